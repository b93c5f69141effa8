"""VisionZip against its formulas and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import FasterVLM, VisionZip
from tests.methods.vision.select import best, images, kept, left

small = lambda n: VisionZip(capacity=n, contextual=3)


def reference(x, cls, keys, dominant, contextual):
    """(rows [d + 1 + c], sizes) of x [1+n c] with the class row first; loops."""
    score, metric = cls.sum(0)[1:], keys.mean(0)
    top = [0] + [1 + j for j in best(score, dominant)]
    rest = [j for j in range(1, len(x)) if j not in top]
    targets = rest[:: max(len(rest) // contextual, 1)][:contextual] if contextual else []
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    members = {t: [] for t in targets}
    for j in rest:
        if targets and j not in targets:
            members[max(targets, key=lambda t: (unit[j] @ unit[t], -t))].append(j)
    merged = [x[t] + (x[members[t]].mean(0) if members[t] else 0) for t in targets]
    return np.array([*x[top], *merged]), np.array([1.0] * len(top) + [1.0 + len(members[t]) for t in targets])


def world(seed, n=20):
    rng = np.random.default_rng(seed)
    cls = np.exp(rng.normal(size=(2, 3, n))).astype(np.float32)
    return rng.normal(size=(2, n, 5)).astype(np.float32), cls, rng.normal(size=(2, 3, n, 4)).astype(np.float32)


def test_by_hand():
    """Row 3 is dominant; of 1, 2, 4, 5 the first is the target: all others join it, 1 + mean(2, 4, 5)."""
    x = np.arange(6, dtype=np.float32).reshape(1, 6, 1)
    cls = np.array([[[9, 1, 1, 5, 1, 1]]], np.float32)
    out = left(VisionZip(capacity=2, contextual=1), images(x), Evidence(cls=cls, keys=jnp.ones((1, 1, 6, 2))))
    np.testing.assert_allclose(out.x[0, :, 0], [0, 3, 1 + 11 / 3], rtol=1e-6)
    assert out.size[0].tolist() == [1, 1, 4] and out.source[0].tolist() == [0, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("dominant, contextual", [(6, 4), (3, 7), (8, 1)])
def test_reference(dominant, contextual):
    x, cls, keys = world(dominant)
    method = VisionZip(capacity=dominant + contextual, contextual=contextual)
    out = left(method, images(x), Evidence(cls=cls, keys=keys))
    traced = left(
        VisionZip(capacity=15, contextual=contextual), images(x), Evidence(cls=cls, keys=keys), jnp.asarray([1 + method.capacity] * 2)
    )
    for i in range(2):
        want, size = reference(x[i], cls[i], keys[i], dominant, contextual)
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], size)
        np.testing.assert_allclose(traced.x[i, -len(want) :], want, atol=1e-5)


def test_without_contextual_rows_it_is_a_selection():
    x, cls, keys = world(1)
    want = kept(FasterVLM(capacity=6), images(x), Evidence(cls=cls))
    assert VisionZip.with_cls and not FasterVLM.with_cls
    out = left(VisionZip(capacity=6, contextual=0), images(x), Evidence(cls=cls, keys=keys))
    np.testing.assert_allclose(out.x[0], x[0, want])
