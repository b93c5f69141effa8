"""Attention of blocks of queries to listed blocks of keys, and the estimate of a block's weight in few bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtok_kernels.block_sparse import block_sparse as _kernel
from jaxtok_kernels.scores import low_bit as _estimate
from jaxtok_kernels.scores import reference
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxtok.core import check
from jaxtok.core.types import BlockTable
from jaxtok.ops._impl import chosen, unfit
from jaxtok.ops.attention import attention
from jaxtok.ops.evidence import rows

TILE = 256  # rows and keys that XLA estimates at once


def block_sparse(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    table: BlockTable,
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    block_q: int,
    block_k: int,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b h t c"], Float32[Array, "b h t"]]:
    """`ops.attention.attention` over the pairs that `table` lists: (out in q's dtype, logsumexp f32 of the listed logits).

    Queries r * block_q .. of list i attend to keys j * block_k .. of each listed block j, as far as positions (and `table.mask`) let them.
    A table that lists every block is plain attention; a query that sees nothing gets out 0 and lse -inf. Neither t nor s need be multiples
    of the blocks. Nothing of size t x s is kept. Gradients reach q, k, v and bias; the table has none.

    impl: "xla"; a kernel of `jaxtok_kernels.block_sparse`: "pallas_tpu", "pallas_gpu", "interpret", "interpret_gpu"; "auto": as in `attention`.
    XLA goes through all m entries of a list whatever `count` says, so its time follows the static m.

    Raises:
      ValueError: shapes, dtypes, sizes or impl are wrong.
      NotImplementedError: the kernel named by `impl` cannot do what is asked.
    """
    if isinstance(window, jax.Array):
        raise ValueError("a block-sparse window is a static int or None, not an array")
    kind = chosen("block_sparse", impl, unfit=unfit(q, k, v))
    k_pos = k_pos if k_pos.ndim == 3 else jnp.broadcast_to(k_pos[:, None], (k.shape[0], k.shape[1], k_pos.shape[1]))
    see: dict[str, Any] = dict(q_pos=q_pos, k_pos=k_pos, bias=bias, causal=causal, window=window, softcap=softcap, scale=scale)
    out, lse, *_ = _kernel(
        q, k, v, table.index, table.count, token_mask=table.mask, block_q=block_q, block_k=block_k, impl=kind, **see
    )  # fmt: skip
    return out, lse


def listed(table: BlockTable, *, t: int, s: int, block_q: int, block_k: int) -> Bool[Array, "b e t s"]:
    """Which pairs of queries and keys a table lists, before any causal mask: for tests, pictures and counts of short sequences."""
    check.count("block_q", block_q)
    check.count("block_k", block_k)
    b, e, nq, m = table.index.shape
    nk = -(-s // block_k)
    if nq != -(-t // block_q):
        raise ValueError(f"{t} queries in blocks of {block_q} are {-(-t // block_q)} blocks, the table has {nq}")
    used = jnp.arange(m, dtype=jnp.int32)[None, None, None] < table.count[..., None]
    keys = jnp.broadcast_to(used[..., None], (b, e, nq, m, block_k))
    keys = keys if table.mask is None else keys & table.mask
    at = jnp.where(used, jnp.clip(table.index, 0, nk - 1), nk)
    b_, e_, q_ = (x[..., None] for x in jnp.indices((b, e, nq), sparse=True))
    found = jnp.zeros((b, e, nq, nk + 1, block_k), bool).at[b_, e_, q_, at].set(keys)[:, :, :, :nk]
    return jnp.repeat(found.reshape(b, e, nq, nk * block_k)[..., :s], block_q, 2)[:, :, :t]


def density(table: BlockTable, pos: Int32[Array, "b n"], *, block_q: int, block_k: int) -> Float32[Array, "b e"]:
    """The share of the causal blocks of live rows (the first of `pos`) that each list reads: 1 is plain attention. Blocks count whole."""
    check.count("block_q", block_q)
    check.count("block_k", block_k)
    nq, nk = -(-pos.shape[1] // block_q), -(-pos.shape[1] // block_k)
    length = jnp.sum(pos >= 0, -1, dtype=jnp.int32)[:, None, None, None]
    first = (jnp.arange(nq, dtype=jnp.int32) * block_q)[None, None, :, None]
    last = jnp.minimum(first + block_q, length) - 1
    index = jnp.where(table.index >= 0, table.index, nk) * block_k
    used = jnp.arange(table.index.shape[3], dtype=jnp.int32)[None, None, None] < table.count[..., None]
    read = jnp.sum(used & (first <= last) & (index <= last), (2, 3)).astype(jnp.float32)
    start = (jnp.arange(nk, dtype=jnp.int32) * block_k)[None, None, None]
    return read / jnp.maximum(jnp.sum((first <= last) & (start <= last), (2, 3)).astype(jnp.float32), 1.0)


def lines(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    pos: Int32[Array, "b n"],
    *,
    last: int,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Float32[Array, "b h n"], Float32[Array, "b h n"]]:
    """(vertical, slash): the attention of the `last` live rows (live ones first) summed by key and by distance, in rows.

    A = softmax of those rows;   vertical_j = sum_i A_ij,   slash_o = sum_i A_i,i-o
    """
    check.count("last", last)
    n = q.shape[2]
    w = min(last, n)
    at = jnp.sum(pos >= 0, -1, keepdims=True, dtype=jnp.int32) - w + jnp.arange(w, dtype=jnp.int32)[None]  # below 0: no such row
    there, at = at >= 0, jnp.maximum(at, 0)
    q = jnp.take_along_axis(q, at[:, None, :, None], 2)
    mine = jnp.where(there, jnp.take_along_axis(pos, at, 1), -1)
    see: dict[str, Any] = dict(q_pos=mine, k_pos=pos, window=window, softcap=softcap, scale=scale)
    found = rows(q, k, attention(q, k, k[..., :1], impl=impl, **see)[1], **see)
    key = at[:, :, None] - jnp.arange(n, dtype=jnp.int32)[None, None]  # of each row, the key at each distance
    slanted = jnp.take_along_axis(found, jnp.broadcast_to(jnp.maximum(key, 0)[:, None], found.shape), 3)
    return jnp.sum(found, 2), jnp.sum(jnp.where((key >= 0)[:, None], slanted, 0.0), 2)


def low_bit(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b g s"],
    lse: Float32[Array, "b h t"] | None = None,
    block_q: int = 64,
    block_k: int = 32,
    tile: int = 16,
    bits: int = 4,
    scale: float,
    diagonal: int | None = None,
    impl: str = "auto",
) -> Float32[Array, "b h x y"]:
    """The largest estimated logit of each block of queries with each block of keys, less the queries' `lse`: see `jaxtok_kernels.scores.low_bit`.

        out_xy = max over the visible pairs of the block of  scale (dq_i dk_j (q code_i . k code_j) + mean q . k'_j + q_i . mean k) - lse_i

    XLA makes the same codes and goes through tiles of about TILE rows by TILE keys, in the time that exact logits take.
    diagonal: row i sees no key behind row i + diagonal of k (static, the caller's word): tiles beyond are not made. None = any key.

    Raises:
      ValueError: shapes, sizes or impl are wrong.
    """
    kind = chosen("low_bit", impl, unfit=unfit(q, k))
    see: dict[str, Any] = dict(block_q=block_q, block_k=block_k, tile=tile, bits=bits, scale=scale)
    if kind != "xla":
        return _estimate(q, k, q_pos, k_pos, lse, impl=kind, **see)
    (b, h, t, d), (g, s) = q.shape, k_pos.shape[1:]
    if not g or h % g or k.shape != (b, g, s, d) or q_pos.shape != (b, t) or (lse is not None and lse.shape != (b, h, t)):
        shapes = [None if x is None else list(x.shape) for x in (q, k, q_pos, k_pos, lse)]
        raise ValueError(f"q, k, q_pos, k_pos, lse are {shapes}; they must be [b h t d], [b g s d], [b t], [b g s], [b h t]")
    for name, size, least, most in (
        ("block_q", block_q, 1, 2**16),
        ("block_k", block_k, 1, 512),
        ("tile", tile, 1, 2**16),
        ("bits", bits, 2, 8),
    ):
        if not least <= size <= most:
            raise ValueError(f"{name} must be in {least} to {most}, got {size}")
    if not q.size or not s:
        return jnp.full((b, h, -(-t // block_q), -(-s // block_k)), -jnp.inf, jnp.float32)
    code = reference.quantised(q, k, q_pos, k_pos, block_k=block_k, tile=tile, bits=bits)
    shift = -scale * code.kq if lse is None else jnp.maximum(lse, -reference.HUGE) - scale * code.kq
    x, y = max(1, TILE // block_q), max(1, TILE // block_k)  # blocks of a tile
    by_head = lambda a: _cut(a.reshape(b, g, h // g, *a.shape[2:]), 3, x * block_q)
    queries, step, shift, at = by_head(code.q), scale * by_head(code.dq), by_head(shift), _cut(q_pos, 1, x * block_q, -1)
    keys, width = _cut(code.k, 2, y * block_k), _cut(code.dk, 2, y * block_k)
    mean, of = scale * _cut(code.qk.reshape(b, g, h // g, s), 3, y * block_k), _cut(k_pos, 2, y * block_k, -1)
    tiles = at.shape[1] // (x * block_q), of.shape[2] // (y * block_k)
    last = lambda i: s if diagonal is None else min((i + 1) * x * block_q, t) - 1 + diagonal
    listed = np.asarray([(i, j) for i in range(tiles[0]) for j in range(tiles[1]) if j * y * block_k <= last(i)], np.int32).reshape(-1, 2)

    def one(tile):
        mine = lambda a, axis: lax.dynamic_slice_in_dim(a, tile[0] * x * block_q, x * block_q, axis)
        its = lambda a, axis: lax.dynamic_slice_in_dim(a, tile[1] * y * block_k, y * block_k, axis)
        dot = jnp.einsum("bgqtd,bgsd->bgqts", mine(queries, 3).astype(jnp.float32), its(keys, 2).astype(jnp.float32))  # below 2^24: exact
        logit = dot * mine(step, 3)[..., None] * its(width, 2)[:, :, None, None]
        logit = logit + its(mean, 3)[:, :, :, None] - mine(shift, 3)[..., None]
        there = its(of, 2)[:, :, None, None]
        seen = (there >= 0) & (there <= mine(at, 1)[:, None, None, :, None])
        best = jnp.max(jnp.where(seen, logit, -jnp.inf).reshape(b, g, h // g, x, block_q, y * block_k), 4)
        return jnp.max(best.reshape(b, g, h // g, x, y, block_k), -1)

    out = jnp.full((*tiles, b, g, h // g, x, y), -jnp.inf, jnp.float32)
    out = out.at[listed[:, 0], listed[:, 1]].set(lax.map(one, jnp.asarray(listed)))
    out = jnp.moveaxis(out, (0, 1), (3, 5)).reshape(b, h, tiles[0] * x, tiles[1] * y)
    return out[:, :, : -(-t // block_q), : -(-s // block_k)]


def _cut(x: Array, axis: int, block: int, fill: Any = 0) -> Array:
    """x with an axis filled up to whole blocks."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pad, constant_values=fill)
