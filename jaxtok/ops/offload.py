"""Arrays that stand in host memory, and their rows fetched to the device. On a CPU all of it is a no-op."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Int


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
