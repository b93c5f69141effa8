"""Matching and merging on TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
TILE = 2**18  # numbers of a tile of rows to match
ROWS, WIDE, OUT = 512, 512, 2**19  # source rows and channels of a step of the merge; numbers of a tile of its output


def match(a, c, bias, *, interpret: Any = False):
    """See `jaxtok_kernels.merge.match`. Scores lie with the rows of c along sublanes, so best and first come out along lanes."""
    (b, n, d), m = a.shape, c.shape[1]
    most = min(max(TILE // d // LANES, 1), 4) * LANES
    rows, cols = min(most, n), min(most, -(-m // LANES) * LANES)
    tiles = pl.cdiv(m, cols)
    bias = jnp.pad(bias, ((0, 0), (0, tiles * cols - m)), constant_values=-jnp.inf)[:, None]

    def kernel(a, c, bias, best, where):
        j = pl.program_id(2)
        precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        score = lax.dot_general(c[...], a[...], (((1,), (1,)), ((), ())), precision=precise, preferred_element_type=jnp.float32)
        extra = jnp.broadcast_to(bias[...], (8, cols)).T[:, :1]
        score = jnp.where(extra > -jnp.inf, score + extra, -jnp.inf)  # what lies behind the last row may hold anything
        row = lax.broadcasted_iota(jnp.int32, score.shape, 0)
        top = jnp.max(score, 0, keepdims=True)
        first = jnp.min(jnp.where(score == top, row, cols), 0, keepdims=True) + j * cols

        @pl.when(j == 0)
        def _():
            best[...], where[...] = top, first

        @pl.when(j > 0)
        def _():
            better = top > best[...]
            where[...] = jnp.where(better, first, where[...])
            best[...] = jnp.where(better, top, best[...])

    out = pl.BlockSpec((None, 1, rows), lambda i, t, j: (i, 0, t))
    best, where = pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(n, rows), tiles),
        in_specs=[
            pl.BlockSpec((None, rows, d), lambda i, t, j: (i, t, 0)),
            pl.BlockSpec((None, cols, d), lambda i, t, j: (i, j, 0)),
            pl.BlockSpec((None, 1, cols), lambda i, t, j: (i, 0, j)),
        ],
        out_specs=[out, out],
        out_shape=[jax.ShapeDtypeStruct((b, 1, n), jnp.float32), jax.ShapeDtypeStruct((b, 1, n), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=32 * 2**20),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * n * m * d, bytes_accessed=b * (n + pl.cdiv(n, rows) * m) * d * a.dtype.itemsize, transcendentals=0
        ),
        name="match",
        interpret=interpret,
    )(a, c, bias)
    return best[:, 0], where[:, 0]


def segment_sum(x, weight, assign, m: int, *, interpret: Any = False):
    """f32 [b m c]: the sum of weight_i x_i over the rows of each group. Row by row into an output that waits in VMEM.

    A row costs a few cycles for each 128 channels, and one test for each further tile of the output.
    """
    b, n, c = x.shape
    wide = min(c, WIDE)
    groups = min(max(OUT // max(wide, LANES) // 8, 1) * 8, m)
    rows = min(ROWS, n)
    steps = pl.cdiv(n, rows)
    line = lambda a, fill: jnp.pad(a, ((0, 0), (0, steps * rows - n)), constant_values=fill).reshape(b, steps, 1, rows)

    def kernel(assign, weight, x, out, *wider):
        if wider:
            wider[0][...] = x[...].astype(jnp.float32)
            x = wider[0]

        @pl.when(pl.program_id(3) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        first = pl.program_id(2) * groups

        def one(i, _):
            to, share = assign[0, i] - first, weight[0, i]

            @pl.when((to >= 0) & (to < groups) & (share != 0.0))
            def _():
                out[pl.ds(to, 1), :] += share * x[pl.ds(i, 1), :]

        lax.fori_loop(0, rows, one, None)

    scalars = pl.BlockSpec((None, None, 1, rows), lambda i, w, j, t: (i, t, 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(c, wide), pl.cdiv(m, groups), steps),
        in_specs=[scalars, scalars, pl.BlockSpec((None, rows, wide), lambda i, w, j, t: (i, t, w))],
        out_specs=pl.BlockSpec((None, groups, wide), lambda i, w, j, t: (i, j, w)),
        out_shape=jax.ShapeDtypeStruct((b, m, c), jnp.float32),
        scratch_shapes=[] if x.dtype == jnp.float32 else [pltpu.VMEM((rows, wide), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * n * c, bytes_accessed=b * (pl.cdiv(m, groups) * n * c * x.dtype.itemsize + 4 * m * c), transcendentals=0
        ),
        name="segment_sum",
        interpret=interpret,
    )(line(assign, -1), line(weight, 0.0), x)
