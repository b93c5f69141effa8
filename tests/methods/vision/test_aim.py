"""AIM's merging against its formulas, the official outputs and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import AIMSelect
from tests.methods.golden import cases
from tests.methods.vision.select import images, left

small = {"aim.select": lambda n: AIMSelect(capacity=n)}


def one_round(x, remove):
    """Rows after a round, in the official order."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max((unit[i] @ unit[j], -j) for j in b) for i in a}
    order = sorted(a, key=lambda i: (-best[i][0], i))
    gone = order[:remove]
    groups = {j: [j] + [i for i in gone if -best[i][1] == j] for j in b}
    return np.array([x[i] for i in order[remove:]] + [x[groups[j]].mean(0) for j in b])


def reference(x, capacity):
    while len(x) > capacity:
        x = one_round(x, min(len(x) - capacity, len(x) // 2))
    return x


def test_by_hand():
    """Rows 0 and 3 are alike: they become their mean; row 2 stands before what row 1 is."""
    x = np.array([[[1, 0], [0, 2], [-1, -0.5], [3, 0]]], np.float32)
    out = left(AIMSelect(capacity=3, special=0), images(x, 0), Evidence())
    np.testing.assert_allclose(out.x[0], [[-1, -0.5], [0, 2], [2, 0]])
    assert out.size[0].tolist() == [1, 1, 2] and out.source[0].tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("n, capacity", [(16, 12), (16, 4), (17, 5), (20, 3)])
def test_reference(n, capacity):
    rng = np.random.default_rng(n + capacity)
    x = rng.normal(size=(2, n, 6)).astype(np.float32)
    out = left(AIMSelect(capacity=capacity, special=0), images(x, 0), Evidence())
    traced = left(AIMSelect(capacity=n, special=0), images(x, 0), Evidence(), jnp.asarray([capacity, n]))
    np.testing.assert_allclose(out.x[0], reference(x[0].astype(np.float64), capacity), atol=1e-5)
    np.testing.assert_allclose(out.x[1], reference(x[1].astype(np.float64), capacity), atol=1e-5)
    np.testing.assert_allclose(traced.x[0, -capacity:], out.x[0], atol=1e-6)
    assert np.asarray(out.size).sum(1).tolist() == [n, n]


def test_official_outputs(data):
    for case in cases(data, "aim_merge"):
        x = case["features"]
        n = x.shape[1]
        one, two = n - n // 2, n - n // 2 - min(n // 4, (n - n // 2) // 2)
        for name, capacity in (("after_round1_r_N_div_2", one), ("after_round2_r_N_div_4", two), ("single_round_r_N_div_5", n - n // 5)):
            out = left(AIMSelect(capacity=capacity, special=0), images(x, 0), Evidence())
            assert out.x.shape == case[name].shape
            np.testing.assert_allclose(out.x, case[name], atol=1e-5)
