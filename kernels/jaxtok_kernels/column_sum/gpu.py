"""Column sums of the attention matrix on Hopper GPUs: a tile of keys stays while the rows that may see it stream by, a query head at a time."""

import jax.numpy as jnp

from jaxtok_kernels.flash._block import Given, Spec, pad
from jaxtok_kernels.flash._sweep import F32, LOG2E, OUTER, M, Part, along, product, ready, rows, sides, splat, sweep, widen
from jaxtok_kernels.flash.gpu import logits


def column_sum(spec: Spec, q, k, lse, bias, x: Given):
    """See `jaxtok_kernels.column_sum.column_sum`."""
    h, (g, s, d) = q.shape[1], k.shape[1:]
    ready(q, d, d)
    block = 128 if d <= 128 else 64
    at = sides(spec, x, 1, block_q=block, block_k=OUTER, by_keys=True)
    saved = jnp.where(lse > -jnp.inf, lse, 0) * LOG2E
    outer = [pad(widen(k), OUTER, 2), *at.key_ids, *([] if bias is None else [pad(bias, OUTER, 2)])]
    inner = [rows(widen(q), h, block), rows(saved, h, block), *at.row_ids]

    def step(masked, outer, inner, total, p_s):
        (k, *theirs), (q, lse, *mine) = outer, inner
        extra = None if bias is None else theirs[-1]
        y, *_ = logits(spec, masked, product(k, q, block), mine, theirs[: len(mine)], extra, by_keys=True)
        return total + jnp.exp2(y - along(lse, 1, y.shape)).sum(axis=1)

    (out,) = sweep(
        spec,
        h,
        at.table,
        [Part(y, h // g) for y in outer],
        [Part(y) for y in inner],
        [((), F32)],
        block=block,
        begin=lambda outer: splat((M,), 0.0),
        step=step,
        end=lambda total: [total],
        scratch=False,
        late_first=False,
        name="column_sum",
    )
    return out[..., :s]
