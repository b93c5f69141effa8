"""Attention to listed blocks of a cache on NVIDIA GPUs from Hopper on: blocks come by TMA, two tiles in flight, products by wgmma."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtok_kernels import mosaic

TILE, THREADS = 64, 128  # slots of a tile, and query rows of a block of threads
BUSY = 264  # blocks of threads that keep a chip busy, two a multiprocessor
MEMORY = 220 * 1024  # bytes of shared memory
UNITS = (64, 32, 16, 8)  # slots that one copy can put into a swizzled tile


def read(
    q, q_pos, k, v, k_pos, bias, index, ids=None, *, block: int, stride: int, scale: float, softcap=None, window=None,
    split: int | None = None, count: bool = False, interpret: bool = False,
):  # fmt: skip
    """The outputs of `jaxtok_kernels.read.read` per part: out f32 [b e parts r c], lse [b e parts r], counted i32 [b e parts 2] or None.

    A copy takes 64, 32, 16 or 8 slots, the most that divides `block` and `stride`; other blocks come slot by slot, through registers where
    d and c are multiples of 128 (unused entries of a tile then load a listed slot again), else by a copy each, which is slow. k_pos and bias of what is copied are gathered outside: 8 bytes a slot. A cache whose s is no multiple
    of eight is copied first, unless its slots come one by one.
    """
    (b, g, s, d), (e, r), c = k.shape, q.shape[1:3], v.shape[3]
    if ids is not None:
        raise NotImplementedError("keys that are stored unrotated are not turned on GPUs; use impl='pallas_tpu' or impl='xla'")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; on GPUs all are bfloat16 or all float16; use impl='xla'")
    single = index is not None and (block % 8 > 0 or stride % 8 > 0)
    fine, held = (64, 1.5) if single else (16, 1.0)
    if d % fine or c % fine or TILE * (4 * held * (d + c) + 2 * d + 4 * c + 2 * TILE) > MEMORY:
        raise NotImplementedError(
            f"heads of {d} and {c} channels, blocks of {block}; on GPUs both are multiples of {fine}, 384 in all; use impl='xla'"
        )
    if index is None:  # the lists of a KV head are rows of one
        q, q_pos, lists, rows = q.reshape(b, g, e // g * r, d), jnp.tile(q_pos, (1, e // g)), g, e // g * r
        k, v, k_pos, bias = (mosaic.padded(x, 2, TILE, fill) for x, fill in ((k, 0), (v, 0), (k_pos, -1), (bias, 0)))
        s = k.shape[2]
        tiles, unit, per = -(-s // TILE), TILE, 1
        first = jnp.minimum(jnp.arange(tiles, dtype=jnp.int32) * TILE, s - TILE)  # the last tile begins earlier where s is ragged
        slot = first[:, None] + jnp.arange(TILE, dtype=jnp.int32)[None]
        mine = (slot >= (jnp.arange(tiles, dtype=jnp.int32) * TILE)[:, None]).reshape(1, 1, -1)
        at = jnp.broadcast_to(first[None, None], (b, g, tiles))
        pick = lambda x, fill: x if s % TILE == 0 else jnp.where(mine, x[:, :, slot.reshape(-1)], fill)
    else:
        lists, rows = e, r
        unit = next((u for u in UNITS if block % u == 0 and stride % u == 0), 1)
        per = block // unit  # copies of a block
        k, v = (k, v) if unit == 1 else (mosaic.padded(x, 2, 1) for x in (k, v))
        begin = index[..., None] * stride + jnp.arange(0, block, unit, dtype=jnp.int32)[None, None, None]
        at = jnp.where(index[..., None] < 0, -1, begin).reshape(b, e, -1)
        tiles = -(-at.shape[2] * unit // TILE)
        at = jnp.pad(at, ((0, 0), (0, 0), (0, tiles * TILE // unit - at.shape[2])), constant_values=-1)
        slot = (at[..., None] + jnp.arange(unit, dtype=jnp.int32)[None, None, None]).reshape(b, e, -1)
        used = jnp.repeat(at >= 0, unit, -1)
        of = lambda x: jnp.take_along_axis(x, jnp.where(used, slot, 0).reshape(b, g, -1), 2).reshape(slot.shape)
        pick = lambda x, fill: jnp.where(used, of(x), fill)
    each = TILE // unit  # copies of a tile
    steps = -(-rows // TILE)
    parts = min(split or max(1, min(BUSY // (b * lists * steps), tiles // 4)), tiles)
    most = -(-tiles // parts)
    parts = -(-tiles // most)
    pad = lambda x, n, fill: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, n - x.shape[-1]),), constant_values=fill)
    at = pad(at, parts * most * each, -1)
    lines = [pad(pick(x, fill), parts * most * TILE, fill) for x, fill in ((k_pos, -1), (bias, 0.0))]
    upto = jnp.max(jnp.where(at >= 0, jnp.arange(1, at.shape[2] + 1, dtype=jnp.int32)[None, None], 0).reshape(b, lists, parts, -1), -1)
    upto = jnp.maximum(-(-upto // each) - jnp.arange(parts, dtype=jnp.int32)[None, None] * most, 0)  # tiles of each part
    direct = unit == 1 and d % THREADS == 0 and c % THREADS == 0
    at = jnp.where(at < 0, -1 - jnp.maximum(jnp.max(at, -1, keepdims=True), 0), at) if direct else at
    short = min(-(-rows // 8) * 8, TILE)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, steps * TILE - rows), (0, 0)))
    q_pos = pad(q_pos, steps * TILE, -1)

    tile = mosaic.tile
    scratch = [
        tile((TILE, d), q.dtype),
        tile((1 if unit == 1 else 2, TILE, d), q.dtype),
        tile((1 if unit == 1 else 2, TILE, c), q.dtype),
        tile((TILE, TILE), q.dtype, mosaic.swizzle(c, q.dtype)),
        tile((TILE, c), jnp.dtype(jnp.float32)),
        plgpu.SMEM((TILE,), jnp.float32),
        *(plgpu.SMEM((1, TILE, n + 8) if direct else (2, TILE, n), q.dtype) for n in (d, c) if unit == 1),  # 8: off the same banks
        plgpu.Barrier(num_arrivals=each, num_barriers=2),
        plgpu.Barrier(num_arrivals=each, num_barriers=2),
        plgpu.Barrier(),
    ]
    kernel = functools.partial(
        _kernel,
        direct=direct,
        each=each,
        per=per,
        most=most,
        heads=lists // g,
        short=short,
        scale=scale,
        softcap=softcap,
        window=window,
        count=count,
    )
    shapes = [((b, lists, parts, steps * TILE, c), jnp.float32), ((b, lists, parts, steps * TILE), jnp.float32)]
    shapes = shapes + ([((b, lists, parts, steps, 2), jnp.int32)] if count else [])
    out, lse, *counted = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*x) for x in shapes],
        scratch_types=scratch,
        grid=(b, lists, parts, steps),
        grid_names=("b", "list", "part", "step"),
        **mosaic.options(interpret),
    )(at, upto, q, q_pos, *lines, k, v)
    counted = jnp.sum(counted[0], 3) if count else None
    out, lse = out[:, :, :, :rows], lse[:, :, :, :rows]
    if lists == e:
        return out, lse, counted
    apart = lambda x: jnp.moveaxis(x.reshape(b, g, parts, e // g, r, *x.shape[4:]), 3, 2).reshape(b, e, parts, r, *x.shape[4:])
    if counted is not None:  # the first list of a KV head has the count
        counted = jnp.pad(counted[:, :, None], ((0, 0), (0, 0), (0, e // g - 1), (0, 0), (0, 0))).reshape(b, e, parts, 2)
    return apart(out), apart(lse), counted


def _kernel(at, upto, q, q_pos, k_pos, bias, k, v, out, lse, *rest, direct, each, per, most, heads, short, scale, softcap, window, count):
    *counted, q_s, k_s, v_s, p_s, out_s, lse_s = rest[: 6 + count]
    *raw, k_there, v_there, q_there = rest[6 + count :]
    b, of, part, step = (lax.axis_index(name) for name in ("b", "list", "part", "step"))
    head, n, unit = lax.div(of, jnp.int32(heads)), upto[b, of, part], TILE // each
    matrix = plgpu.Layout.WGMMA
    row, column = matrix.reduce(1), matrix.reduce(0)
    down = lambda x, width=TILE: lax.broadcast_in_dim(x, (TILE, width), [0])
    along = lambda x: lax.broadcast_in_dim(x, (TILE, TILE), [1])

    def fetch(tile, slot):
        """Start the copies of a tile; an unused entry only says that it came. How many blocks they begin."""
        first = (part * most + tile) * each

        def one(j, blocks):
            begin = at[b, of, first + j]

            @pl.when(begin >= 0)
            def _():
                for x, whole, kept, there in ((k, k_s, raw[:1], k_there), (v, v_s, raw[1:], v_there)):
                    if kept:
                        plgpu.copy_gmem_to_smem(x.at[b, head, begin], kept[0].at[slot, j], there.at[slot])
                    else:
                        to = whole.at[slot, pl.ds(j * unit, unit)]
                        plgpu.copy_gmem_to_smem(x.at[b, head, pl.ds(begin, unit)], to, there.at[slot])

            @pl.when(begin < 0)
            def _():
                plgpu.barrier_arrive(k_there.at[slot])
                plgpu.barrier_arrive(v_there.at[slot])

            return blocks + jnp.where((begin >= 0) & (lax.rem(first + j, jnp.int32(per)) == 0), 1, 0)

        if direct:
            return jnp.int32(0)
        if raw:
            return lax.fori_loop(0, each, one, jnp.int32(0))
        blocks = jnp.int32(0)
        for j in range(each):
            blocks = one(j, blocks)
        return blocks

    def gather(x, to, tile):
        """Rows through registers, 16 on their way at once. How many blocks they begin."""
        first, width, blocks = (part * most + tile) * each, x.shape[3], jnp.int32(0)
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // THREADS)
        for some in range(0, TILE, 16):
            found = []
            for j in range(some, some + 16):
                begin = at[b, of, first + j]
                found.append(mosaic.load(x.at[b, head, jnp.where(begin < 0, -1 - begin, begin)], layout))
                blocks = blocks + jnp.where((begin >= 0) & (lax.rem(first + j, jnp.int32(per)) == 0), 1, 0)
            for j, line in enumerate(found, some):
                to.at[0, j, pl.ds(0, width)][...] = line
        return blocks

    def settle(raw, whole, slot, tile):
        """Rows that came one by one, into the tile of the products; what no copy filled becomes 0."""
        rows = mosaic.load(raw.at[0, :, pl.ds(0, whole.shape[2])] if direct else raw.at[slot], matrix)
        live = mosaic.load(k_pos.at[b, of, pl.ds((part * most + tile) * TILE, TILE)], row) >= 0
        live = lax.broadcast_in_dim(live, rows.shape, [0])
        whole.at[0][...] = jnp.where(live, rows, jnp.zeros_like(rows))
        plgpu.commit_smem()

    def attend(tile, state):
        top, total, acc, blocks = state
        slot = lax.rem(tile, jnp.int32(2))
        kept = 0 if raw else slot
        more = lax.cond(tile + 1 < n, lambda: fetch(tile + 1, 1 - slot), lambda: jnp.int32(0))
        where = pl.ds((part * most + tile) * TILE, TILE)
        theirs, extra = (along(mosaic.load(x.at[b, of, where], column)) for x in (k_pos, bias))
        if direct:
            more = gather(k, raw[0], tile)
            gather(v, raw[1], tile)
            plgpu.commit_smem()
        else:
            plgpu.barrier_wait(k_there.at[slot])
        if raw:
            settle(raw[0], k_s, slot, tile)
        logit = mosaic.product(q_s, k_s.at[kept], turned=True) * scale
        logit = logit if softcap is None else softcap * jnp.tanh(logit / softcap)
        seen = (theirs >= 0) & (theirs <= down(mine))
        seen = seen if window is None else seen & (down(mine) - theirs < window)
        logit = jnp.where(seen, logit + extra, -jnp.inf)
        new = jnp.maximum(top, jnp.max(logit, axis=1))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        mass, fade = jnp.exp(logit - down(safe)), jnp.exp(top - safe)
        p_s[...] = mass.astype(q.dtype)
        plgpu.commit_smem()
        if not direct:
            plgpu.barrier_wait(v_there.at[slot])
        if raw:
            settle(raw[1], v_s, slot, tile)

        value = mosaic.product(p_s, v_s.at[kept])
        plgpu.commit_smem()  # all have read before the next copies write
        return new, total * fade + jnp.sum(mass, axis=1), acc * down(fade, acc.shape[1]) + value, blocks + more

    if not raw:  # what no copy fills is multiplied by 0: it has to be finite
        for slot in range(2):
            v_s.at[slot][...] = plgpu.layout_cast(jnp.zeros(v_s.shape[1:], q.dtype), matrix)
        plgpu.commit_smem()
    plgpu.copy_gmem_to_smem(q.at[b, of, pl.ds(step * TILE, TILE)], q_s, q_there)
    plgpu.barrier_wait(q_there)
    mine = mosaic.load(q_pos.at[b, pl.ds(step * TILE, TILE)], row)
    full = lambda shape, fill, layout: plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)
    begun = lax.cond(n > 0, lambda: fetch(jnp.int32(0), jnp.int32(0)), lambda: jnp.int32(0))
    nothing = full((TILE,), -jnp.inf, row), full((TILE,), 0.0, row), full((TILE, v.shape[3]), 0.0, matrix), begun
    top, total, acc, blocks = lax.fori_loop(0, n, attend, nothing)
    live = total > 0
    norm = jnp.where(live, total, 1.0)
    out_s[...] = acc / down(norm, acc.shape[1])
    lse_s[...] = jnp.where(live, top + jnp.log(norm), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, short)], out.at[b, of, part, pl.ds(step * TILE, short)])
    plgpu.copy_smem_to_gmem(lse_s, lse.at[b, of, part, pl.ds(step * TILE, TILE)])
    if count:
        counted[0][b, of, part, step, 0] = n
        counted[0][b, of, part, step, 1] = blocks
    plgpu.wait_smem_to_gmem(0)
