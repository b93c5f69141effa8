"""The frame of the Hopper kernels of flash and column_sum: a tile of an outer sequence stays on chip while blocks of an inner one stream by."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxtok_kernels.flash._block import FAR, Given, Ids, Spec, boxes, extent, meets, pad

M = 64  # outer rows of a warpgroup: those of one wgmma
TEAM = 2  # warpgroups that compute; one more copies
OUTER = M * TEAM
STAGES = 2  # inner blocks in flight
LOG2E = float(np.log2(np.e))
F32, I32 = jnp.float32, jnp.int32


def mosaic() -> Any:
    """The module of Mosaic GPU, imported when it is needed: it wants absl-py."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


@dataclasses.dataclass(frozen=True)
class Part:
    """One array [b heads/div or 1, n, width] (tiles) or [b heads/div or 1, n] (numbers) of the outer or the inner sequence."""

    x: Any
    div: int = 1  # heads of the grid that share one of its heads

    @property
    def tile(self) -> tuple[int, ...]:
        return self.x.shape[3:]


@dataclasses.dataclass(frozen=True)
class Sides:
    """Rows and keys of a call, padded to whole blocks; the r query heads of a group one after another along the rows.

    table [b e outer 4]: the inner blocks of an outer tile: its first, the first and the end of those all of whose pairs are visible, its end.
    """

    row_ids: list
    key_ids: list
    table: jax.Array


def ready(q, d: int, c: int) -> None:
    """Raises where these kernels cannot run."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"no kernel for {q.dtype} on GPUs: wgmma takes 16 bits; cast q, k, v to bfloat16 or use impl='interpret'")
    if max(d, c) > 256:
        raise NotImplementedError(f"head dims {d} and {c}; the GPU kernel takes up to 256")


def widen(x: jax.Array) -> jax.Array:
    """Channels padded with zeros to a multiple of 64 (one swizzled row of shared memory)."""
    return pad(x, 64, x.ndim - 1)


def rows(x: jax.Array, g: int, block: int, value=0) -> jax.Array:
    """[b h t ...] -> [b g r*t, padded, ...]"""
    return pad(x.reshape(x.shape[0], g, x.shape[1] // g * x.shape[2], *x.shape[3:]), block, 2, value)


def sides(spec: Spec, x: Given, r: int, *, block_q: int, block_k: int, by_keys: bool) -> Sides:
    """Positions and segments in blocks, and which blocks meet."""
    t, bounds = x.q_pos.shape[1], dataclasses.replace(spec, diagonal=None)
    mine = [rows(jnp.tile(y, (1, r))[:, None], 1, block_q, -1) for y in (x.q_pos, x.q_segment) if y is not None]
    theirs = [pad(y, block_k, 2, FAR) for y in (x.far, x.k_segment) if y is not None]
    split = lambda y, block: y.reshape(*y.shape[:2], -1, block)
    at = Ids(jnp.stack([split(y, block_q)[:, 0] for y in mine], 2), jnp.stack([split(y, block_k) for y in theirs], 3))
    q, k = ([y[..., n] for n in range(4)] for y in boxes(at))
    q, k = [y[:, None, :, None] for y in q], [y[:, :, None] for y in k]
    need = meets(bounds, q, k, 0, 0, block_q, block_k)
    if spec.diagonal is not None:
        last = np.pad(np.arange(r * t) % t, (0, -r * t % block_q), constant_values=-FAR).reshape(-1, block_q).max(1)
        need &= jnp.asarray(np.arange(need.shape[3])[None] * block_k <= last[:, None] + spec.diagonal)[None, None]
    live = jnp.all(at.q[:, :, 0] >= 0, -1)[:, None, :, None] & jnp.all(at.k[:, :, :, 0] < FAR, -1)[:, :, None]
    whole = need & live & (q[2] == q[3]) & (k[2] == k[3]) & (q[2] == k[2])
    whole = whole & (k[1] <= q[0]) if spec.causal else whole
    whole = whole if spec.window is None else whole & (q[1] - jnp.maximum(k[0], 0) < spec.window)
    if by_keys:
        need, whole = need.swapaxes(2, 3), whole.swapaxes(2, 3)
    (first, last), n = extent(need, 3), need.shape[3]
    none = ~whole.any(3)
    start = jnp.where(none, last + 1, jnp.argmax(whole, 3).astype(I32))
    beyond = ~whole & (jnp.arange(n, dtype=I32)[None, None, None] > start[..., None])
    stop = jnp.where(beyond.any(3), jnp.argmax(beyond, 3).astype(I32), n)
    return Sides(mine, theirs, jnp.stack([first, start, jnp.where(none, last + 1, stop), last + 1], -1))


def sweep(
    spec: Spec,
    heads: int,
    table: jax.Array,
    outer: list[Part],
    inner: list[Part],
    outs: list[tuple[tuple[int, ...], Any]],
    *,
    block: int,
    begin: Callable,
    step: Callable,
    end: Callable,
    scratch: bool,
    late_first: bool,
    name: str,
) -> list[jax.Array]:
    """Runs begin, step for each block of `block` inner rows that an outer tile needs, end; returns outs [b heads n ...].

    begin(outer) -> carry; step(masked, outer, inner, carry, p) -> carry; end(carry) -> values [M ...] of outs. outer and inner are refs in shared
    memory, of the M rows of this warpgroup and of a whole block. p: a scratch [M block] for `add` (where `scratch`). A last out of one number a
    tile counts, with spec.count, the blocks that were computed and those that were copied.
    """
    plgpu = mosaic()

    b, n = table.shape[0], outer[0].x.shape[2]
    dtype = outer[0].x.dtype
    swizzled = {"transforms": (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))}
    smem = lambda lead, tile, kind: plgpu.SMEM((*lead, *tile), kind, **(swizzled if tile and jnp.dtype(kind).itemsize == 2 else {}))
    types = [smem((TEAM, M), p.tile, p.x.dtype) for p in outer]
    types += [smem((STAGES, block), p.tile, p.x.dtype) for p in inner]
    over, kinds = [], [(p.tile, jnp.dtype(p.x.dtype)) for p in outer]  # the outer array in whose place an out is written, where one fits
    for tile, kind in outs:
        fits = [i for i, have in enumerate(kinds) if tile and have == (tile, jnp.dtype(kind)) and i not in over]
        over.append(fits[0] if fits else None)
    apart = [o for o, i in zip(outs, over, strict=True) if i is None]
    types += [smem((TEAM, M), tile, kind) for tile, kind in apart]
    through = bool(spec.interpret)  # the interpreter has no product whose left side is in registers
    types += [smem((TEAM, M), (block,), dtype)] * (scratch and through)
    types += [plgpu.SMEM((2, 128), I32)] * spec.count
    types += [
        plgpu.Barrier(num_barriers=TEAM, num_arrivals=len(outer)),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=len(inner)),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=TEAM),
    ]

    def kernel(table_g, *refs):
        cut = lambda k: (refs[: len(k)], refs[len(k) :])
        outer_g, refs = cut(outer)
        inner_g, refs = cut(inner)
        outs_g, refs = cut(outs)
        count_g, refs = (refs[0], refs[1:]) if spec.count else (None, refs)
        outer_s, refs = cut(outer)
        inner_s, refs = cut(inner)
        apart_s, refs = cut(apart)
        rooms = iter(apart_s)
        outs_s = [next(rooms) if i is None else outer_s[i] for i in over]
        *rest, outer_bar, full, free = refs
        p_s = rest[0] if scratch and through else None
        count_s = rest[-1] if spec.count else None
        team, head, tile, seq = (lax.axis_index(x) for x in ("wg", "head", "tile", "seq"))
        tile = n // OUTER - 1 - tile if late_first else tile
        pick = lambda ref, p: ref.at[seq, 0 if p.x.shape[1] == 1 else lax.div(head, jnp.int32(p.div))]
        runs = table_g.at[seq, 0 if table.shape[1] == 1 else lax.div(head, jnp.int32(heads // table.shape[1])), tile]
        first, start, stop, last = (runs[i] for i in range(4))

        def counted(row, number):
            count_s[row] = jnp.full((128,), number, I32)  # pyright: ignore[reportOptionalSubscript]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(count_s.at[row], count_g.at[seq, head, tile, row])  # pyright: ignore[reportOptionalMemberAccess]
            plgpu.wait_smem_to_gmem(0)

        @pl.when(team < TEAM)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            here = pl.ds(pl.multiple_of(tile * OUTER + team * M, M), M)
            for p, src, dst in zip(outer, outer_g, outer_s, strict=True):
                plgpu.copy_gmem_to_smem(pick(src, p).at[here], dst.at[team], outer_bar.at[team])
            plgpu.barrier_wait(outer_bar.at[team])
            mine = [x.at[team] for x in outer_s]

            def body(masked, j, state):
                carry, number = state
                slot = lax.rem(j - first, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                carry = step(masked, mine, [x.at[slot] for x in inner_s], carry, None if p_s is None else p_s.at[team])
                plgpu.barrier_arrive(free.at[slot])
                return carry, number + 1

            state = begin(mine), jnp.int32(0)
            for low, high, masked in ((first, start, True), (start, stop, False), (stop, last, True)):
                state = lax.fori_loop(low, high, functools.partial(body, masked), state)
            for (_, kind), value, dst in zip(outs, end(state[0]), outs_s, strict=True):
                dst[team] = value.astype(kind)
            plgpu.commit_smem()
            for src, dst in zip(outs_s, outs_g, strict=True):
                plgpu.copy_smem_to_gmem(src.at[team], dst.at[seq, head, here])
            plgpu.wait_smem_to_gmem(0)
            if spec.count:
                pl.when(team == 0)(lambda: counted(0, state[1]))

        @pl.when(team == TEAM)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            def body(j, number):
                slot = lax.rem(j - first, jnp.int32(STAGES))
                pl.when(j - first >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                there = pl.ds(pl.multiple_of(j * block, block), block)
                for p, src, dst in zip(inner, inner_g, inner_s, strict=True):
                    plgpu.copy_gmem_to_smem(pick(src, p).at[there], dst.at[slot], full.at[slot])
                return number + 1

            number = lax.fori_loop(first, last, body, jnp.int32(0))
            for i in range(STAGES):  # nothing is in flight when the kernel ends
                late = lax.rem(number - 1 - i, jnp.int32(STAGES))
                pl.when(number > i)(functools.partial(plgpu.barrier_wait, free.at[late]))
            if spec.count:
                counted(1, number)

    kernel.__name__ = name
    out_type = [jax.ShapeDtypeStruct((b, heads, n, *tile), kind) for tile, kind in outs]
    out_type += [jax.ShapeDtypeStruct((b, heads, n // OUTER, 2, 128), I32)] * spec.count
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=types,
        grid=(heads, n // OUTER, b),
        grid_names=("head", "tile", "seq"),
        num_threads=TEAM + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=False),
        **({"interpret": spec.interpret} if through else {}),
    )(table, *(p.x for p in outer), *(p.x for p in inner))


def splat(shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant in the layout of a product [M n], or of a number a row [M]."""
    plgpu = mosaic()

    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, F32), layout)


def product(a, b, width: int) -> jax.Array:
    """a b^T of tiles in shared memory [M d] and [width d]."""
    plgpu = mosaic()

    def run(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((M, width), F32))


def add(acc: jax.Array, p: jax.Array, b, p_s) -> jax.Array:
    """acc + p b, of p [M n] in registers (through the scratch p_s, if there is one) and b [n c] in shared memory."""
    plgpu = mosaic()

    if p_s is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p.astype(b.dtype), b))(plgpu.ACC.init(acc))
    p_s[...] = p.astype(b.dtype)
    plgpu.commit_smem()

    def run(ref):
        plgpu.wgmma(ref, p_s, b)
        return ref[...]

    return acc + pl.run_scoped(run, plgpu.ACC(acc.shape, F32))


def along(ref, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """Numbers in shared memory, one a row (axis 0) or one a column (axis 1) of a product, spread over it."""
    plgpu = mosaic()

    index = inspect.signature(plgpu.load).parameters.get("idx")
    apart = index is not None and index.default is index.empty  # jax < 0.11.2 takes the index apart from the reference
    return spread(plgpu.load(ref, *[()] * apart, layout=plgpu.Layout.WGMMA.reduce(1 - axis)), axis, shape)


def spread(x: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [int(axis)])
