"""Learned positions of one grid at the points of another."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_A = -0.75  # of the cubic kernel


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """f32 [new old]: bicubic interpolation with half-pixel centres, edges repeated, no antialiasing."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(at).astype(int)
    out = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(at - (base + tap))
        near = (_A + 2) * t**3 - (_A + 3) * t**2 + 1
        far = _A * t**3 - 5 * _A * t**2 + 8 * _A * t - 4 * _A
        np.add.at(out, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(t <= 1, near, np.where(t < 2, far, 0.0)))
    return out.astype(np.float32)


def resize_grid(x: Float[Array, "n c"], old: tuple[int, int], new: tuple[int, int]) -> Float[Array, "m c"]:
    """Rows x of a grid of `old` rows and columns at the points of a grid of `new` ones, float32 inside; x itself where they are equal."""
    if old == new:
        return x
    grid = x.astype(jnp.float32).reshape(*old, x.shape[-1])
    y = jnp.einsum("ij,jkc->ikc", jnp.asarray(_weights(old[0], new[0])), grid)
    y = jnp.einsum("ij,kjc->kic", jnp.asarray(_weights(old[1], new[1])), y)
    return y.reshape(new[0] * new[1], x.shape[-1]).astype(x.dtype)
