"""Zero-TPrune against its formulas and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.score import pagerank
from jaxtok.core.types import Evidence
from jaxtok.methods import ZeroTPrune
from tests.methods.vision.toyrows import normal, rows, unit

small = lambda n: ZeroTPrune(remove=16 - n, similar=2)


@functools.partial(jax.jit, static_argnums=0)
def planned(method, tokens, probs, metric, keep=None):
    return method.plan({}, method.start({}, tokens), tokens, Evidence(probs=probs, keys=metric[:, None]), keep)[1]


def attention(seed, b, h, n, sharp=2.0):
    e = np.exp(sharp * normal(seed, b, h, n, n))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def ranked(probs, among, times):
    """Power iteration in float64 -> [h n]."""
    out = []
    for a in probs.astype(np.float64):
        a = a * among[None] * among[:, None]
        a = np.divide(a, a.sum(1, keepdims=True), where=a.sum(1, keepdims=True) > 0, out=np.zeros_like(a))
        s = among / among.sum()
        for _ in range(times):
            s = a.T @ s
        out.append(s)
    return np.array(out)


def importance(probs, among, times, low, high):
    s = ranked(probs, among, times)
    keep = [low <= np.var(h[among > 0] * among.sum()) <= high for h in s]
    s = s[keep] if any(keep) else s
    return np.sqrt((s**2).mean(0))


def reference(probs, metric, special, remove, similar, times, low, high):
    """-> indices that stay."""
    n, u = len(metric), unit(metric)
    live, free = np.ones(n), list(range(special, n))
    s = importance(probs, live, times, low, high)
    order = sorted(free, key=lambda i: -s[i])
    better, worse = order[: len(free) - len(free) // 2], order[len(free) - len(free) // 2 :]
    gone = sorted(worse, key=lambda i: -max(u[i] @ u[j] for j in better))[: min(similar, remove)]
    left = live.copy()
    left[gone] = 0
    s = importance(probs, left, times, low, high)
    rest = sorted((i for i in free if i not in gone), key=lambda i: -s[i])
    return sorted(list(range(special)) + rest[: len(free) - remove])


@pytest.mark.parametrize(
    "special, remove, similar, times, bounds", [(1, 6, 3, 5, (0.01, 0.7)), (0, 5, 9, 1, (0.05, 0.2)), (1, 4, 0, 30, (5.0, 6.0))]
)
def test_reference(special, remove, similar, times, bounds):
    n = 15
    probs, metric = attention(1, 3, 4, n), normal(2, 3, n, 5)
    method = ZeroTPrune(remove=remove, similar=similar, iterations=times, lowest=bounds[0], highest=bounds[1], special=special)
    plan = planned(method, rows(normal(3, 3, n, 4), special), jnp.asarray(probs), jnp.asarray(metric))
    for i in range(3):
        assert np.asarray(plan.index[i]).tolist() == reference(probs[i], metric[i], special, remove, similar, times, *bounds)


def test_pagerank():
    """Uniform attention: uniform; sums to 1; many rounds: the leading left eigenvector; one round: the mean attention received."""
    live = jnp.ones((2, 9), bool)
    np.testing.assert_allclose(pagerank(jnp.full((2, 1, 9, 9), 1 / 9), live, 7), 1 / 9, atol=1e-6)
    probs = attention(4, 2, 3, 9)
    for times in (1, 4, 200):
        np.testing.assert_allclose(jnp.sum(pagerank(jnp.asarray(probs), live, times), -1), 1.0, atol=1e-5)
    np.testing.assert_allclose(pagerank(jnp.asarray(probs), live, 1), probs.mean(2), atol=1e-6)
    found = np.asarray(pagerank(jnp.asarray(probs), live, 200))
    for a, s in zip(probs.reshape(-1, 9, 9), found.reshape(-1, 9), strict=True):
        value, vector = np.linalg.eig(a.T.astype(np.float64))
        lead = np.real(vector[:, np.argmax(np.real(value))])
        np.testing.assert_allclose(s, lead / lead.sum(), atol=1e-5)
    short = np.arange(9)[None] >= 3
    found = np.asarray(pagerank(jnp.asarray(probs), jnp.asarray(np.broadcast_to(short, (2, 9))), 5))
    np.testing.assert_allclose(found[0], ranked(probs[0], short[0].astype(float), 5), atol=1e-6)


def test_duplicates_of_important_rows_go_first():
    """By hand: of four rows the less important twin of an important one goes."""
    probs = np.tile(np.array([0.4, 0.3, 0.1, 0.2], np.float32), (1, 1, 4, 1))
    metric = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0.1]]], np.float32)
    plan = planned(ZeroTPrune(remove=1, similar=1, special=0), rows(normal(1, 1, 4, 2), 0), jnp.asarray(probs), jnp.asarray(metric))
    assert np.asarray(plan.index)[0].tolist() == [0, 1, 2]
    plan = planned(ZeroTPrune(remove=1, similar=0, special=0), rows(normal(1, 1, 4, 2), 0), jnp.asarray(probs), jnp.asarray(metric))
    assert np.asarray(plan.index)[0].tolist() == [0, 1, 3]


def test_iterations_follow_the_depth():
    found = [ZeroTPrune(remove=3).layer(i, 12).iterations for i in range(12)]
    assert found == [40] * 3 + [8] * 6 + [1] * 3


def test_bad_input():
    for bad in ({"remove": -1}, {"remove": 1, "lowest": 2.0}, {"remove": 1, "iterations": 0}, {"remove": 1, "similar": -1}):
        with pytest.raises(ValueError):
            ZeroTPrune(**bad)
