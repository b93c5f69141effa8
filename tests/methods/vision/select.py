"""Rows of images for the tests of methods that choose among them, and what such a method leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.reduce import reduce
from jaxtok.core.types import CROP, IMAGE, SPECIAL, Tokens


def images(x, special=1, live=None, segment=None, cell=None, kind=None) -> Tokens:
    """Tokens of x [b n c]; the first `special` live rows are class rows."""
    x = np.asarray(x)
    b, n, _ = x.shape
    live = np.ones((b, n), bool) if live is None else np.asarray(live)
    pos = np.where(live, np.cumsum(live, 1) - 1, -1).astype(np.int32)
    segment = np.full((b, n), -1) if segment is None else np.broadcast_to(segment, (b, n))
    if kind is None:
        kind = np.where(pos < special, SPECIAL, np.where(segment > 0, CROP, IMAGE))
    cell = np.full((b, n, 2), -1) if cell is None else np.broadcast_to(cell, (b, n, 2))
    zero = jnp.zeros((b,), jnp.int32)
    return Tokens(
        x=jnp.asarray(x),
        pos=jnp.asarray(pos),
        rope=jnp.asarray(np.maximum(pos, 0)[..., None]),
        size=jnp.asarray(live.astype(np.float32)),
        kind=jnp.asarray(np.broadcast_to(kind, (b, n)).astype(np.int8)),
        segment=jnp.asarray(segment.astype(np.int32)),
        cell=jnp.asarray(cell.astype(np.int32)),
        source=jnp.asarray(np.where(live, np.arange(n), -1).astype(np.int32)),
        seen=jnp.asarray(live.sum(1), jnp.int32),
        delta=zero,
        lost=zero,
    )


def grid(rows: int, cols: int) -> np.ndarray:
    """cell [rows*cols 2] of a raster."""
    return np.stack(np.mgrid[:rows, :cols], -1).reshape(-1, 2)


@functools.partial(jax.jit, static_argnums=0)
def left(method, tokens, evidence, keep=None):
    """Tokens that a method leaves."""
    _, plan = method.plan({}, method.start({}, tokens), tokens, evidence, keep)
    return reduce(plan, tokens, method.positions)


def kept(method, tokens, evidence, keep=None, row=0) -> list[int]:
    """The rows of `tokens` of one sequence that stay, in order."""
    out = left(method, tokens, evidence, keep)
    source, alive = np.asarray(out.source[row]), np.asarray(out.pos[row]) >= 0
    assert (np.asarray(out.lost) == 0).all()
    return [int(np.flatnonzero(source == i)[0]) for i in np.flatnonzero(alive)]


def best(score, k) -> list[int]:
    """The k rows of highest score, ties to the first, in order."""
    return sorted(sorted(range(len(score)), key=lambda j: (-score[j], j))[: max(int(k), 0)])
