"""Attention of blocks of queries to listed blocks of keys; a block that is not listed is neither fetched nor computed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok_kernels.block_sparse import xla
from jaxtok_kernels.block_sparse.layout import Spec, Tables

IMPLS = ("pallas_tpu", "pallas_gpu", "interpret", "interpret_gpu", "xla")


def block_sparse(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    block_index: Int[Array, "b e nq m"],
    block_count: Int[Array, "b e nq"],
    *,
    q_pos: Int[Array, "b t"],
    k_pos: Int[Array, "b g s"],
    bias: Float[Array, "b g s"] | None = None,
    token_mask: Bool[Array, "b e nq m block_k"] | None = None,
    block_q: int,
    block_k: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    count: bool = False,
    impl: str,
) -> tuple[Array, ...]:
    """(out [b h t c] in q's dtype, lse f32 [b h t]), and with `count` i32 [b e nq 2].

        listed(i, j)  = j // block_k is one of the first block_count entries of the list of query block i // block_q
        visible(i, j) = listed, token_mask, q_pos[i] >= 0, k_pos[j] >= 0, k_pos[j] <= q_pos[i] if causal, q_pos[i] - k_pos[j] < window
        logit(i, j)   = softcap(scale q_i . k_j) + bias[j],   softcap(x) = c tanh(x / c),   scale None = d ** -0.5
        out_i         = sum_j exp(logit(i, j) - lse_i) v_j,   lse_i = log sum_j exp(logit(i, j)),   both over visible j

    Query head i reads KV head i // (h/g). List j of e serves query heads j h/e .. (j+1) h/e - 1: e = g (a list a KV head, whose query
    heads share every fetch) or e = h, or any multiple of g that divides h. Query block i is rows i * block_q .., nq = ceil(t / block_q); key
    block j is rows j * block_k ..; the two sizes are free. Tables are arrays, made at run time: entries past block_count are ignored, in any
    order, each block listed once. Positions mask within a block: that a list leaves out what no query may see is the caller's saving.
    A row that sees nothing gets 0 and -inf; what lies in dead rows never matters as long as it is finite. Float32 sums; probabilities
    meet v in v's dtype.

    token_mask: [b e nq m block_k], which keys of each listed block the query block sees: what chunks of any length and keys chosen one by
    one need beside positions. It goes with the entries of the list, so it is as sparse as the table; a mask per query row would cost block_q
    times more, and a method that picks keys for each row takes block_q = 1.

    count: i32 [b e nq 2], counted where it happens: tiles computed, and key blocks fetched (K and V of a block are one). A tile is a listed
    block against the query block in all h/e heads. "xla" goes through all m entries of a list, whatever block_count, and says so.

    impl: "pallas_tpu"; "pallas_gpu" (NVIDIA Hopper, 16-bit dtypes); "interpret" and "interpret_gpu" run those two in the Pallas
    interpreter on any machine (the second from jax 0.11.2); "xla": gathers the m blocks of one query block at a time, cost
    proportional to m. Blocks that do not fit the tiles of the machine are rounded up in a copy of q, k, v; see tpu.py, gpu.py.

    Gradients reach q, k, v, bias, from out and lse. The backward pass recomputes the probabilities from lse: dq with the same table, dk, dv and
    dbias with its transpose, 4 b e nk nq bytes beside the arrays; "xla" adds to dk, dv block by block.

    Bytes (e = g): listed blocks of k and v, 8 a listed key for position and bias (12 with a mask), the table, q, out, lse.

    ValueError: shapes, dtypes, options that do not fit. NotImplementedError: the machine's kernel cannot do this.
    """
    (b, h, t, d), (g, s), c, (e, nq, m) = q.shape, k.shape[1:3], v.shape[3], block_index.shape[1:]
    if not g or not e or h % e or e % g:
        raise ValueError(
            f"{e} lists serve {h} query heads and {g} KV heads; the lists must be a multiple of the KV heads and divide the query heads"
        )
    if block_q < 1 or block_k < 1 or nq != -(-t // block_q):
        raise ValueError(
            f"{t} queries in blocks of {block_q} are {-(-t // max(block_q, 1))} blocks, the table has {nq}; block_k is {block_k}"
        )
    fits = q_pos.shape == (b, t) and k_pos.shape == (b, g, s) and block_count.shape == (b, e, nq) and k.shape == (b, g, s, d)
    if not fits or v.shape[:3] != (b, g, s) or (bias is not None and bias.shape != (b, g, s)):
        shapes = [None if x is None else list(x.shape) for x in (q, k, v, block_count, q_pos, k_pos, bias)]
        raise ValueError(f"q [b h t d], k [b g s d], v [b g s c], block_count [b e nq], q_pos [b t], k_pos, bias [b g s] are {shapes}")
    if token_mask is not None and token_mask.shape != (b, e, nq, m, block_k):
        raise ValueError(f"token_mask must be [{b} {e} {nq} {m} {block_k}], got {list(token_mask.shape)}")
    if not (q.dtype == k.dtype == v.dtype) or any(x.dtype != jnp.int32 for x in (block_index, block_count, q_pos, k_pos)):
        kinds = [str(x.dtype) for x in (q, k, v, block_index, block_count, q_pos, k_pos)]
        raise ValueError(
            f"q, k, v share a dtype, table and positions are int32; q, k, v, index, count, q_pos, k_pos are {', '.join(kinds)}"
        )
    if bias is not None and bias.dtype != jnp.float32:
        raise ValueError(f"bias is {bias.dtype}; it must be float32")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window is {window} and softcap {softcap}; each is None or above 0")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    if not m or not s or not q.size or not v.size:
        out = jnp.zeros((b, h, t, c), q.dtype), jnp.full((b, h, t), -jnp.inf, jnp.float32)
        return (*out, jnp.zeros((b, e, nq, 2), jnp.int32)) if count else out
    spec = Spec(block_q, block_k, causal, window, softcap, d**-0.5 if scale is None else scale, count)
    index = jnp.clip(block_index, 0, -(-s // block_k) - 1)
    tables = Tables(index, jnp.clip(block_count, 0, m), q_pos, k_pos, token_mask)
    return _attend(spec, impl, q, k, v, bias, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: Spec, impl: str, q, k, v, bias, tables: Tables):
    return _passes(impl)[0](spec, q, k, v, bias, tables)


def _forward(spec, impl, q, k, v, bias, tables):
    result = _passes(impl)[0](spec, q, k, v, bias, tables)
    return result, (q, k, v, bias, tables, *result[:2])


def _backward(spec, impl, saved, cotangents):
    q, k, v, bias, tables, out, lse = saved
    live = lse > -jnp.inf
    # A row that sees nothing is a constant: its cotangents, which may be NaN (log 0, 0/0 in the caller), stop here.
    dout = jnp.where(live[..., None], cotangents[0], 0).astype(v.dtype)
    dlse = jnp.where(live, cotangents[1], 0)
    return *_passes(impl)[1](spec, q, k, v, bias, tables, out, lse, dout, dlse), None


_attend.defvjp(_forward, _backward)


def _passes(impl: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of an implementation; a kernel's modules are imported when it is used."""
    if impl == "xla":
        return xla.forward, xla.backward
    if impl.endswith("gpu"):
        from jaxtok_kernels.block_sparse import gpu as ahead
        from jaxtok_kernels.block_sparse import gpu_grad as back
    else:
        from jaxtok_kernels.block_sparse import tpu as ahead
        from jaxtok_kernels.block_sparse import tpu_grad as back
    interpret = impl.startswith("interpret")
    return functools.partial(ahead.forward, interpret=interpret), functools.partial(back.backward, interpret=interpret)
