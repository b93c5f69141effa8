"""Arrays that stand in host memory, and their rows fetched to the device. On a CPU all of it is a no-op.

A cache that is read in parts (a reader with offload=True) is cut in two when its prompt is in: the prompt's slots go to host memory and are
only read from then on; new tokens get slots of their own on the device (`Halves`). So no step writes to host memory, and what crosses in
a step are the rows that the reader chose, gathered by the host. Generating keeps the new tokens on the device: room for `new` of them is
allocated there. Another prefill on such caches brings them back whole, a layer at a time, and stows them anew.

No gradient passes through such a cache (JAX raises). Programs lower for TPU and CUDA with the placements in them; on accelerators they have
not been run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Int

from jaxtok.core import check
from jaxtok.core.reduce import gather
from jaxtok.core.types import KV


class Halves(NamedTuple):
    """An array [b g s ...] whose first slots stand in host memory, never written again, and the others on the device."""

    host: jax.Array  # [b g s0 ...]
    here: jax.Array  # [b g s - s0 ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both together."""
        b, g, s, *rest = self.host.shape
        return (b, g, s + self.here.shape[2], *rest)

    @property
    def ndim(self) -> int:
        return self.host.ndim

    @property
    def dtype(self) -> Any:
        return self.host.dtype


def to_host(x: Array) -> Array:
    """x in pinned host memory; inside or outside jit."""
    return jax.device_put(x, jax.memory.Space.Host)


def fetch_rows(x: Array, slots: Int[Array, "b g m"]) -> Array:
    """The listed rows [b g m ...] of x [b g s ...], which stands in host memory: gathered there, so that only they cross to the device.

    Slots are in 0..s-1: nothing is clipped, and an unused entry (-1) is read as row 0 (mask it by its position).
    """
    (b, g, m), rest = slots.shape, x.shape[3:]
    whole = (b, g, m, 1)
    index = jnp.concatenate(
        [lax.broadcasted_iota(jnp.int32, whole, 0), lax.broadcasted_iota(jnp.int32, whole, 1), jnp.maximum(slots, 0)[..., None]], -1
    )
    axes = tuple(range(3, 3 + len(rest)))
    dims = lax.GatherDimensionNumbers(offset_dims=axes, collapsed_slice_dims=(0, 1, 2), start_index_map=(0, 1, 2))
    index = to_host(index)
    with compute_on("device_host"):
        rows = lax.gather(x, index, dims, (1, 1, 1, *rest), mode="promise_in_bounds")
    return jax.device_put(rows, jax.memory.Space.Device)


def stow(kv: KV, slots: int, what: tuple[str, ...] = ("k", "v")) -> KV:
    """The cache with the first `slots` slots of the arrays named in `what` (k, v) in host memory. Positions and biases stay.

    Nothing may be written there any more: the cursor must be at `slots` or behind.
    """
    check.count("slots", slots, 0, kv.pos.shape[-1])
    if not set(what) <= {"k", "v"}:
        raise ValueError(f"what={what!r}; of a cache k and v can stand in host memory")
    cut = lambda x: Halves(to_host(x[:, :, :slots]), x[:, :, slots:])
    return kv._replace(**{name: cut(whole(getattr(kv, name))) for name in what})


def whole(x: Array | Halves) -> Array:
    """x on the device: all of it crosses."""
    return jnp.concatenate([jax.device_put(x.host, jax.memory.Space.Device), x.here], 2) if isinstance(x, Halves) else x


def together(kv: KV) -> KV:
    """The cache with all arrays on the device."""
    return kv._replace(k=whole(kv.k), v=whole(kv.v))


def aligned(kv: KV, block: int = 1) -> KV:
    """The cache with its unused slots in front: moved by whole blocks until the cursor is less than a block from the end.

    So that all but the last block - 1 slots can be stowed where the cursor is not known before the program runs.
    """
    check.count("block", block)
    shift = (kv.pos.shape[-1] - kv.cursor) // block * block
    moved = {
        name: None if x is None else jnp.roll(x, shift, 2)
        for name, x in kv._asdict().items()
        if name in ("k", "v", "pos", "bias", "segment")
    }
    return kv._replace(**moved, cursor=kv.cursor + shift)


def rows(x: Array | Halves, slots: Int[Array, "b g m"]) -> Array:
    """The listed rows [b g m ...]; -1 gives zeros. Of the part in host memory only they cross."""
    if not isinstance(x, Halves):
        return gather(x, slots)
    there = x.host.shape[2]
    near = gather(x.here, jnp.where(slots >= there, slots - there, -1))
    if not there:
        return near
    far = fetch_rows(x.host, jnp.where(slots < there, slots, -1))
    wide = lambda mask: mask.reshape(*mask.shape, *(1,) * (near.ndim - 3))
    return jnp.where(wide((slots >= 0) & (slots < there)), far, near)


def newest(x: Array | Halves, slot: Int[Array, ""]) -> Array:
    """The row [b g ...] of a slot that was written by a step."""
    x, slot = (x.here, slot - x.host.shape[2]) if isinstance(x, Halves) else (x, slot)
    return lax.dynamic_slice_in_dim(x, slot, 1, 2)[:, :, 0]


def nbytes(tree: Any) -> tuple[int, int]:
    """(bytes on the device, bytes in host memory) of caches, arrays or structs."""
    halves = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Halves)) if isinstance(x, Halves)]
    size = lambda leaves: sum(x.size * x.dtype.itemsize for x in leaves)
    host = size([x.host for x in halves])
    return size(jax.tree.leaves(tree)) - host, host
