"""ToDRE's first stage against its formulas and brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import ToDRESelect
from tests.methods.vision.select import images, kept

small = {
    "todre.select": lambda n: ToDRESelect(capacity=n),
    "todre.select:random": lambda n: ToDRESelect(capacity=n, pivot="random"),
}


def cosines(x):
    u = x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
    return u @ u.T


def reference(x, cls, k):
    """Picks in order, the sum taken anew at each pick."""
    like, picked = cosines(x), [int(np.argmax(cls))]
    while len(picked) < k:
        left = [v for v in range(len(x)) if v not in picked]
        picked.append(min(left, key=lambda v: sum(like[v, c] for c in picked)))
    return picked


def world(seed, n=14):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, n, 5)), rng.uniform(size=(2, 3, n)).astype(np.float32)


def test_by_hand():
    """Pivot 0 degrees; the least like it is 180; of 90 (sum 0) and 20 (sum 0) the older."""
    angle = np.deg2rad([0, 20, 90, 180])
    x = np.stack([np.cos(angle), np.sin(angle)], -1)[None].round(6)
    cls = np.array([[[0.7, 0.1, 0.1, 0.1]]], np.float32)
    assert kept(ToDRESelect(capacity=2, special=0), images(x, 0), Evidence(cls=cls)) == [0, 3]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_sum_against_brute_force(seed):
    x, cls = world(seed)
    for i in range(2):
        want = reference(x[i], cls[i].mean(0), 6)
        assert kept(ToDRESelect(capacity=6, special=0), images(x, 0), Evidence(cls=cls), row=i) == sorted(want)
        found = kept(ToDRESelect(capacity=6, special=0), images(x, 0), Evidence(cls=cls), jnp.asarray([4, 1]), i)
        assert found == sorted(want[: (4, 1)[i]])


def test_the_pivot_is_the_thumbnails():
    x, cls = world(4)
    cls[0, :, 10] = 9.0  # a crop's row
    segment = np.repeat([0, 1], 7)
    tokens = images(x, 0, segment=segment)
    found = kept(ToDRESelect(capacity=1, special=0, crops=2), tokens, Evidence(cls=cls))
    assert found == [int(np.argmax(cls[0].mean(0)[:7]))]
    assert kept(ToDRESelect(capacity=1, special=0), tokens, Evidence(cls=cls)) == [10]


def test_without_a_class_row_the_pivot_is_drawn():
    x, _ = world(5)
    assert len(kept(ToDRESelect(capacity=4, special=0, pivot="random"), images(x, 0), Evidence())) == 4
