"""MustDrop, the part in the vision encoder. Source: arXiv:2411.10803; liuting20/MustDrop (local_merge.py, clip_encoder.py), Apache-2.0."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.matching import by_falling, merge_plan, movable, unit
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import choose
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


def key_set(seen: Float[Array, "b h n"], tokens: Tokens, rate: float = 0.08) -> Bool[Array, "b n"]:
    """The rows that later stages may not drop: the ceil(rate * rows) of largest attention `seen` from the class row, mean over heads.

    `seen` is that of the second to last layer; rows counts live rows that are not SPECIAL.
    """
    free = movable(tokens)
    count = jnp.ceil(rate * jnp.sum(free, -1).astype(jnp.float32) - 1e-4).astype(jnp.int32)
    return choose(jnp.mean(seen.astype(jnp.float32), 1), free, count)


@register(
    "mustdrop.vit",
    site="vit",
    paper="arXiv:2411.10803",
    title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    authors="Ting Liu and Liangtao Shi and Richang Hong and Yue Hu and Quanjun Yin and Linfeng Zhang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MustDropVit(Reducer):
    """Windows of the grid whose rows are alike become one row each, before a layer (the paper: before 0-based layer 1).

        similarity of a window = mean of cos(x_i, x_j) over its pairs i != j;   merged where it is >= threshold
        x' = sum of size * x / sum of size over the window

    Windows are contiguous `window` x `window` cells; one that lacks a live row (at a border of the grid) is left alone. Output: SPECIAL
    rows, the merged windows by falling similarity, the other rows in order; a window takes the place in line of its last row. The number of merged windows
    is data, so the static number of rows stays, and what is spared are dead rows; `most` = r merges the r most similar windows instead, whatever their
    similarity, and takes r (window^2 - 1) rows off the static number. The official code merges equally many windows in all images of a
    batch (the smallest number of them); here each image has its own. Thresholds are set per task (0.8 is TextVQA's). A threshold above 1
    changes nothing. A traced `keep` is not obeyed: a threshold has no budget.
    """

    floor: ClassVar[bool] = True
    conserves: ClassVar[bool] = True

    threshold: float = 0.8
    window: int = 3
    most: int | None = None

    def __post_init__(self):
        check.count("window", self.window, 2)
        check.real("threshold", self.threshold)
        if self.most is not None:
            check.count("most", self.most, 0)

    @property
    def needs(self) -> Needs:
        return Needs()

    def count(self, n: int, n_kind: int) -> int:
        size = self.window**2
        return n - (0 if self.most is None else min(self.most, n_kind // size) * (size - 1))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        (_, n), full = tokens.pos.shape, self.window**2
        live, free = tokens.pos >= 0, movable(tokens) & (tokens.cell[..., 0] >= 0)
        where = tokens.cell // self.window
        same = jnp.all(where[:, :, None] == where[:, None], -1) & free[:, :, None] & free[:, None]
        u = unit(tokens.x)
        like = jnp.where(same & ~jnp.eye(n, dtype=bool)[None], jnp.einsum("bnc,bmc->bnm", u, u), 0.0)
        each = jnp.sum(like, -1)  # of a row to the others of its window
        similar = jnp.sum(jnp.where(same, each[:, None], 0.0), -1) / (full * (full - 1))
        whole = free & (jnp.sum(same, -1, dtype=jnp.int32) == full)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        last = jnp.max(jnp.where(same, row[:, None], -1), -1)
        heads = whole & (last == row)  # one row a window
        order = by_falling(similar, heads)
        merges = heads & (similar >= self.threshold) if self.most is None else heads & (order < self.most)
        goes = whole & jnp.take_along_axis(merges, jnp.maximum(last, 0), 1)
        into = jnp.where(live, jnp.where(goes, last, row), -1)
        place = jnp.where(merges, n + order, jnp.where(live & ~movable(tokens), row, 2 * n + row))
        rank = jnp.where(live & (into == row), place, -1)
        return state, merge_plan(rank, into, tokens.size, self.count(n, n))
