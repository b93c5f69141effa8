"""Site select: which rows of images stay at the output of an encoder. A method supplies the score, or the choice; the base owns the rest."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.matching import merge_plan
from jaxtok.core.reduce import POSITIONS
from jaxtok.core.reducer import Reducer
from jaxtok.core.select import choose, choose_groups, pack
from jaxtok.core.types import SPECIAL, TEXT, Evidence, Plan, Tokens


def pictured(tokens: Tokens) -> Bool[Array, "b n"]:
    """Live rows of images, crops and frames."""
    return (tokens.pos >= 0) & (tokens.kind != TEXT) & (tokens.kind != SPECIAL)


def asking(tokens: Tokens) -> Bool[Array, "b n"]:
    """Live text rows behind the last image row."""
    behind = tokens.pos > jnp.max(jnp.where(pictured(tokens), tokens.pos, -1), -1, keepdims=True)
    return (tokens.pos >= 0) & (tokens.kind == TEXT) & behind


def room(tokens: Tokens, keep, capacity: int) -> Int[Array, " b"]:
    """How many image rows may stay under a capacity of them and a traced budget of all live rows (None = no other limit)."""
    check.count("capacity", capacity, 0)
    if keep is None:
        return jnp.full((tokens.pos.shape[0],), capacity, jnp.int32)
    fixed = jnp.sum((tokens.pos >= 0) & ~pictured(tokens), -1, dtype=jnp.int32)
    return jnp.clip(jnp.maximum(keep, 0) - fixed, 0, capacity)


def evenly(total: Int[Array, " b"], parts: int, most: int) -> Int[Array, "b p"]:
    """`total` over `parts` groups, one more to the first ones where it does not divide; `most` each at most."""
    check.count("parts", parts)
    group = jnp.arange(parts, dtype=jnp.int32)[None]
    return jnp.minimum((total // parts)[:, None] + (group < (total % parts)[:, None]).astype(jnp.int32), most)


def part(total: Int[Array, " b"], share: float) -> Int[Array, " b"]:
    """floor(share * total) of the decimal that was written, for totals under 200,000; `share` from 0 to 1."""
    check.between("share", share, 0, 1)
    exact = Fraction(str(share)).limit_denominator(10_000)
    return (jnp.clip(total, 0, 200_000) * exact.numerator) // exact.denominator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(Reducer):
    """Of a sequence's image rows at most `capacity` stay, in raster order. Other rows (kind SPECIAL: class row, newlines) always stay.

    capacity: image rows of all crops together. special: how many other rows there are at most (static; the class row is one).
    crops: sub-images that stand in a sequence, told apart by `segment` (0 = thumbnail); 1 = one image, whatever its segments say.
    positions: "repack" (the rows go before a language model as if the others had never been), "keep", "keep_mrope".
    `keep` [b] counts all live rows that are left. ValueError for what is out of range.

    A tower's class row is of kind SPECIAL and so is never dropped here; who feeds a language model takes it away, unless `with_cls`.
    """

    with_cls = False  # the class row is one of the visual tokens that the language model reads

    capacity: int
    special: int = 1
    crops: int = 1
    positions: str = "repack"

    def __post_init__(self):
        check.count("capacity", self.capacity)
        check.count("special", self.special, 0)
        check.count("crops", self.crops)
        check.one_of("positions", self.positions, POSITIONS)

    def count(self, n: int, n_kind: int) -> int:
        return min(n, self.capacity + self.special)

    def room(self, tokens: Tokens, keep) -> Int[Array, " b"]:
        """How many image rows may stay."""
        return room(tokens, keep, self.capacity)

    def group(self, tokens: Tokens) -> Int[Array, "b n"]:
        """The crop of each row, 0..crops-1."""
        return jnp.clip(tokens.segment, 0, self.crops - 1)

    def score(self, params, tokens: Tokens, evidence: Evidence) -> Float[Array, "b n"]:
        """The higher, the rather a row stays; by default the best of each crop, equally many of each."""
        raise NotImplementedError(f"{type(self).__name__} must score its rows or choose them")

    def stay(self, params, tokens: Tokens, evidence: Evidence, free: Bool[Array, "b n"], room: Int[Array, " b"]) -> Bool[Array, "b n"]:
        """Which of the `free` rows stay, `room` of them at most."""
        score = jax.lax.stop_gradient(self.score(params, tokens, evidence))
        if self.crops == 1:
            return choose(score, free, room, most=self.capacity)
        return choose_groups(score, self.group(tokens), free, evenly(room, self.crops, free.shape[1]))

    def order(self, tokens: Tokens, evidence: Evidence, mask: Bool[Array, "b n"]) -> Int[Array, "b n"] | None:
        """Ranks >= 0 in which the image rows of `mask` stand behind the others; None = raster."""
        return None

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        free = pictured(tokens)
        mask = self.stay(params, tokens, evidence, free, self.room(tokens, keep)) & free
        fixed = (tokens.pos >= 0) & ~free
        n, rank = free.shape[1], self.order(tokens, evidence, mask)
        if rank is None:
            return state, pack(mask | fixed, self.count(n, n), jnp.where(fixed, jnp.inf, 0.0))
        row = jnp.arange(n, dtype=jnp.int32)[None]
        rank = jnp.where(fixed, 0, jnp.where(mask, 1 + rank, -1))
        stays = rank >= 0
        rank = jnp.where(stays, jnp.argsort(jnp.argsort(jnp.where(stays, rank, -1), axis=-1, stable=True), axis=-1).astype(jnp.int32), -1)
        return state, merge_plan(rank, jnp.where(stays, row, -1), None, self.count(n, n))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSelector(Selector):
    """A selector that minds where crops stand. grid: their rows and columns, crops = 1 + rows * columns.

    grid=None with crops=1: one image. grid=None with crops=P: P sub-images at most, in a grid of each image's own, which the caller tells
    (`Evidence.grid`); that wins over `grid`.
    """

    grid: tuple[int, int] | None = None

    def __post_init__(self):
        if self.grid is not None:
            check.kind("grid", self.grid, tuple)
            if len(self.grid) != 2:
                raise ValueError(f"grid={self.grid} must be (rows, columns) of crops")
            for size in self.grid:
                check.count("grid", size, 1, 1000)
            parts = 1 + self.grid[0] * self.grid[1]
            if self.crops not in (1, parts):
                raise ValueError(f"grid={self.grid} makes {parts} sub-images, got crops={self.crops}; leave it out")
            object.__setattr__(self, "crops", parts)
        super().__post_init__()

    def crop_grid(self, evidence: Evidence) -> Int[Array, "k 2"]:
        """Rows and columns of crops; k = b where the caller told them of each image, else 1."""
        if evidence.grid is not None:
            return jnp.maximum(evidence.grid, 1)
        if self.grid is None and self.crops > 1:
            raise ValueError(
                f"crops={self.crops} stand in a grid; give grid=(rows, columns), or tell {type(self).__name__} that of each image"
            )
        return jnp.asarray([self.grid or (1, 1)], jnp.int32)
