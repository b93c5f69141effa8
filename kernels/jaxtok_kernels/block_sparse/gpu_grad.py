"""The backward pass of attention to listed blocks of keys on NVIDIA Hopper: dq along the lists; dk, dv and dbias along their transpose.

Layout as in gpu.py, tiles of 64 queries by 64 keys. For dk and dv a warpgroup holds 64 keys; queries and cotangents of the rows that list them stream by;
heads wider than 128 spill registers there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtok_kernels.block_sparse.gpu import (
    LOG2E,
    ROWS,
    Sizes,
    accumulate,
    barriers,
    base2,
    copy_ahead,
    gpu_module,
    key_copies,
    line_of,
    product,
    rows_of,
    share,
    sides_of,
    sizes,
    swizzled,
    wide,
)  # fmt: skip
from jaxtok_kernels.block_sparse.layout import Spec, Tables, transpose, untile, visible


def backward(spec: Spec, q, k, v, bias, tables: Tables, out, lse, dout, dlse, *, interpret: bool):
    """dq, dk, dv, dbias. dout and dlse are 0 where a row sees nothing."""
    z = sizes(spec, q, k, v, tables, 64)
    level = jnp.where(lse > -jnp.inf, lse, 0.0) * LOG2E
    shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    rows = (
        rows_of(q, spec.block_q, z.bq, z.d),
        rows_of(dout, spec.block_q, z.bq, z.c),
        *(line_of(x, spec.block_q, z.bq) for x in (level, shift)),
        line_of(tables.q_pos, spec.block_q, z.bq, -1),
    )
    keys = rows_of(k, spec.block_k, z.bk, z.d), rows_of(v, spec.block_k, z.bk, z.c), *sides_of(spec, z, bias, tables)
    how = bias is not None, tables.mask is not None, interpret
    dq = _dq(spec, z, how, rows, keys, tables)
    if interpret:  # one kernel at a time: two at once wait for each other in the interpreter
        dq, rows = lax.optimization_barrier((dq, rows))
    dq = untile(dq.reshape(*q.shape[:2], z.nq, z.bq, z.d), spec.block_q, *q.shape[2:])
    dk, dv, *dbias = _dkv(spec, z, how, rows, keys, tables)
    cut = lambda x, n, c: untile(x.reshape(z.b, z.g, z.nk, z.bk, -1), spec.block_k, n, c)
    return dq, cut(dk, *k.shape[2:]), cut(dv, *v.shape[2:]), cut(dbias[0], k.shape[2], 1)[..., 0] if dbias else None


def _dq(spec: Spec, z: Sizes, how, rows, keys, tables: Tables):
    plgpu, options = gpu_module(how[2])
    tile = functools.partial(swizzled, plgpu, dtype=rows[0].dtype)
    return plgpu.kernel(
        functools.partial(_dq_kernel, plgpu, spec, z, *how),
        out_type=jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype),
        scratch_types=[
            tile(z.groups, ROWS, z.d),
            tile(z.groups, ROWS, z.c),
            *(plgpu.SMEM((z.groups, ROWS), x.dtype) for x in rows[2:]),
            tile(z.depth, z.tile, z.d),
            tile(z.depth, z.tile, z.c),
            *(plgpu.SMEM((z.depth, z.tile), x.dtype) for x in keys[2:]),
            *([tile(z.groups, ROWS, z.tile)] if how[2] else []),
            plgpu.Barrier(num_arrivals=len(rows), num_barriers=z.groups),
            *barriers(plgpu, z, len(keys) - 1, 1),
        ],
        grid=(z.n * z.bq // ROWS // z.groups, z.nq, z.b * z.e),
        num_threads=z.groups + 1,
        **options,
    )(tables.index, tables.count, *rows, *keys)


def _dq_kernel(plgpu, spec: Spec, z: Sizes, biased: bool, masked: bool, interpret: bool, index, count, *refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    given, arrays, (dq,) = take(5), take(3 + biased + masked), take(1)
    mine, buffers, through = take(5), take(3 + biased + masked), take(int(interpret))
    ready, k_ready, v_ready, free = refs
    group, part, i, at = (lax.axis_index(name) for name in ("group", "part", "row", "list"))
    b, e = lax.div(at, jnp.int32(z.e)), lax.rem(at, jnp.int32(z.e))
    per, steps = z.bq // ROWS, count[b, e, i] * (z.bk // z.tile)

    @pl.when(group == z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        copy_ahead(plgpu, z, steps, free, key_copies(plgpu, z, index, b, e, i, arrays, buffers, masked, k_ready, v_ready))

    @pl.when(group < z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(232, action="increase")
        row = part * z.groups + group
        head = e * z.n + lax.div(row, jnp.int32(per))
        rows = pl.ds(pl.multiple_of(i * z.bq + lax.rem(row, jnp.int32(per)) * ROWS, ROWS), ROWS)
        for n, (x, y) in enumerate(zip(given, mine, strict=True)):
            plgpu.copy_gmem_to_smem(x.at[(b, rows) if n == 4 else (b, head, rows)], y.at[group], ready.at[group])
        plgpu.barrier_wait(ready.at[group])
        down, across = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        q_tile, do_tile = (x.at[group] for x in mine[:2])
        level, shift, stand = (plgpu.layout_cast(x[group], down) for x in mine[2:])
        k_tile, v_tile, *sides = buffers
        shape = ROWS, z.tile

        def attend(a, acc):
            slot = lax.rem(a, jnp.int32(z.depth))
            plgpu.barrier_wait(k_ready.at[slot])
            x, slope = base2(spec, product(plgpu, q_tile, k_tile.at[slot].transpose((1, 0)), shape))
            side = [plgpu.layout_cast(y[slot], across) for y in sides]
            x = x + wide(side[1], 1, shape) if biased else x
            theirs = jnp.where(side[-1] > 0, side[0], -1) if masked else side[0]
            seen = visible(spec, wide(stand, 0, shape), wide(theirs, 1, shape))
            p = jnp.exp2(jnp.where(seen, x - wide(level, 0, shape), -jnp.inf))
            plgpu.barrier_wait(v_ready.at[slot])
            ds = p * (product(plgpu, do_tile, v_tile.at[slot].transpose((1, 0)), shape) - wide(shift, 0, shape))
            ds = ds if slope is None else ds * (1.0 - slope * slope)
            acc = accumulate(plgpu, acc, ds.astype(dq.dtype), k_tile.at[slot], *(y.at[group] for y in through))
            plgpu.barrier_arrive(free.at[slot])
            return acc

        acc = lax.fori_loop(0, steps, attend, plgpu.layout_cast(jnp.zeros((ROWS, z.d), jnp.float32), plgpu.Layout.WGMMA))
        q_tile[...] = (acc * spec.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, dq.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _dkv(spec: Spec, z: Sizes, how, rows, keys, tables: Tables):
    plgpu, options = gpu_module(how[2])
    z = share(z, z.bk // ROWS)
    tile = functools.partial(swizzled, plgpu, dtype=rows[0].dtype)
    biased, masked, interpret = how
    if masked:
        keys = *keys[:-1], keys[-1].reshape(z.b, z.e, z.nq, -1, z.groups, ROWS)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in keys[:2]]
    shapes += [jax.ShapeDtypeStruct(keys[3].shape, jnp.float32)] if biased else []
    held = keys[: 3 + biased]
    return plgpu.kernel(
        functools.partial(_dkv_kernel, plgpu, spec, z, *how),
        out_type=shapes,
        scratch_types=[
            tile(z.groups, ROWS, z.d),
            tile(z.groups, ROWS, z.c),
            *(plgpu.SMEM((z.groups, ROWS), x.dtype) for x in held[2:]),
            tile(z.depth, ROWS, z.d),
            tile(z.depth, ROWS, z.c),
            *(plgpu.SMEM((z.depth, ROWS), x.dtype) for x in rows[2:]),
            *([plgpu.SMEM((z.depth, z.groups, ROWS), jnp.int32)] if masked else []),
            *([tile(z.groups, ROWS, ROWS)] if interpret else []),
            plgpu.Barrier(num_arrivals=len(held), num_barriers=z.groups),
            *barriers(plgpu, z, len(rows) + masked),
        ],
        grid=(z.bk // ROWS // z.groups, z.nk, z.b * z.g),
        num_threads=z.groups + 1,
        **options,
    )(transpose(tables.index, tables.count, z.g, z.nk), *rows, *keys)


def _dkv_kernel(plgpu, spec: Spec, z: Sizes, biased: bool, masked: bool, interpret: bool, table, *refs):
    """Keys down, queries across."""
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    arrays, held, mask = take(5), take(3 + biased), take(int(masked))
    dk, dv, *dbias = take(2 + biased)
    mine, buffers, through = take(3 + biased), take(5 + masked), take(int(interpret))
    ready, come, free = refs
    group, part, j, at = (lax.axis_index(name) for name in ("group", "part", "row", "list"))
    b, g = lax.div(at, jnp.int32(z.g)), lax.rem(at, jnp.int32(z.g))
    per = z.bq // ROWS
    each = z.n * per  # row tiles of a listed query block
    steps = table[b, g, j, 0] * each

    @pl.when(group == z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")

        def issue(a, slot):
            entry, piece = table[b, g, j, 1 + lax.div(a, jnp.int32(each))], lax.rem(a, jnp.int32(each))
            place, row = lax.rem(entry, jnp.int32(z.m)), lax.div(entry, jnp.int32(z.m))
            e, i = g * (z.e // z.g) + lax.div(row, jnp.int32(z.nq)), lax.rem(row, jnp.int32(z.nq))
            head = e * z.n + lax.div(piece, jnp.int32(per))
            rows = pl.ds(pl.multiple_of(i * z.bq + lax.rem(piece, jnp.int32(per)) * ROWS, ROWS), ROWS)
            for n, (x, y) in enumerate(zip(arrays, buffers, strict=False)):
                plgpu.copy_gmem_to_smem(x.at[(b, rows) if n == 4 else (b, head, rows)], y.at[slot], come.at[slot])
            for x in mask:
                where = place * (z.bk // ROWS // z.groups) + part
                plgpu.copy_gmem_to_smem(x.at[b, e, i, where], buffers[-1].at[slot], come.at[slot])
            return jnp.int32(0)

        copy_ahead(plgpu, z, steps, free, issue)

    @pl.when(group < z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(232, action="increase")
        keys = pl.ds(pl.multiple_of(j * z.bk + (part * z.groups + group) * ROWS, ROWS), ROWS)
        for x, y in zip(held, mine, strict=True):
            plgpu.copy_gmem_to_smem(x.at[b, g, keys], y.at[group], ready.at[group])
        plgpu.barrier_wait(ready.at[group])
        square, down, across = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        k_tile, v_tile = (x.at[group] for x in mine[:2])
        side = [plgpu.layout_cast(x[group], down) for x in mine[2:]]
        q_tile, do_tile, *stats = buffers[:5]
        shape = ROWS, ROWS
        spare = [y.at[group] for y in through]

        def attend(a, sums):
            sum_k, sum_v, sum_bias = sums
            slot = lax.rem(a, jnp.int32(z.depth))
            plgpu.barrier_wait(come.at[slot])
            level, shift, stand = (plgpu.layout_cast(x[slot], across) for x in stats)
            x, slope = base2(spec, product(plgpu, k_tile, q_tile.at[slot].transpose((1, 0)), shape))
            x = x + wide(side[1], 0, shape) if biased else x
            theirs = jnp.where(plgpu.layout_cast(buffers[-1][slot, group], down) > 0, side[0], -1) if masked else side[0]
            seen = visible(spec, wide(stand, 1, shape), wide(theirs, 0, shape))
            p = jnp.exp2(jnp.where(seen, x - wide(level, 1, shape), -jnp.inf))
            sum_v = accumulate(plgpu, sum_v, p.astype(dv.dtype), do_tile.at[slot], *spare)
            ds = p * (product(plgpu, v_tile, do_tile.at[slot].transpose((1, 0)), shape) - wide(shift, 1, shape))
            sum_bias = sum_bias + jnp.sum(ds, axis=1) if biased else sum_bias
            ds = ds if slope is None else ds * (1.0 - slope * slope)
            sum_k = accumulate(plgpu, sum_k, ds.astype(dk.dtype), q_tile.at[slot], *spare)
            plgpu.barrier_arrive(free.at[slot])
            return sum_k, sum_v, sum_bias

        zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        sums = zeros((ROWS, z.d), square), zeros((ROWS, z.c), square), zeros((ROWS,), down)
        sum_k, sum_v, sum_bias = lax.fori_loop(0, steps, attend, sums)
        k_tile[...], v_tile[...] = (sum_k * spec.scale).astype(dk.dtype), sum_v.astype(dv.dtype)
        ends = [(k_tile, dk), (v_tile, dv)]
        if biased:
            mine[3][group] = sum_bias
            ends.append((mine[3].at[group], dbias[0]))
        plgpu.commit_smem()
        for x, y in ends:
            plgpu.copy_smem_to_gmem(x, y.at[b, g, keys])
        plgpu.wait_smem_to_gmem(0)
