"""Ring attention: keys and values travel around the devices, each of which attends to what is there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops.attention import merge
from jaxtok.parallel.tiles import Keys, Queries, Sight, attend, backward, over, sides


def ring_attention(
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
    """`jaxtok.ops.attention.attention` over a sequence that the devices of a mesh axis share; call it inside shard_map or pmap.

    Each device passes the c tokens that it holds, with their positions in the whole sequence, and gets their outputs. In step s = 0 .. n - 1 it
    attends to the keys of device (rank - s) mod n, merged by their logsumexp (in float32); then the keys go on to the next one. Rows that
    are dead (-1), packed sequences (segments), windows and grouped heads are as in `attention`.

    layout: how the sequence was cut (`Layout`). "contiguous": with a causal mask device r has r + 1 of n shards to attend to, and blocks that
      cannot be seen are skipped as the program runs, so the last device sets the time. "striped": each step is a triangle. "zigzag", causal:
      a step is two tiles of half a shard squared for every device, picked without branches. Positions must rise with the rows of the layout.

    Traffic, sent by each device, of n devices: forward (n - 1) x bytes of (k, v, k_pos, bias, k_segment); backward the same, and
    n x 4 bytes x (k, v, bias) for their gradients. Only KV heads travel. The backward pass keeps q, k, v, out and lse of its own tokens.

    Raises:
      ValueError: the layout or the window is none; zigzag with an odd c; what `attention` refuses.

    Source: Ring Attention, arXiv:2310.01889 (backward with the saved logsumexp); zigzag tiles: zhuzilin/ring-flash-attention.
    """
    sight = Sight(layout=layout, causal=causal, window=window, softcap=softcap, scale=scale)
    both: Any = _ring(sight, axis, *sides(sight, q, k, v, q_pos, k_pos, bias, q_segment, k_segment))
    out, lse = both
    return out.astype(q.dtype if out_dtype is None else out_dtype), lse


def _forward(sight: Sight, axis: str, queries: Queries, keys: Keys) -> tuple[Array, Array]:
    n, rank = lax.axis_size(axis), lax.axis_index(axis)
    visiting = over(keys, axis, 1)  # asked for before the work that it can hide behind
    out, lse = attend(sight, queries, keys, rank, rank, own=True)
    if n == 1:
        return out, lse

    def step(state, s):
        out, lse, keys = state
        onward = over(keys, axis, 1)
        return (*merge(out, lse, *attend(sight, queries, keys, rank, (rank - s) % n)), onward), None

    (out, lse, visiting), _ = lax.scan(step, (out, lse, visiting), jnp.arange(1, n - 1, dtype=jnp.int32))
    return merge(out, lse, *attend(sight, queries, visiting, rank, (rank + 1) % n))  # nobody needs these keys next


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(sight: Sight, axis: str, queries: Queries, keys: Keys):
    return _forward(sight, axis, queries, keys)


def _save(sight, axis, queries, keys):
    out, lse = _forward(sight, axis, queries, keys)
    return (out, lse), (queries, keys, out, lse)


def _back(sight: Sight, axis: str, kept, cotangents) -> tuple[Any, Any]:
    queries, keys, out, lse = kept
    n, rank = lax.axis_size(axis), lax.axis_index(axis)
    saved = out, lse, *cotangents
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    visiting = over(keys, axis, 1)
    dq, *dkeys = backward(sight, queries, keys, saved, rank, rank, own=True)
    if n > 1:

        def step(state, s):
            dq, dkeys, keys = state
            onward, dkeys = over(keys, axis, 1), over(dkeys, axis, 1)
            to_q, *to_keys = backward(sight, queries, keys, saved, rank, (rank - s) % n)
            return (dq + to_q, add(dkeys, to_keys), onward), None

        (dq, dkeys, visiting), _ = lax.scan(step, (dq, dkeys, visiting), jnp.arange(1, n - 1, dtype=jnp.int32))
        to_q, *to_keys = backward(sight, queries, visiting, saved, rank, (rank + 1) % n)
        dq, dkeys = dq + to_q, over(add(over(dkeys, axis, 1), to_keys), axis, 1)  # the last step takes them home
    dk, dv, dbias = dkeys
    return (
        Queries(dq.astype(queries.q.dtype), None, None),  # type: ignore[arg-type]
        Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, dbias, None),  # type: ignore[arg-type]
    )


_ring.defvjp(_save, _back)
