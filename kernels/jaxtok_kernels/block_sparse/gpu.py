"""Attention to listed blocks of keys on NVIDIA Hopper: wgmma and TMA, one warpgroup copying ahead of those that compute. Forward only.

16-bit dtypes. A warpgroup holds 64 rows (of one query head); two share each copy. Blocks of queries are rounded up to 64 rows, blocks of keys to 64, or to
whole tiles of 128 where they are larger, widths to 64: what does not fit is copied once, padded. All h/e heads of a list walk it by themselves,
so a listed block is copied h/e * block_q / 128 times, past the first time out of the L2 cache; `count` tells what the first two warpgroups did.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtok_kernels.block_sparse.layout import Spec, Tables, lanes, tiles, untile, up, visible

ROWS, LOG2E, WIDEST = 64, math.log2(math.e), 256
SHARED = 227 * 1024  # bytes of shared memory that a Hopper block may have


class _Sizes(NamedTuple):
    """g KV heads, e lists of n heads; nq blocks of bq rows; nk blocks of bk keys in tiles; widths d, c; `groups` warpgroups share copies, `depth` deep."""

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
    tile: int
    groups: int
    depth: int


def _sizes(spec: Spec, q, k, v, tables: Tables) -> _Sizes:
    (b, h, _, d), (g, s), (e, nq, m) = q.shape, k.shape[1:3], tables.index.shape[1:]
    d, c, bq = up(d, 64), up(v.shape[3], 64), up(spec.block_q, ROWS)
    if q.dtype.itemsize != 2 or max(d, c) > WIDEST:
        raise NotImplementedError(
            f"the GPU kernel takes 16-bit dtypes and heads of at most {WIDEST}, got {q.dtype}, {max(d, c)}; use impl='xla'"
        )
    tile = 64 if spec.block_k <= 64 or d + c > 256 else 128
    groups = 2 if h // e * bq // ROWS % 2 == 0 else 1
    each = 2 * tile * (d + c) + 12 * tile
    depth = max(2, min(4, (SHARED - 8192 - groups * ROWS * 2 * (d + c + tile)) // each))
    return _Sizes(b, g, e, h // e, nq, bq, -(-s // spec.block_k), up(spec.block_k, tile), m, d, c, tile, groups, depth)


def forward(spec: Spec, q, k, v, bias, tables: Tables, *, interpret: bool):
    """See `jaxtok_kernels.block_sparse.block_sparse`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # needs absl-py

    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"jax {jax.__version__} has no interpreter of GPU kernels; take jax 0.11.2, or impl='interpret'")
    z = _sizes(spec, q, k, v, tables)
    cut = lambda x, block, rows, width: tiles(x, block, rows, width).reshape(*x.shape[:2], -1, width)
    flat = lambda x, block, rows, fill=0: lanes(x, block, rows, fill).reshape(*x.shape[:-1], -1)
    sides = [flat(tables.k_pos, spec.block_k, z.bk, -1)]
    sides += [] if bias is None else [flat(bias, spec.block_k, z.bk) * LOG2E]
    if tables.mask is not None:
        mask = jnp.pad(tables.mask, [(0, 0)] * 4 + [(0, z.bk - spec.block_k)]).astype(jnp.int32)
        sides.append(mask.reshape(*mask.shape[:3], -1))
    given = (
        tables.index,
        tables.count,
        flat(tables.q_pos, spec.block_q, z.bq, -1),
        cut(q, spec.block_q, z.bq, z.d),
        cut(k, spec.block_k, z.bk, z.d),
        cut(v, spec.block_k, z.bk, z.c),
        *sides,
    )
    h, t, rows = q.shape[1], q.shape[2], z.nq * z.bq
    parts = z.n * z.bq // ROWS // z.groups
    shapes = [jax.ShapeDtypeStruct((z.b, h, rows, z.c), q.dtype), jax.ShapeDtypeStruct((z.b, h, rows), jnp.float32)]
    if spec.count:
        shapes.append(jax.ShapeDtypeStruct((z.b, z.e, z.nq, parts, 2, 128), jnp.int32))
    swizzled = dict(transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
    scratch = [
        plgpu.SMEM((z.groups, ROWS, z.d), q.dtype, **swizzled),
        plgpu.SMEM((z.groups, ROWS), jnp.int32),
        plgpu.SMEM((z.depth, z.tile, z.d), q.dtype, **swizzled),
        plgpu.SMEM((z.depth, z.tile, z.c), q.dtype, **swizzled),
        *(plgpu.SMEM((z.depth, z.tile), x.dtype) for x in sides),
        plgpu.SMEM((z.groups, ROWS, z.c), q.dtype, **swizzled),
        plgpu.SMEM((z.groups, ROWS), jnp.float32),
        *([plgpu.SMEM((z.groups, ROWS, z.tile), q.dtype, **swizzled)] if interpret else []),
        *([plgpu.SMEM((2, 128), jnp.int32)] if spec.count else []),
        plgpu.Barrier(num_arrivals=2, num_barriers=z.groups),
        plgpu.Barrier(num_arrivals=1 + len(sides), num_barriers=z.depth),
        plgpu.Barrier(num_barriers=z.depth),
        plgpu.Barrier(num_arrivals=z.groups, num_barriers=z.depth),
    ]
    out, lse, *count = plgpu.kernel(
        functools.partial(_kernel, plgpu, spec, z, bias is not None, tables.mask is not None, interpret),
        out_type=shapes,
        scratch_types=scratch,
        grid=(parts, z.nq, z.b * z.e),
        grid_names=("part", "row", "list"),
        num_threads=z.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*given)
    out = untile(out.reshape(z.b, h, z.nq, z.bq, z.c), spec.block_q, t, v.shape[3])
    lse = untile(lse.reshape(z.b, h, z.nq, z.bq, 1), spec.block_q, t, 1)[..., 0]
    return out, lse, *(x[:, :, :, 0, :, 0] for x in count)


def backward(spec: Spec, q, k, v, bias, tables: Tables, out, lse, dout, dlse, *, interpret: bool):
    raise NotImplementedError("block_sparse has no backward pass for GPUs yet; use impl='xla'")


def _kernel(plgpu, spec: Spec, z: _Sizes, biased: bool, masked: bool, interpret: bool, *refs):
    """A block of z.groups computing warpgroups, 64 rows each, and one that copies; `interpret`: probabilities pass through shared memory."""
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    sides = 1 + biased + masked
    index, count, q_pos, q, k, v = take(6)
    given = take(sides)
    out, lse, *counts = take(2 + spec.count)
    q_tile, mine_tile, k_tile, v_tile = take(4)
    side_tiles = take(sides)
    out_tile, lse_tile, *p_tile = take(2 + interpret)
    count_tile = take(int(spec.count))
    q_ready, k_ready, v_ready, free = refs
    group, part, i, at = (lax.axis_index(name) for name in ("group", "part", "row", "list"))
    b, e = lax.div(at, jnp.int32(z.e)), lax.rem(at, jnp.int32(z.e))
    g, split, per = lax.div(e, jnp.int32(z.e // z.g)), z.bk // z.tile, z.bq // ROWS
    steps = count[b, e, i] * split

    def tell(what, n):
        if spec.count:
            whole = plgpu.layout_cast(lax.broadcast_in_dim(n, (128,), ()), plgpu.Layout.WG_STRIDED((128,), 1))
            count_tile[0][what] = whole
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(count_tile[0].at[what], counts[0].at[b, e, i, part, what])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")

        def fetch(a, fetched):
            slot, entry, piece = lax.rem(a, jnp.int32(z.depth)), lax.div(a, jnp.int32(split)), lax.rem(a, jnp.int32(split))

            @pl.when(a >= z.depth)
            def _():
                plgpu.barrier_wait(free.at[slot])

            rows = pl.ds(pl.multiple_of(index[b, e, i, entry] * z.bk + piece * z.tile, z.tile), z.tile)
            plgpu.copy_gmem_to_smem(k.at[b, g, rows], k_tile.at[slot], k_ready.at[slot])
            for x, y in zip(given[: sides - masked], side_tiles, strict=False):
                plgpu.copy_gmem_to_smem(x.at[b, g, rows], y.at[slot], k_ready.at[slot])
            if masked:
                mine = pl.ds(pl.multiple_of(a * z.tile, z.tile), z.tile)
                plgpu.copy_gmem_to_smem(given[-1].at[b, e, i, mine], side_tiles[-1].at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(v.at[b, g, rows], v_tile.at[slot], v_ready.at[slot])
            return fetched + jnp.where(piece == 0, jnp.int32(1), jnp.int32(0))

        fetched = lax.fori_loop(0, steps, fetch, jnp.int32(0))
        for slot in range(z.depth):  # every arrival is waited for before the barriers go

            @pl.when(steps > slot)
            def _():
                plgpu.barrier_wait(free.at[slot])  # noqa: B023

        tell(1, fetched)

    @pl.when(group < z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(232, action="increase")
        row = part * z.groups + group
        head = e * z.n + lax.div(row, jnp.int32(per))
        rows = pl.ds(pl.multiple_of(i * z.bq + lax.rem(row, jnp.int32(per)) * ROWS, ROWS), ROWS)
        plgpu.copy_gmem_to_smem(q.at[b, head, rows], q_tile.at[group], q_ready.at[group])
        plgpu.copy_gmem_to_smem(q_pos.at[b, rows], mine_tile.at[group], q_ready.at[group])
        plgpu.barrier_wait(q_ready.at[group])
        square, down, across = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        mine = plgpu.layout_cast(mine_tile[group], down)
        wide = lambda x, axis, n=z.tile: lax.broadcast_in_dim(x, (ROWS, n), [axis])

        def attend(a, held):
            top, total, acc, done = held
            slot = lax.rem(a, jnp.int32(z.depth))
            plgpu.barrier_wait(k_ready.at[slot])

            def product(ref):
                plgpu.wgmma(ref, q_tile.at[group], k_tile.at[slot].transpose((1, 0)))
                return ref[...]

            x = pl.run_scoped(product, plgpu.ACC((ROWS, z.tile), jnp.float32))
            if spec.softcap is None:
                x = x * (spec.scale * LOG2E)
            else:
                x = jnp.tanh(x * (spec.scale / spec.softcap)) * (spec.softcap * LOG2E)
            side = [plgpu.layout_cast(y[slot], across) for y in side_tiles]
            x = x + wide(side[1], 1) if biased else x
            theirs = jnp.where(side[-1] > 0, side[0], -1) if masked else side[0]
            x = jnp.where(visible(spec, wide(mine, 0), wide(theirs, 1)), x, -jnp.inf)
            new = jnp.maximum(top, jnp.max(x, axis=1))
            safe = jnp.where(new > -jnp.inf, new, 0.0)
            p, fade = jnp.exp2(x - wide(safe, 0)), jnp.exp2(top - safe)
            total = total * fade + jnp.sum(p, axis=1)
            acc, p = acc * wide(fade, 0, z.c), p.astype(q.dtype)
            if interpret:
                p_tile[0][group] = p
                plgpu.commit_smem()
            plgpu.barrier_wait(v_ready.at[slot])

            def add(ref):
                plgpu.wgmma(ref, p_tile[0].at[group] if interpret else p, v_tile.at[slot])
                return ref[...] if interpret else None

            acc = acc + pl.run_scoped(add, plgpu.ACC((ROWS, z.c), jnp.float32)) if interpret else pl.run_state(add)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(free.at[slot])
            return new, total, acc, done + jnp.where(lax.rem(a, jnp.int32(split)) == 0, jnp.int32(1), jnp.int32(0))

        line = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), down)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, z.c), jnp.float32), square)
        top, total, acc, done = lax.fori_loop(0, steps, attend, (line(-jnp.inf), line(0.0), nothing, jnp.int32(0)))
        live = total > 0
        norm = jnp.where(live, total, 1.0)
        out_tile[group] = (acc / wide(norm, 0, z.c)).astype(q.dtype)
        lse_tile[group] = jnp.where(live, top * math.log(2.0) + jnp.log(norm), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile.at[group], out.at[b, head, rows])
        plgpu.copy_smem_to_gmem(lse_tile.at[group], lse.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)
        pl.when(group == 0)(lambda: tell(0, done))
