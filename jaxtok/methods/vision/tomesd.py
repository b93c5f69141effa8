"""ToMeSD, token merging around a module. Source: arXiv:2303.17604; dbolya/tomesd (tomesd/merge.py, tomesd/patch.py), MIT."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine, join, movable, removal
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.score import by_order, drawing_key
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


@register(
    "tomesd",
    site="vit",
    paper="arXiv:2303.17604",
    title="Token Merging for Fast Stable Diffusion",
    authors="Daniel Bolya and Judy Hoffman",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMeSD(Reducer):
    """Merge before the attention, copy back behind it: every layer sees all rows at its boundary.

        destinations: one row of each full sy x sx block of the grid (random=False: its top left one), all other rows are sources
        S_ij = cos(x_i, x_j) of the rows x that enter the layer;   the `remove` sources of largest max_j S_ij join their argmax
        a group's row = plain mean of its members;   behind the attention each member takes its group's row;   x + that

    `remove` rows go, by default int(rows (1 - ratio)) with `ratio` the fraction kept (0.5, as in the paper), never more than there are
    sources. Blocks cut by the border have no destination. Rows without a cell (class tokens) take no part. `random`: the destination of
    a block is drawn, from the model's key (without one from `seed` and the layer), the
    same for the whole batch. The official code turns this off for odd batches; here the field says it. `special`: how many rows are of
    kind SPECIAL (static; a U-Net has none). sx = sy = 1: every row is a destination and nothing goes. A grid without a full block merges
    nothing and counts what finds no room in `lost`. `keep` [b]: live rows inside the attention.
    """

    at: ClassVar[str] = "around"

    ratio: float = 0.5
    remove: int | None = None
    sx: int = 2
    sy: int = 2
    random: bool = True
    seed: int = 0
    special: int = 0

    def __post_init__(self):
        check.count("special", self.special, 0)
        check.count("sx", self.sx)
        check.count("sy", self.sy)
        if self.remove is not None:
            check.count("remove", self.remove, 0)
        else:
            check.share("ratio", self.ratio)

    @property
    def needs(self) -> Needs:
        return Needs()

    def asked(self, free: int) -> int:
        return int(free * (1 - self.ratio)) if self.remove is None else self.remove

    def count(self, n: int, n_kind: int) -> int:
        free = max(n - self.special, 0)
        return n - min(self.asked(free), free - free // (self.sx * self.sy))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        (_, n), stride = tokens.pos.shape, self.sy * self.sx
        row, column = tokens.cell[..., 0], tokens.cell[..., 1]
        free = movable(tokens) & (row >= 0) & (column >= 0)
        high, wide = (jnp.max(jnp.where(free, a, -1), -1, keepdims=True) + 1 for a in (row, column))
        by, bx = row // self.sy, column // self.sx
        full = free & ((by + 1) * self.sy <= high) & ((bx + 1) * self.sx <= wide)
        inside = row % self.sy * self.sx + column % self.sx
        rank = by_order(drawing_key(evidence, self.seed), (by * (n // self.sx + 1) + bx) * stride + inside) if self.random else inside
        order = jnp.lexsort((jnp.where(full, rank, 0), bx, by, ~full), axis=-1)
        there, y, x = (jnp.take_along_axis(a, order, 1) for a in (full, by, bx))
        first = there & ((jnp.roll(y, 1, 1) != y) | (jnp.roll(x, 1, 1) != x) | (jnp.arange(n, dtype=jnp.int32)[None] == 0))
        target = jnp.zeros_like(first).at[jnp.arange(first.shape[0])[:, None], order].set(first)
        source = free & ~target & jnp.any(target, -1, keepdims=True)
        room = self.count(n, n)
        remove = removal(tokens.pos >= 0, keep, self.asked(max(n - self.special, 0)), room, jnp.sum(source, -1, dtype=jnp.int32))
        ones = jnp.ones(free.shape, jnp.float32)
        return state, join(tokens, cosine(tokens.x, tokens.x), source, target, remove, n, room, weight=ones)
