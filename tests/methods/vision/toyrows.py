"""Rows of images and what an encoder tells of them, for the tests of methods inside encoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.reduce import reduce
from jaxtok.core.types import IMAGE, SPECIAL, Tokens

reduced = jax.jit(reduce, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def do(method, name, *args):
    """A method's own function, in one program: done eagerly, each operation in it would be compiled by itself."""
    return getattr(method, name)(*args)


def rows(x, special=1, live=None, size=None, grid=None, segment=None) -> Tokens:
    """Tokens of x [b n c]; the first `special` live ones are class tokens; `grid` (rows, columns) gives the others their cells."""
    x = np.asarray(x, np.float32)
    b, n, _ = x.shape
    live = np.ones((b, n), bool) if live is None else np.broadcast_to(live, (b, n))
    pos = np.where(live, np.cumsum(live, 1) - 1, -1).astype(np.int32)
    cell = np.full((b, n, 2), -1, np.int32)
    if grid is not None:
        where = pos - special
        cell = np.where((where >= 0)[..., None], np.stack([where // grid[1], where % grid[1]], -1), -1).astype(np.int32)
    zero = jnp.zeros((b,), jnp.int32)
    return Tokens(
        x=jnp.asarray(x),
        pos=jnp.asarray(pos),
        rope=jnp.asarray(np.maximum(pos, 0)[..., None]),
        size=jnp.asarray(live if size is None else np.where(live, size, 0), jnp.float32),
        kind=jnp.asarray(np.where(pos < special, SPECIAL, IMAGE).astype(np.int8)),
        segment=jnp.full((b, n), -1, jnp.int32) if segment is None else jnp.asarray(segment, jnp.int32),
        cell=jnp.asarray(cell),
        source=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n)),
        seen=jnp.asarray(live.sum(1), jnp.int32),
        delta=zero,
        lost=zero,
    )


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def grouped(x, size, source) -> tuple[np.ndarray, np.ndarray]:
    """Size-weighted means and sizes of the groups that `source` [n] names, of one sequence."""
    x, size, source = np.asarray(x, np.float64), np.asarray(size, np.float64), np.asarray(source)
    total = np.zeros(source.max() + 1)
    out = np.zeros((len(total), x.shape[-1]))
    np.add.at(total, source, size)
    np.add.at(out, source, size[:, None] * x)
    return out / np.maximum(total, 1e-9)[:, None], total
