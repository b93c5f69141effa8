"""Runs of rows that are scored or kept together: chunks, pages, sentences."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.reduce import gather, segment_sum


def chunks(pos: Int[Array, "*B n"], size: int) -> Int[Array, "*B n"]:
    """Chunk number of each live row, counted from the oldest live row; -1 where dead. Rows are in order."""
    check.count("size", size)
    live = pos >= 0
    rank = jnp.cumsum(live.astype(jnp.int32), -1) - 1
    return jnp.where(live, rank // size, -1)


def sentences(ids: Int[Array, "b n"], live: Bool[Array, "b n"], ends: tuple[int, ...]) -> Int[Array, "b n"]:
    """Sentence number of each live token: a token whose id is in `ends` closes its sentence; -1 where dead."""
    check.kind("ends", ends, tuple)
    for end in ends:
        check.count("ends", end, 0)
    stop = (live & jnp.isin(ids, jnp.asarray(ends, ids.dtype))).astype(jnp.int32)
    before = jnp.cumsum(stop, -1) - stop
    return jnp.where(live, before, -1)


def mean(x: Float[Array, "*B n"], segment: Int[Array, "*B n"], count: int) -> Float[Array, "*B n"]:
    """The mean of x over each row's own segment, given back to every row; 0 where the segment is -1."""
    ones = (segment >= 0).astype(jnp.float32)
    size = segment_sum(ones, segment, count)
    average = segment_sum(x, segment, count) / jnp.maximum(size, 1.0)
    return gather(average, segment)


def rank(score: Float[Array, "*B n"], segment: Int[Array, "*B n"]) -> Int[Array, "*B n"]:
    """Place of each row in its own segment by falling score, from 0 (ties: the older row first). Rows of -1 share one segment."""
    n = score.shape[-1]
    by_score = jnp.argsort(-score, axis=-1, stable=True)
    by_segment = jnp.argsort(jnp.take_along_axis(segment, by_score, -1), axis=-1, stable=True)
    order = jnp.take_along_axis(by_score, by_segment, -1)  # segments together, each by falling score
    group = jnp.take_along_axis(segment, order, -1)
    row = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), group.shape)
    fresh = jnp.concatenate([jnp.ones_like(group[..., :1], bool), group[..., 1:] != group[..., :-1]], -1)
    start = jnp.where(fresh, row, 0)
    start = lax.cummax(start, axis=start.ndim - 1)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(row - start, back, -1)
