"""Attention to listed blocks of a cache on TPUs: each block is copied from where it lies, while the one before it is attended to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 256  # rows of a tile, whose copies are in flight together; fewer than two blocks make tiles of one
MOST, TURNED = 128, 16  # tiles of one grid step, whose positions and biases (and ids, 128 lanes each) wait in VMEM; longer lists are split
LANES, ALIGNED = 128, 8  # rows narrower than 32 bits lie two (or four) to a word: a copy begins at a word, or at a whole tile of eight


def read(
    q,
    q_pos,
    k,
    v,
    k_pos,
    bias,
    index,
    ids=None,
    freqs=None,
    *,
    block: int,
    stride: int,
    scale: float,
    softcap=None,
    window=None,
    split: int | None = None,
    count: bool = False,
    interpret: Any = False,
):
    """The outputs of `jaxtok_kernels.read.read` per part: out [b e parts r c], lse [b e parts r], counted i32 [b e parts 2] or None.

    out is f32 where there are several parts. k_pos and bias (and ids) of what is copied are gathered outside: 8 (12) bytes a row.

    Blocks that are no multiple of eight rows, or do not begin at one, are copied row by row, 16-bit ones by pairs of rows, up to one row more at each end.
    """
    (b, g, s, d), (e, m), r, c = k.shape, index.shape[1:], q.shape[2], v.shape[3]
    pack = 1 if block % ALIGNED == stride % ALIGNED == 0 else 4 // k.dtype.itemsize
    if s % pack:
        raise ValueError(f"blocks of {block} {k.dtype} rows are copied by {pack}; round the {s} slots of the cache up to a multiple")
    words = block // pack if block % pack == stride % pack == 0 else (block + pack - 2) // pack + 1  # that a block may touch
    rows = words * pack
    each = min(max(1, TILE // rows), m)
    tiles = -(-m // each)
    parts = max(-(-tiles // (MOST if ids is None else TURNED)), split or (2 if b * e == 1 and tiles > 8 else 1))
    tiles = -(-tiles // min(parts, tiles))
    parts = -(-m // (tiles * each))
    last = ((0, 0), (0, 0), (0, parts * tiles * each - m))
    index = jnp.pad(index, last, constant_values=-1).reshape(b, e * parts, tiles * each)  # a part is a list of its own
    used = index >= 0
    upto = jnp.max(jnp.where(used, jnp.arange(1, tiles * each + 1, dtype=jnp.int32)[None, None], 0), -1)
    first = jnp.maximum(index, 0) * stride
    start = jnp.minimum(first // pack, s // pack - words)
    row = start[..., None] * pack + jnp.arange(rows, dtype=jnp.int32)[None, None, None]
    within = row - first[..., None]
    mine = used[..., None] & (within >= 0) & (within < block)
    listed = lambda x, fill: jnp.where(mine, _rows(x, row), fill).reshape(b, e * parts, tiles, 1, each * rows)
    turned = ()
    if ids is not None and freqs is not None:
        ids = jnp.pad(ids.reshape(b, e, m, block), (*last, (0, 0))).reshape(b, e * parts, tiles * each, block)
        ids = jnp.where(mine, jnp.take_along_axis(ids, jnp.clip(within, 0, block - 1), 3), 0)
        turned = ids.reshape(b, e * parts, tiles, each * rows, 1), freqs[None]

    def whole(*shape):
        return pl.BlockSpec((None, None, *shape), lambda i, j, *_: (i, j, *(0,) * len(shape)))

    kernel = functools.partial(
        _kernel,
        whole=block % ALIGNED == stride % ALIGNED == 0,
        words=words,
        pack=pack,
        each=each,
        heads=e // g * parts,
        scale=scale,
        softcap=softcap,
        window=window,
        count=count,
    )
    kind = q.dtype if parts == 1 else jnp.dtype(jnp.float32)
    shapes = [((r, c), kind), ((r, LANES), jnp.float32), *([((1, LANES), jnp.int32)] if count else [])]
    out, lse, *counted = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, e * parts),
            in_specs=[
                pl.BlockSpec((None, None, 1, tiles * each), lambda i, j, *_: (i, j, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, None, r, d), lambda i, j, *_: (i, j // parts, 0, 0)),
                pl.BlockSpec((None, r, 1), lambda i, j, *_: (i, 0, 0)),
                whole(tiles, 1, each * rows),
                whole(tiles, 1, each * rows),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                *([whole(tiles, each * rows, 1), pl.BlockSpec(turned[1].shape, lambda *_: (0, 0))] if turned else []),
            ],
            out_specs=[whole(*shape) for shape, _ in shapes],
            scratch_shapes=[
                pltpu.VMEM((2, each * words, d), jnp.uint32 if pack > 1 else k.dtype),
                pltpu.VMEM((2, each * words, c), jnp.uint32 if pack > 1 else v.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, e * parts, *shape), dtype) for shape, dtype in shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * e * r * m * rows * (d + c),
            bytes_accessed=b * e * m * rows * ((d + c) * k.dtype.itemsize + (12 if turned else 8))
            + b * e * r * ((d + c) * q.dtype.itemsize + 4),
            transcendentals=b * e * r * m * rows,
        ),
        name="read_blocks",
        interpret=interpret,
    )(upto, jnp.where(used, start, -1)[:, :, None], q, q_pos[..., None], listed(k_pos, -1), listed(bias, 0.0), k, v, *turned)
    of = lambda x: x.reshape(b, e, parts, *x.shape[2:])
    return of(out), of(lse[..., 0]), of(counted[0][:, :, 0, :2]) if count else None


def _turn(x, ids, freqs):
    """The rotary embedding of rows [n d] at ids [n 1]."""
    angle = ids.astype(jnp.float32) * freqs
    cos, sin, r = jnp.cos(angle), jnp.sin(angle), freqs.shape[1]
    wide = x.astype(jnp.float32)
    a, b = wide[:, :r], wide[:, r : 2 * r]
    rest = [wide[:, 2 * r :]] if 2 * r < x.shape[1] else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], -1).astype(x.dtype)


def _rows(x, row):
    """The values [b e m rows] of x [b g s]."""
    (b, g), e = x.shape[:2], row.shape[1]
    return jnp.take_along_axis(x, row.reshape(b, g, -1), 2).reshape(b, e, *row.shape[2:])


def _kernel(upto, start, q, q_pos, k_pos, bias, k, v, *rest, whole, words, pack, each, heads, scale, softcap, window, count):
    *rest, k_tile, v_tile, done = rest
    *turned, out, lse = rest[:-1] if count else rest
    b, e = pl.program_id(0), pl.program_id(1)
    g, n = e // heads, upto[b, e]
    kinds, precise = (k.dtype, v.dtype), lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    size = words if whole else 1  # words of a copy
    if pack > 1:
        k, v = k.bitcast(jnp.uint32), v.bitcast(jnp.uint32)

    def every(tile, act):
        """`act` on the copies of a tile: blocks, or the words of them. How many blocks they are."""
        slot = lax.rem(tile, 2)

        def one(j, blocks):
            at = start[0, tile * each + (j if whole else j // words)]

            @pl.when(at >= 0)
            def _():
                where = pl.ds(pl.multiple_of(at, ALIGNED), words) if whole else pl.ds(at + lax.rem(j, words), 1)
                to = pl.ds(j * size, size)
                act(pltpu.make_async_copy(k.at[b, g, where], k_tile.at[slot, to], done.at[slot, 0]))
                act(pltpu.make_async_copy(v.at[b, g, where], v_tile.at[slot, to], done.at[slot, 1]))

            return blocks + jnp.where((at >= 0) & (whole or lax.rem(j, words) == 0), 1, 0)

        return lax.fori_loop(0, jnp.minimum(each, n - tile * each) * (words // size), one, 0)

    def attend(tile, state):
        top, total, acc, blocks = state

        @pl.when((tile + 1) * each < n)
        def _():
            every(tile + 1, lambda copy: copy.start())

        blocks = blocks + every(tile, lambda copy: copy.wait())
        slot = lax.rem(tile, 2)
        keys, values = k_tile[slot], v_tile[slot]
        if pack > 1:
            keys, values = (pltpu.bitcast(x, kind) for x, kind in zip((keys, values), kinds, strict=True))
        if turned:
            ids, freqs = turned
            keys = _turn(keys, ids[tile], freqs[...])
        logit = lax.dot_general(q[...], keys, (((1,), (1,)), ((), ())), precision=precise, preferred_element_type=jnp.float32)
        logit = logit * scale if softcap is None else softcap * jnp.tanh(logit * scale / softcap)
        mine, theirs = q_pos[...], k_pos[tile]
        seen = (theirs >= 0) & (theirs <= mine)
        seen = seen if window is None else seen & (mine - theirs < window)
        logit = jnp.where(seen, logit + bias[tile], -jnp.inf)
        new = jnp.maximum(top, jnp.max(logit, -1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        mass, fade = jnp.exp(logit - safe), jnp.exp(top - safe)
        mixed = mass.astype(values.dtype), values, (((1,), (0,)), ((), ()))
        value = lax.dot_general(*mixed, precision=precise, preferred_element_type=jnp.float32)
        return new, total * fade + jnp.sum(mass, -1, keepdims=True), acc * fade + value, blocks

    @pl.when(n > 0)
    def _():
        for tile in (k_tile, v_tile):  # what no copy fills is multiplied by 0: it has to be finite
            tile[...] = jnp.zeros_like(tile)
        every(0, lambda copy: copy.start())

    r, c = out.shape
    nothing = jnp.full((r, 1), -jnp.inf, jnp.float32), jnp.zeros((r, 1), jnp.float32), jnp.zeros((r, c), jnp.float32), 0
    top, total, acc, blocks = lax.fori_loop(0, pl.cdiv(n, each), attend, nothing)
    live = total > 0
    norm = jnp.where(live, total, 1.0)
    out[...] = jnp.where(live, acc / norm, 0.0).astype(out.dtype)
    lse[...] = jnp.broadcast_to(jnp.where(live, top + jnp.log(norm), -jnp.inf), lse.shape)
    if count:
        lane = lax.broadcasted_iota(jnp.int32, rest[-1].shape, 1)
        rest[-1][...] = jnp.where(lane == 0, pl.cdiv(n, each), jnp.where(lane == 1, blocks, 0))
