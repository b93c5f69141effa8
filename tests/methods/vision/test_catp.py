"""CATP's first stage against its formulas, brute force and its limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.diverse import facility
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import CATPSelect
from jaxtok.models import vit
from tests.methods.vision.select import images, kept

small = {"catp.select": lambda n: CATPSelect(capacity=n)}


def parts(x, text):
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    return (1 + unit(x) @ unit(x).T) / 2, (1 + unit(x) @ unit(text)) / 2


def value(like, fits, rows, weight):
    rows = list(rows)
    return like[rows].max(0).sum() + weight * fits[rows].sum()


def reference(x, text, k, weight):
    """Picks in order; the whole objective anew for each candidate."""
    like, fits = parts(x.astype(np.float64), text.astype(np.float64))
    picked = []
    while len(picked) < k:
        left = [j for j in range(len(x)) if j not in picked]
        picked.append(max(left, key=lambda j: (round(value(like, fits, [*picked, j], weight), 9), -j)))
    return picked


def world(seed, n=14):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, n, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)


def test_by_hand():
    """Rows at 0, 0, 90, 200 degrees. Alone, one of the pair covers most; text at 200 degrees draws the last with a large weight."""
    angle = np.deg2rad([0, 5, 90, 200])
    x = np.stack([np.cos(angle), np.sin(angle)], -1)[None].astype(np.float32)
    assert kept(CATPSelect(capacity=1, special=0, weight=0.0), images(x, 0), Evidence(text=jnp.asarray(x[:, 3]))) == [1]
    assert kept(CATPSelect(capacity=1, special=0, weight=9.0), images(x, 0), Evidence(text=jnp.asarray(x[:, 3]))) == [3]


@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_reference(weight):
    x, text = world(3)
    for i in range(2):
        want = reference(x[i], text[i], 6, weight)
        assert kept(CATPSelect(capacity=6, special=0, weight=weight), images(x, 0), Evidence(text=text), row=i) == sorted(want)
        few = kept(CATPSelect(capacity=6, special=0, weight=weight), images(x, 0), Evidence(text=text), jnp.asarray([3, 2]), i)
        assert few == sorted(want[: (3, 2)[i]])


def test_gains_never_grow_and_greedy_is_near_the_best():
    x, text = world(5, 10)
    like, fits = parts(x[0].astype(np.float64), text[0].astype(np.float64))
    order = facility(jnp.asarray(like[None], jnp.float32), jnp.ones((1, 10), bool), 10, jnp.zeros((1, 10)))[0].tolist()
    assert sorted(order) == list(range(10))
    gains = np.diff([0] + [value(like, fits, order[: k + 1], 0) for k in range(10)])
    assert (np.diff(gains) <= 1e-6).all()
    top = max(value(like, fits, rows, 0) for rows in itertools.combinations(range(10), 3))
    assert value(like, fits, order[:3], 0) >= (1 - 1 / np.e) * top


def test_all_rows_is_the_identity():
    x, text = world(6)
    assert kept(CATPSelect(capacity=14, special=0), images(x, 0), Evidence(text=text)) == list(range(14))


def test_a_missing_text_is_refused():
    x, _ = world(7)
    found = vit.Encoded(images(x, 0), Evidence())
    with pytest.raises(ValueError, match="text="):
        vit.select({}, found, Recipe(select=CATPSelect(capacity=4, special=0)))
