"""Scores of pages, blocks and chunks on NVIDIA GPUs from Hopper on, one group of four warps a tile."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtok_kernels import mosaic

TILE = 64
NEVER = -3e30
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def _narrow(**given) -> None:
    kinds = {x.dtype for x in given.values()}
    if len(kinds) > 1 or not kinds <= {jnp.dtype("bfloat16"), jnp.dtype("float16")}:
        said = ", ".join(f"{name} is {x.dtype}" for name, x in given.items())
        raise NotImplementedError(f"{said}; on GPUs all are bfloat16 or all float16; use impl='xla'")
    if any(x.shape[-1] % 16 or x.shape[-1] > 256 for x in given.values()):
        raise NotImplementedError(
            f"rows of {[x.shape[-1] for x in given.values()]} channels; on GPUs a multiple of 16 up to 256; use impl='xla'"
        )


def page_bounds(q, low, high, *, group: str, interpret: bool = False):
    """See `jaxtok_kernels.scores.page_bounds`. Pages are the rows of the products, query heads (padded to eights) their columns."""
    _narrow(q=q, low=low, high=high)
    (b, h, d), (g, p) = q.shape, low.shape[1:3]
    heads = -(-h // g // 8) * 8
    query = q.reshape(b, g, h // g, d)
    fill = query[:, :, :1] if group == "max" else jnp.zeros_like(query[:, :, :1])
    query = jnp.concatenate([query, jnp.broadcast_to(fill, (b, g, heads - h // g, d))], 2)
    low, high = (mosaic.padded(x, 2, TILE) for x in (low, high))
    number, first = mosaic.whole_tiles(low.shape[2], TILE)

    def kernel(first, up, down, low, high, out, up_s, down_s, low_s, high_s, out_s, there):
        i, j, n = (lax.axis_index(name) for name in ("b", "g", "n"))
        pages = pl.ds(first[n], TILE)
        copies = ((up.at[i, j], up_s), (down.at[i, j], down_s), (low.at[i, j, pages], low_s), (high.at[i, j, pages], high_s))
        for x, to in copies:
            plgpu.copy_gmem_to_smem(x, to, there)
        plgpu.barrier_wait(there)
        bound = mosaic.product(high_s, up_s, turned=True) + mosaic.product(low_s, down_s, turned=True)
        out_s[...] = jnp.max(bound, axis=1) if group == "max" else jnp.sum(bound, axis=1) * (g / h if group == "mean" else 1.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[i, j, n])
        plgpu.wait_smem_to_gmem(0)

    tile = lambda n: mosaic.tile((n, d), q.dtype)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((b, g, number, TILE), jnp.float32),
        scratch_types=[
            tile(heads), tile(heads), tile(TILE), tile(TILE), plgpu.SMEM((TILE,), jnp.float32), plgpu.Barrier(num_arrivals=4),
        ],
        grid=(b, g, number),
        grid_names=("b", "g", "n"),
        **mosaic.options(interpret),
    )(first, jnp.maximum(query, 0), jnp.minimum(query, 0), low, high)  # fmt: skip
    return _joined(out, 2, low.shape[2])[:, :, :p]


def _joined(x, axis: int, n: int):
    """The n rows of tiles [... number size ...] at `axis`, of which the last begins at n - size."""
    number, size = x.shape[axis : axis + 2]
    flat = x.reshape(*x.shape[:axis], number * size, *x.shape[axis + 2 :])
    cut = lambda a, b: lax.slice_in_dim(flat, a, b, axis=axis)
    return jnp.concatenate([cut(0, (number - 1) * size), cut(number * size - (n - (number - 1) * size), number * size)], axis)


def chunk_means(x, live, *, chunk: int, bounds: bool = False, interpret: bool = False):
    """See `jaxtok_kernels.scores.chunk_means`. 64 chunks a block of threads: products of a matrix of zeros and ones with tiles of 64 rows."""
    assert not bounds
    _narrow(x=x)
    b, h, n, d = x.shape
    p = -(-n // chunk)
    x, live = mosaic.padded(x, 2, TILE), mosaic.padded(live, 2, TILE, False)
    n, tiles = x.shape[2], -(-p // TILE)
    there_ = live.astype(jnp.float32)

    def kernel(x, live, out, x_s, mine_s, out_s, there):
        i, j, t = (lax.axis_index(name) for name in ("b", "h", "t"))
        begin = lambda step: jnp.minimum((t * chunk + step) * TILE, n - TILE)
        page = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=MATRIX)
        col = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=MATRIX)

        def fetch(step, slot):
            plgpu.copy_gmem_to_smem(x.at[i, j, pl.ds(begin(step), TILE)], x_s.at[slot], there.at[slot])

        def use(step, slot, total):
            row, first = col + begin(step), (page + t * TILE) * chunk
            seen = lax.broadcast_in_dim(mosaic.load(live.at[i, j, pl.ds(begin(step), TILE)], COLUMN), (TILE, TILE), [1])
            mine = (row >= first) & (row < first + chunk) & (row >= (t * chunk + step) * TILE)
            mine_s[...] = jnp.where(mine, seen, 0.0).astype(x_s.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(there.at[slot])
            return total + mosaic.product(mine_s, x_s.at[slot])

        total = mosaic.stream(jnp.int32(chunk), fetch, use, plgpu.layout_cast(jnp.zeros((TILE, d), jnp.float32), MATRIX))
        out_s[...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[i, j, pl.ds(t * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    total = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((b, h, tiles * TILE, d), jnp.float32),
        scratch_types=[
            mosaic.tile((2, TILE, d), x.dtype),
            mosaic.tile((TILE, TILE), x.dtype, mosaic.swizzle(d, x.dtype)),
            mosaic.tile((TILE, d), jnp.float32),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(b, h, tiles),
        grid_names=("b", "h", "t"),
        **mosaic.options(interpret),
    )(x, there_)
    there_ = jnp.pad(there_, ((0, 0), (0, 0), (0, max(p * chunk - n, 0))))[:, :, : p * chunk]
    number = jnp.sum(there_.reshape(b, h, p, chunk), -1)
    return total[:, :, :p] / jnp.maximum(number, 1.0)[..., None]


def low_bit(code, q_pos, k_pos, *, block_q: int, block_k: int, interpret: bool = False):
    """As the kernel for TPUs. A block of threads: 64 queries, 64 blocks of keys; a block of keys all beyond the queries is not fetched."""
    (b, h, t, d), (g, s) = code.q.shape, k_pos.shape[1:]
    wide = -(-block_k // 8) * 8
    if wide > 256:
        raise NotImplementedError(f"blocks of {block_k} keys; on GPUs 256 at most")
    x, number, tall = -(-t // block_q), -(-s // block_k), -(-block_q // TILE) * TILE
    steps, groups = x * tall // TILE, -(-number // TILE)

    def blocks(a, axis, size, to, number, fill=0):
        """Axis `axis` in `number` blocks of `size`, each padded to `to`."""
        pad = lambda a, axis, n: jnp.pad(a, [(0, n if i == axis else 0) for i in range(a.ndim)], constant_values=fill)
        a = pad(a, axis, number * size - a.shape[axis])
        a = pad(a.reshape(*a.shape[:axis], number, size, *a.shape[axis + 1 :]), axis + 1, to - size)
        return a.reshape(*a.shape[:axis], number * to, *a.shape[axis + 2 :])

    rows = lambda a, axis, fill=0: blocks(a, axis, block_q, tall, x, fill)
    keys = lambda a, fill=0: blocks(a, 2, block_k, wide, groups * TILE, fill)
    more = -d % 64  # channels
    even = lambda a: jnp.pad(a, ((0, 0),) * 3 + ((0, more),))
    at, of = rows(q_pos, 1, -1), keys(k_pos, -1)
    latest = jnp.max(at.reshape(b, steps, TILE), -1)
    earliest = jnp.min(jnp.where(of < 0, 2**30, of).reshape(b, g, groups * TILE, wide), -1)
    d += more

    def kernel(latest, earliest, q, dq, off, at, k, dk, qk, of, out, q_s, k_s, top_s, best_s, out_s, there, q_there):
        i, j, n, y = (lax.axis_index(name) for name in ("b", "h", "n", "y"))
        head, mine = lax.div(j, jnp.int32(h // g)), pl.ds(n * TILE, TILE)
        sees = lambda step: earliest[i, head, y * TILE + step] <= latest[i, n]
        plgpu.copy_gmem_to_smem(q.at[i, j, mine], q_s, q_there)
        plgpu.barrier_wait(q_there)
        down = lambda a: lax.broadcast_in_dim(a, (TILE, wide), [0])
        along = lambda a: lax.broadcast_in_dim(mosaic.load(a, COLUMN), (TILE, wide), [1])
        step_, off_, at_ = (down(mosaic.load(a, ROW)) for a in (dq.at[i, j, mine], off.at[i, j, mine], at.at[i, mine]))

        def fetch(step, slot):
            @pl.when(sees(step))
            def _():
                plgpu.copy_gmem_to_smem(k.at[i, head, pl.ds((y * TILE + step) * wide, wide)], k_s.at[slot], there.at[slot])

        def use(step, slot, state):
            where = pl.ds((y * TILE + step) * wide, wide)

            @pl.when(sees(step))
            def _():
                plgpu.barrier_wait(there.at[slot])
                dot = mosaic.product(q_s, k_s.at[slot], jnp.int32, turned=True)
                logit = dot.astype(jnp.float32) * step_ * along(dk.at[i, head, where]) + along(qk.at[i, j, where]) - off_
                theirs = along(of.at[i, head, where])
                logit = jnp.where((theirs >= 0) & (theirs <= at_), logit, NEVER)
                top_s[...] = jnp.max(logit, axis=1)

            @pl.when(jnp.logical_not(sees(step)))
            def _():
                top_s[...] = plgpu.layout_cast(jnp.full((TILE,), NEVER, jnp.float32), ROW)

            plgpu.commit_smem()
            best_s.at[step][...] = mosaic.load(top_s, ROW)
            return state

        mosaic.stream(jnp.int32(min(TILE, number)), fetch, use, jnp.int32(0))
        out_s[...] = jnp.max(mosaic.load(best_s, MATRIX), axis=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[i, j, n, pl.ds(y * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    line = lambda *n: plgpu.SMEM(n, jnp.float32)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((b, h, steps, groups * TILE), jnp.float32),
        scratch_types=[
            mosaic.tile((TILE, d), jnp.int8), mosaic.tile((2, wide, d), jnp.int8), line(TILE), line(TILE, TILE), line(TILE),
            plgpu.Barrier(num_barriers=2), plgpu.Barrier(),
        ],
        grid=(b, h, steps, groups),
        grid_names=("b", "h", "n", "y"),
        **mosaic.options(interpret),
    )(
        latest, earliest, even(rows(code.q, 2)), rows(code.dq, 2), rows(code.kq, 2), at,
        even(keys(code.k)), keys(code.dk), keys(code.qk), of,
    )  # fmt: skip
    return jnp.max(out.reshape(b, h, x, tall // TILE, -1), 3)[..., :number]
