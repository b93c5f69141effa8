import numpy as np
import pytest

from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import KeyDiff
from tests.methods import toys

small = lambda capacity: KeyDiff(capacity=capacity)


def reference(k, pos):
    """-cos(k_j, mean of k_i/|k_i|), one key after another."""
    out = np.zeros(pos.shape)
    for b, g in np.ndindex(*pos.shape[:2]):
        live = [j for j in range(pos.shape[2]) if pos[b, g, j] >= 0]
        anchor = sum(k[b, g, j] / np.linalg.norm(k[b, g, j]) for j in live) / len(live)
        for j in live:
            out[b, g, j] = -np.dot(k[b, g, j], anchor) / np.linalg.norm(k[b, g, j]) / np.linalg.norm(anchor)
    return out


def test_by_hand():
    """Unit keys x, x, x, y: the anchor is (3, 1)/4, so cos = 3/sqrt(10) for x and 1/sqrt(10) for y. Lengths play no part."""
    k = np.array([[1, 0], [7, 0], [0.1, 0], [0, 3]])[None, None]
    kv = toys.cache(k, k)
    np.testing.assert_allclose(toys.scorer(KeyDiff(capacity=2))(kv, Evidence())[0, 0], -np.array([3, 3, 3, 1]) / 10**0.5, rtol=1e-6)
    assert toys.kept(toys.run(KeyDiff(capacity=2), kv, Evidence())) == [[{0, 3}]]  # of equal ones the oldest
    assert toys.kept(toys.run(KeyDiff(capacity=2, protect=Protect(recent=2)), kv, Evidence())) == [[{2, 3}]]


def test_checks_of_a_scorer():
    toys.check_scorer(small, lambda q, kv: Evidence(), protected=lambda p, seen: False)
    protect = lambda capacity: KeyDiff(capacity=capacity, protect=Protect(sinks=2, recent=3))
    toys.check_scorer(protect, lambda q, kv: Evidence(), protected=lambda p, seen: p < 2 or p >= seen - 3)
    with pytest.raises(ValueError, match="no room"):
        KeyDiff(capacity=4, protect=Protect(sinks=2, recent=3))


def test_equals_numpy():
    _, kv = toys.problem(1, junk=1e4)
    want = reference(np.asarray(kv.k, np.float64), np.asarray(kv.pos))
    got = np.where(np.asarray(kv.pos) >= 0, toys.scorer(KeyDiff(capacity=9))(kv, Evidence()), 0)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert toys.kept(toys.run(KeyDiff(capacity=9), kv, Evidence())) == toys.top(want, kv.pos, 9)


def test_a_zero_key_scores_zero():
    k = np.array([[1, 0], [0, 0], [1, 0]])[None, None]
    score = toys.scorer(KeyDiff(capacity=2))(toys.cache(k, k), Evidence())
    np.testing.assert_allclose(score[0, 0], [-1, 0, -1], atol=1e-6)
    assert np.isfinite(toys.scorer(KeyDiff(capacity=2))(toys.cache(0 * k, k), Evidence())).all()
