"""Turbo against its formulas, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import ToMe, Turbo
from tests.methods.golden import cases
from tests.methods.vision.toyrows import grouped, normal, rows, unit

small = lambda n: Turbo(remove=16 - n, threshold=0)


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens, metric, attention, t=0.0, keep=None):
    state = method.start({}, tokens)
    state = state._replace(rest=jnp.asarray(t, jnp.float32)) if isinstance(method, Turbo) else state
    state, plan = method.plan({}, state, tokens, Evidence(keys=metric[:, None], cls=attention[:, None]), keep)
    return state, reduce(plan, tokens)


def reference(metric, attention, t, remove, alpha, beta, gamma, special=1):
    """Loops -> for each row its place in the output."""
    n, u = len(metric), unit(metric)
    a, b = list(range(0, n, 2)), list(range(1, n, 2))
    best = {}
    for i in a:
        score = [u[i] @ u[j] - beta ** abs(gamma - t) * alpha * 30 * attention[i] if j >= special else -np.inf for j in b]
        best[i] = (max(score) if i >= special else -np.inf, b[int(np.argmax(score))])
    gone = sorted((i for i in a if i >= special), key=lambda i: -best[i][0])[:remove]
    order = [i for i in a if i not in gone] + b
    return np.array([order.index(best[i][1] if i in gone else i) for i in range(n)])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("t, beta, gamma", [(0, 1.0, 0.0), (3, 0.8, 1.0)])
def test_reference(t, beta, gamma):
    metric, x, attention = normal(1, 2, 13, 5), normal(2, 2, 13, 4), softmax(normal(3, 2, 13))
    size = np.random.default_rng(4).integers(1, 5, (2, 13))
    method = Turbo(remove=4, alpha=0.5, beta=beta, gamma=gamma, threshold=10)
    state, out = merged(method, rows(x, size=size), jnp.asarray(metric), jnp.asarray(attention), float(t))
    assert float(state.rest) == t + 1
    for i in range(2):
        source = reference(metric[i], attention[i], t, 4, 0.5, beta, gamma)
        want, total = grouped(x[i], size[i], source)
        assert (np.asarray(out.source[i]) == source).all()
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], total)


def test_without_the_attention_it_is_tome():
    metric, x, attention = normal(5, 2, 13, 5), normal(6, 2, 13, 4), softmax(normal(7, 2, 13))
    found, want = (
        merged(m, rows(x), jnp.asarray(metric), jnp.asarray(attention))[1]
        for m in (Turbo(remove=5, alpha=0.0, threshold=0), ToMe(remove=5))
    )
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_what_is_attended_to_stays():
    """All rows alike: the rows that the class row attends to least go."""
    attention = np.full((1, 11), 0.05, np.float32)
    attention[0, [2, 6, 8]] = [0.2, 0.1, 0.3]
    _, out = merged(Turbo(remove=2, threshold=0), rows(np.arange(11.0).reshape(1, 11, 1)), jnp.ones((1, 11, 3)), jnp.asarray(attention))
    assert np.asarray(out.pos)[0].tolist() == [0, 2, 6, 8, 1, 3, 5, 7, 9]


def test_few_rows_are_left_alone():
    tokens = rows(normal(8, 1, 12, 4))
    _, out = merged(Turbo(remove=4, threshold=13), tokens, jnp.asarray(normal(9, 1, 12, 4)), jnp.ones((1, 12)) / 12)
    np.testing.assert_array_equal(out.x, tokens.x)
    assert Turbo(remove=4, threshold=13).count(12, 11) == 12 and Turbo(remove=4, threshold=12).count(12, 11) == 8
    _, out = merged(Turbo(remove=4, threshold=13), tokens, jnp.asarray(normal(9, 1, 12, 4)), jnp.ones((1, 12)) / 12, 0.0, jnp.asarray([5]))
    assert (np.asarray(out.pos) >= 0).sum() == 12


def test_official_outputs(data):
    """Merged rows and sizes, from unit and from given sizes."""
    for case in cases(data, "turbo"):
        if "metric" not in case:  # whole blocks, not this function
            continue
        special, x = int(case["class_token"]), case["x"]
        method = Turbo(
            remove=int(case["r"]),
            alpha=float(case["alpha"]),
            beta=float(case["beta"]),
            gamma=float(case["gamma"]),
            threshold=int(case["r_threshold"]),
            special=special,
        )
        for size, name in ((np.ones(x.shape[:2]), "unit"), (case["size_in"][..., 0], "with")):
            tokens = rows(x, special, size=size)
            _, out = merged(method, tokens, jnp.asarray(case["metric"]), jnp.asarray(case["cls_attn"]), float(case["num_layer"]))
            want = case["merged_unit_size" if name == "unit" else "merged_with_size"]
            total = case["size_out_unit" if name == "unit" else "size_out_with_size"][..., 0]
            assert out.x.shape == want.shape
            np.testing.assert_allclose(out.x, want, atol=2e-5)
            np.testing.assert_allclose(out.size, total)


def test_bad_input():
    for bad in ({"remove": -1}, {"remove": 1, "threshold": -1}):
        with pytest.raises(ValueError):
            Turbo(**bad)
