"""How many image rows go through each layer of a decoder: a budget in the three conventions of the literature, forth and back."""

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

from jaxtok.core import check
from jaxtok.core.recipe import Recipe

CONVENTIONS = ("enter", "average", "end")


class Schedule(NamedTuple):
    """`entry` rows enter the decoder; for each (layer, count) `count` rows go through 0-based `layer` and those behind it."""

    entry: int
    stages: tuple[tuple[int, int], ...]


class Budget(NamedTuple):
    """One schedule in three conventions, which published tables mix: FastV at "192" rows keeps 166 of 576."""

    enter: int  # rows that enter the decoder
    average: float  # "equivalent" rows T_eq: the mean over the layers
    end: int  # rows that go through the last layer


def counts(entry: int, stages: tuple[tuple[int, int], ...], layers: int) -> tuple[int, ...]:
    """Rows that go through each of `layers` layers. ValueError for stages that do not ascend in depth or leave more rows than came."""
    check.count("entry", entry, 0)
    check.count("layers", layers)
    if not isinstance(stages, tuple | list) or not all(isinstance(s, tuple | list) and len(s) == 2 for s in stages):
        raise TypeError(f"stages must be pairs (layer, count), got {stages!r}")
    _places(tuple(layer for layer, _ in stages), layers)
    out, left = [entry] * layers, entry
    for layer, count in stages:
        check.count("count", count, 0)
        if count > left:
            raise ValueError(f"{count} rows from layer {layer} on, but {left} come to it")
        left = count
        out[layer:] = [count] * (layers - layer)
    return tuple(out)


def conventions(entry: int, stages: tuple[tuple[int, int], ...], layers: int) -> Budget:
    """The budget of a schedule: average = (1/L) sum over the layers of the rows that go through them."""
    rows = counts(entry, stages, layers)
    return Budget(entry, sum(rows) / layers, rows[-1])


def geometric(entry: int, at: tuple[int, ...], ratio: float | int) -> Schedule:
    """`entry * ratio^j` rows, rounded half up, behind the j-th of the places `at` (0-based layers): PyramidDrop; one place: FastV."""
    check.count("entry", entry, 0)
    check.between("ratio", ratio, 0, 1)
    _places(at, 2**31 - 1)
    share = Fraction(str(float(ratio)))
    return Schedule(entry, tuple((layer, math.floor(entry * share**j + Fraction(1, 2))) for j, layer in enumerate(at, 1)))


def decay(target: float | int, *, entry: int, at: tuple[int, ...], layers: int, by: str = "average") -> float:
    """The ratio with which `entry` rows fall at each of the places `at` so that the budget is `target`.

        by="average":  entry (a_0 + a_1 ratio + a_2 ratio^2 + ...) = target,   a_j: the share of the layers between two places
        by="end":      entry ratio^m = target, for m places

    ValueError where no ratio from 0 to 1 reaches it, with what can be reached: PyramidDrop's places 8, 16, 24 of 32 layers leave 576 rows at
    an average of 144 at least.
    """
    check.count("entry", entry)
    check.count("layers", layers)
    check.one_of("by", by, CONVENTIONS[1:])
    check.between("target", target, 0, 2**31 - 1)
    _places(at, layers)
    if not at:
        raise ValueError(f"a ratio needs a place to act at, got at={at!r}")
    share = _shares(at, layers)
    least = entry * share[0] if by == "average" else Fraction(0)
    if not least <= target <= entry:
        raise ValueError(
            f"{target} rows ({by}) are out of reach: {entry} rows enter and the first place is before layer {at[0]} of {layers}; "
            f"the least is {float(least):g}, the most {entry}"
        )
    if by == "end":
        return (float(target) / entry) ** (1 / len(at))
    if len(at) == 1:
        return float((Fraction(str(float(target))) - least) / (entry * share[1]))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        under = entry * sum(float(a) * middle**j for j, a in enumerate(share)) < target
        low, high = (middle, high) if under else (low, middle)
    return (low + high) / 2


def fit(
    target: float | int,
    *,
    at: tuple[int, ...],
    layers: int,
    by: str = "average",
    entry: int | None = None,
    ratio: float | int | None = None,
    most: int = 2**31 - 1,
) -> Schedule:
    """The schedule of a shape whose budget is `target` in the convention `by`: of `entry` and `ratio` exactly one is given.

    entry: how the rows fall is sought (`decay`; by = "average" or "end"). ratio: how many enter is sought, at most `most` of them.
    Rounded half up, so the budget of the outcome (`conventions`) is near the target, not on it. ValueError: out of reach.
    """
    check.one_of("by", by, CONVENTIONS)
    check.count("layers", layers)
    check.between("target", target, 0, 2**31 - 1)
    _places(at, layers)
    if (entry is None) == (ratio is None):
        raise ValueError(f"give entry or ratio, exactly one; got entry={entry}, ratio={ratio}")
    if entry is not None:
        if by == "enter":
            raise ValueError(f"by='enter' says how many rows enter ({target}); give ratio, not entry")
        return geometric(entry, at, decay(target, entry=entry, at=at, layers=layers, by=by))
    check.between("ratio", ratio, 0, 1)  # type: ignore[arg-type]
    check.count("most", most)
    share = Fraction(str(float(ratio)))  # type: ignore[arg-type]
    part = {"enter": Fraction(1), "end": share ** len(at)}
    part["average"] = sum((a * share**j for j, a in enumerate(_shares(at, layers))), Fraction(0))
    if Fraction(str(float(target))) > most * part[by]:
        raise ValueError(f"{target} rows ({by}) are out of reach: with {most} rows that enter there are {float(most * part[by]):g} at most")
    if not part[by]:
        raise ValueError(f"ratio={ratio} leaves nothing by the convention {by!r}, whatever enters; give entry")
    return geometric(math.floor(Fraction(str(float(target))) / part[by] + Fraction(1, 2)), at, ratio)  # type: ignore[arg-type]


def of_recipe(recipe: Recipe, cfg, images: int) -> Budget:
    """What becomes of `images` image rows that an encoder gives in a decoder of configuration `cfg`, by static counts.

    Read of the recipe: the capacity of `select`, the methods of `layers`, the layer where an edit lets image rows go. A traced `keep` and
    methods that drop fewer rows than they may are not seen.
    """
    check.count("images", images)
    check.kind("recipe", recipe, Recipe)
    left, stages = images, []
    if recipe.select is not None:
        capacity = getattr(recipe.select, "capacity", None)
        left = min(left, recipe.select.count(left, left) if capacity is None else capacity)
    entry = left
    until = min((edit.until for edit in recipe.edits if edit.until is not None), default=cfg.layers)
    for k, method in sorted(recipe.layers, key=lambda place: place[0]):
        left = min(left, method.layer(k, cfg.layers).count(left, left))
        stages.append((k, left))
    stages = [s for s in stages if s[0] < until] + ([(until, 0)] if until < cfg.layers else [])
    return conventions(entry, tuple(stages), cfg.layers)


def _places(at: tuple[int, ...], layers: int) -> None:
    if not isinstance(at, tuple | list):
        raise TypeError(f"places must be a tuple of layers, got {at!r}")
    for layer in at:
        check.count("layer", layer, 0)
    if any(a >= b for a, b in zip(at, (*at[1:], layers), strict=False)):
        raise ValueError(f"places {tuple(at)} must ascend and lie below {layers} layers")


def _shares(at: tuple[int, ...], layers: int) -> list[Fraction]:
    """Of the layers, those before the first place, between the places, behind the last."""
    edges = (0, *at, layers)
    return [Fraction(b - a, layers) for a, b in itertools.pairwise(edges)]
