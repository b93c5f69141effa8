"""Ulysses, USP and gathered keys: each device sees whole sequences of some heads, or all keys."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops.attention import attention
from jaxtok.parallel.ring import ring_attention
from jaxtok.parallel.tiles import Sight


def ulysses_attention(
    q: Float[Array, "b h c d"],
    k: Float[Array, "b g c d"],
    v: Float[Array, "b g c e"],
    *,
    q_pos: Int32[Array, "b c"],
    k_pos: Int32[Array, "b c"] | Int32[Array, "b g c"],
    axis: str,
    ring: str | None = None,
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
    """As `ring_attention` (arguments, result), by exchanging tokens for heads: all-to-all, attention of h / n whole heads, all-to-all back.

    h must be a multiple of n; g KV heads that are not are repeated to the least common multiple first. `ring`: the second mesh axis of USP, over
    which the n shards together are one of several and ring attention runs in this `layout`; shards are cut over (ring, axis), in this order.

    Traffic, sent by each device: (n - 1) / n of its q, k, v, out, lse and bias, and (n - 1) x its positions and segments; the ring's besides.

    Raises:
      ValueError: h is no multiple of n; what `ring_attention` refuses.

    Source: DeepSpeed Ulysses, arXiv:2309.14509; USP, arXiv:2405.07719.
    """
    Sight(layout=layout, causal=causal, window=window, softcap=softcap, scale=scale)
    n, (h, g) = lax.axis_size(axis), (q.shape[1], k.shape[1])
    if h % n:
        raise ValueError(f"{h} query heads cannot be shared by {n} devices; use ring attention")
    wide = math.lcm(g, n) // g
    if h % (g * wide):
        raise ValueError(f"{g} KV heads, {wide} times each for {n} devices, do not divide {h} query heads; use ring attention")
    repeat = lambda x: x if x is None or wide == 1 else jnp.repeat(x, wide, 1)

    def heads(x) -> Any:
        return None if x is None else lax.all_to_all(x, axis, 1, 2, tiled=True)

    def every(x) -> Any:
        return None if x is None else lax.all_gather(x, axis, axis=1, tiled=True)

    k_all = heads(repeat(k_pos)) if k_pos.ndim == 3 else every(k_pos)
    given: dict[str, Any] = dict(
        q_pos=every(q_pos), k_pos=k_all, bias=heads(repeat(bias)), q_segment=every(q_segment), k_segment=every(k_segment)
    )
    given |= dict(causal=causal, window=window, softcap=softcap, scale=scale, out_dtype=out_dtype)
    rows = heads(q), heads(repeat(k)), heads(repeat(v))
    if ring is not None:
        out, lse = ring_attention(*rows, axis=ring, layout=layout, **given)
    else:
        out, lse = attention(*rows, diagonal=0 if causal and layout == "contiguous" else None, **given)
    home = lambda x: lax.all_to_all(x, axis, 2, 1, tiled=True)
    return home(out), home(lse)


def gathered_attention(
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
    """As `ring_attention` (arguments, result), with the keys of all devices gathered, one KV head after another.

    One call of the kernel a head, no merging; a device holds all n c keys of one head at a time.

    Traffic, sent by each device, of n devices: (n - 1) x its k, v, k_pos, bias and k_segment.

    Source: Llama 3, arXiv:2407.21783, section 3.3.2.
    """
    Sight(layout=layout, causal=causal, window=window, softcap=softcap, scale=scale)
    (b, h, c, d), g = q.shape, k.shape[1]

    def every(x, at: int) -> Any:
        return None if x is None else lax.all_gather(x, axis, axis=at, tiled=True)

    shared_pos = every(k_pos, 1) if k_pos.ndim == 2 else None
    segment = every(k_segment, 1)

    def one(head):
        q, k, v, pos, bias = head
        pos = shared_pos if pos is None else every(pos, 1)[:, None]
        bias = None if bias is None else every(bias, 1)[:, None]
        see: dict[str, Any] = dict(q_pos=q_pos, k_pos=pos, bias=bias, q_segment=q_segment, k_segment=segment)
        keys = every(k, 1)[:, None], every(v, 1)[:, None]
        return attention(q, *keys, causal=causal, window=window, softcap=softcap, scale=scale, out_dtype=out_dtype, **see)

    first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
    heads = first(q.reshape(b, g, h // g, c, d)), first(k), first(v), first(k_pos) if k_pos.ndim == 3 else None, first(bias)
    out, lse = jax.lax.map(one, heads)
    return jnp.moveaxis(out, 0, 1).reshape(b, h, c, -1), jnp.moveaxis(lse, 0, 1).reshape(b, h, c)
