"""Ranks in groups, shares, and what the base of a selection of image rows owns."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import score, select
from jaxtok.core.selector import Selector, evenly, part
from jaxtok.core.types import SPECIAL, Evidence
from tests.methods.vision.select import images, kept, left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest(Selector):
    """The largest first channels; `falling`: in that order."""

    falling: bool = False

    def score(self, params, tokens, evidence):
        return tokens.x[..., 0]

    def order(self, tokens, evidence, mask):
        return jnp.argsort(jnp.argsort(-tokens.x[..., 0], axis=-1), axis=-1).astype(jnp.int32) if self.falling else None


def test_ranks_and_choice_in_groups():
    rng = np.random.default_rng(0)
    value, group, there = rng.integers(0, 5, (3, 20)).astype(np.float32), rng.integers(-1, 4, (3, 20)), rng.uniform(size=(3, 20)) < 0.8
    share = rng.integers(0, 4, (3, 3))
    rank = select.group_ranks(jnp.asarray(value), jnp.asarray(group), jnp.asarray(there))
    mask = select.choose_groups(*map(jnp.asarray, (value, group, there, share)))
    for b in range(3):
        for j in range(20):
            better = [i for i in range(20) if there[b, i] and group[b, i] == group[b, j] and (-value[b, i], i) < (-value[b, j], j)]
            assert rank[b, j] == (len(better) if there[b, j] else 20)
            assert mask[b, j] == (there[b, j] and 0 <= group[b, j] < 3 and len(better) < share[b, min(group[b, j], 2)])


def test_first_picks_and_shares():
    order = jnp.asarray([[3, 0, -1], [2, 4, 1]])
    assert select.first_picks(order, jnp.asarray([5, 2]), 5).tolist() == [
        [True, False, False, True, False],
        [False, False, True, False, True],
    ]
    assert evenly(jnp.asarray([7, 2, 30]), 3, 4).tolist() == [[3, 2, 2], [1, 1, 0], [4, 4, 4]]
    assert part(jnp.asarray([100, 7]), 0.29).tolist() == [29, 2]


def test_softmax_among_some():
    x, among = jnp.asarray([[1.0, 2.0, 99.0], [1.0, 2.0, 3.0]]), jnp.asarray([[True, True, False], [False] * 3])
    np.testing.assert_allclose(score.softmax(x, among), [[1 / (1 + np.e), np.e / (1 + np.e), 0], [0, 0, 0]], rtol=1e-6)


def test_other_rows_always_stay_and_are_not_counted():
    x = np.array([[[9], [1], [5], [3], [0], [4]]], np.float32)
    tokens = images(x, kind=[SPECIAL, 1, 1, 1, SPECIAL, 1])
    assert kept(Largest(capacity=2, special=2), tokens, Evidence()) == [0, 2, 4, 5]
    assert kept(Largest(capacity=2, special=2), tokens, Evidence(), jnp.asarray([3])) == [0, 2, 4]
    assert kept(Largest(capacity=3, special=2, falling=True), tokens, Evidence()) == [0, 4, 2, 5, 3]
    out = left(Largest(capacity=2, special=1), tokens, Evidence())  # one more special row than was said
    assert out.lost.tolist() == [1] and out.x[0, :, 0].tolist() == [9, 0, 4]


def test_crops_share_evenly():
    tokens = images(np.arange(12, dtype=np.float32).reshape(1, 12, 1), 0, segment=np.repeat([0, 1, 2], 4))
    assert kept(Largest(capacity=7, special=0, crops=3), tokens, Evidence()) == [1, 2, 3, 6, 7, 10, 11]


def test_bad_fields():
    for bad in ({"capacity": 0}, {"capacity": 3, "special": -1}, {"capacity": 3, "crops": 0}, {"capacity": 3, "positions": "there"}):
        with pytest.raises(ValueError):
            Largest(**bad)
    with pytest.raises(NotImplementedError, match="score"):
        Selector(capacity=2).score({}, images(np.zeros((1, 2, 1))), Evidence())
