"""Column sums of the attention matrix on TPUs: a block of keys stays while the rows that may see it pass by."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtok_kernels.flash._block import Given, Spec, capped, dot, group, lanes, pad
from jaxtok_kernels.flash._grid import Grid, biases, column, make, run, tile_seen

ROWS = {2: 1024, 4: 512}  # folded rows of a block, by bytes a number
F32 = jnp.float32


def column_sum(spec: Spec, q, k, lse, bias, x: Given):
    """See `jaxtok_kernels.column_sum.column_sum`."""
    grid, at = make(spec, x, q, k, rows=ROWS[q.dtype.itemsize], by_keys=True)
    (b, h, _, d), (g, s), r = q.shape, k.shape[1:3], grid.r
    saved = lanes(jnp.where(lse > -jnp.inf, lse, 0), g, grid.block_q)[:, :, :, None]
    operands = [
        (group(q, g, grid.block_q), grid.rows(d)),
        (pad(k, grid.block_k, 2), grid.keys(d)),
        (saved, grid.row_numbers(1)),
        (at.q, grid.row_ids()),
        (at.k, grid.key_ids()),
        *biases(bias, grid),
    ]
    block = pl.BlockSpec((None, None, None, r, grid.block_k), lambda *w: (w[0], w[1], grid.at(*w)[1], 0, 0))
    outs = [(jax.ShapeDtypeStruct((b, g, grid.nk, r, grid.block_k), F32), block)]
    (out,) = run(grid, at, _kernel, operands, outs, [pltpu.VMEM((r, grid.block_k), F32)], products=1, width=d, name="column_sum")
    return out.swapaxes(2, 3).reshape(b, h, -1)[..., :s]


def _kernel(grid: Grid, first, last, q_box, k_box, q, k, lse, q_at, k_at, *rest):
    *bias, out, acc = rest
    step, done, need, fetched = grid.place(first, last, q_box, k_box)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, F32)

    @pl.when(need)
    def _():
        y, slope = capped(grid.spec, dot(q[...].reshape(-1, q.shape[-1]), k[...], (1, 1)))
        for extra in bias:
            y += extra[...]
        see = tile_seen(grid, column(q_at[...]), k_at[...])
        p = jnp.exp(jnp.where(see, y - column(lse[...]), -jnp.inf))
        acc[...] += jnp.sum(p.reshape(grid.r, grid.block_q, grid.block_k), 1)

    @pl.when(done)
    def _():
        out[...] = acc[...]
