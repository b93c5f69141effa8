"""Rows of images condensed: some stay as they are, some take in the rest. What VisionZip, VisionDrop and SparseVLM do."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.matching import cosine
from jaxtok.core.reduce import gather
from jaxtok.core.select import choose, pack
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


def stand(
    weight: Float[Array, "b n n"], stays: Bool[Array, "b n"], made: Bool[Array, "b n"], free: Bool[Array, "b n"], rows: int, inside=False
) -> DensePlan:
    """The plan of `rows` rows, those of `stays` and of `made`, each the sum of weight[., row, j] * row j.

    The made ones stand behind all others up to the last `free` row, before what follows it (a prompt's text); `inside`: at their own place.
    Where `rows` has no room for all, image rows go first, the oldest first, and are counted.
    """
    check.count("rows", rows, 0)
    if free.ndim != 2 or weight.shape != (*free.shape, free.shape[1]):
        raise ValueError(f"weight is {list(weight.shape)} for rows {list(free.shape)}; they must be [b n n] and [b n]")
    n = free.shape[1]
    row = jnp.arange(n, dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(free, row, -1), -1, keepdims=True)
    place = row if inside else jnp.where(made, n + row, jnp.where(row > last, 2 * n + row, row))
    fits = pack(stays | made, rows, jnp.where(free, 0.0, jnp.inf))
    rank = jnp.where(fits.assign >= 0, place, -1)
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)[:, n - min(rows, n) :]
    index = jnp.where(jnp.take_along_axis(rank, order, 1) >= 0, order, -1)
    return DensePlan(gather(weight, index), index, lost=fits.lost)


def condense(
    tokens: Tokens,
    metric: Float[Array, "b n d"],
    score: Float[Array, "b n"],
    free: Bool[Array, "b n"],
    fixed: Bool[Array, "b n"],
    room: Int[Array, " b"],
    contextual: int,
    rows: int,
    inside: bool = False,
) -> DensePlan:
    """The plan of `rows` rows: dominant ones (and fixed ones before the last image row) in raster order, then the contextual ones (`stand`).

    dominant: the room - contextual free rows of largest `score`;  targets: every floor(n / c)-th of the n other free rows, c of them
    the rest go to the target of largest cosine of `metric` (ties: the first);  target' = target + mean of those that went to it

    Where all free rows find room, they stay as they are.
    """
    n = free.shape[1]
    c = jnp.where(jnp.sum(free, -1, dtype=jnp.int32) <= room, 0, jnp.minimum(contextual, room))
    dominant = choose(score, free, room - c)
    rest = free & ~dominant
    many = jnp.sum(rest, -1, dtype=jnp.int32)
    raster = jnp.cumsum(rest, -1, dtype=jnp.int32) - 1
    step = jnp.maximum(many // jnp.maximum(c, 1), 1)[:, None]
    target = rest & (raster % step == 0) & (raster // step < c[:, None])
    like = jnp.where(target[:, None], cosine(metric, metric), -jnp.inf)
    into = jnp.argmax(like, -1).astype(jnp.int32)
    goes = rest & ~target & jnp.any(target, -1, keepdims=True)
    row = jnp.arange(n, dtype=jnp.int32)[None]
    joins = goes[:, None] & (into[:, None] == row[..., None])  # [b target source]
    w = jnp.where(joins, 1.0 / jnp.maximum(jnp.sum(joins, -1, keepdims=True), 1).astype(jnp.float32), 0.0)
    w = w + (jnp.eye(n, dtype=bool)[None] & (fixed | dominant | target)[..., None]).astype(jnp.float32)
    return stand(w, fixed | dominant, target, free, rows, inside)


def density_peaks(
    x: Float[Array, "b n c"], live: Bool[Array, "b n"], count: Int[Array, " b"]
) -> tuple[Bool[Array, "b n"], Int[Array, "b n"]]:
    """`count` clusters of the live rows -> (which rows are centres, the centre of each row, itself for a centre; -1 where there is none).

    d_ij = |x_i - x_j| / sqrt(c);   density_i = exp(-mean of d_ij^2 over the `count` nearest live rows j, i itself among them)
    delta_i = min of d_ij over denser rows j (equal density: the older is denser), the largest of all d for the densest
    centres: the `count` rows of largest density * delta (ties: the older); the others go to the nearest one (ties: the older)
    """
    if x.ndim != 3 or live.shape != x.shape[:2]:
        raise ValueError(f"x is {list(x.shape)}, live {list(live.shape)}; they must be [b n c] and [b n]")
    n, y = x.shape[1], jnp.where(live[..., None], jax.lax.stop_gradient(x).astype(jnp.float32), 0.0)
    apart = jax.lax.map(lambda r: jnp.sum((y - r[:, None]) ** 2, -1), jnp.swapaxes(y, 0, 1))  # row by row: no [b n n c]
    apart = jnp.minimum(jnp.swapaxes(apart, 0, 1) / max(x.shape[-1], 1), 1e35)
    pair = live[:, :, None] & live[:, None]
    near = jnp.sort(jnp.where(pair, apart, jnp.inf), -1)
    few = jnp.minimum(count, jnp.sum(live, -1, dtype=jnp.int32))[:, None, None]
    among = jnp.arange(n, dtype=jnp.int32)[None, None] < few
    density = jnp.exp(-jnp.sum(jnp.where(among & (near < jnp.inf), near, 0.0), -1) / jnp.maximum(few[..., 0], 1).astype(jnp.float32))
    row = jnp.arange(n, dtype=jnp.int32)
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & (row[None, None] < row[None, :, None]))
    d = jnp.sqrt(apart)
    most = jnp.max(jnp.where(pair, d, 0.0), (1, 2), keepdims=True)
    delta = jnp.min(jnp.where(pair & denser, d, most), -1) if n else density
    centre = choose(density * delta, live, count)
    into = jnp.argmin(jnp.where(centre[:, None], d, jnp.inf), -1).astype(jnp.int32) if n else jnp.zeros(live.shape, jnp.int32)
    into = jnp.where(centre, row[None], jnp.where(live & jnp.any(centre, -1, keepdims=True), into, -1))
    return centre, into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condenser(Selector):
    """`condense` by the class row's attention (sum over heads) and the keys (mean over heads) of one image; `contextual` rows are merged."""

    with_cls = True

    contextual: int

    def __post_init__(self):
        super().__post_init__()
        check.count("contextual", self.contextual, 0, self.capacity)
        if self.crops != 1:
            raise ValueError(f"{type(self).__name__} condenses one image, got crops={self.crops}")

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, keys=True)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, DensePlan]:
        free, stop = pictured(tokens), jax.lax.stop_gradient
        fixed = (tokens.pos >= 0) & ~free
        score = stop(jnp.sum(check.given("cls", evidence.cls).astype(jnp.float32), 1))
        metric = stop(jnp.mean(check.given("keys", evidence.keys).astype(jnp.float32), 1))
        rows = self.count(free.shape[1], free.shape[1])
        return state, condense(tokens, metric, score, free, fixed, self.room(tokens, keep), self.contextual, rows)
