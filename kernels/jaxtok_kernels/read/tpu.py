"""Attention to listed blocks of a cache on TPUs: each block is copied from where it lies, while the one before it is attended to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 256  # rows of a tile, whose copies are in flight together; fewer than two blocks make tiles of one
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
    interpret: Any = False,
):
    """See `jaxtok_kernels.read.read`. k_pos and bias (and ids) of what is copied are gathered outside: 8 (12) bytes a row.

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
    last = ((0, 0), (0, 0), (0, tiles * each - m))
    index = jnp.pad(index, last, constant_values=-1)
    used = index >= 0
    count = jnp.max(jnp.where(used, jnp.arange(1, tiles * each + 1, dtype=jnp.int32)[None, None], 0), -1)
    first = jnp.maximum(index, 0) * stride
    start = jnp.minimum(first // pack, s // pack - words)
    row = start[..., None] * pack + jnp.arange(rows, dtype=jnp.int32)[None, None, None]
    within = row - first[..., None]
    mine = used[..., None] & (within >= 0) & (within < block)
    listed = lambda x, fill: jnp.where(mine, _rows(x, row), fill).reshape(b, e, tiles, 1, each * rows)
    turned = ()
    if ids is not None and freqs is not None:
        ids = jnp.pad(ids.reshape(b, e, m, block), (*last, (0, 0)))
        ids = jnp.where(mine, jnp.take_along_axis(ids, jnp.clip(within, 0, block - 1), 3), 0)
        turned = ids.reshape(b, e, tiles, each * rows, 1), freqs[None]

    def whole(*shape):
        return pl.BlockSpec((None, None, *shape), lambda i, j, *_: (i, j, *(0,) * len(shape)))

    kernel = functools.partial(
        _kernel,
        whole=block % ALIGNED == stride % ALIGNED == 0,
        words=words,
        pack=pack,
        each=each,
        heads=e // g,
        scale=scale,
        softcap=softcap,
        window=window,
    )
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, e),
            in_specs=[
                whole(r, d),
                pl.BlockSpec((None, r, 1), lambda i, j, *_: (i, 0, 0)),
                whole(tiles, 1, each * rows),
                whole(tiles, 1, each * rows),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                *([whole(tiles, each * rows, 1), pl.BlockSpec(turned[1].shape, lambda *_: (0, 0))] if turned else []),
            ],
            out_specs=[whole(r, c), whole(r, LANES)],
            scratch_shapes=[
                pltpu.VMEM((2, each * words, d), jnp.uint32 if pack > 1 else k.dtype),
                pltpu.VMEM((2, each * words, c), jnp.uint32 if pack > 1 else v.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, e, r, c), q.dtype), jax.ShapeDtypeStruct((b, e, r, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * e * r * m * rows * (d + c),
            bytes_accessed=b * e * m * rows * ((d + c) * k.dtype.itemsize + (12 if turned else 8))
            + b * e * r * ((d + c) * q.dtype.itemsize + 4),
            transcendentals=b * e * r * m * rows,
        ),
        name="read_blocks",
        interpret=interpret,
    )(jnp.where(used, start, -1).reshape(b, -1), count, q, q_pos[..., None], listed(k_pos, -1), listed(bias, 0.0), k, v, *turned)
    return out, lse[..., 0]


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


def _kernel(start, count, q, q_pos, k_pos, bias, k, v, *rest, whole, words, pack, each, heads, scale, softcap, window):
    *turned, out, lse, k_tile, v_tile, done = rest
    b, e = pl.program_id(0), pl.program_id(1)
    g, n = e // heads, count[b, e]
    first, kinds = e * (k_pos.shape[0] * each), (k.dtype, v.dtype)
    size = words if whole else 1  # words of a copy
    if pack > 1:
        k, v = k.bitcast(jnp.uint32), v.bitcast(jnp.uint32)

    def every(tile, act):
        """`act` on the copies of a tile: blocks, or the words of them."""
        slot = lax.rem(tile, 2)

        def one(j, _):
            at = start[b, first + tile * each + (j if whole else j // words)]

            @pl.when(at >= 0)
            def _():
                where = pl.ds(pl.multiple_of(at, ALIGNED), words) if whole else pl.ds(at + lax.rem(j, words), 1)
                to = pl.ds(j * size, size)
                act(pltpu.make_async_copy(k.at[b, g, where], k_tile.at[slot, to], done.at[slot, 0]))
                act(pltpu.make_async_copy(v.at[b, g, where], v_tile.at[slot, to], done.at[slot, 1]))

        lax.fori_loop(0, jnp.minimum(each, n - tile * each) * (words // size), one, None)

    def attend(tile, state):
        top, total, acc = state

        @pl.when((tile + 1) * each < n)
        def _():
            every(tile + 1, lambda copy: copy.start())

        every(tile, lambda copy: copy.wait())
        slot = lax.rem(tile, 2)
        keys, values = k_tile[slot], v_tile[slot]
        if pack > 1:
            keys, values = (pltpu.bitcast(x, kind) for x, kind in zip((keys, values), kinds, strict=True))
        if turned:
            ids, freqs = turned
            keys = _turn(keys, ids[tile], freqs[...])
        logit = lax.dot_general(q[...], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        logit = logit if softcap is None else softcap * jnp.tanh(logit / softcap)
        mine, theirs = q_pos[...], k_pos[tile]
        seen = (theirs >= 0) & (theirs <= mine)
        seen = seen if window is None else seen & (mine - theirs < window)
        logit = jnp.where(seen, logit + bias[tile], -jnp.inf)
        new = jnp.maximum(top, jnp.max(logit, -1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        mass, fade = jnp.exp(logit - safe), jnp.exp(top - safe)
        value = lax.dot_general(mass.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return new, total * fade + jnp.sum(mass, -1, keepdims=True), acc * fade + value

    @pl.when(n > 0)
    def _():
        for tile in (k_tile, v_tile):  # what no copy fills is multiplied by 0: it has to be finite
            tile[...] = jnp.zeros_like(tile)
        every(0, lambda copy: copy.start())

    r, c = out.shape
    nothing = jnp.full((r, 1), -jnp.inf, jnp.float32), jnp.zeros((r, 1), jnp.float32), jnp.zeros((r, c), jnp.float32)
    top, total, acc = lax.fori_loop(0, pl.cdiv(n, each), attend, nothing)
    live = total > 0
    norm = jnp.where(live, total, 1.0)
    out[...] = jnp.where(live, acc / norm, 0.0).astype(out.dtype)
    lse[...] = jnp.broadcast_to(jnp.where(live, top + jnp.log(norm), -jnp.inf), lse.shape)
