"""The backward pass of attention to listed blocks of keys on TPUs: dq along the lists; dk, dv and dbias along their transpose."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtok_kernels.block_sparse.layout import Spec, Tables, lanes, transpose, unlane, untile, up, visible
from jaxtok_kernels.block_sparse.tpu import (
    LANES,
    Sizes,
    call,
    column,
    dot,
    heads,
    keys_of,
    logits,
    queries_of,
    row,
    scalars,
    sides,
    sizes,
    stats_of,
    stream,
    walk,
)


def backward(spec: Spec, q, k, v, bias, tables: Tables, out, lse, dout, dlse, *, interpret: bool):
    """dq, dk, dv, dbias. dout and dlse are 0 where a row sees nothing."""
    z = sizes(spec, q, k, v, tables)
    finite = jnp.where(lse > -jnp.inf, lse, 0.0)
    shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    queries, cotangents = queries_of(spec, z, q, z.d), queries_of(spec, z, dout, z.c)
    stats = jnp.concatenate([stats_of(spec, z, x, z.bq) for x in (finite, shift)], -2)
    shapes = [jax.ShapeDtypeStruct(queries.shape, q.dtype)]
    given = [queries, cotangents, stats]
    scratch = [pltpu.VMEM((z.n * z.bq, z.d), jnp.float32)]
    (dq,) = call(_dq_kernel, spec._replace(count=False), z, given, k, v, bias, tables, shapes, [heads(z, z.d)], scratch, interpret, "dq")
    dq = untile(dq.reshape(z.b, -1, z.nq, z.bq, z.d), spec.block_q, q.shape[2], q.shape[3])
    return dq, *_dkv(spec, z, queries, cotangents, (finite, shift), k, v, bias, tables, interpret)


def _dq_kernel(spec: Spec, z: Sizes, masked: bool, table, stand, q, do, stats, *rest):
    n = 3 + masked
    arrays, dq, (*buffers, done, acc) = rest[:n], rest[n], rest[n + 1 :]
    rows = z.n * z.bq
    mine = jnp.concatenate([column(stand[...])] * z.n, 0)
    lse, shift = (jnp.concatenate([column(stats[u : u + 1]) for u in range(x, x + z.n)], 0) for x in (0, z.n))
    queries, cotangents = q[...].reshape(rows, z.d), do[...].reshape(rows, z.c)
    acc[...] = jnp.zeros_like(acc)

    def attend(keys, values, theirs, extra):
        x, slope = logits(spec, queries, keys)
        x = x if extra is None else x + extra
        p = jnp.where(visible(spec, mine, theirs), jnp.exp(x - lse), 0.0)
        ds = p * (dot(cotangents, values, 1, 1) - shift)
        ds = ds if slope is None else ds * slope
        acc[...] += dot(ds.astype(keys.dtype), keys, 1, 0)

    walk(z, table, arrays, buffers, done, attend)
    dq[...] = (acc[...] * spec.scale).astype(dq.dtype).reshape(dq.shape)


def _dkv(spec: Spec, z: Sizes, queries, cotangents, stats, k, v, bias, tables: Tables, interpret: bool):
    """dk, dv, dbias on a grid (b, g, nk): each key block against the query blocks that list it."""
    wide, share = up(z.bq, LANES), z.e // z.g
    side, mask = sides(spec, z, bias, tables)
    table = transpose(tables.index, tables.count, z.g, z.nk)[..., None, :]
    stand = lanes(tables.q_pos, spec.block_q, wide, -1)
    stats = jnp.concatenate([stats_of(spec, z, x, wide) for x in stats], -2)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    here = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, j, x: (i, j, x, 0))
    each = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda i, j, x: (i, j, x, 0, 0))
    shapes = [jax.ShapeDtypeStruct((z.b, z.g, z.nk * z.bk, z.d), k.dtype), jax.ShapeDtypeStruct((z.b, z.g, z.nk * z.bk, z.c), v.dtype)]
    specs = [here(z.bk, z.d), here(z.bk, z.c)]
    if bias is not None:
        shapes.append(jax.ShapeDtypeStruct((z.b, z.g, z.nk, 1, z.bk), jnp.float32))
        specs.append(each(1, z.bk))
    work = z.b * z.e * z.nq * z.m * z.n * z.bq
    dk, dv, *dbias = pl.pallas_call(
        functools.partial(_dkv_kernel, spec, z, bool(mask)),
        grid=(z.b, z.g, z.nk),
        in_specs=[scalars(1 + share * z.nq), here(z.bk, z.d), here(z.bk, z.c), each(*side.shape[3:]), *[anywhere] * (4 + len(mask))],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((2, z.n, z.bq, z.d), queries.dtype),
            pltpu.VMEM((2, z.n, z.bq, z.c), cotangents.dtype),
            pltpu.VMEM((2, 2 * z.n, wide), jnp.float32),
            pltpu.VMEM((2, 1, wide), jnp.int32),
            *([pltpu.VMEM((2, 1, side.shape[4]), jnp.int32)] if mask else []),
            pltpu.SemaphoreType.DMA((2, 5)),
            pltpu.VMEM((z.bk, z.d), jnp.float32),
            pltpu.VMEM((z.bk, z.c), jnp.float32),
            pltpu.VMEM((z.bk, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * work * z.bk * (z.d + z.c), bytes_accessed=work * (z.d + z.c) * k.dtype.itemsize, transcendentals=work * z.bk
        ),
        name="block_sparse_dkv",
        interpret=interpret,
    )(table, keys_of(spec, z, k, z.d), keys_of(spec, z, v, z.c), side, queries, cotangents, stats, stand, *mask)
    cut = lambda x, like: untile(x.reshape(z.b, z.g, z.nk, z.bk, -1), spec.block_k, *like.shape[2:])
    return cut(dk, k), cut(dv, v), unlane(dbias[0][..., 0, :], spec.block_k, k.shape[2]) if dbias else None


def _dkv_kernel(spec: Spec, z: Sizes, masked: bool, table, k, v, side, *rest):
    n = 4 + masked
    arrays, (dk, dv, *dbias), (*buffers, done, sum_k, sum_v, sum_bias) = rest[:n], rest[n : -(n + 4)], rest[-(n + 4) :]
    b, g = pl.program_id(0), pl.program_id(1)
    keys, values = k[...], v[...]
    theirs = column(side[:1, : z.bk])
    extra = column(lax.bitcast_convert_type(side[1:, : z.bk], jnp.float32)) if side.shape[0] > 1 else None
    for x in (sum_k, sum_v, sum_bias):
        x[...] = jnp.zeros_like(x)

    def copies(a):
        entry, slot = table[0, 1 + a], lax.rem(a, 2)
        i = entry // z.m
        e, i = g * (z.e // z.g) + i // z.nq, lax.rem(i, z.nq)
        rows = pl.ds(pl.multiple_of(i * z.bq, 8), z.bq)
        where = [(b, e, slice(None), rows), (b, e, slice(None), rows), (b, e, i), (b, i), (b, e, i, lax.rem(entry, z.m))]
        for j, (x, y, w) in enumerate(zip(arrays, buffers, where, strict=False)):
            yield pltpu.make_async_copy(x.at[w], y.at[slot], done.at[slot, j])

    def attend(a):
        queries, cotangents, stats, stand, *mask = (y[lax.rem(a, 2)] for y in buffers)
        at = jnp.where(column(mask[0][:, : z.bk]) > 0, theirs, -1) if mask else theirs
        seen = visible(spec, stand[:, : z.bq], at)
        for u in range(z.n):  # keys down, queries across: lse and shift are rows
            x, slope = logits(spec, keys, queries[u])
            x = x if extra is None else x + extra
            p = jnp.where(seen, jnp.exp(x - stats[u : u + 1, : z.bq]), 0.0)
            sum_v[...] += dot(p.astype(values.dtype), cotangents[u], 1, 0)
            ds = p * (dot(values, cotangents[u], 1, 1) - stats[z.n + u : z.n + u + 1, : z.bq])
            sum_bias[...] += jnp.sum(ds, 1, keepdims=True)
            ds = ds if slope is None else ds * slope
            sum_k[...] += dot(ds.astype(keys.dtype), queries[u], 1, 0)

    stream(table[0, 0], copies, attend)
    dk[...], dv[...] = (sum_k[...] * spec.scale).astype(dk.dtype), sum_v[...].astype(dv.dtype)
    if dbias:
        dbias[0][...] = row(sum_bias[...])
