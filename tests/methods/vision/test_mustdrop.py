"""MustDrop's part in the encoder against its formulas, the official outputs and its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import MustDropVit
from jaxtok.methods.vision.mustdrop import key_set
from tests.methods.golden import cases
from tests.methods.vision.toyrows import grouped, normal, rows, unit

small = {
    "mustdrop.vit": lambda n: MustDropVit(window=2, most=(16 - n) // 3),
    "mustdrop.vit:threshold": lambda n: MustDropVit(window=2, threshold=2.0 if n == 16 else 0.2),
}


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence())
    return reduce(plan, tokens)


def reference(x, side, window, chosen, special=1):
    """`chosen`(similarities by window) -> the windows that merge; -> for each row its place in the output."""
    u, members = unit(x), {}
    for j in range(side * side):
        members.setdefault((j // side // window, j % side // window), []).append(special + j)
    members = {w: m for w, m in members.items() if len(m) == window**2}
    like = {w: np.mean([u[i] @ u[j] for i in m for j in m if i != j]) for w, m in members.items()}
    merge = sorted(chosen(like), key=lambda w: -like[w])
    inside = {i: w for w in merge for i in members[w]}
    order = list(range(special)) + merge + [i for i in range(special, len(x)) if i not in inside]
    return np.array([order.index(inside.get(i, i)) for i in range(len(x))])


@pytest.mark.parametrize("side, window", [(6, 3), (6, 2), (7, 3)])
def test_reference(side, window):
    x = 0.7 * normal(1, 2, 1 + side**2, 4) + normal(2, 1, 1, 4)
    size = np.random.default_rng(3).integers(1, 4, x.shape[:2])
    for method, chosen in (
        (MustDropVit(threshold=0.6, window=window), lambda like: [w for w in like if like[w] >= 0.6]),
        (MustDropVit(most=2, window=window), lambda like: sorted(like, key=lambda w: -like[w])[:2]),
    ):
        out = merged(method, rows(x, size=size, grid=(side, side)))
        assert out.x.shape[1] == method.count(1 + side**2, side**2)
        for i in range(2):
            source = reference(x[i], side, window, chosen)
            want, total = grouped(x[i], size[i], source)
            dead = out.x.shape[1] - len(want)
            assert (np.asarray(out.source[i]) - dead == source).all() and (np.asarray(out.pos[i])[:dead] == -1).all()
            np.testing.assert_allclose(out.x[i][dead:], want, atol=1e-5)
            np.testing.assert_allclose(out.size[i][dead:], total)


def test_limits():
    x = normal(4, 1, 17, 3)
    np.testing.assert_array_equal(merged(MustDropVit(threshold=1.5, window=2), rows(x, grid=(4, 4))).x, x)
    out = merged(MustDropVit(threshold=0.9, window=2), rows(np.ones((1, 17, 3)), grid=(4, 4)))
    assert np.asarray(out.size)[0][-5:].tolist() == [1, 4, 4, 4, 4] and (np.asarray(out.pos) >= 0).sum() == 5


def test_official_outputs(data):
    """Merged windows by falling similarity, the rest in raster order; in a batch the official code merges the smallest number of all."""
    for case in cases(data, "mustdrop_vit"):
        x, side, window = case["x_with_cls"], int(case["grid_side"]), int(case["window"])
        number = int(case["n_merged_windows"])
        tokens = rows(x, grid=(side, side))
        threshold = merged(MustDropVit(threshold=float(case["threshold"]), window=window), tokens)
        alike = (np.asarray(threshold.size) == window**2).sum(1)
        assert alike.min() == number
        out = merged(MustDropVit(most=number, window=window), tokens)
        np.testing.assert_allclose(out.x, case["merged_with_cls"], atol=2e-5)
        np.testing.assert_allclose(out.size, case["sizes"][..., 0])
        if (alike == number).all():
            np.testing.assert_allclose(np.asarray(threshold.x)[:, -out.x.shape[1] :], out.x, atol=1e-6)
        if "layer23_cls_attn" in case:
            seen = case["layer23_cls_attn"]
            kept = key_set(jnp.asarray(seen), rows(np.zeros((*seen.shape[::2], 1))), float(case["key_rate"]))
            want = case["key_set_unsorted"]
            for i in range(len(want)):
                found = np.flatnonzero(np.asarray(kept[i]))
                assert set(found - 1) == set(want[i].tolist())  # official indices start behind the class row


def test_key_set():
    seen = normal(5, 2, 3, 37) ** 2
    kept = np.asarray(key_set(jnp.asarray(seen), rows(np.zeros((2, 37, 1)))))
    for i in range(2):
        assert set(np.flatnonzero(kept[i])) == set((1 + np.argsort(-seen[i].mean(0)[1:]))[: math.ceil(0.08 * 36)].tolist())
    assert key_set(jnp.ones((1, 1, 577)), rows(np.zeros((1, 577, 1)))).sum() == 47


def test_bad_input():
    for bad in ({"window": 1}, {"most": -1}):
        with pytest.raises(ValueError):
            MustDropVit(**bad)
