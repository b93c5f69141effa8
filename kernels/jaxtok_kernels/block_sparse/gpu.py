"""Attention to listed blocks of keys on NVIDIA Hopper: wgmma and TMA, one warpgroup copying ahead of those that compute.

16-bit dtypes. A warpgroup holds 64 rows (of one query head); two share each copy. Blocks of queries are rounded up to 64 rows, blocks of keys to 64, or to
whole tiles of 128 where they are larger, widths to 64: what does not fit is copied once, padded. All h/e heads of a list walk it by themselves,
so a listed block is copied h/e * block_q / 128 times, past the first time out of the L2 cache; `count` tells what the first two warpgroups did.
The interpreter knows no wgmma with an operand in registers: there (`interpret`) probabilities pass through shared memory; and its threads may wait
for ever inside a larger program: call it outside jit. ptxas of CUDA 12.8 to 12.9.0 is known to miscompile masked attention of this kind.
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
SHARED = 220 * 1024  # bytes of shared memory that tiles may take


class Sizes(NamedTuple):
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


def sizes(spec: Spec, q, k, v, tables: Tables, widest: int) -> Sizes:
    """`widest`: rows of a tile of keys, at most."""
    (b, h, _, d), (g, s), (e, nq, m) = q.shape, k.shape[1:3], tables.index.shape[1:]
    d, c, bq = up(d, 64), up(v.shape[3], 64), up(spec.block_q, ROWS)
    if q.dtype.itemsize != 2 or max(d, c) > WIDEST:
        raise NotImplementedError(
            f"the GPU kernel takes 16-bit dtypes and heads of at most {WIDEST}, got {q.dtype}, {max(d, c)}; use impl='xla'"
        )
    tile = 64 if spec.block_k <= 64 or d + c > 256 else widest
    z = Sizes(b, g, e, h // e, nq, bq, -(-s // spec.block_k), up(spec.block_k, tile), m, d, c, tile, 0, 0)
    return share(z, z.n * bq // ROWS)


def share(z: Sizes, held: int) -> Sizes:
    """Two warpgroups to a copy where `held` tiles are even and two slots of what streams by fit beside what the two hold; slots for the rest."""
    for groups in (2, 1):
        depth = (SHARED - groups * ROWS * 2 * (z.d + z.c + z.tile)) // (2 * z.tile * (z.d + z.c) + 12 * z.tile)
        if groups == 1 or (held % 2 == 0 and depth >= 2):
            break
    return z._replace(groups=groups, depth=max(2, min(4, depth)))


def rows_of(x, block: int, rows: int, width: int):
    """[b h n c] -> [b h blocks*rows width]."""
    return tiles(x, block, rows, width).reshape(*x.shape[:2], -1, width)


def line_of(x, block: int, rows: int, fill=0):
    """[*B n] -> [*B blocks*rows]."""
    return lanes(x, block, rows, fill).reshape(*x.shape[:-1], -1)


def sides_of(spec: Spec, z: Sizes, bias, tables: Tables):
    """What goes with a key: positions and biases (of base 2) [b g nk*bk], the mask i32 [b e nq m*bk]."""
    sides = [line_of(tables.k_pos, spec.block_k, z.bk, -1)]
    sides += [] if bias is None else [line_of(bias, spec.block_k, z.bk) * LOG2E]
    if tables.mask is not None:
        mask = jnp.pad(tables.mask, [(0, 0)] * 4 + [(0, z.bk - spec.block_k)]).astype(jnp.int32)
        sides.append(mask.reshape(*mask.shape[:3], -1))
    return sides


def gpu_module(interpret: bool):
    """Pallas for Mosaic GPU, which needs absl-py, and what a call of `kernel` gets from us."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = getattr(plgpu, "InterpretGPUParams", None)
    if interpret and params is None:
        raise NotImplementedError(f"jax {jax.__version__} has no interpreter of GPU kernels; take jax 0.11.2, or impl='interpret'")
    options = {"interpret": params()} if interpret and params is not None else {}
    return plgpu, options | dict(
        thread_name="group",
        grid_names=("part", "row", "list"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def swizzled(plgpu, *shape, dtype):
    """Shared memory for wgmma."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def forward(spec: Spec, q, k, v, bias, tables: Tables, *, interpret: bool):
    """See `jaxtok_kernels.block_sparse.block_sparse`."""
    plgpu, options = gpu_module(interpret)
    z = sizes(spec, q, k, v, tables, 128)
    sides = sides_of(spec, z, bias, tables)
    h, t, rows = q.shape[1], q.shape[2], z.nq * z.bq
    parts = z.n * z.bq // ROWS // z.groups
    shapes = [jax.ShapeDtypeStruct((z.b, h, rows, z.c), q.dtype), jax.ShapeDtypeStruct((z.b, h, rows), jnp.float32)]
    if spec.count:
        shapes.append(jax.ShapeDtypeStruct((z.b, z.e, z.nq, parts, 2, 128), jnp.int32))
    tile = functools.partial(swizzled, plgpu, dtype=q.dtype)
    out, lse, *count = plgpu.kernel(
        functools.partial(_kernel, plgpu, spec, z, bias is not None, tables.mask is not None, interpret),
        out_type=shapes,
        scratch_types=[
            tile(z.groups, ROWS, z.d),
            plgpu.SMEM((z.groups, ROWS), jnp.int32),
            tile(z.depth, z.tile, z.d),
            tile(z.depth, z.tile, z.c),
            *(plgpu.SMEM((z.depth, z.tile), x.dtype) for x in sides),
            tile(z.groups, ROWS, z.c),
            plgpu.SMEM((z.groups, ROWS), jnp.float32),
            *([tile(z.groups, ROWS, z.tile)] if interpret else []),
            *([plgpu.SMEM((2, 128), jnp.int32)] if spec.count else []),
            plgpu.Barrier(num_arrivals=2, num_barriers=z.groups),
            *barriers(plgpu, z, 1 + len(sides), 1),
        ],
        grid=(parts, z.nq, z.b * z.e),
        num_threads=z.groups + 1,
        **options,
    )(
        tables.index,
        tables.count,
        line_of(tables.q_pos, spec.block_q, z.bq, -1),
        rows_of(q, spec.block_q, z.bq, z.d),
        rows_of(k, spec.block_k, z.bk, z.d),
        rows_of(v, spec.block_k, z.bk, z.c),
        *sides,
    )
    out = untile(out.reshape(z.b, h, z.nq, z.bq, z.c), spec.block_q, t, v.shape[3])
    lse = untile(lse.reshape(z.b, h, z.nq, z.bq, 1), spec.block_q, t, 1)[..., 0]
    return out, lse, *(x[:, :, :, 0, :, 0] for x in count)


def barriers(plgpu, z: Sizes, *arrivals: int):
    """One for each kind of copy of a slot, which takes that many copies; then one that frees the slot."""
    return [plgpu.Barrier(num_arrivals=n, num_barriers=z.depth) for n in (*arrivals, z.groups)]


def copy_ahead(plgpu, z: Sizes, steps, free, issue):
    """The copying warpgroup: issue(step, slot) as soon as a slot is free; the sum of what it returns."""

    def step(a, total):
        slot = lax.rem(a, jnp.int32(z.depth))

        @pl.when(a >= z.depth)
        def _():
            plgpu.barrier_wait(free.at[slot])

        return total + issue(a, slot)

    total = lax.fori_loop(0, steps, step, jnp.int32(0))
    for slot in range(z.depth):  # every arrival is waited for before the barriers go

        @pl.when(steps > slot)
        def _():
            plgpu.barrier_wait(free.at[slot])  # noqa: B023

    return total


def key_copies(plgpu, z: Sizes, index, b, e, i, arrays, buffers, masked: bool, k_ready, v_ready):
    """issue(step, slot) that copies a tile of a listed block, with its sides; 1 for the first of a block, else 0."""
    g, split = lax.div(e, jnp.int32(z.e // z.g)), z.bk // z.tile

    def issue(a, slot):
        entry, piece = lax.div(a, jnp.int32(split)), lax.rem(a, jnp.int32(split))
        rows = pl.ds(pl.multiple_of(index[b, e, i, entry] * z.bk + piece * z.tile, z.tile), z.tile)
        for n, (x, y) in enumerate(zip(arrays, buffers, strict=True)):
            where = (b, g, rows)
            if masked and n == len(arrays) - 1:
                where = b, e, i, pl.ds(pl.multiple_of(a * z.tile, z.tile), z.tile)
            plgpu.copy_gmem_to_smem(x.at[where], y.at[slot], (v_ready if n == 1 else k_ready).at[slot])
        return jnp.where(piece == 0, jnp.int32(1), jnp.int32(0))

    return issue


def product(plgpu, x, y, shape):
    """x @ y of shared memory, in float32 registers."""

    def run(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def accumulate(plgpu, acc, x, y, through=None):
    """acc + x @ y, x in registers; `through` is shared memory for x where that cannot be interpreted."""
    if through is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, x, y))(plgpu.ACC.init(acc))
    through[...] = x
    plgpu.commit_smem()
    return acc + product(plgpu, through, y, acc.shape)


def wide(x, axis: int, shape):
    """A vector along one axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def base2(spec: Spec, x):
    """(logits of base 2 from products, tanh of the cap or None)."""
    if spec.softcap is None:
        return x * (spec.scale * LOG2E), None
    x = jnp.tanh(x * (spec.scale / spec.softcap))
    return x * (spec.softcap * LOG2E), x


def _kernel(plgpu, spec: Spec, z: Sizes, biased: bool, masked: bool, interpret: bool, *refs):
    """A block of z.groups computing warpgroups, 64 rows each, and one that copies."""
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    index, count, q_pos, q = take(4)
    arrays = take(3 + biased + masked)
    out, lse, *counts = take(2 + spec.count)
    q_tile, mine_tile = take(2)
    buffers = take(3 + biased + masked)
    out_tile, lse_tile, *through = take(2 + interpret)
    count_tile = take(int(spec.count))
    q_ready, k_ready, v_ready, free = refs
    group, part, i, at = (lax.axis_index(name) for name in ("group", "part", "row", "list"))
    b, e = lax.div(at, jnp.int32(z.e)), lax.rem(at, jnp.int32(z.e))
    split, per = z.bk // z.tile, z.bq // ROWS
    steps = count[b, e, i] * split

    def tell(what, n):
        if spec.count:
            count_tile[0][what] = plgpu.layout_cast(lax.broadcast_in_dim(n, (128,), ()), plgpu.Layout.WG_STRIDED((128,), 1))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(count_tile[0].at[what], counts[0].at[b, e, i, part, what])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == z.groups)
    def _():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        tell(1, copy_ahead(plgpu, z, steps, free, key_copies(plgpu, z, index, b, e, i, arrays, buffers, masked, k_ready, v_ready)))

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
        down, across = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        mine, shape, whole = plgpu.layout_cast(mine_tile[group], down), (ROWS, z.tile), (ROWS, z.c)
        k_tile, v_tile, *sides = buffers

        def attend(a, held):
            top, total, acc, done = held
            slot = lax.rem(a, jnp.int32(z.depth))
            plgpu.barrier_wait(k_ready.at[slot])
            x, _ = base2(spec, product(plgpu, q_tile.at[group], k_tile.at[slot].transpose((1, 0)), shape))
            side = [plgpu.layout_cast(y[slot], across) for y in sides]
            x = x + wide(side[1], 1, shape) if biased else x
            theirs = jnp.where(side[-1] > 0, side[0], -1) if masked else side[0]
            x = jnp.where(visible(spec, wide(mine, 0, shape), wide(theirs, 1, shape)), x, -jnp.inf)
            new = jnp.maximum(top, jnp.max(x, axis=1))
            safe = jnp.where(new > -jnp.inf, new, 0.0)
            p, fade = jnp.exp2(x - wide(safe, 0, shape)), jnp.exp2(top - safe)
            total, acc = total * fade + jnp.sum(p, axis=1), acc * wide(fade, 0, whole)
            plgpu.barrier_wait(v_ready.at[slot])
            acc = accumulate(plgpu, acc, p.astype(q.dtype), v_tile.at[slot], *(y.at[group] for y in through))
            plgpu.barrier_arrive(free.at[slot])
            return new, total, acc, done + jnp.where(lax.rem(a, jnp.int32(split)) == 0, jnp.int32(1), jnp.int32(0))

        line = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), down)
        nothing = plgpu.layout_cast(jnp.zeros(whole, jnp.float32), plgpu.Layout.WGMMA)
        top, total, acc, done = lax.fori_loop(0, steps, attend, (line(-jnp.inf), line(0.0), nothing, jnp.int32(0)))
        live = total > 0
        norm = jnp.where(live, total, 1.0)
        out_tile[group] = (acc / wide(norm, 0, whole)).astype(q.dtype)
        lse_tile[group] = jnp.where(live, top * math.log(2.0) + jnp.log(norm), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile.at[group], out.at[b, head, rows])
        plgpu.copy_smem_to_gmem(lse_tile.at[group], lse.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)
        pl.when(group == 0)(lambda: tell(0, done))
