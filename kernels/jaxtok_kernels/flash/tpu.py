"""Attention and its gradients on TPUs: a tile of logits lives in VMEM between its products, and is computed again in the backward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtok_kernels.flash._block import Given, Spec, capped, cotangents_of_logits, dot, group, lanes, pad
from jaxtok_kernels.flash._grid import Grid, biases, column, make, run, tile_seen

ROWS = {2: 1024, 4: 512}  # folded rows of a block, by bytes a number; half of that in the backward pass, which holds more of a tile
F32, I32 = jnp.float32, jnp.int32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(spec: Spec, q, k, v, bias, x: Given):
    """See `jaxtok_kernels.flash.flash`: out, lse[, count]."""
    grid, at = make(spec, x, q, k, rows=ROWS[q.dtype.itemsize], by_keys=False)
    (b, h, t, d), g, c, rows = q.shape, v.shape[1], v.shape[3], grid.r * grid.block_q
    top = grid.nq * grid.block_q
    operands = [
        (group(q, g, grid.block_q), grid.rows(d)),
        (pad(k, grid.block_k, 2), grid.keys(d)),
        (pad(v, grid.block_k, 2), grid.keys(c)),
        (at.q, grid.row_ids()),
        (at.k, grid.key_ids()),
        *biases(bias, grid),
    ]
    outs = [
        (jax.ShapeDtypeStruct((b, g, grid.r, top, c), q.dtype), grid.rows(c)),
        (jax.ShapeDtypeStruct((b, g, grid.nq, 1, rows), F32), grid.row_numbers(1)),
    ]
    if spec.count:
        shape = jax.ShapeDtypeStruct((b, g, grid.nq, 8, 128), I32)
        outs += [(shape, pl.BlockSpec((None, None, None, 8, 128), lambda *w: (*w[:3], 0, 0)))]
    scratch = [pltpu.VMEM((rows, n), kind) for n, kind in ((grid.ids, I32), (1, F32), (1, F32), (c, F32))]
    scratch += [pltpu.SMEM((2,), I32)] * spec.count
    out, lse, *count = run(grid, at, _forward, operands, outs, scratch, products=2, width=max(c, d), name="flash")
    return (
        out.reshape(b, h, top, c)[:, :, :t],
        unfold(lse[:, :, :, 0], grid.r)[:, :, :t],
        *(jnp.sum(x[..., 0, :2], (0, 1, 2), dtype=I32) for x in count),
    )


def unfold(x: jax.Array, r: int) -> jax.Array:
    """[b g nq r*block_q] -> [b g*r nq*block_q]"""
    b, g, n, rows = x.shape
    return x.reshape(b, g, n, r, rows // r).swapaxes(2, 3).reshape(b, g * r, -1)


def _forward(grid: Grid, first, last, q_box, k_box, q, k, v, q_at, k_at, *rest):
    bias, (out, lse, *rest) = (rest[0], rest[1:]) if len(rest) % 2 else (None, rest)
    count, (rows, top, total, acc, *tally) = (rest[0], rest[1:]) if grid.spec.count else (None, rest)
    step, done, need, fetched = grid.place(first, last, q_box, k_box)

    @pl.when(step == 0)
    def _():
        rows[...] = column(q_at[...])
        top[...] = jnp.full(top.shape, -jnp.inf, F32)
        total[...] = jnp.zeros(total.shape, F32)
        acc[...] = jnp.zeros(acc.shape, F32)
        for ref in tally:
            ref[0] = ref[1] = 0

    for ref in tally:
        ref[0] += need.astype(I32)
        ref[1] += fetched.astype(I32)

    @pl.when(need)
    def _():
        y, _ = capped(grid.spec, dot(q[...].reshape(-1, q.shape[-1]), k[...], (1, 1)))
        y = y if bias is None else y + bias[...]
        y = jnp.where(tile_seen(grid, rows[...], k_at[...]), y, -jnp.inf)
        old = top[...]
        new = jnp.maximum(old, jnp.max(y, 1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        p, fade = jnp.exp(y - safe), jnp.exp(old - safe)
        top[...] = new
        total[...] = total[...] * fade + jnp.sum(p, 1, keepdims=True)
        acc[...] = acc[...] * fade + dot(p.astype(v.dtype), v[...], (1, 0))

    @pl.when(done)
    def _():
        live = total[...] > 0
        norm = jnp.where(live, total[...], 1.0)
        out[...] = jnp.where(live, acc[...] / norm, 0.0).astype(out.dtype).reshape(out.shape)
        lse[...] = column(jnp.where(live, top[...] + jnp.log(norm), -jnp.inf))
        if count is not None:
            lane = jax.lax.broadcasted_iota(I32, count.shape, 1)
            count[...] = jnp.where(lane == 0, tally[0][0], tally[0][1])


def _flash_forward(spec: Spec, q, k, v, bias, x: Given):
    given = q, k, v, bias, x
    outs: Any = flash(spec, *given)
    return outs, (*given, *outs[:2])


def _flash_backward(spec: Spec, saved, cotangents):
    q, k, v, bias, x, out, lse = saved
    dout, lse, shift = cotangents_of_logits(out, lse, *cotangents[:2])
    given = q, k, v, bias, x, dout.astype(v.dtype), lse, shift
    dq = _to_queries(spec, *given)
    dk, dv, *dbias = _to_keys(spec, *given)
    return dq, dk, dv, (dbias[0] if dbias else None), None


flash.defvjp(_flash_forward, _flash_backward)


def _operands(spec: Spec, q, k, v, bias, x, dout, lse, shift, by_keys: bool):
    grid, at = make(spec, x, q, k, rows=ROWS[q.dtype.itemsize] // 2, by_keys=by_keys)
    g, d, c = k.shape[1], q.shape[3], v.shape[3]
    stats = jnp.stack([lanes(y, g, grid.block_q) for y in (lse, shift)], 3)
    operands = [
        (group(q, g, grid.block_q), grid.rows(d)),
        (pad(k, grid.block_k, 2), grid.keys(d)),
        (pad(v, grid.block_k, 2), grid.keys(c)),
        (group(dout, g, grid.block_q), grid.rows(c)),
        (stats, grid.row_numbers(2)),
        (at.q, grid.row_ids()),
        (at.k, grid.key_ids()),
        *biases(bias, grid),
    ]
    return grid, at, operands


def _to_queries(spec: Spec, q, k, v, *rest):
    """dq."""
    grid, at, operands = _operands(spec, q, k, v, *rest, by_keys=False)
    (b, h, t, d), g, rows = q.shape, k.shape[1], grid.r * grid.block_q
    outs = [(jax.ShapeDtypeStruct((b, g, grid.r, grid.nq * grid.block_q, d), q.dtype), grid.rows(d))]
    scratch = [pltpu.VMEM((rows, n), kind) for n, kind in ((grid.ids, I32), (2, F32), (d, F32))]
    (dq,) = run(grid, at, _dq, operands, outs, scratch, products=3, width=max(d, v.shape[3]), name="flash_dq")
    return dq.reshape(b, h, -1, d)[:, :, :t]


def _dq(grid: Grid, first, last, q_box, k_box, q, k, v, dout, stats, q_at, k_at, *rest):
    *bias, dq, rows, saved, acc = rest
    step, done, need, fetched = grid.place(first, last, q_box, k_box)

    @pl.when(step == 0)
    def _():
        rows[...], saved[...] = column(q_at[...]), column(stats[...])
        acc[...] = jnp.zeros(acc.shape, F32)

    @pl.when(need)
    def _():
        y, slope = capped(grid.spec, dot(q[...].reshape(-1, q.shape[-1]), k[...], (1, 1)))
        for extra in bias:
            y += extra[...]
        see = tile_seen(grid, rows[...], k_at[...])
        p = jnp.exp(jnp.where(see, y - saved[:, 0:1], -jnp.inf))
        to_p = dot(dout[...].reshape(-1, dout.shape[-1]), v[...], (1, 1))
        ds = p * (to_p - saved[:, 1:2])
        ds = jnp.where(see, ds if slope is None else ds * slope, 0.0)  # whatever lies in dead rows
        acc[...] += dot(ds.astype(k.dtype), k[...], (1, 0))

    @pl.when(done)
    def _():
        dq[...] = (acc[...] * grid.spec.scale).astype(dq.dtype).reshape(dq.shape)


def _to_keys(spec: Spec, q, k, v, bias, *rest):
    """dk, dv[, dbias]."""
    grid, at, operands = _operands(spec, q, k, v, bias, *rest, by_keys=True)
    (b, g, s, d), c, size = k.shape, v.shape[3], grid.nk * grid.block_k
    outs = [(jax.ShapeDtypeStruct((b, g, size, n), k.dtype), grid.keys(n)) for n in (d, c)]
    scratch = [pltpu.VMEM((grid.block_k, n), kind) for n, kind in ((grid.ids, I32), (d, F32), (c, F32))]
    if bias is not None:
        outs += [(jax.ShapeDtypeStruct((b, g, grid.nk, 1, grid.block_k), F32), grid.key_bias())]
        scratch += [pltpu.VMEM((grid.block_k, 1), F32)] * 2
    dk, dv, *dbias = run(grid, at, _dkv, operands, outs, scratch, products=4, width=max(c, d), name="flash_dkv")
    return dk[:, :, :s], dv[:, :, :s], *(x.reshape(b, g, -1)[..., :s] for x in dbias)


def _dkv(grid: Grid, first, last, q_box, k_box, q, k, v, dout, stats, q_at, k_at, *rest):
    """Tiles stand on their side here, keys by rows: what belongs to a row lies along the lanes, and so both sums are plain products."""
    refs: tuple[Any, ...] = (None, *rest[:2], None, *rest[2:], None, None) if len(rest) == 5 else rest  # without and with biases
    bias, dk, dv, dbias, keys, dk_acc, dv_acc, extra, dbias_acc = refs
    step, done, need, fetched = grid.place(first, last, q_box, k_box)

    @pl.when(step == 0)
    def _():
        keys[...] = column(k_at[...])
        dk_acc[...], dv_acc[...] = jnp.zeros(dk_acc.shape, F32), jnp.zeros(dv_acc.shape, F32)
        if bias is not None:
            extra[...] = column(bias[...])
            dbias_acc[...] = jnp.zeros(dbias_acc.shape, F32)

    @pl.when(need)
    def _():
        rows, out = q[...].reshape(-1, q.shape[-1]), dout[...].reshape(-1, dout.shape[-1])
        y, slope = capped(grid.spec, dot(k[...], rows, (1, 1)))
        y = y if bias is None else y + extra[...]
        see = tile_seen(grid, q_at[...], keys[...], by_columns=True)
        p = jnp.exp(jnp.where(see, y - stats[0:1], -jnp.inf))
        dv_acc[...] += dot(p.astype(v.dtype), out, (1, 0))
        ds = jnp.where(see, p * (dot(v[...], out, (1, 1)) - stats[1:2]), 0.0)
        if bias is not None:
            dbias_acc[...] += jnp.sum(ds, 1, keepdims=True)
        ds = ds if slope is None else jnp.where(see, ds * slope, 0.0)
        dk_acc[...] += dot(ds.astype(k.dtype), rows, (1, 0))

    @pl.when(done)
    def _():
        dk[...], dv[...] = (dk_acc[...] * grid.spec.scale).astype(dk.dtype), dv_acc[...].astype(dv.dtype)
        if bias is not None:
            dbias[...] = column(dbias_acc[...])
