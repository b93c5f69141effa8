"""Keys and values that a trained attention keeps from step to step: a ring of slots, the last tokens in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import check
from jaxtok.core.reduce import gather


class Store(NamedTuple):
    """A ring: the token of order p stands in slot p % s until that of order p + s comes."""

    k: jax.Array  # [b e s d]
    v: jax.Array  # [b e s d]
    pos: jax.Array  # i32 [b s]; -1 = empty


def begin(k: Float[Array, "b e n d"], v: Float[Array, "b e n d"], count: Int[Array, " b"], slots: int) -> Store:
    """A ring of `slots` slots with the last of `count` tokens; row i has order i. n may be 0."""
    check.count("slots", slots)
    if k.ndim != 4 or v.shape[:3] != k.shape[:3] or count.shape != k.shape[:1]:
        raise ValueError(f"k, v, count are {[list(x.shape) for x in (k, v, count)]}; they must be [b e n d], [b e n d], [b]")
    (b, e, n, _), last = k.shape, count[:, None] - 1
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    pos = last - (last - slot) % slots  # the last order that stands in a slot; negative: none yet
    pos = jnp.where((pos >= 0) & (pos < n), pos, -1)
    if not n:
        empty = lambda x: jnp.zeros((b, e, slots, x.shape[-1]), x.dtype)
        return Store(empty(k), empty(v), pos)
    at = jnp.broadcast_to(pos[:, None], (b, e, slots))
    return Store(gather(k, at), gather(v, at), pos)


def write(store: Store, k: Float[Array, "b e 1 d"], v: Float[Array, "b e 1 d"], slot: Int[Array, " b"], pos: Int[Array, " b"]) -> Store:
    """One row a sequence into `slot` (-1, or one beyond the last: nowhere), said to stand at `pos`."""
    if k.ndim != 4 or k.shape[2] != 1 or v.shape[:3] != k.shape[:3] or slot.shape != k.shape[:1] or pos.shape != slot.shape:
        shapes = [list(x.shape) for x in (k, v, slot, pos)]
        raise ValueError(f"k, v, slot, pos are {shapes}; they must be [b e 1 d], [b e 1 d], [b], [b]")
    at = jnp.where(slot < 0, store.pos.shape[-1], slot)
    row = jnp.arange(slot.shape[0], dtype=jnp.int32)
    put = lambda old, new: old.at[row, :, at].set(new[:, :, 0].astype(old.dtype), mode="drop")
    return Store(put(store.k, k), put(store.v, v), store.pos.at[row, at].set(pos, mode="drop"))


def extend(store: Store, k: Float[Array, "b e 1 d"], v: Float[Array, "b e 1 d"], pos: Int[Array, " b"]) -> Store:
    """The ring with one more token a sequence, at order `pos` (-1 = none)."""
    return write(store, k, v, jnp.where(pos < 0, -1, pos % store.pos.shape[-1]), pos)
