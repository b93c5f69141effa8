"""Attention of a few queries to every slot of a cache on TPUs: no table of blocks, and the lists of a KV head read it once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 2**18  # bytes of keys in a tile
LANES = 128


def read(
    q, q_pos, k, v, k_pos, bias, *, scale: float, softcap=None, window=None, split: int | None = None, count: bool = False, interpret: Any = False
):  # fmt: skip
    """The outputs of `jaxtok_kernels.read.read` of q [b g r d] per part: out [b g parts r c], lse [b g parts r], counted i32 [b g parts 2].

    out is f32 where there are several parts. A tile of keys counts as one block.
    """
    (b, g, s, d), r, c = k.shape, q.shape[2], v.shape[3]
    width = max(d, LANES) * k.dtype.itemsize
    rows = min(max(TILE // width // LANES, 1) * LANES, -(-s // LANES) * LANES)
    tiles = -(-s // rows)
    parts = min(split or (2 if b * g == 1 and tiles > 8 else 1), tiles)
    each = -(-tiles // parts)
    parts = -(-tiles // each)
    at = lambda p, j: jnp.minimum(p * each + j, tiles - 1)
    own = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda i, h, p, j: (i, h, p, 0, 0))
    line = pl.BlockSpec((None, None, 1, rows), lambda i, h, p, j: (i, h, 0, at(p, j)))
    cache = lambda n: pl.BlockSpec((None, None, rows, n), lambda i, h, p, j: (i, h, at(p, j), 0))
    kind = q.dtype if parts == 1 else jnp.dtype(jnp.float32)
    shapes = [((r, c), kind), ((r, LANES), jnp.float32), *([((1, LANES), jnp.int32)] if count else [])]
    kernel = functools.partial(_kernel, s=s, tiles=tiles, each=each, scale=scale, softcap=softcap, window=window)
    out, lse, *counted = pl.pallas_call(
        kernel,
        grid=(b, g, parts, each),
        in_specs=[
            pl.BlockSpec((None, None, r, d), lambda i, h, p, j: (i, h, 0, 0)),
            pl.BlockSpec((None, r, 1), lambda i, h, p, j: (i, 0, 0)),
            line,
            line,
            cache(d),
            cache(c),
        ],
        out_specs=[own(*shape) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct((b, g, parts, *shape), dtype) for shape, dtype in shapes],
        scratch_shapes=[pltpu.VMEM((r, LANES), jnp.float32), pltpu.VMEM((r, LANES), jnp.float32), pltpu.VMEM((r, c), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * g * r * s * (d + c),
            bytes_accessed=b * g * (s * ((d + c) * k.dtype.itemsize + 8) + r * (d + c) * q.dtype.itemsize),
            transcendentals=b * g * r * s,
        ),
        name="read_all",
        interpret=interpret,
    )(q, q_pos[..., None], k_pos[:, :, None], bias[:, :, None], k, v)
    return out, lse[..., 0], counted[0][..., 0, :2] if count else None


def _kernel(q, q_pos, k_pos, bias, k, v, out, lse, *rest, s, tiles, each, scale, softcap, window):
    *counted, top, total, acc = rest
    part, j = pl.program_id(2), pl.program_id(3)
    tile, rows = part * each + j, k.shape[0]
    precise = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None

    @pl.when(j == 0)
    def _():
        top[...], total[...], acc[...] = jnp.full_like(top, -jnp.inf), jnp.zeros_like(total), jnp.zeros_like(acc)
        for x in counted:
            x[...] = jnp.zeros_like(x)

    @pl.when(tile < tiles)
    def _():
        values = v[...]
        left = s - tile * rows  # what lies behind the last slot may hold anything
        if s % rows:
            values = jnp.where(lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < left, values, jnp.zeros((), values.dtype))
        logit = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), precision=precise, preferred_element_type=jnp.float32)
        logit = logit * scale if softcap is None else softcap * jnp.tanh(logit * scale / softcap)
        mine, theirs = q_pos[...], k_pos[...]
        seen = (theirs >= 0) & (theirs <= mine)
        seen = seen & (lax.broadcasted_iota(jnp.int32, (1, rows), 1) < left) if s % rows else seen
        seen = seen if window is None else seen & (mine - theirs < window)
        logit = jnp.where(seen, logit + bias[...], -jnp.inf)
        old = top[:, :1]
        new = jnp.maximum(old, jnp.max(logit, -1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        mass, fade = jnp.exp(logit - safe), jnp.exp(old - safe)
        mixed = mass.astype(values.dtype), values, (((1,), (0,)), ((), ()))
        acc[...] = acc[...] * fade + lax.dot_general(*mixed, precision=precise, preferred_element_type=jnp.float32)
        total[...] = total[...] * fade + jnp.sum(mass, -1, keepdims=True)
        top[...] = jnp.broadcast_to(new, top.shape)
        for x in counted:
            x[...] += (lax.broadcasted_iota(jnp.int32, x.shape, 1) < 2).astype(jnp.int32)

    @pl.when(j == each - 1)
    def _():
        live = total[:, :1] > 0
        norm = jnp.where(live, total[:, :1], 1.0)
        out[...] = jnp.where(live, acc[...] / norm, 0.0).astype(out.dtype)
        lse[...] = jnp.broadcast_to(jnp.where(live, top[:, :1] + jnp.log(norm), -jnp.inf), lse.shape)
