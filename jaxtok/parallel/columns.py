"""Attention that each key receives, over a sequence that several devices share: the sums travel with their keys."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops.evidence import received
from jaxtok.parallel.tiles import Keys, Queries, Sight, over, sides


def ring_received(
    q: Float[Array, "b h c d"],
    k: Float[Array, "b g c d"],
    lse: Float32[Array, "b h c"],
    *,
    q_pos: Int32[Array, "b c"],
    k_pos: Int32[Array, "b c"] | Int32[Array, "b g c"],
    axis: str,
    layout: str = "contiguous",
    bias: Float32[Array, "b g c"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float32[Array, "b h c"]:
    """`jaxtok.ops.evidence.received` of each device's keys from the queries of all; lse and arguments as of `ring_attention`.

    Traffic, sent by each device, of n devices: (n - 1) x bytes of (k, k_pos, bias) and n x 4 b h c.
    """
    sight = Sight(layout=layout, causal=causal, window=window, softcap=softcap, scale=scale)
    queries, keys = sides(sight, q, k, k[..., :0], q_pos, k_pos, bias, None, None)
    n = lax.axis_size(axis)
    visiting = over(keys, axis, 1)
    total = _sums(sight, queries, keys, lse, own=True)
    if n == 1:
        return total

    def step(state, s):
        total, keys = state
        onward, total = over(keys, axis, 1), over(total, axis, 1)
        return (total + _sums(sight, queries, keys, lse), onward), None

    (total, visiting), _ = lax.scan(step, (total, visiting), jnp.arange(1, n - 1, dtype=jnp.int32))
    return over(over(total, axis, 1) + _sums(sight, queries, visiting, lse), axis, 1)


def _sums(sight: Sight, queries: Queries, keys: Keys, lse: Array, own: bool = False) -> Array:
    see: dict[str, Any] = dict(q_pos=queries.pos, k_pos=keys.pos, bias=keys.bias, causal=sight.causal, window=sight.window)
    return received(queries.q, keys.k, lse, softcap=sight.softcap, scale=sight.scale, diagonal=sight.diagonal(own), **see)
