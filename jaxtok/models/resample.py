"""Learned positions of one grid at the points of another."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int, antialias: bool) -> np.ndarray:
    """f32 [new old]: bicubic interpolation with half-pixel centres.

    Plain: a kernel of a = -0.75, edges repeated. Antialiased: a = -0.5, the kernel widened by old / new where that is over 1 and
    weighted anew where it reaches over an edge.
    """
    a, wide = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    at, reach = (np.arange(new) + 0.5) * old / new - 0.5, int(np.ceil(2 * wide)) + 1
    base = np.floor(at).astype(int)
    out = np.zeros((new, old))
    for tap in range(-reach, reach + 1):
        t = np.abs(at - (base + tap)) / wide
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        value = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
        inside = (base + tap >= 0) & (base + tap < old) | (not antialias)
        np.add.at(out, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(inside, value, 0.0))
    return (out / out.sum(-1, keepdims=True)).astype(np.float32)


def resize_grid(x: Float[Array, "n c"], old: tuple[int, int], new: tuple[int, int], antialias: bool = False) -> Float[Array, "m c"]:
    """Rows x of a grid of `old` rows and columns at the points of a grid of `new` ones, float32 inside; x itself where they are equal."""
    if old == new:
        return x
    grid = x.astype(jnp.float32).reshape(*old, x.shape[-1])
    y = jnp.einsum("ij,jkc->ikc", jnp.asarray(_weights(old[0], new[0], antialias)), grid)
    y = jnp.einsum("ij,kjc->kic", jnp.asarray(_weights(old[1], new[1], antialias)), y)
    return y.reshape(new[0] * new[1], x.shape[-1]).astype(x.dtype)
