"""VFlowOpt: behind the vision encoder and between the decoder's layers. Source: arXiv:2508.05211; sihany077/VFlowOpt (siglip_encoder.py, llava_qwen_training_free.py), CC BY-NC: written
from the formulas."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxtok.core import budget, check
from jaxtok.core.matching import merge_plan
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.score import softmax
from jaxtok.core.select import choose
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.stages import StagedPruner, schedule
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


@register(
    "vflowopt.select",
    site="select",
    paper="arXiv:2508.05211",
    title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    authors="Sihan Yang and Runsen Xu and Chenhang Cui and Tai Wang and Dahua Lin and Jiangmiao Pang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VFlowOptSelect(Selector):
    """Keep what the much-attended rows attend to; recycle the rest cell by cell of a coarse grid.

        M = mean over heads of A;  recv_j = mean_i M_ij;  G = rows with recv_j > t * mean(recv);   map = mean of the rows i of G of M_ij
        map += alpha_v * softmax over the image of e_j,  e = grey-level entropy of the patch (256 bins, bits; `Evidence.detail`)
        the `top` = capacity - cells rows of largest map stay;  of the others, each m x m cell's become one: their mean weighted by map,
        at the place of the largest

    n rows become top + (cells with anything left), at most the capacity; the official count is top = n - int(n (1 - r)) - int(n / m^2)
    of n rows newlines included (`official_top` here; newlines, which weigh 1.0 there, always stay). cells: a static bound of how many there
    are (None = from `shape`: ceil(rows / m) * ceil(cols / m) of the thumbnail and of the joined crops apart). m need not be whole: the
    cell of (i, j) is (floor(i / m), floor(j / m)), in float32. recycle=False: plain top-k of capacity rows (several images, video).
    Where G is empty (large t) the code's map is NaN; here it is the column mean, as at t=0. Defaults as shipped: t 39.3, m 17.4,
    alpha_v 0 (the published search ranges: t 0..50, m 3..24, alpha_v -1..1). e is the caller's to measure: the code takes it from
    uint8(255 * normalised pixel), which wraps for negatives. It reads the whole attention matrix of a layer. Raster order; later stages
    in the decoder keep positions. Needs `cell`; crops in a `grid` are joined, each `side` rows and columns wide.
    """

    conserves: ClassVar[bool] = False

    t: float = 39.3
    m: float = 17.4
    alpha_v: float = 0.0
    recycle: bool = True
    shape: tuple[int, int] = (27, 27)
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        for name, value in (("shape", self.shape), ("grid", (1, 1) if self.grid is None else self.grid)):
            check.kind(name, value, tuple)
            if len(value) != 2:
                raise ValueError(f"{name}={value} must be (rows, columns)")
            for size in value:
                check.count(name, size, 1, 10_000)
        if self.grid is not None:
            object.__setattr__(self, "crops", 1 + self.grid[0] * self.grid[1])
        elif self.crops != 1:
            raise ValueError(f"crops={self.crops} stand in a grid; give grid=(rows, columns)")
        super().__post_init__()
        check.between("t", self.t, 0, 1e6)
        check.between("m", self.m, 1, 1e6)
        check.between("alpha_v", self.alpha_v, -1e6, 1e6)
        check.kind("recycle", self.recycle, bool)

    @property
    def needs(self) -> Needs:
        return Needs(probs=True, detail=self.alpha_v != 0)

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """Rows and columns of cells of the thumbnail, and of the joined crops (0, 0 without)."""
        many = lambda size: math.floor((size - 1) / self.m) + 1
        rows, cols = self.grid or (0, 0)
        far, away = (many(rows * self.shape[0]), many(cols * self.shape[1])) if self.grid else (0, 0)
        return many(self.shape[0]), many(self.shape[1]), far, away

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return self.importance(jnp.mean(check.given("probs", evidence.probs).astype(jnp.float32), 1), pictured(tokens), evidence.detail)

    def importance(self, m, free, detail=None):
        """map [b n] of the mean over heads of attention [b n n]."""
        m = jnp.where(free[:, :, None] & free[:, None, :], m, 0.0)
        n = jnp.maximum(jnp.sum(free, -1, keepdims=True), 1).astype(jnp.float32)
        received = jnp.sum(m, 1) / n
        loud = free & (received > self.t * jnp.sum(received / n, -1, keepdims=True))
        loud = jnp.where(jnp.any(loud, -1, keepdims=True), loud, free)
        seen = jnp.sum(jnp.where(loud[..., None], m, 0.0), 1) / jnp.maximum(jnp.sum(loud, -1, keepdims=True), 1).astype(jnp.float32)
        if not self.alpha_v:
            return seen
        return seen + self.alpha_v * softmax(check.given("detail", detail), free)

    def mark(self, params, state, tokens: Tokens, evidence: Evidence):
        """The map, for the stages between the decoder's layers."""
        return jnp.where(pictured(tokens), jax.lax.stop_gradient(self.score(params, tokens, evidence)), 1.0)

    def place(self, tokens: Tokens):
        """Number of the cell that each row lies in."""
        group, (high, wide, far, away) = self.group(tokens), self.cells
        cols = (self.grid or (1, 1))[1]
        index = jnp.maximum(group - 1, 0)
        shift = jnp.stack([index // cols * self.shape[0], index % cols * self.shape[1]], -1)
        at = jnp.maximum(tokens.cell, 0) + jnp.where((group > 0)[..., None], shift, 0)
        at = jnp.floor(at.astype(jnp.float32) / jnp.float32(self.m)).astype(jnp.int32)
        inner = jnp.clip(at[..., 0], 0, high - 1) * wide + jnp.clip(at[..., 1], 0, wide - 1)
        outer = high * wide + jnp.clip(at[..., 0], 0, max(far - 1, 0)) * max(away, 1) + jnp.clip(at[..., 1], 0, max(away - 1, 0))
        return jnp.where(group > 0, outer, inner)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        if not self.recycle:
            return super().plan(params, state, tokens, evidence, keep)
        free = pictured(tokens)
        fixed = (tokens.pos >= 0) & ~free
        n, room = free.shape[1], self.room(tokens, keep)
        high, wide, far, away = self.cells
        score = jnp.where(free, jax.lax.stop_gradient(self.score(params, tokens, evidence)), 0.0)
        everything = room >= jnp.sum(free, -1, dtype=jnp.int32)
        top = choose(score, free, jnp.where(everything, room, jnp.maximum(room - high * wide - far * away, 0)))
        rest = free & ~top
        cell = jnp.where(rest, self.place(tokens), -1)
        same = (cell[:, :, None] == cell[:, None]) & rest[:, None]
        into = jnp.where(rest, jnp.argmax(jnp.where(same, score[:, None], -jnp.inf), -1).astype(jnp.int32), -1)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        lead = rest & (into == row)
        best = choose(score, lead, jnp.maximum(room - jnp.sum(top, -1, dtype=jnp.int32), 0))  # fewer than the cells: the best of them
        there = jnp.take_along_axis(best, jnp.maximum(into, 0), 1) & rest
        rank = jnp.where(fixed | top | best, row, -1)
        weight = jnp.where(rest, jnp.maximum(score, 0.0), 1.0)
        empty = jnp.sum(jnp.where(same, jnp.maximum(score, 0.0)[:, None], 0.0), -1) <= 0  # a cell that nobody looks at: a plain mean
        return state, merge_plan(
            rank, jnp.where(fixed | top, row, jnp.where(there, into, -1)), jnp.where(rest & empty, 1.0, weight), self.count(n, n)
        )


def official_top(rows: int, ratio: float, m: float) -> int:
    """How many of `rows` (newlines included) stay unmerged at the kept fraction `ratio`: n - int(n (1 - ratio)) - int(n / m^2)."""
    check.count("rows", rows)
    check.share("ratio", ratio)
    return rows - int(rows * (1 - ratio)) - int(rows / m**2)


@register(
    "vflowopt.layers",
    site="layers",
    paper="arXiv:2508.05211",
    title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    authors="Sihan Yang and Runsen Xu and Chenhang Cui and Tai Wang and Dahua Lin and Jiangmiao Pang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VFlowOptLayers(StagedPruner):
    """Between the decoder's layers, keep the image rows of largest map: the one that was made of the tower's attention before.

        score_j = map_j of VFlowOptSelect (`Tokens.score`, which goes with the rows; a recycled cell has that of its largest row)

    No attention of the decoder is read. Rows keep their rotary ids. Newlines (map 1.0 in the official code, kind SPECIAL here) are never
    dropped and not counted in `capacity`. ValueError while tracing where no earlier site has made a map. Ties: the older row. The paper's
    schedule: `vflowopt`.
    """

    @property
    def needs(self) -> Needs:
        return Needs(score=True)

    def score(self, params, state, tokens: Tokens, evidence: Evidence):
        return check.given("score", tokens.score)


def vflowopt(rows: int = 729, newlines: int = 0, *, vit_ratio: float = 0.117, ratios=(1.0, 0.6), places=(9, 18), **tower) -> Recipe:
    """The paper's recipe for a picture of `rows` rows (all crops) and `newlines` SPECIAL ones, as shipped: vit_ratio of them go on to the
    decoder (and a row for each cell of the others), ratios[i] of what comes to places[i] stays there, rounded down, newlines counted.

    tower: t, m, alpha_v, shape, grid of VFlowOptSelect. That ratios are of what comes to their place is our reading. A cell that is left
    with nothing makes no row, so fewer may come.
    """
    if len(ratios) != len(places):
        raise ValueError(f"ratios={ratios} and places={places} must be equally many")
    select = VFlowOptSelect(capacity=rows, special=newlines, **tower)
    high, wide, far, away = select.cells
    top = max(official_top(rows + newlines, vit_ratio, select.m) - newlines, 0)
    images = left = min(top + high * wide + far * away, rows)
    stages = []
    for place, ratio in zip(places, ratios, strict=True):
        stay = max(budget.floored(ratio, left + newlines) - newlines, 0)
        stages += [(place, stay)] if stay < left else []
        left = stay
    later = schedule(VFlowOptLayers(capacity=left, images=images, stages=tuple(stages))) if stages else ()
    return Recipe(select=dataclasses.replace(select, capacity=images), layers=later)
