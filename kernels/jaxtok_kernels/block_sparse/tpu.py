"""Attention to listed blocks of keys on TPUs: each block is copied from where it lies, while the one before it is attended to.

Blocks of queries are rounded up to 8 rows (16 of 16-bit dtypes), blocks of keys likewise, widths to 128 lanes: what does not fit is copied once,
padded. The table of one query block lies in SMEM (4 bytes an entry), whatever the size of the whole. VMEM: h/e * block_q rows of
queries, logits and sums, two blocks of keys and values. Blocks of keys under 128 leave part of the matrix unit idle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtok_kernels.block_sparse.layout import Spec, Tables, lanes, tiles, unlane, untile, up, visible

LANES = 128


class Sizes(NamedTuple):
    """Sizes of a call, rounded to tiles: g KV heads, e lists of n query heads each; nq blocks of bq rows, nk blocks of bk keys, widths d and c."""

    b: int
    g: int
    e: int
    n: int
    nq: int
    bq: int
    nk: int
    bk: int
    m: int
    d: int
    c: int


def sizes(spec: Spec, q, k, v, tables: Tables) -> Sizes:
    (b, h, _, d), (g, s), (e, nq, m) = q.shape, k.shape[1:3], tables.index.shape[1:]
    packed = 32 // q.dtype.itemsize
    bq, bk = up(spec.block_q, packed), up(spec.block_k, packed)
    return Sizes(b, g, e, h // e, nq, bq, -(-s // spec.block_k), bk, m, up(d, LANES), up(v.shape[3], LANES))


def queries_of(spec: Spec, z: Sizes, x, width: int):
    """[b h t c] -> [b e n nq*bq width]."""
    x = tiles(x.reshape(z.b, z.e, z.n, *x.shape[2:]), spec.block_q, z.bq, width)
    return x.reshape(*x.shape[:3], z.nq * z.bq, width)


def keys_of(spec: Spec, z: Sizes, x, width: int):
    """[b g s c] -> [b g nk*bk width]."""
    return tiles(x, spec.block_k, z.bk, width).reshape(z.b, z.g, z.nk * z.bk, width)


def sides(spec: Spec, z: Sizes, bias, tables: Tables):
    """Positions and biases i32 [b g nk 1|2 bk in lanes] of key blocks; the mask [b e nq m 1 bk in lanes], or none."""
    wide = up(z.bk, LANES)
    side = lanes(tables.k_pos, spec.block_k, wide, -1)
    if bias is not None:
        side = jnp.concatenate([side, lax.bitcast_convert_type(lanes(bias, spec.block_k, wide), jnp.int32)], -2)
    if tables.mask is None:
        return side, []
    last = [(0, 0)] * 4 + [(0, wide - spec.block_k)]
    return side, [jnp.pad(tables.mask, last).astype(jnp.int32)[..., None, :]]


def stats_of(spec: Spec, z: Sizes, x, width: int):
    """[b h t] -> [b e nq n width]."""
    x = lanes(x.reshape(z.b, z.e, z.n, -1), spec.block_q, width)
    return jnp.swapaxes(x[..., 0, :], 2, 3)


def forward(spec: Spec, q, k, v, bias, tables: Tables, *, interpret: bool):
    """See `jaxtok_kernels.block_sparse.block_sparse`."""
    z = sizes(spec, q, k, v, tables)
    rows = z.n * z.bq
    shapes = [
        jax.ShapeDtypeStruct((z.b, z.e, z.n, z.nq * z.bq, z.c), q.dtype),
        jax.ShapeDtypeStruct((z.b, z.e, z.nq, z.n, z.bq), jnp.float32),
    ]
    specs = [heads(z, z.c), pl.BlockSpec((None, None, None, z.n, z.bq), lambda i, j, x: (i, j, x, 0, 0))]
    if spec.count:
        shapes.append(jax.ShapeDtypeStruct((z.b, z.e, z.nq, 1, 2), jnp.int32))
        specs.append(scalars(2))
    vector = pltpu.VMEM((rows, 1), jnp.float32)
    scratch = [vector, vector, pltpu.VMEM((rows, z.c), jnp.float32)]
    given = [queries_of(spec, z, q, z.d)]
    out, lse, *count = call(_forward_kernel, spec, z, given, k, v, bias, tables, shapes, specs, scratch, interpret, "forward")
    t = q.shape[2]
    out = untile(out.reshape(z.b, -1, z.nq, z.bq, z.c), spec.block_q, t, v.shape[3])
    lse = unlane(jnp.swapaxes(lse, 2, 3), spec.block_q, t).reshape(q.shape[:3])
    return out, lse, *(x.reshape(z.b, z.e, z.nq, 2) for x in count)


def heads(z: Sizes, width: int):
    return pl.BlockSpec((None, None, z.n, z.bq, width), lambda i, j, x: (i, j, 0, x, 0))


def scalars(n: int):
    return pl.BlockSpec((None, None, None, 1, n), lambda i, j, x: (i, j, x, 0, 0), memory_space=pltpu.SMEM)


def call(kernel, spec, z: Sizes, given, k, v, bias, tables: Tables, shapes, specs, scratch, interpret, name):
    """Runs a kernel on a grid (b, e, nq) that walks the lists."""
    side, mask = sides(spec, z, bias, tables)
    table = jnp.concatenate([tables.count[..., None], tables.index], -1)[..., None, :]
    stand = lanes(tables.q_pos, spec.block_q, z.bq, -1)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    whole = pl.BlockSpec((None, None, None, 2 * z.n, z.bq), lambda i, j, x: (i, j, x, 0, 0))
    held = [k.dtype, v.dtype, jnp.int32, jnp.int32][: 3 + len(mask)]
    buffers = [(z.bk, z.d), (z.bk, z.c), side.shape[3:], (1, side.shape[4])]
    width = z.d + z.c
    work = z.b * z.e * z.nq * z.m * z.bk
    return pl.pallas_call(
        functools.partial(kernel, spec, z, bool(mask)),
        grid=(z.b, z.e, z.nq),
        in_specs=[
            scalars(z.m + 1),
            pl.BlockSpec((None, None, 1, z.bq), lambda i, j, x: (i, x, 0, 0)),
            *[heads(z, given[0].shape[-1]), heads(z, z.c), whole][: len(given)],
            *[anywhere] * (3 + len(mask)),
        ],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[
            *(pltpu.VMEM((2, *size), kind) for size, kind in zip(buffers, held, strict=False)),
            pltpu.SemaphoreType.DMA((2, 4)),
            *scratch,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * z.n * z.bq * width, bytes_accessed=work * width * k.dtype.itemsize, transcendentals=work * z.n * z.bq
        ),
        name=f"block_sparse_{name}",
        interpret=interpret,
    )(table, stand, *given, keys_of(spec, z, k, z.d), keys_of(spec, z, v, z.c), side, *mask)


def column(row):
    """[1 n] -> [n 1]."""
    n = row.shape[1]
    same = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
    return jnp.sum(jnp.where(same, row, 0), 1, keepdims=True, dtype=row.dtype)


def row(column):
    """[n 1] -> [1 n]."""
    n = column.shape[0]
    same = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
    return jnp.sum(jnp.where(same, column, 0), 0, keepdims=True, dtype=column.dtype)


def dot(x, y, i: int, j: int):
    """Contracts axis i of x with axis j of y, summed in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32, precision=precision)


def stream(many, copies, attend, counts=None):
    """`attend(a)` for each of `many` tiles when copies(a) have arrived, those of the next under way; counts them."""

    def fetch(a):
        for copy in copies(a):
            copy.start()
        if counts is not None:
            counts[0, 1] += 1

    def step(a, _):
        @pl.when(a + 1 < many)
        def _():
            fetch(a + 1)

        for copy in copies(a):
            copy.wait()
        attend(a)
        if counts is not None:
            counts[0, 0] += 1

    @pl.when(many > 0)
    def _():
        fetch(0)

    lax.fori_loop(0, many, step, None)


def walk(z: Sizes, table, arrays, buffers, done, attend, counts=None):
    """`attend(keys, values, positions, biases)` on each listed block."""
    b, e, i = (pl.program_id(axis) for axis in range(3))
    g = e // (z.e // z.g)

    def copies(a):
        at, slot = table[0, 1 + a], lax.rem(a, 2)
        rows = pl.ds(pl.multiple_of(at * z.bk, 8), z.bk)
        where = [(b, g, rows), (b, g, rows), (b, g, at), (b, e, i, a)]
        for n, (x, y, w) in enumerate(zip(arrays, buffers, where, strict=False)):
            yield pltpu.make_async_copy(x.at[w], y.at[slot], done.at[slot, n])

    def tile(a):
        keys, values, side, *mask = (y[lax.rem(a, 2)] for y in buffers)
        side = side[:, : z.bk]
        stand = jnp.where(mask[0][:, : z.bk] > 0, side[:1], -1) if mask else side[:1]
        attend(keys, values, stand, lax.bitcast_convert_type(side[1:], jnp.float32) if side.shape[0] > 1 else None)

    stream(table[0, 0], copies, tile, counts)


def logits(spec: Spec, q, k):
    """(capped logits, the cap's slope) of rows q against rows k."""
    x = dot(q, k, 1, 1) * spec.scale
    if spec.softcap is None:
        return x, None
    x = jnp.tanh(x / spec.softcap)
    return spec.softcap * x, 1 - x * x


def _forward_kernel(spec: Spec, z: Sizes, masked: bool, table, stand, q, *rest):
    n, m = 3 + masked, 5 + masked + spec.count
    arrays, (out, lse, *counts), (*buffers, done, top, total, acc) = rest[:n], rest[n:m], rest[m:]
    counts = counts[0] if counts else None
    rows = z.n * z.bq
    mine = jnp.concatenate([column(stand[...])] * z.n, 0)
    queries = q[...].reshape(rows, z.d)
    top[...], total[...], acc[...] = jnp.full_like(top, -jnp.inf), jnp.zeros_like(total), jnp.zeros_like(acc)
    if counts is not None:
        counts[0, 0] = counts[0, 1] = jnp.int32(0)

    def attend(keys, values, theirs, extra):
        x, _ = logits(spec, queries, keys)
        x = x if extra is None else x + extra
        x = jnp.where(visible(spec, mine, theirs), x, -jnp.inf)
        old = top[...]
        new = jnp.maximum(old, jnp.max(x, -1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        mass, fade = jnp.exp(x - safe), jnp.exp(old - safe)
        top[...] = new
        total[...] = total[...] * fade + jnp.sum(mass, -1, keepdims=True)
        acc[...] = acc[...] * fade + dot(mass.astype(values.dtype), values, 1, 0)

    walk(z, table, arrays, buffers, done, attend, counts)
    live = total[...] > 0
    norm = jnp.where(live, total[...], 1.0)
    out[...] = (acc[...] / norm).astype(out.dtype).reshape(out.shape)
    level = jnp.where(live, top[...] + jnp.log(norm), -jnp.inf)
    for u in range(z.n):
        lse[u : u + 1] = row(level[u * z.bq : (u + 1) * z.bq])
