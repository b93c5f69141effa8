"""Greedy choice of rows that differ from each other, or that together stand for all: one row after another, in a loop of static length.

Each returns the order of the picks, i32 [b most]; -1 once no candidate is left, so the first k are the choice at any budget k <= most.
Memory O(b n n) for the similarities that go in. Ties: the older row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.select import finite


def _greedy(candidate: Bool[Array, "b n"], most: int, start: Any, value: Callable, update: Callable) -> Int[Array, "b most"]:
    """`value(state, i)` [b n]: the higher the better at pick i; `update(state, row [b])` after it."""
    check.count("most", most, 0)
    b, n = candidate.shape
    if not n or not most:
        return jnp.full((b, most), -1, jnp.int32)

    def pick(i, carry):
        free, order, state = carry
        best = jnp.argmax(jnp.where(free, finite(value(state, i)), -jnp.inf), -1).astype(jnp.int32)
        there = jnp.take_along_axis(free, best[:, None], 1)[:, 0]
        free = free & (jnp.arange(n, dtype=jnp.int32)[None] != best[:, None])
        return free, order.at[:, i].set(jnp.where(there, best, -1)), update(state, best)

    return lax.fori_loop(0, min(most, n), pick, (candidate, jnp.full((b, min(most, n)), -1, jnp.int32), start))[1]


def _row(like: Float[Array, "b n n"], i: Int[Array, " b"]) -> Float[Array, "b n"]:
    return jnp.take_along_axis(like, i[:, None, None], 1)[:, 0]


def max_min(distance: Float[Array, "b n n"], candidate: Bool[Array, "b n"], most: int, first: Float[Array, "b n"]) -> Int[Array, "b most"]:
    """First the row of largest `first`, then the one furthest from its nearest picked row."""
    distance = lax.stop_gradient(distance.astype(jnp.float32))
    start = jnp.full(candidate.shape, jnp.inf, jnp.float32)
    value = lambda near, i: jnp.where(i == 0, first.astype(jnp.float32), near)
    return _greedy(candidate, most, start, value, lambda near, j: jnp.minimum(near, _row(distance, j)))


def max_sum(like: Float[Array, "b n n"], candidate: Bool[Array, "b n"], most: int, first: Float[Array, "b n"]) -> Int[Array, "b most"]:
    """First the row of largest `first`, then the one of least summed similarity to the picked rows."""
    like = lax.stop_gradient(like.astype(jnp.float32))
    value = lambda total, i: jnp.where(i == 0, first.astype(jnp.float32), -total)
    return _greedy(candidate, most, jnp.zeros(candidate.shape, jnp.float32), value, lambda total, j: total + _row(like, j))


def facility(like: Float[Array, "b n n"], candidate: Bool[Array, "b n"], most: int, bonus: Float[Array, "b n"]) -> Int[Array, "b most"]:
    """Greedy maximisation of sum_x max_{y picked} like[y, x] + sum_{y picked} bonus_y over the candidates x; similarities >= 0."""
    like = jnp.where(candidate[:, None], lax.stop_gradient(like.astype(jnp.float32)), 0.0)
    value = lambda cover, i: jnp.sum(jnp.maximum(like - cover[:, None], 0.0), -1) + bonus.astype(jnp.float32)
    start = jnp.zeros(candidate.shape, jnp.float32)
    return _greedy(candidate, most, start, value, lambda cover, j: jnp.maximum(cover, _row(like, j)))


def first_far(distance: Float[Array, "b n n"], candidate: Bool[Array, "b n"]) -> Float[Array, "b n"]:
    """Distance of each candidate to its nearest other one, 0 where there is none: what begins a max-min choice."""
    n = candidate.shape[1]
    other = candidate[:, None] & ~jnp.eye(n, dtype=bool)[None]
    near = jnp.min(jnp.where(other, distance.astype(jnp.float32), jnp.inf), -1, initial=jnp.inf)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(near), near, 0.0))
