"""Budgets over the depth of a decoder against the numbers that the literature quotes."""

import dataclasses

import pytest

from jaxtok.core import planner
from jaxtok.core.recipe import Recipe
from jaxtok.methods import FasterVLM, FastV
from jaxtok.models.config import Config

LLAMA = Config(vocab=8, width=8, layers=32, heads=1, kv_heads=1, head_dim=8, hidden=8)


def test_rows_by_hand():
    assert planner.counts(8, ((1, 4), (3, 1)), 5) == (8, 4, 4, 1, 1)
    assert planner.conventions(8, ((1, 4), (3, 1)), 5) == (8, 18 / 5, 1)
    assert planner.conventions(8, (), 5) == (8, 8.0, 8)
    assert planner.conventions(8, ((0, 3),), 2) == (8, 3.0, 3)


@pytest.mark.parametrize("place, kept", [(2, (166, 98, 30)), (3, (152, 82, 11))])
def test_fastv(place, kept):
    """What FastV must keep for an average of 192, 128, 64 of 576 rows."""
    for target, count in zip((192, 128, 64), kept, strict=True):
        schedule = planner.fit(target, entry=576, at=(place,), layers=32)
        assert schedule == (576, ((place, count),))
        assert abs(planner.conventions(*schedule, 32).average - target) <= 0.5


def test_pyramiddrop():
    """Places 8, 16, 24: halves are 270 rows on average, 192 is a ratio of .253, 128 and 64 are out of reach."""
    at = (8, 16, 24)
    assert planner.geometric(576, at, 0.5) == (576, ((8, 288), (16, 144), (24, 72)))
    assert planner.conventions(576, planner.geometric(576, at, 0.5).stages, 32) == (576, 270.0, 72)
    assert round(planner.decay(192, entry=576, at=at, layers=32), 3) == 0.253
    assert planner.fit(192, entry=576, at=at, layers=32).stages == ((8, 146), (16, 37), (24, 9))
    assert planner.fit(144, entry=576, at=at, layers=32).stages == ((8, 0), (16, 0), (24, 0))
    for target in (128, 64):
        with pytest.raises(ValueError, match=r"out of reach: 576 rows enter .* the least is 144, the most 576"):
            planner.fit(target, entry=576, at=at, layers=32)


def test_published_schedules():
    """SparseVLM's T = sum of (layers between two places) * (their rows) / L, TransPrune's defaults, VisionDrop's example."""
    stages = ((2, 300), (6, 200), (15, 110))
    assert planner.conventions(576, stages, 32).average == (2 * 576 + 4 * 300 + 9 * 200 + 17 * 110) / 32
    assert planner.conventions(576, ((7, 504), (9, 360), (12, 72)), 32) == (576, 236.25, 72)
    assert planner.conventions(48, ((8, 35), (16, 26), (24, 19)), 32) == (48, 32.0, 19)


def test_forth_and_back():
    """The outcome of each convention, sought with what enters or with the ratio given, is its target up to rounding."""
    for at in ((2,), (8, 16, 24), (1, 5)):
        for by in ("average", "end"):
            got = planner.conventions(*planner.fit(200, entry=576, at=at, layers=32, by=by), 32)
            assert abs(getattr(got, by) - 200) <= 0.6 and got.enter == 576
        for by in ("enter", "average", "end"):
            got = planner.conventions(*planner.fit(90, ratio=0.5, at=at, layers=32, by=by), 32)
            assert abs(getattr(got, by) - 90) <= 1
    assert planner.fit(40, ratio=1, at=(), layers=4) == (40, ())


def test_refused():
    fit = lambda target=64, **given: planner.fit(target, **{"at": (2,), "layers": 32, "entry": 576} | given)
    for match, given in {
        r"exactly one; got entry=576, ratio=0.5": dict(ratio=0.5),
        "by='enter' says how many rows enter": dict(by="enter"),
        "by must be one of enter, average, end": dict(by="mean"),
        r"places \(3, 3\) must ascend and lie below 32 layers": dict(at=(3, 3)),
        r"places \(32,\) must": dict(at=(32,)),
        "the least is 36, the most 576": dict(target=35),
        "the most 576": dict(target=577),
        "with 100 rows that enter there are 53.125 at most": dict(entry=None, ratio=0.5, most=100),
        "leaves nothing by the convention 'end'": dict(entry=None, ratio=0, by="end", target=0),
        r"got at=\(\)": dict(at=()),
    }.items():
        with pytest.raises(ValueError, match=match):
            fit(**given)
    with pytest.raises(ValueError, match="9 rows from layer 3 on, but 4 come to it"):
        planner.counts(8, ((1, 4), (3, 9)), 5)


def test_a_recipe_in_three_conventions():
    fastv = lambda k, images, capacity: (k, FastV(capacity=capacity, images=images))
    assert planner.of_recipe(Recipe(), LLAMA, 576) == (576, 576.0, 576)
    assert planner.of_recipe(Recipe(layers=(fastv(2, 576, 144),)), LLAMA, 576) == (576, 171.0, 144)
    both = Recipe(select=FasterVLM(capacity=128), layers=(fastv(16, 64, 32), fastv(8, 128, 64)))
    assert planner.of_recipe(both, LLAMA, 576) == (128, (8 * 128 + 8 * 64 + 16 * 32) / 32, 32)
    assert planner.of_recipe(both, dataclasses.replace(LLAMA, layers=20), 576).average == (8 * 128 + 8 * 64 + 4 * 32) / 20
    assert planner.of_recipe(Recipe(select=FasterVLM(capacity=700)), LLAMA, 576).enter == 576
    with pytest.raises(ValueError, match="told of images=576 rows, but 100 rows come"):
        planner.of_recipe(Recipe(layers=(fastv(2, 576, 144),)), LLAMA, 100)
