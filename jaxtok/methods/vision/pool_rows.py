"""Pooled rows: the mean of neighbours, what every merge must beat."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import merge_plan
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import Evidence, Plan, Tokens


@register("pool_rows", site="select", paper="baseline")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRows(Selector):
    """Average image rows over the cells of a coarser grid.

        bin of (i, j) = (floor(i * out_rows / rows), floor(j * out_cols / cols));   row = mean over its live rows, weighted by size

    of each crop its own. grid: (rows, cols) that there are; out: (rows, cols) to make, no more than there are. `capacity` follows: crops
    * out. A bin takes pos and place of its first row; an empty one is empty. No budget below that: of `keep` fewer, the last bins are
    dropped. Other rows (kind SPECIAL) stay in front. out = grid: the identity. Needs `cell`.
    """

    conserves = True

    grid: tuple[int, int]
    out: tuple[int, int]
    capacity: int = 0

    def __post_init__(self):
        for name in ("grid", "out"):
            check.kind(name, getattr(self, name), tuple)
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}={getattr(self, name)} must be (rows, columns)")
            for size in getattr(self, name):
                check.count(name, size, 1, 10_000)
        if any(a < b for a, b in zip(self.grid, self.out, strict=True)):
            raise ValueError(f"out={self.out} is finer than grid={self.grid}")
        check.count("crops", self.crops)
        many = self.crops * self.out[0] * self.out[1]
        if self.capacity not in (0, many):
            raise ValueError(f"capacity={self.capacity} is {many} here: crops * out; leave it out")
        object.__setattr__(self, "capacity", many)
        super().__post_init__()

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        free = pictured(tokens)
        fixed = (tokens.pos >= 0) & ~free
        n, room = free.shape[1], self.room(tokens, keep)
        high, wide = self.out
        place = [jnp.clip(tokens.cell[..., a], 0, self.grid[a] - 1) * self.out[a] // self.grid[a] for a in (0, 1)]
        part = jnp.where(free, (self.group(tokens) * high + place[0]) * wide + place[1], -1)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        same = (part[:, :, None] == part[:, None]) & free[:, None]
        first = jnp.where(free, jnp.argmax(same, -1).astype(jnp.int32), -1)
        lead = free & (first == row)
        number = jnp.sum(jnp.where(lead[:, None], part[:, None] < part[..., None], False), -1, dtype=jnp.int32)  # bins before this one
        there = free & (number < room[:, None])
        rank = jnp.where(fixed, row, jnp.where(lead & there, n + part, -1))
        return state, merge_plan(rank, jnp.where(fixed, row, jnp.where(there, first, -1)), tokens.size, self.count(n, n))
