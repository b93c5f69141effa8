"""Matching and merging on NVIDIA GPUs from Hopper on."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtok_kernels import mosaic

TILE, WIDE, DEEP = 64, 128, 64  # rows of a, rows of c, channels of a step
THREADS = 128
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def match(a, c, bias, *, interpret: bool = False):
    """See `jaxtok_kernels.merge.match`. A block of threads: 64 rows of a against all of c, 128 at a time, 64 channels a step."""
    if a.dtype == jnp.float32:
        a, c = _parts(a, (0, 0, 1, 0, 1, 2)), _parts(c, (0, 1, 0, 2, 1, 0))
    elif a.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"rows of {a.dtype} on GPUs; they are float32, bfloat16 or float16")
    b, n, d = a.shape
    deep = -(-d // DEEP)
    a, c = (jnp.pad(x, ((0, 0), (0, 0), (0, deep * DEEP - d))) for x in (a, c))
    a, c, bias = mosaic.padded(a, 1, TILE), mosaic.padded(c, 1, WIDE), mosaic.padded(bias, 1, WIDE, -jnp.inf)
    tiles, first = mosaic.whole_tiles(a.shape[1], TILE)
    steps, begin = mosaic.whole_tiles(c.shape[1], WIDE)
    slot = (begin[:, None] + jnp.arange(WIDE, dtype=jnp.int32)[None]).reshape(-1)
    new = slot >= (jnp.arange(steps, dtype=jnp.int32) * WIDE).repeat(WIDE)
    bias = jnp.where(new[None], bias[:, slot], -jnp.inf)

    def kernel(first, begin, a, c, bias, best, where, a_s, c_s, best_s, where_s, there):
        i, t = lax.axis_index("b"), lax.axis_index("t")
        rows, index = pl.ds(first[t], TILE), plgpu.broadcasted_iota(jnp.int32, (TILE, WIDE), 1, layout=MATRIX)

        def fetch(step, slot):
            channels = pl.ds(lax.rem(step, jnp.int32(deep)) * DEEP, DEEP)
            cols = pl.ds(begin[lax.div(step, jnp.int32(deep))], WIDE)
            plgpu.copy_gmem_to_smem(a.at[i, rows, channels], a_s.at[slot], there.at[slot])
            plgpu.copy_gmem_to_smem(c.at[i, cols, channels], c_s.at[slot], there.at[slot])

        def tile(j, state):
            best, where = state

            def part(k, score):
                step = j * deep + k
                slot = lax.rem(step, jnp.int32(2))

                @pl.when(step + 1 < steps * deep)
                def _():
                    fetch(step + 1, 1 - slot)

                plgpu.barrier_wait(there.at[slot])
                score = score + mosaic.product(a_s.at[slot], c_s.at[slot], turned=True)
                plgpu.commit_smem()  # all have read before the next copies write
                return score

            score = lax.fori_loop(0, deep, part, plgpu.layout_cast(jnp.zeros((TILE, WIDE), jnp.float32), MATRIX))
            extra = lax.broadcast_in_dim(mosaic.load(bias.at[i, pl.ds(j * WIDE, WIDE)], COLUMN), score.shape, [1])
            score = score + extra
            top = jnp.max(score, axis=1)
            at = (index + begin[j]).astype(jnp.float32)  # exact below 2**24
            hit = score == lax.broadcast_in_dim(top, score.shape, [0])
            early = -jnp.max(jnp.where(hit, -at, -(2.0**25)), axis=1)
            better = top > best
            return jnp.where(better, top, best), jnp.where(better, early, where)

        fetch(jnp.int32(0), jnp.int32(0))
        full = lambda fill: plgpu.layout_cast(jnp.full((TILE,), fill, jnp.float32), ROW)
        best_s[...], where_s[...] = lax.fori_loop(0, steps, tile, (full(-jnp.inf), full(-1.0)))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(best_s, best.at[i, t])
        plgpu.copy_smem_to_gmem(where_s, where.at[i, t])
        plgpu.wait_smem_to_gmem(0)

    line = plgpu.SMEM((TILE,), jnp.float32)
    best, where = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((b, tiles, TILE), jnp.float32)] * 2,
        scratch_types=[
            mosaic.tile((2, TILE, DEEP), a.dtype), mosaic.tile((2, WIDE, DEEP), a.dtype), line, line,
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        grid=(b, tiles),
        grid_names=("b", "t"),
        **mosaic.options(interpret),
    )(first, begin, a, c, bias)  # fmt: skip

    def joined(x):  # the last tile begins where the rows end
        last = a.shape[1] - (tiles - 1) * TILE
        return jnp.concatenate([x[:, :-1].reshape(b, -1), x[:, -1, TILE - last :]], 1)[:, :n]

    return joined(best), joined(where).astype(jnp.int32)


def _parts(x, order):
    """Three bfloat16 numbers that add up to each float32, side by side in `order`; the six products that matter are then one product."""
    found = []
    for _ in range(3):
        found.append(lax.reduce_precision(x, 8, 7))
        x = x - found[-1]
    return jnp.concatenate([found[i].astype(jnp.bfloat16) for i in order], -1)


def segment_sum(x, weight, assign, m: int, *, interpret: bool = False):
    """f32 [b m c]: the sum of weight_i x_i over the rows of each group, in their order. A block of threads a group: each row is read once.

    Rows are padded to a multiple of 128 channels, which copies them.
    """
    b, n, c = x.shape
    wide = -(-c // THREADS) * THREADS
    each = next(i for i in (1024, 512, 256, 128) if wide % i == 0)
    x = x if wide == c else jnp.pad(x, ((0, 0), (0, 0), (0, wide - c)))
    to = jnp.where((assign < 0) | (weight == 0), m, assign)
    order = jnp.argsort(to, axis=-1, stable=True).astype(jnp.int32)
    sizes = jax.vmap(lambda i: jnp.zeros(m + 1, jnp.int32).at[i].add(1))(to)
    ends = jnp.cumsum(sizes, -1).astype(jnp.int32)
    layout = plgpu.Layout.WG_STRIDED((each,), vec_size=each // THREADS)

    def kernel(order, ends, sizes, weight, x, out):
        i, j, k = lax.axis_index("b"), lax.axis_index("m"), lax.axis_index("c")
        cols = pl.ds(k * each, each)

        def one(at, total):
            row = order[i, at]
            return total + mosaic.load(x.at[i, row, cols], layout).astype(jnp.float32) * weight[i, row]

        zero = plgpu.layout_cast(jnp.zeros((each,), jnp.float32), layout)
        out[i, j, cols] = lax.fori_loop(ends[i, j] - sizes[i, j], ends[i, j], one, zero)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((b, m, wide), jnp.float32),
        grid=(b, wide // each, m),
        grid_names=("b", "c", "m"),
        **mosaic.options(interpret),
    )(order, ends, sizes, weight, x)
    return out[..., :c]
