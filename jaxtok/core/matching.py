"""Who merges with whom: similarity between rows, bipartite matching, and the plan that it makes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.reduce import expand
from jaxtok.core.select import identity
from jaxtok.core.types import SPECIAL, Evidence, Plan, Tokens


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Rows of length one, float32; a zero row stays zero."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    some = square > jnp.finfo(jnp.float32).tiny
    return x * jnp.where(some, lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)  # both, or the gradient of a zero row is NaN


def cosine(a: Float[Array, "*B n d"], b: Float[Array, "*B m d"]) -> Float[Array, "*B n m"]:
    """Cosines of all pairs of rows, float32."""
    return jnp.einsum("...nd,...md->...nm", unit(a), unit(b))


def packed_order(live: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """Live rows first, each side in order: `jnp.take_along_axis(x, packed_order(live), 1)` makes what depends on a row's rank (even or
    odd, the first) independent of the padding before it."""
    return jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)


def mean_keys(evidence: Evidence, order: Int[Array, "b n"] | None = None) -> Float[Array, "b n d"]:
    """Keys averaged over heads, float32; in the order of the rows `order`, if given."""
    metric = jnp.mean(check.given("keys", evidence.keys).astype(jnp.float32), 1)
    return metric if order is None else jnp.take_along_axis(metric, order[..., None], 1)


def bipartite(
    score: Float[Array, "b i j"], source: Bool[Array, "b i"], target: Bool[Array, "b j"], remove: Int[Array, " b"], most: int
) -> tuple[Int[Array, "b i"], Float[Array, "b i"]]:
    """(the target of each row i that goes, -1 where it stays; its best score, -inf where it may not go).

    Each source looks at its best target (ties: the first); the `remove` sources of highest best score go (ties: the first), at most `most`.
    """
    check.count("most", most, 0)
    if score.ndim != 3:
        raise ValueError(f"score is {list(score.shape)}; it must be [b sources targets]")
    if not score.shape[1] or not score.shape[2] or not most:
        return jnp.full(source.shape, -1, jnp.int32), jnp.full(source.shape, -jnp.inf, jnp.float32)
    score = jnp.where(target[:, None], score.astype(jnp.float32), -jnp.inf)
    where, best = jnp.argmax(score, -1).astype(jnp.int32), jnp.max(score, -1)
    best = jnp.where(source, best, -jnp.inf)
    top, index = lax.top_k(best, min(most, best.shape[-1]))
    goes = (top > -jnp.inf) & (lax.broadcasted_iota(jnp.int32, top.shape, 1) < remove[:, None])
    hit = jax.vmap(lambda i: jnp.zeros((best.shape[-1] + 1,), bool).at[i].set(True)[:-1])(jnp.where(goes, index, best.shape[-1]))
    return jnp.where(hit, where, -1), best


def merge_plan(rank: Int[Array, "b n"], into: Int[Array, "b n"], weight: Float[Array, "b n"] | None, m: int) -> Plan:
    """The plan of m rows: those of `rank` >= 0 (all different) in ascending order of it behind empty rows; row j joins row into[j].

    into[j] = j where a row stays, -1 where it is dropped. What m has no room for goes, lowest ranks first, and is counted.
    """
    check.count("m", m, 0)
    n = rank.shape[-1]
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)[:, n - min(m, n) :]
    there = jnp.take_along_axis(rank, order, 1) >= 0
    index = jnp.where(there, order, -1)
    slot = jax.vmap(lambda i: jnp.full((n + 1,), -1, jnp.int32).at[i].set(jnp.arange(i.shape[0], dtype=jnp.int32))[:n])(
        jnp.where(there, order, n)
    )
    assign = jnp.where(into < 0, -1, jnp.take_along_axis(slot, jnp.maximum(into, 0), 1))
    lost = jnp.sum(rank >= 0, -1, dtype=jnp.int32) - jnp.sum(there, -1, dtype=jnp.int32)
    return Plan(index, assign, weight, lost)


def scatter(order: Int[Array, "b n"], x: Array) -> Array:
    """What `take_along_axis(., order, 1)` gathered, back where it was."""
    return jnp.take_along_axis(x, expand(jnp.argsort(order, axis=-1), x), 1)


def movable(tokens: Tokens) -> Bool[Array, "b n"]:
    """Live rows that may be reduced in an encoder: all but those of kind SPECIAL."""
    return (tokens.pos >= 0) & (tokens.kind != SPECIAL)


def removal(
    live: Bool[Array, "b n"], keep: Int[Array, " b"] | None, remove: int, room: int, spare: Int[Array, " b"] | int
) -> Int[Array, " b"]:
    """How many rows go: `remove`, however short the sequence; with a traced budget as many as leave min(keep, room). `spare` at most."""
    if keep is None:
        return jnp.minimum(jnp.full((live.shape[0],), remove, jnp.int32), spare)
    return jnp.clip(jnp.sum(live, -1, dtype=jnp.int32) - jnp.minimum(keep, room), 0, spare)


def by_falling(score: Float[Array, "b n"], among: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The rank of each row `among` by falling score (0 = highest; ties: the first row); the others come behind them."""
    return jnp.argsort(jnp.argsort(jnp.where(among, -score, jnp.inf), axis=-1, stable=True), axis=-1).astype(jnp.int32)


def even_odd(tokens: Tokens, score: Float[Array, "b i j"], remove: Int[Array, " b"], most: int, room: int, sort: bool = False) -> Plan:
    """ToMe's plan: the `remove` best even rows join their best odd ones, weighted by size; what stays of the even rows, then the odd.

    `score` [even, odd] goes by the live rows in order (`packed_order`). `sort`: what stays of the even rows by falling score.
    most=0: nothing moves.
    """
    _, n = tokens.pos.shape
    if not most:
        return identity(tokens.pos.shape)
    order = packed_order(tokens.pos >= 0)
    free, here = (jnp.take_along_axis(x, order, 1) for x in (movable(tokens), tokens.pos >= 0))
    partner, best = bipartite(score, free[:, ::2], free[:, 1::2], remove, most)
    row = jnp.arange(n, dtype=jnp.int32)
    place = jnp.broadcast_to(jnp.where(row % 2 == 0, row, n + row)[None], here.shape)
    if sort:
        place = place.at[:, ::2].set(by_falling(best, jnp.ones(best.shape, bool)))
    goes = jnp.zeros(here.shape, jnp.int32).at[:, ::2].set(partner + 1) - 1
    into = jnp.where(goes >= 0, 2 * goes + 1, row[None])
    rank = jnp.where(here & (goes < 0), place, -1)
    into = jnp.where(here, jnp.take_along_axis(order, into, 1), -1)
    return merge_plan(scatter(order, rank), scatter(order, into), tokens.size, room)


def join(
    tokens: Tokens, score: Float[Array, "b n n"], source, target, remove, most: int, room: int, *, weight: Array, place: Array | None = None
) -> Plan:
    """The `remove` best rows of the mask `source` join their best row of the mask `target` (all [b n]); the others stay, by `place`."""
    row = jnp.broadcast_to(jnp.arange(source.shape[-1], dtype=jnp.int32)[None], source.shape)
    partner, _ = bipartite(score, source, target, remove, most)
    live = tokens.pos >= 0
    rank = jnp.where(live & (partner < 0), row if place is None else place, -1)
    return merge_plan(rank, jnp.where(live, jnp.where(partner >= 0, partner, row), -1), weight, room)
