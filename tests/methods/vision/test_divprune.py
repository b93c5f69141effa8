"""DivPrune against its formulas, brute force, the official outputs and its limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.diverse import first_far, max_min
from jaxtok.core.types import Evidence
from jaxtok.methods import DivPrune
from tests.methods.golden import cases
from tests.methods.vision.select import images, kept

small = lambda n: DivPrune(capacity=n)


def distances(x):
    u = x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
    return 1 - u @ u.T


def reference(x, k):
    """Picks in order."""
    d = distances(x)
    picked = [int(np.argmax(np.sort(d, 0)[1]))]
    while len(picked) < k:
        value = d[picked].min(0)
        value[picked] = -np.inf
        picked.append(int(np.argmax(value)))
    return picked


def test_by_hand():
    """Angles 0, 10, 90, 183 degrees: the last is furthest from its nearest (93 degrees); then 0, 177 from it; then 90."""
    angle = np.deg2rad([0, 10, 90, 183])
    x = np.stack([np.cos(angle), np.sin(angle)], -1)[None]
    assert kept(DivPrune(capacity=1, special=0), images(x, 0), Evidence()) == [3]
    assert kept(DivPrune(capacity=2, special=0), images(x, 0), Evidence()) == [0, 3]
    assert kept(DivPrune(capacity=3, special=0), images(x, 0), Evidence()) == [0, 2, 3]


@pytest.mark.parametrize("n, k", [(9, 4), (24, 11)])
def test_reference_and_scale(n, k):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(2, n, 6))
    scaled = x * rng.uniform(0.5, 3, (2, n, 1))
    for i in range(2):
        want = sorted(reference(x[i], k))
        assert kept(DivPrune(capacity=k, special=0), images(x, 0), Evidence(), row=i) == want
        assert kept(DivPrune(capacity=k, special=0), images(scaled, 0), Evidence(), row=i) == want
        fewer = kept(DivPrune(capacity=k, special=0), images(x, 0), Evidence(), jnp.asarray([k - 2, 1]), i)
        assert fewer == sorted(reference(x[i], (k - 2, 1)[i]))


def test_all_rows_are_all_rows():
    x = np.random.default_rng(0).normal(size=(1, 10, 4))
    assert kept(DivPrune(capacity=10, special=0), images(x, 0), Evidence()) == list(range(10))


def test_at_least_half_of_the_best_diversity():
    """Greedy max-min on a metric is within a factor of two of the best subset (angles are one; cosines keep their order)."""
    rng = np.random.default_rng(5)
    for _ in range(5):
        x = rng.normal(size=(1, 10, 3))
        d = np.arccos(np.clip(1 - distances(x[0]), -1, 1))
        spread = lambda rows, d=d: min(d[i, j] for i, j in itertools.combinations(rows, 2))
        top = max(map(spread, itertools.combinations(range(10), 4)))
        assert spread(kept(DivPrune(capacity=4, special=0), images(x, 0), Evidence())) >= top / 2 - 1e-6


def test_official_outputs(data):
    for case in cases(data, "divprune"):
        x = case["features"][None]
        k = len(case["kept_sorted"])
        assert kept(DivPrune(capacity=k, special=0), images(x, 0), Evidence()) == case["kept_sorted"].tolist()
        d = jnp.asarray(distances(x[0])[None], jnp.float32)
        free = jnp.ones(x.shape[:2], bool)
        assert max_min(d, free, k, first_far(d, free))[0].tolist() == case["selected_in_order"].tolist()
        if "cosine_distance" in case:
            np.testing.assert_allclose(d[0], case["cosine_distance"], atol=1e-5)
