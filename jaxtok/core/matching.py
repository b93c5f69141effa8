"""Who merges with whom: similarity between rows, bipartite matching, and the plan that it makes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.reduce import expand
from jaxtok.core.types import Plan


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Rows of length one, float32; a zero row stays zero."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), jnp.finfo(jnp.float32).tiny))


def cosine(a: Float[Array, "*B n d"], b: Float[Array, "*B m d"]) -> Float[Array, "*B n m"]:
    """Cosines of all pairs of rows, float32."""
    return jnp.einsum("...nd,...md->...nm", unit(a), unit(b))


def packed_order(live: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """Live rows first, each side in order: `jnp.take_along_axis(x, packed_order(live), 1)` makes what depends on a row's rank (even or
    odd, the first) independent of the padding before it."""
    return jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)


def bipartite(
    score: Float[Array, "b i j"], source: Bool[Array, "b i"], target: Bool[Array, "b j"], remove: Int[Array, " b"], most: int
) -> tuple[Int[Array, "b i"], Float[Array, "b i"]]:
    """(the target of each row i that goes, -1 where it stays; its best score, -inf where it may not go).

    Each source looks at its best target (ties: the first); the `remove` sources of highest best score go (ties: the first), at most `most`.
    """
    check.count("most", most, 0)
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
