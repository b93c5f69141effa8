"""Scores of pages, blocks and chunks on TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
NEVER = -3e30  # below every estimate; finite, since it is multiplied by 0
VMEM = 32 * 2**20


def _dot(x, y, contract=((1,), (1,)), to: Any = jnp.float32):
    precise = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (contract, ((), ())), precision=precise, preferred_element_type=to)


def _params(*kinds):
    return pltpu.CompilerParams(dimension_semantics=kinds, vmem_limit_bytes=VMEM)


def page_bounds(q, low, high, *, group: str, interpret: Any = False):
    """See `jaxtok_kernels.scores.page_bounds`. Tiles of 512 pages."""
    (b, h, d), (g, p) = q.shape, low.shape[1:3]
    kind = jnp.result_type(q, low) if q.dtype == low.dtype else jnp.float32
    pages = 512 if p > 512 else p
    of = pl.BlockSpec((None, None, pages, d), lambda i, j, n: (i, j, n, 0))

    def kernel(q, low, high, out):
        query = q[...].astype(kind)
        bound = _dot(jnp.maximum(query, 0), high[...].astype(kind)) + _dot(jnp.minimum(query, 0), low[...].astype(kind))
        over = jnp.max if group == "max" else jnp.sum
        bound = over(bound, 0, keepdims=True)
        out[...] = bound * (g / h) if group == "mean" else bound

    out = pl.pallas_call(
        kernel,
        grid=(b, g, pl.cdiv(p, pages)),
        in_specs=[pl.BlockSpec((None, None, h // g, d), lambda i, j, n: (i, j, 0, 0)), of, of],
        out_specs=pl.BlockSpec((None, None, 1, pages), lambda i, j, n: (i, j, 0, n)),
        out_shape=jax.ShapeDtypeStruct((b, g, 1, p), jnp.float32),
        compiler_params=_params("parallel", "parallel", "parallel"),
        name="page_bounds",
        interpret=interpret,
    )(q.reshape(b, g, h // g, d), low, high)
    return out[:, :, 0]


def chunk_means(x, live, *, chunk: int, bounds: bool, interpret: Any = False):
    """See `jaxtok_kernels.scores.chunk_means`. The sums are one product with a matrix of zeros and ones, exact at any chunk."""
    b, h, n, d = x.shape
    p = -(-n // chunk)
    pages = max(16, 512 // chunk // 16 * 16)
    most = max(2**21 // (max(d, LANES) * 4), 16)  # rows
    steps = next(i for i in range(1, chunk + 1) if chunk % i == 0 and (bounds or pages * chunk // i <= most or i == chunk))
    rows = pages * chunk // steps
    tiles, last = pl.cdiv(p, pages), pl.cdiv(n, rows) - 1
    live = jnp.pad(live, ((0, 0), (0, 0), (0, tiles * steps * rows - n))).astype(jnp.float32).reshape(b, h, tiles * steps, 1, rows)
    own = pl.BlockSpec((None, None, pages, d), lambda i, j, t, u: (i, j, t, 0))
    kinds = [jnp.float32, x.dtype, x.dtype] if bounds else [jnp.float32]

    def kernel(x, live, *rest):
        *outs, total, number = rest
        t, u = pl.program_id(2), pl.program_id(3)
        seen, rows_ = live[...], x[...]
        at = (t * steps + u) * rows
        if n % rows:
            rows_ = jnp.where(lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < n - at, rows_, jnp.zeros((), rows_.dtype))
        row = lax.broadcasted_iota(jnp.int32, (pages, rows), 1) + u * rows
        first = lax.broadcasted_iota(jnp.int32, (pages, rows), 0) * chunk
        mine = jnp.where((row >= first) & (row < first + chunk), seen, 0.0)

        @pl.when(u == 0)
        def _():
            total[...], number[...] = jnp.zeros_like(total), jnp.zeros_like(number)

        total[...] += _dot(mine.astype(rows_.dtype), rows_, ((1,), (0,)))
        number[...] += jnp.broadcast_to(jnp.sum(mine, 1, keepdims=True), number.shape)

        @pl.when(u == steps - 1)
        def _():
            outs[0][...] = total[...] / jnp.maximum(number[:, :1], 1.0)

        if bounds:
            big = float(jnp.finfo(x.dtype).max)
            there, wide = _column(seen) > 0, rows_.astype(jnp.float32)
            for i in range(pages):
                of = slice(i * chunk, (i + 1) * chunk)
                low = jnp.min(jnp.where(there[of], wide[of], big), 0, keepdims=True)
                high = jnp.max(jnp.where(there[of], wide[of], -big), 0, keepdims=True)
                some = number[i : i + 1, :1] > 0
                outs[1][i : i + 1] = jnp.where(some, low, 0.0).astype(x.dtype)
                outs[2][i : i + 1] = jnp.where(some, high, 0.0).astype(x.dtype)

    out = pl.pallas_call(
        kernel,
        grid=(b, h, tiles, steps),
        in_specs=[
            pl.BlockSpec((None, None, rows, d), lambda i, j, t, u: (i, j, jnp.minimum(t * steps + u, last), 0)),
            pl.BlockSpec((None, None, None, 1, rows), lambda i, j, t, u: (i, j, t * steps + u, 0, 0)),
        ],
        out_specs=[own] * len(kinds),
        out_shape=[jax.ShapeDtypeStruct((b, h, p, d), kind) for kind in kinds],
        scratch_shapes=[pltpu.VMEM((pages, d), jnp.float32), pltpu.VMEM((pages, LANES), jnp.float32)],
        compiler_params=_params("parallel", "parallel", "parallel", "arbitrary"),
        name="chunk_means",
        interpret=interpret,
    )(x, live)
    return tuple(out) if bounds else out[0]


def _column(line):
    """[1 n] -> [n 1]: what lies along lanes, along sublanes."""
    n = line.shape[1]
    diagonal = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
    return jnp.sum(jnp.where(diagonal, line, 0.0), 1, keepdims=True)


def low_bit(code, q_pos, k_pos, *, block_q: int, block_k: int, interpret: Any = False):
    """The estimates of codes whose dq and qk hold the scale and whose kq is taken off; <= 2 NEVER / 3 where no pair may see.

    Blocks are padded to powers of two (of keys) and multiples of eight (of queries) rows when they are laid out.
    """
    (b, h, t, d), (g, s) = code.q.shape, k_pos.shape[1:]
    wide, tall = max(1 << (block_k - 1).bit_length(), 4), -(-block_q // 8) * 8
    x, y = -(-t // block_q), -(-s // block_k)
    least = LANES // min(wide, LANES)
    nx, ny = min(8, x), min(LANES, -(-y // least) * least)
    tx, ty = -(-x // nx), -(-y // ny)

    def blocks(a, axis, size, to, number, fill=0):
        """Axis `axis` in `number` blocks of `size`, each padded to `to`."""
        pad = lambda a, axis, n: jnp.pad(a, [(0, n if i == axis else 0) for i in range(a.ndim)], constant_values=fill)
        a = pad(a, axis, number * size - a.shape[axis])
        a = pad(a.reshape(*a.shape[:axis], number, size, *a.shape[axis + 1 :]), axis + 1, to - size)
        return a.reshape(*a.shape[:axis], number * to, *a.shape[axis + 2 :])

    rows = lambda a, fill=0: blocks(a, 2, block_q, tall, tx * nx, fill)
    keys = lambda a, fill=0: blocks(a, 2, block_k, wide, ty * ny, fill)
    tq, tk = nx * tall, ny * wide
    at = jnp.broadcast_to(q_pos.astype(jnp.float32)[:, None], (b, h, t))
    lines = jnp.stack([rows(code.dq), rows(code.kq), rows(at, -1)], 2)  # f32 [b h 3 t]
    lines = jnp.moveaxis(jnp.pad(lines, ((0, 0), (0, 0), (0, 5), (0, 0))).reshape(b, h, 8, tx, tq), 3, 2)
    part = min(tk, 512)

    def kernel(q, line, k, dk, qk, of, out):
        column = line[...].T  # [tq 8]
        step, off, mine = column[:, :1], column[:, 1:2], column[:, 2:3]
        first = lax.broadcasted_iota(jnp.int32, (part, ny), 1) * wide - lax.broadcasted_iota(jnp.int32, (part, ny), 0)

        def piece(i, best):
            where = pl.ds(pl.multiple_of(i * part, part), part)
            theirs = of[:, where]
            dot = _dot(q[...], k[where], to=jnp.int32).astype(jnp.float32)
            logit = dot * step * dk[:, where] + qk[:, where] - off
            logit = jnp.where((theirs >= 0) & (theirs <= mine), logit, NEVER)
            top = jnp.concatenate([jnp.max(logit[j * tall : (j + 1) * tall], 0, keepdims=True) for j in range(nx)], 0)
            size = 1
            while size < wide:  # the largest of each key and the wide - 1 behind it
                top = jnp.maximum(top, pltpu.roll(top, part - size, 1))
                size *= 2
            return best + _dot(top, (first == i * part).astype(jnp.float32), ((1,), (0,)))

        out[...] = jnp.full_like(out, NEVER)

        @pl.when(jnp.max(mine) >= jnp.min(jnp.where(of[...] >= 0, of[...], 2.0**25)))  # some query may see some key
        def _():
            out[...] = lax.fori_loop(0, tk // part, piece, jnp.zeros(out.shape, jnp.float32))

    line = pl.BlockSpec((None, None, 1, tk), lambda i, j, x, y: (i, j // (h // g), 0, y))
    out = pl.pallas_call(
        kernel,
        grid=(b, h, tx, ty),
        in_specs=[
            pl.BlockSpec((None, None, tq, d), lambda i, j, x, y: (i, j, x, 0)),
            pl.BlockSpec((None, None, None, 8, tq), lambda i, j, x, y: (i, j, x, 0, 0)),
            pl.BlockSpec((None, None, tk, d), lambda i, j, x, y: (i, j // (h // g), y, 0)),
            line,
            pl.BlockSpec((None, None, 1, tk), lambda i, j, x, y: (i, j, 0, y)),
            line,
        ],
        out_specs=pl.BlockSpec((None, None, None, nx, ny), lambda i, j, x, y: (i, j, x, 0, y)),
        out_shape=jax.ShapeDtypeStruct((b, h, tx, nx, ty * ny), jnp.float32),
        compiler_params=_params("parallel", "parallel", "parallel", "parallel"),
        name="low_bit",
        interpret=interpret,
    )(
        rows(code.q), lines, keys(code.k), keys(code.dk)[:, :, None], keys(code.qk)[:, :, None],
        keys(k_pos.astype(jnp.float32), -1)[:, :, None],
    )  # fmt: skip
    return out.reshape(b, h, tx * nx, ty * ny)[:, :, :x, :y]
