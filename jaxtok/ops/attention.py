"""Grouped-query attention over positions, with its logsumexp, in memory O(block); and the monoid that merges partial results."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtok_kernels.flash import flash
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops._chunked import (
    Spec,
    add,
    as_static,
    as_window,
    check,
    dot,
    finite,
    fold,
    group,
    level,
    logits,
    make_spec,
    pad,
    prepare,
    probs,
    put,
    take,
    unfold,
    walk,
)
from jaxtok.ops._impl import chosen, settings, unfit
from jaxtok.ops._shared import Impl, Shared


def attention(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    q_segment: Int32[Array, "b t"] | None = None,
    k_segment: Int32[Array, "b s"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
    out_dtype: DTypeLike | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "b h t c"], Float32[Array, "b h t"]]:
    """Attention of queries to the keys that their positions let them see, and the logsumexp of the logits.

        visible(i, j) = q_pos[i] >= 0 and k_pos[j] >= 0 and (not causal or k_pos[j] <= q_pos[i])
                        and (window is None or q_pos[i] - k_pos[j] < window) and q_segment[i] == k_segment[j]
        logit(i, j)   = softcap(scale * q_i . k_j) + bias[j],   softcap(x) = c tanh(x / c)
        out_i         = sum_j exp(logit(i, j) - lse_i) v_j,     lse_i = log sum_j exp(logit(i, j)),   both over visible j

    Query head i reads KV head i // (h/g). Positions and segments are the only masks: order in memory does not matter, and -1 is a dead row. A query
    that sees nothing gets out 0 and lse -inf; what lies in dead rows never matters as long as it is finite.

    Args:
      q, k, v: one floating dtype; values may be wider or narrower than keys (c = d but for thinned keys). Logits, softmax and sums are float32 whatever it is; probabilities meet v in v's dtype.
      q_segment, k_segment: which of several packed sequences a row belongs to; positions may then count on through all of them. None = one.
      bias: added after the soft-cap, always finite (the log of the number of tokens that a slot stands for).
      window: a static int, or an i32 scalar that may be traced (2**31 - 1 = everything).
      softcap: c above; None = none.
      scale: of q . k; None = d ** -0.5.
      diagonal: promises that key row j > query row i + diagonal is never visible, so blocks beyond it are not computed: 0 for causal
        self-attention over packed rows, the number of earlier rows for a chunk after a prefix. A false promise drops those keys.
      out_dtype: of out; None = q's. (A kernel rounds to q's dtype first.)
      impl: "xla"; a kernel of `jaxtok_kernels.flash`: "pallas_tpu", "pallas_gpu", "interpret" and "interpret_gpu" (the same in Pallas'
        interpreters, anywhere); "auto": the kernel of this platform where it has been measured on this kind of device
        (jaxtok_kernels/blocks.json) and can do what is asked, else XLA. A `Shared`: the attention of several devices.

    Gradients reach q, k, v and bias, from out and from lse. Nothing of size t x s is kept: the backward pass recomputes each block from
    q, k, v, out and lse. Blocks whose positions cannot meet are skipped at run time when there is a window, or when a causal call has
    no `diagonal` (a cache that is mostly empty).

    Raises:
      ValueError: shapes, dtypes, window or impl are wrong.
      NotImplementedError: the kernel named by `impl` cannot do what is asked (a traced window).

    Source: FlashAttention-2, arXiv:2307.08691 (online softmax, recomputed backward), written as XLA loops.
    """
    if isinstance(impl, Shared):
        see = dict(q_pos=q_pos, k_pos=k_pos, bias=bias, q_segment=q_segment, k_segment=k_segment, causal=causal, window=window)
        return impl.attention(q, k, v, **see, softcap=softcap, scale=scale, diagonal=diagonal, out_dtype=out_dtype)
    check(q, k, q_pos, k_pos, v=v, bias=bias, softcap=softcap, diagonal=diagonal, segments=(q_segment, k_segment))
    kind = chosen(
        "flash", impl, "its window is a static int or None, not an array" if isinstance(window, jax.Array) else None, unfit(q, k, v)
    )
    dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"out_dtype is {dtype}; it must be a floating dtype")
    if not q.size or not k.size or not v.size:  # nothing to read, or nobody to read it
        return jnp.zeros((*q.shape[:3], v.shape[3]), dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    if kind != "xla":
        see = dict(
            q_pos=q_pos, k_pos=k_pos, bias=bias, q_segment=q_segment, k_segment=k_segment, causal=causal, softcap=softcap, scale=scale
        )
        sizes: Any = settings("flash") or {}
        out, lse, *_ = flash(q, k, v, **see, window=as_static(window), diagonal=diagonal, impl=kind, **sizes)
        return out.astype(dtype), lse
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    return _jitted(spec, dtype, *level(q, k, v, q_pos, k_pos, bias, as_window(window), q_segment, k_segment))


def _attend(spec: Spec, dtype, q, k, v, *rest):
    x = prepare(spec, q, k, *rest)
    v = pad(v, spec.block, 2)

    def step(carry, i, j, first, guard):
        out, lse, top, total, acc = carry
        top = jnp.where(first, -jnp.inf, top)  # also clears total and acc: their factor below is exp(-inf)

        def update(top, total, acc):
            y = fold(logits(spec, x, i, j)[0])
            new = jnp.maximum(top, y.max(-1))
            safe = finite(new)
            p, fade = jnp.exp(y - safe[..., None]), jnp.exp(top - safe)
            value = dot(p.astype(v.dtype), take(v, j, spec.block, 2), 3, 2)
            return new, total * fade + p.sum(-1), acc * fade[..., None] + value

        top, total, acc = guard(update, top, total, acc, otherwise=(top, total, acc))
        live = top > -jnp.inf
        norm = jnp.where(live, total, 1)
        part = jnp.where(live[..., None], acc / norm[..., None], 0).astype(dtype)
        out = put(out, unfold(part, spec.chunk), i, 3)
        lse = put(lse, unfold(jnp.where(live, top + jnp.log(norm), -jnp.inf), spec.chunk), i, 3)
        return out, lse, top, total, acc

    wide = lambda y, dtype: jnp.zeros_like(y, dtype, shape=(*y.shape[:-1], v.shape[3]))
    acc = wide(fold(x.q[:, :, :, : spec.chunk]), jnp.float32)
    total = jnp.zeros_like(acc[..., 0])
    out, lse = wide(x.q, dtype), jnp.full_like(x.q[..., 0], -jnp.inf, jnp.float32)
    out, lse, *_ = walk(spec, x, step, (out, lse, total, total, acc))
    return out[:, :, :, : q.shape[2]].reshape(*q.shape[:3], -1), lse[..., : q.shape[2]].reshape(q.shape[:3])


def _forward(spec, dtype, *args):
    out, lse = _attend(spec, dtype, *args)
    return (out, lse), (*args, out, lse)


def _backward(spec, dtype, saved, cotangents):
    q, k, v, *rest, out, lse = saved
    given: Any = (q, k, v, *rest, out, lse, *cotangents)
    dq, dk, dv, dbias = _gradients(spec, *given)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dbias, None, None, None


def _gradients(spec: Spec, q, k, v, q_pos, k_pos, bias, window, q_segment, k_segment, out, lse, dout, dlse):
    x = prepare(spec, q, k, q_pos, k_pos, bias, window, q_segment, k_segment)
    g = k.shape[1]
    live = lse > -jnp.inf
    # A row that sees nothing is a constant: its cotangents, which may be NaN (log 0, 0/0 in the caller), stop here.
    dout = jnp.where(live[..., None], dout, 0)
    shift = jnp.where(live, (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse, 0)
    dout, shift, lse = (pad(group(a, g), spec.chunk, 3) for a in (dout.astype(v.dtype), shift, finite(lse)))
    values = pad(v, spec.block, 2)

    def step(carry, i, j, first, guard):
        dq, dk, dv, dbias = carry

        def update():
            p, slope = probs(spec, x, lse, i, j)
            qi, doi = (fold(take(a, i, spec.chunk, 3)) for a in (x.q, dout))
            kj, vj = (take(a, j, spec.block, 2) for a in (x.k, values))
            ds = p * (dot(doi, vj, 3, 3).reshape(p.shape) - take(shift, i, spec.chunk, 3)[..., None])
            to_bias = None if bias is None else ds.sum((2, 3))
            ds = fold((ds if slope is None else ds * slope) * spec.scale).astype(k.dtype)
            to_q = dot(ds, kj, 3, 2).reshape(*p.shape[:4], q.shape[3])
            return to_q, dot(ds, qi, 2, 2), dot(fold(p).astype(v.dtype), doi, 2, 2), to_bias

        old = take(dq, i, spec.chunk, 3), *(None if a is None else take(a, j, spec.block, 2) for a in (dk, dv, dbias))
        to_q, to_k, to_v, to_bias = guard(update, otherwise=jax.tree.map(jnp.zeros_like, old))
        dbias = None if bias is None else add(dbias, to_bias, j, 2)
        return add(dq, to_q, i, 3), add(dk, to_k, j, 2), add(dv, to_v, j, 2), dbias

    init = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), (x.q, x.k, values, x.bias))
    dq, dk, dv, dbias = walk(spec, x, step, init)
    t, s = q.shape[2], k.shape[2]
    dbias = None if bias is None else dbias[..., :s]
    return dq[:, :, :, :t].reshape(q.shape), dk[:, :, :s], dv[:, :, :s], dbias


def gradients(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    out: Float[Array, "b h t c"],
    lse: Float32[Array, "b h t"],
    dout: Float[Array, "b h t c"],
    dlse: Float32[Array, "b h t"],
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    q_segment: Int32[Array, "b t"] | None = None,
    k_segment: Int32[Array, "b s"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
) -> tuple[Float32[Array, "b h t d"], Float32[Array, "b g s d"], Float32[Array, "b g s c"], Float32[Array, "b g s"] | None]:
    """What these keys have to do with the gradients (of q, k, v, bias; float32) of attention over these and other keys.

    out, lse: of the whole attention; dout, dlse: their cotangents. Summed over the parts that the keys were cut into, dq is that of the
    whole; dk, dv and dbias of a part need nothing from the others. Other arguments and errors as in `attention`.
    """
    check(q, k, q_pos, k_pos, v=v, bias=bias, lse=lse, softcap=softcap, diagonal=diagonal, segments=(q_segment, k_segment))
    if not q.size or not k.size or not v.size:
        zeros = lambda x: None if x is None else jnp.zeros_like(x, jnp.float32)
        return zeros(q), zeros(k), zeros(v), zeros(bias)  # type: ignore[return-value]
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    return _gradients(spec, *level(q, k, v, q_pos, k_pos, bias, as_window(window), q_segment, k_segment, out, lse, dout, dlse))


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
_jitted = jax.jit(_attention, static_argnums=(0, 1))  # an unrolled model traces it once for all its layers


def merge(
    out_a: Float[Array, "*batch d"], lse_a: Float32[Array, "*batch"], out_b: Float[Array, "*batch d"], lse_b: Float32[Array, "*batch"]
) -> tuple[Float[Array, "*batch d"], Float32[Array, "*batch"]]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

        lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Associative and commutative; the identity is (0, -inf), and a side with lse -inf counts for nothing whatever its out holds. Computed
    in float32, returned in the dtype of the outs. Gradients are finite with -inf on either or both sides.

    Raises:
      ValueError: the sides differ in shape or dtype.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        shapes = [list(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
        raise ValueError(f"out_a, lse_a, out_b, lse_b are {shapes}; both sides must be [... d] and [...]")
    if out_a.dtype != out_b.dtype:
        raise ValueError(f"out_a is {out_a.dtype} and out_b is {out_b.dtype}; ask attention for one out_dtype")
    top = finite(lax.stop_gradient(jnp.maximum(lse_a, lse_b)))
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    some = a + b > 0
    total = jnp.where(some, a + b, 1)

    def part(weight, out):
        share = (weight / total)[..., None]
        return share * jnp.where(share > 0, out.astype(jnp.float32), 0)

    out = part(a, out_a) + part(b, out_b)
    return out.astype(out_a.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)
