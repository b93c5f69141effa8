"""TokenRing: queries travel one way around the devices, and what was made of them goes straight home the other way."""

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops.attention import merge
from jaxtok.parallel.tiles import Sight, attend, over, sides


def token_ring_attention(
    q: Float[Array, "b h c d"],
    k: Float[Array, "b g c d"],
    v: Float[Array, "b g c e"],
    *,
    q_pos: Int32[Array, "b c"],
    k_pos: Int32[Array, "b c"] | Int32[Array, "b g c"],
    axis: str,
    layout: str = "contiguous",
    bias: Float32[Array, "b g c"] | None = None,
    q_segment: Int32[Array, "b c"] | None = None,
    k_segment: Int32[Array, "b c"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    out_dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "b h c e"], Float32[Array, "b h c"]]:
    """As `ring_attention` (arguments, layouts, result), with keys and values that stay at home.

    In step s a device holds the queries of device (rank + s) mod n and sends their (out, lse) s devices on, directly to their owner,
    which merges them: on full-duplex links of a full mesh both directions are used at once. The paper sends the second half of the queries
    only, once the first has nothing more to see; devices that run one program send arrays of one shape, so here all of them travel.

    Traffic, sent by each device, of n devices: forward (n - 1) x bytes of (q, q_pos, q_segment), and (n - 1) x 4 bytes x (out, lse) against them. All query heads travel: with g KV
    heads of h, ring attention moves about g / h of that. Gradients by JAX's own rules, which keep the visiting queries: O(n c) memory.

    Source: TokenRing, arXiv:2412.20501 (forward only there).
    """
    sight = Sight(layout=layout, causal=causal, window=window, softcap=softcap, scale=scale)
    queries, keys = sides(sight, q, k, v, q_pos, k_pos, bias, q_segment, k_segment)
    n, rank = lax.axis_size(axis), lax.axis_index(axis)
    onward = over(queries, axis, -1)
    out, lse = attend(sight, queries, keys, rank, rank, own=True)
    for s in range(1, n):  # unrolled: the distance home differs from step to step
        queries = onward
        onward = over(queries, axis, -1) if s < n - 1 else queries
        out, lse = merge(out, lse, *over(attend(sight, queries, keys, (rank + s) % n, rank), axis, s))
    return out.astype(q.dtype if out_dtype is None else out_dtype), lse
