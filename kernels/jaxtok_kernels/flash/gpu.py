"""Attention on Hopper GPUs: two warpgroups multiply (wgmma), a third copies K and V (TMA)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtok_kernels.flash._block import Given, Spec, capped, cotangents_of_logits, pad, seen
from jaxtok_kernels.flash._sweep import (
    F32,
    I32,
    LOG2E,
    OUTER,
    M,
    Part,
    add,
    along,
    product,
    ready,
    rows,
    sides,
    splat,
    spread,
    sweep,
    widen,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(spec: Spec, q, k, v, bias, x: Given):
    """See `jaxtok_kernels.flash.flash`: out, lse[, count]."""
    (b, h, t, d), g, c = q.shape, v.shape[1], v.shape[3]
    ready(q, d, c)
    block, r = keys(spec, d, c), h // g
    at = sides(spec, x, r, block_q=OUTER, block_k=block, by_keys=False)
    q, k, v = rows(widen(q), g, OUTER), pad(widen(k), block, 2), pad(widen(v), block, 2)
    outer = [Part(q), *(Part(y) for y in at.row_ids)]
    inner = [Part(k), Part(v), *(Part(y) for y in at.key_ids), *(() if bias is None else [Part(pad(bias, block, 2))])]
    shape, wide, n = (M, block), v.shape[3], len(at.row_ids)

    def begin(outer):
        return splat((M,), -jnp.inf), splat((M,), 0.0), splat((M, wide), 0.0)

    def step(masked, outer, inner, carry, p_s):
        top, total, acc = carry
        theirs, extra = inner[2 : 2 + n], None if bias is None else inner[-1]
        y, *_ = logits(spec, masked, product(outer[0], inner[0], block), outer[1:], theirs, extra)
        new = jnp.maximum(top, y.max(axis=1))
        safe = jnp.where(new > -jnp.inf, new, 0.0) if masked else new
        p, fade = jnp.exp2(y - spread(safe, 0, shape)), jnp.exp2(top - safe)
        return new, total * fade + p.sum(axis=1), add(acc * spread(fade, 0, acc.shape), p, inner[1], p_s)

    def end(carry):
        top, total, acc = carry
        norm = jnp.where(total > 0, total, 1.0)
        return acc / spread(norm, 0, acc.shape), jnp.where(total > 0, top / LOG2E + jnp.log(norm), -jnp.inf)

    run: dict[str, Any] = dict(block=block, begin=begin, step=step, end=end, scratch=True, late_first=True, name="flash")
    out, lse, *count = sweep(spec, g, at.table, outer, inner, [((wide,), q.dtype), ((), F32)], **run)
    return (
        out[:, :, : r * t, :c].reshape(b, h, t, c),
        lse[:, :, : r * t].reshape(b, h, t),
        *(jnp.sum(y[..., 0], (0, 1, 2), dtype=I32) for y in count),
    )


def keys(spec: Spec, d: int, c: int) -> int:
    """Key rows of a block."""
    most = 128 if max(d, c) <= 128 else 64
    return most if spec.block_k is None else min(max(spec.block_k // 64 * 64, 64), most)


def logits(spec: Spec, masked: bool, y, mine: list, theirs: list, bias, by_keys: bool = False):
    """From the products: logits times log2(e), -inf where not visible, and the soft-cap's slope; which pairs are visible (None: all).

    mine, theirs: the ids of rows and of keys. by_keys: keys stand along the rows of the product, rows along its columns.
    """
    y, slope = capped(spec, y)
    y = (y if bias is None else y + along(bias, 1 - by_keys, y.shape)) * LOG2E
    if not masked:
        return y, slope, None
    see = seen(
        spec,
        *(
            along(ref, axis, y.shape)
            for pair in zip(mine, theirs, strict=True)
            for ref, axis in zip(pair, (by_keys, 1 - by_keys), strict=True)
        ),
    )
    return jnp.where(see, y, -jnp.inf), slope, see


def _slopes(spec: Spec, masked: bool, y, to_p, mine, theirs, bias, lse, shift, by_keys: bool):
    """p and the gradient for the logits (None: before the soft-cap, too), of a tile."""
    y, slope, see = logits(spec, masked, y, mine, theirs, bias, by_keys)
    p = jnp.exp2(y - along(lse, by_keys, y.shape))
    ds = p * (to_p - along(shift, by_keys, y.shape))
    clear = lambda x: x if see is None else jnp.where(see, x, 0.0)  # whatever lies in dead rows
    return p, clear(ds), clear(ds if slope is None else ds * slope)


def _to_queries(spec: Spec, q, k, v, bias, x: Given, dout, lse, shift):
    """dq."""
    (h, t, d), g, block = q.shape[1:], k.shape[1], 64
    r = h // g
    at = sides(spec, x, r, block_q=OUTER, block_k=block, by_keys=False)
    outer = [rows(y, g, OUTER) for y in (widen(q), widen(dout), lse, shift)] + at.row_ids
    inner = [pad(y, block, 2) for y in (widen(k), widen(v))] + at.key_ids + ([] if bias is None else [pad(bias, block, 2)])
    wide, n = outer[0].shape[3], len(at.row_ids)

    def step(masked, outer, inner, acc, p_s):
        q, dout, lse, shift, *mine = outer
        k, v, *theirs = inner
        extra = None if bias is None else theirs[-1]
        p, _, ds = _slopes(spec, masked, product(q, k, block), product(dout, v, block), mine, theirs[:n], extra, lse, shift, False)
        return add(acc, ds, k, p_s)

    run: dict[str, Any] = dict(
        block=block, begin=lambda outer: splat((M, wide), 0.0), step=step, end=lambda acc: [acc * spec.scale], scratch=True
    )
    parts: Any = [[Part(y) for y in z] for z in (outer, inner)]
    (dq,) = sweep(spec, g, at.table, parts[0], parts[1], [((wide,), q.dtype)], **run, late_first=True, name="flash_dq")
    return dq[:, :, : r * t, :d].reshape(q.shape)


def _to_keys(spec: Spec, q, k, v, bias, x: Given, dout, lse, shift):
    """dk, dv[, dbias]."""
    (h, _, d), (g, s, c), block = q.shape[1:], v.shape[1:], 64
    at = sides(spec, x, h // g, block_q=block, block_k=OUTER, by_keys=True)
    outer = [pad(y, OUTER, 2) for y in (widen(k), widen(v))] + at.key_ids + ([] if bias is None else [pad(bias, OUTER, 2)])
    inner = [rows(y, g, block) for y in (widen(q), widen(dout), lse, shift)] + at.row_ids
    wide, n = (outer[0].shape[3], outer[1].shape[3]), len(at.row_ids)

    def begin(outer):
        return *(splat((M, w), 0.0) for w in wide), *([] if bias is None else [splat((M,), 0.0)])

    def step(masked, outer, inner, carry, p_s):
        k, v, *theirs = outer
        q, dout, lse, shift, *mine = inner
        extra = None if bias is None else theirs[-1]
        p, slope, ds = _slopes(spec, masked, product(k, q, block), product(v, dout, block), mine, theirs[:n], extra, lse, shift, True)
        dk, dv, *dbias = carry
        return add(dk, ds, q, p_s), add(dv, p, dout, p_s), *(y + slope.sum(axis=1) for y in dbias)

    run: dict[str, Any] = dict(
        block=block, begin=begin, step=step, end=lambda y: (y[0] * spec.scale, *y[1:]), scratch=True, late_first=False
    )
    outs = [*(((w,), k.dtype) for w in wide), *([] if bias is None else [((), F32)])]
    parts: Any = [[Part(y) for y in z] for z in (outer, inner)]
    dk, dv, *dbias = sweep(spec, g, at.table, parts[0], parts[1], outs, **run, name="flash_dkv")
    return dk[:, :, :s, :d], dv[:, :, :s, :c], *(y[:, :, :s] for y in dbias)


def _flash_forward(spec: Spec, q, k, v, bias, x: Given):
    given = q, k, v, bias, x
    outs: Any = flash(spec, *given)
    return outs, (*given, *outs[:2])


def _flash_backward(spec: Spec, saved, cotangents):
    *given, out, lse = saved
    if max(given[0].shape[3], out.shape[3]) > 128:
        raise NotImplementedError(f"head dims {given[0].shape[3]} and {out.shape[3]}; the gradient on GPUs takes up to 128")
    spec = dataclasses.replace(spec, count=False)
    dout, lse, shift = cotangents_of_logits(out, lse, *cotangents[:2])
    given: Any = (*given, dout.astype(out.dtype), lse * LOG2E, shift)
    dk, dv, *dbias = _to_keys(spec, *given)
    return _to_queries(spec, *given), dk, dv, (dbias[0] if dbias else None), None


flash.defvjp(_flash_forward, _flash_backward)
