"""A layer's attention through a sparsifier's table: rows aligned, listed, attended, put back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int

from jaxtok.core.sparsifier import Sparsifier, View
from jaxtok.ops.attention import Impl, Shared, attention
from jaxtok.ops.block_sparse import block_sparse


def attend(
    method: Sparsifier | None,
    params,
    layer: int,
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n d"],
    pos: Int[Array, "b n"],
    *,
    bias: Float32[Array, "b g n"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "b h n d"], Float32[Array, "b h n"]]:
    """Causal attention among packed rows (dead first, live last), by `method`'s table; plain where it is None or reads everything.

    The table is made of rows aligned to their first live one, so what a sequence attends to does not depend on how it was padded.
    """
    n, see = pos.shape[1], dict[str, Any](window=window, softcap=softcap, scale=scale)
    if method is None or method.whole(n):
        return attention(q, k, v, q_pos=pos, k_pos=pos, bias=bias, diagonal=0, impl=impl, **see)
    if isinstance(impl, Shared):
        raise ValueError(f"{method.name} lists the keys of whole sequences; run it on one device, or leave it out of the recipe")
    view = aligned(q, k, pos, layer, impl=impl, **see)
    there, back = _turns(pos)
    values, extra = _move(v, there), None if bias is None else _move(bias, there)
    table = method.table(params, view._replace(q=jax.lax.stop_gradient(view.q), k=jax.lax.stop_gradient(view.k)))
    blocks = dict[str, Any](block_q=method.block_q, block_k=method.block_k)
    out, lse = block_sparse(view.q, view.k, values, table, q_pos=view.pos, k_pos=view.pos, bias=extra, impl=impl, **blocks, **see)
    out, lse = _move(out, back), _move(lse, back)
    tail = min(method.tail, n)
    if not tail:
        return out, lse
    last = attention(q[:, :, -tail:], k, v, q_pos=pos[:, -tail:], k_pos=pos, bias=bias, diagonal=n - tail, impl=impl, **see)
    return jnp.concatenate([out[:, :, :-tail], last[0]], 2), jnp.concatenate([lse[:, :, :-tail], last[1]], 2)


def aligned(q: Float[Array, "b h n d"], k: Float[Array, "b g n d"], pos: Int[Array, "b n"], layer: int = 0, **see: Any) -> View:
    """What a sparsifier is told of packed rows (dead first, live last): the live ones first. `see`: fields of View."""
    there, _ = _turns(pos)
    return View(_move(q, there), _move(k, there), _move(pos, there), layer, **see)


def _turns(pos: Int[Array, "b n"]) -> tuple[Array, Array]:
    """i32 [b n] each: the packed row that each aligned row is, and back."""
    n, dead = pos.shape[1], jnp.sum(pos < 0, -1, keepdims=True, dtype=jnp.int32)
    row = jnp.arange(n, dtype=jnp.int32)[None]
    return (row + dead) % n, (row - dead) % n


def _move(x: Array, at: Int[Array, "b n"]) -> Array:
    """Rows `at` of x [b n], [b e n] or [b e n d]."""
    b, n = at.shape
    axis = 1 + (x.ndim > 2)
    return jnp.take_along_axis(x, at.reshape(b, *(1,) * (axis - 1), n, *(1,) * (x.ndim - axis - 1)), axis)
