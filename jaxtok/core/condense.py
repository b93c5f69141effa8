"""Rows of images condensed: some stay as they are, some take in the rest. What VisionZip and VisionDrop do at an encoder's output."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.matching import cosine
from jaxtok.core.reduce import gather
from jaxtok.core.select import choose
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


def condense(
    tokens: Tokens,
    metric: Float[Array, "b n d"],
    score: Float[Array, "b n"],
    free: Bool[Array, "b n"],
    fixed: Bool[Array, "b n"],
    room: Int[Array, " b"],
    contextual: int,
    rows: int,
) -> DensePlan:
    """The plan of `rows` rows: fixed and dominant ones in raster order, then the contextual ones.

    dominant: the room - contextual free rows of largest `score`;  targets: every floor(n / c)-th of the n other free rows, c of them
    the rest go to the target of largest cosine of `metric` (ties: the first);  target' = target + mean of those that went to it
    """
    n = free.shape[1]
    c = jnp.minimum(contextual, room)
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
    rank = jnp.where(fixed | dominant, row, jnp.where(target, n + row, -1))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)[:, n - min(rows, n) :]
    index = jnp.where(jnp.take_along_axis(rank, order, 1) >= 0, order, -1)
    return DensePlan(gather(w, index), index)


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
