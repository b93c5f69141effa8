"""Slots of a cache: written in place, placed by rank, gathered and scattered by block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxtok.core import check
from jaxtok.core.reduce import ranks
from jaxtok.core.rotary import turn
from jaxtok.core.types import KV
from jaxtok.ops.offload import Halves


def append(kv: KV, k: Float[Array, "b g t d"], v: Array, pos: Int[Array, "b t"], bias: Float[Array, "b g t"]) -> KV:
    """Write t rows at the cursor; rows that find no slot are counted in `lost`. `seen` is the caller's to move."""
    if k.ndim != 4 or kv.k.ndim != 4 or kv.v.ndim != 4:
        raise ValueError(
            f"keys are {list(k.shape)}, the cache's {list(kv.k.shape)} and {list(kv.v.shape)}; they must be [b g t d], [b g s d]"
        )
    (b, g, slots, d), t = kv.k.shape, k.shape[2]
    fit = {"k": (k, (b, g, t, d)), "v": (v, (b, g, t, kv.v.shape[3])), "pos": (pos, (b, t)), "bias": (bias, (b, g, t))}
    fit |= {"kv.pos": (kv.pos, (b, g, slots)), "kv.bias": (kv.bias, (b, g, slots))}
    for name, (x, shape) in fit.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}, must be {list(shape)} for keys {list(k.shape)} and a cache {list(kv.k.shape)}")
    if t > slots:
        raise ValueError(f"{t} rows cannot be appended to a cache of {slots} slots; prefill with more room (new=)")
    skip = jnp.maximum(kv.cursor - (slots - t), 0)  # this many rows find no slot
    full = jnp.broadcast_to(pos[:, None], (*kv.pos.shape[:2], t))
    gone = jnp.sum((pos >= 0) & (jnp.arange(t) >= t - skip)[None], -1, dtype=jnp.int32)

    def write(old, rows):
        rows = rows.astype(old.dtype)
        if not isinstance(old, Halves):
            return _write(old, rows, kv.cursor, skip)
        before, room = old.host.shape[2], old.here.shape[2]
        if t > room:
            raise ValueError(
                f"{t} rows cannot be appended to {room} slots on the device, the others stand in host memory; prefill with more room (new=)"
            )
        return old._replace(here=_write(old.here, rows, kv.cursor - before, skip))

    return kv._replace(
        k=write(kv.k, k),
        v=write(kv.v, v),
        pos=write(kv.pos, full),
        bias=write(kv.bias, bias),
        cursor=jnp.minimum(kv.cursor + t, slots),
        lost=kv.lost + gone[:, None],
    )


def _write(old: Shaped[Array, "b g s *d"], rows: Shaped[Array, "b g t *d"], cursor: Array, skip: Array) -> Array:
    """`old` with the rows from `cursor` on, but for the last `skip`."""
    t, at = rows.shape[2], cursor - jnp.maximum(cursor + rows.shape[2] - old.shape[2], 0)

    def slices(old, rows):  # the window [at, at + t) begins with `skip` slots that are taken already
        if t > 1:
            rows = jnp.roll(rows, skip, 2)
        here = jax.lax.dynamic_slice_in_dim(old, at, t, 2)
        fit = (jnp.arange(t, dtype=jnp.int32) >= skip).reshape((1, 1, t) + (1,) * (old.ndim - 3))
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(fit, rows, here), at, 2)

    def scatter(old, rows):
        b, g = jnp.indices(old.shape[:2], sparse=True)
        return old.at[b, g, cursor].set(rows[:, :, 0], mode="drop", unique_indices=True)

    # XLA's CPU compiler fuses the update into the attention that reads it and so makes a copy of the whole cache at each step (three
    # times slower); a scatter it leaves alone. For rows of 16 bits it turns the whole cache into float32 and back, for a scatter in more
    # passes than for an update.
    return slices(old, rows) if t > 1 or old.dtype.itemsize == 2 else jax.lax.platform_dependent(old, rows, cpu=scatter, default=slices)


def place(q: Float[Array, "b h t d"], kv: KV, first: Array, freqs: Array) -> tuple[Array, Array]:
    """Raw keys and the queries of the rows at slots first, first + 1, ...: rotated at their rank among the live slots."""
    check.cache(kv)
    rank = ranks(kv.pos)
    own = jax.lax.dynamic_slice_in_dim(rank, first, q.shape[2], 2)
    return turn(q, jnp.repeat(own, q.shape[1] // own.shape[1], 1), freqs), turn(kv.k, rank, freqs)


def block_slots(index: Int[Array, "b g nb"], block: int, stride: int | None = None) -> Int[Array, "b g m"]:
    """The slots of the listed blocks of `block` slots, one every `stride` (None = block); -1 for unused entries."""
    check.count("block", block)
    stride = block if stride is None else stride
    check.count("stride", stride)
    if index.ndim != 3:
        raise ValueError(f"index must be [b g nb], got {list(index.shape)}")
    slots = index[..., None] * stride + jnp.arange(block, dtype=jnp.int32)[None, None, None]
    return jnp.where(index[..., None] < 0, -1, slots).reshape(*index.shape[:2], index.shape[2] * block)


def scatter(x: Float[Array, "b h *w m"], slots: Int[Array, "b g m"], s: int) -> Array:
    """Attention over gathered slots back to all s slots; [b h m] or [b h w m]."""
    check.count("s", s, 0)
    (b, g, m), wide = slots.shape, x.shape[2:-1]
    if x.ndim not in (3, 4) or x.shape[0] != b or x.shape[-1] != m or not g or x.shape[1] % g:
        raise ValueError(f"x is {list(x.shape)} for slots {list(slots.shape)}; x must be [{b} h {m}] or [{b} h w {m}], h a multiple of {g}")
    group = x.shape[1] // g
    where = jnp.where(slots < 0, s, slots)
    rows = jnp.moveaxis(x, -1, 2).reshape(b, g, group, m, *wide or (1,))
    add = jax.vmap(jax.vmap(lambda at, r: jnp.zeros((group, s + 1, r.shape[-1]), jnp.float32).at[:, at].add(r)[:, :s]))
    out = add(where, rows).reshape(*x.shape[:2], s, *wide)
    return jnp.moveaxis(out, 2, -1)
