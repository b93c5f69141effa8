"""Which rows stay: scores to masks, masks to plans of static size."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.types import Plan

NEG = jnp.finfo(jnp.float32).min  # the lowest score that a live row can have; -inf is left to rows that may not be chosen


def finite(score: Float[Array, "*B n"]) -> Float[Array, "*B n"]:
    """Scores as float32 inside the finite range; NaN counts as the lowest."""
    score = score.astype(jnp.float32)
    return jnp.clip(jnp.where(jnp.isnan(score), NEG, score), NEG, -NEG)


def choose(
    score: Float[Array, "*B n"],
    live: Bool[Array, "*B n"],
    keep: int | Int[Array, "*B"],
    protect: Bool[Array, "*B n"] | None = None,
    most: int | None = None,
) -> Bool[Array, "*B n"]:
    """Mask of the protected live rows and of the `keep` best other live rows (ties: the older row).

    `keep` may be traced; `most` is its static upper bound (default: n). NaN scores count as the lowest.
    """
    n = score.shape[-1]
    if isinstance(keep, int):
        check.count("keep", keep, 0)
        most = keep if most is None else min(most, keep)
    most = n if most is None else min(most, n)
    candidate = live if protect is None else live & ~protect
    always = live & ~candidate
    if most <= 0:
        return always
    top, where = lax.top_k(jnp.where(candidate, finite(score), -jnp.inf), most)
    count = jnp.broadcast_to(jnp.asarray(keep, jnp.int32), top.shape[:-1])
    ok = (top > -jnp.inf) & (lax.broadcasted_iota(jnp.int32, top.shape, top.ndim - 1) < count[..., None])
    return always | mark(jnp.where(ok, where, n), n)


def mark(index: Int[Array, "*B m"], n: int) -> Bool[Array, "*B n"]:
    """Mask of the rows named by `index`; entries outside 0..n-1 name none."""
    check.count("n", n, 0)
    flat = jnp.where((index < 0) | (index > n), n, index).reshape(math.prod(index.shape[:-1]), index.shape[-1])
    hit = jax.vmap(lambda i: jnp.zeros((n + 1,), bool).at[i].set(True)[:n])(flat)
    return hit.reshape((*index.shape[:-1], n))


def pack(mask: Bool[Array, "*B n"], cap: int | None = None, score: Float[Array, "*B n"] | None = None) -> Plan:
    """The masked rows in order, dead rows first, in `cap` static rows (default n).

    Where more than `cap` rows are masked, the lowest scores go first (give protected rows +inf), then the oldest; what goes is
    counted in `plan.lost`.
    """
    n = mask.shape[-1]
    if cap is not None:
        check.count("cap", cap, 0)
    cap = n if cap is None else min(cap, n)
    lost = jnp.maximum(jnp.sum(mask, -1, dtype=jnp.int32) - cap, 0)
    if score is not None and cap < n:
        rank = jnp.where(mask, jnp.where(jnp.isnan(score), NEG, jnp.maximum(score.astype(jnp.float32), NEG)), -jnp.inf)
        top, where = lax.top_k(rank[..., ::-1], cap)  # reversed: of equal scores the newer row stays
        mask = mark(jnp.where(top > -jnp.inf, n - 1 - where, n), n)
    row = lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    index = jnp.sort(jnp.where(mask, row, -1), axis=-1)[..., n - cap :]
    upto = jnp.cumsum(mask.astype(jnp.int32), axis=-1)
    first = cap - upto[..., -1:]
    assign = jnp.where(mask & (first + upto > 0), first + upto - 1, -1)
    return Plan(index, assign, None, lost)


def from_index(index: Int[Array, "*B m"], n: int) -> Plan:
    """The selection that row i of the result takes from row `index[i]` (-1 = empty); indices are distinct."""
    check.count("n", n, 0)
    m = index.shape[-1]
    flat = jnp.where(index < 0, n, index).reshape(math.prod(index.shape[:-1]), m)
    assign = jax.vmap(lambda i: jnp.full((n + 1,), -1, jnp.int32).at[i].set(jnp.arange(m, dtype=jnp.int32))[:n])(flat)
    return Plan(index.astype(jnp.int32), assign.reshape((*index.shape[:-1], n)), None, jnp.zeros(index.shape[:-1], jnp.int32))


def identity(shape: tuple[int, ...]) -> Plan:
    """The plan that leaves rows of shape [*B n] as they are."""
    check.kind("shape", shape, tuple)
    if not shape:
        raise ValueError("shape must name the row axis last, [*B n]; got ()")
    row = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    return Plan(row, row, None, jnp.zeros(shape[:-1], jnp.int32))


def group_ranks(score: Float[Array, "b n"], group: Int[Array, "b n"], candidate: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """How many candidates of the same group score higher (ties: the older row is higher); n for what is no candidate."""
    n = score.shape[-1]
    key = jnp.where(candidate, group, jnp.iinfo(jnp.int32).max)
    order = jnp.lexsort((-finite(score), key), axis=-1)
    by = jnp.take_along_axis(key, order, -1)
    row = lax.broadcasted_iota(jnp.int32, by.shape, 1)
    new = jnp.concatenate([jnp.ones_like(by[:, :1], bool), by[:, 1:] != by[:, :-1]], 1)
    rank = row - lax.cummax(jnp.where(new, row, 0), axis=1)
    return jnp.where(candidate, jnp.take_along_axis(rank, jnp.argsort(order, axis=-1), -1), n)


def choose_groups(score, group: Int[Array, "b n"], candidate: Bool[Array, "b n"], share: Int[Array, "b p"]) -> Bool[Array, "b n"]:
    """Mask of the share[b, p] best candidates of each group p in 0..p-1 (ties: the older row)."""
    if not share.shape[-1]:
        return jnp.zeros(candidate.shape, bool)
    inside = candidate & (group >= 0) & (group < share.shape[-1])
    most = jnp.take_along_axis(share, jnp.clip(group, 0, share.shape[-1] - 1), 1)
    return inside & (group_ranks(score, group, inside) < most)


def first_picks(order: Int[Array, "b m"], keep: Int[Array, " b"], n: int) -> Bool[Array, "b n"]:
    """Mask of the first `keep` rows that `order` names; -1 names none."""
    there = (order >= 0) & (lax.broadcasted_iota(jnp.int32, order.shape, 1) < keep[:, None])
    return mark(jnp.where(there, order, -1), n)
