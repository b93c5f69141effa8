"""Small views for the sparsifiers' own tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.sparsifier import View
from jaxtok.ops.block_sparse import listed

N, D, LIVE = 24, 8, (24, 17)


def view(seed=0, live=LIVE, h=4, g=2, n=N, d=D, junk=0.0, **more) -> View:
    """Random rows, live ones first, with `junk` in the dead ones."""
    rng, b = np.random.default_rng(seed), len(live)
    alive = np.arange(n)[None] < np.asarray(live)[:, None]
    rows = lambda e: np.where(alive[:, None, :, None], 2 * rng.normal(size=(b, e, n, d)), junk).astype(np.float32)
    pos = np.where(alive, np.arange(n)[None], -1).astype(np.int32)
    return View(jnp.asarray(rows(h)), jnp.asarray(rows(g)), jnp.asarray(pos), **more)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _table(method, q, k, pos, rest, params):
    return method.table(params, View(q, k, pos, **dict(rest)))


def table(method, x: View, params=None):
    """The method's table, compiled."""
    rest = tuple((name, getattr(x, name)) for name in ("layer", "window", "softcap", "scale", "impl"))
    return _table(method, x.q, x.k, x.pos, rest, {} if params is None else params)


def tokens(method, x: View, params=None) -> np.ndarray:
    """bool [b h n n]: which pairs are attended to: listed, causal, live."""
    n, h = x.pos.shape[1], x.q.shape[1]
    found = np.asarray(listed(table(method, x, params), t=n, s=n, block_q=method.block_q, block_k=method.block_k))
    return np.repeat(found, h // found.shape[1], 1) & seen(x)[:, None]


def blocks(method, x: View, params=None) -> list[list[list[set[int]]]]:
    """The blocks listed, [b][e][nq] sets, those that lie in the future of the whole block among them."""
    t = jax.device_get(table(method, x, params))
    lists = lambda index, count: [set(row[:n].tolist()) for row, n in zip(index, count, strict=True)]
    return [[lists(*pair) for pair in zip(*both, strict=True)] for both in zip(t.index, t.count, strict=True)]


def seen(x: View) -> np.ndarray:
    """bool [b n n]: causal pairs of live rows."""
    pos = np.asarray(x.pos)
    return (pos[:, :, None] >= pos[:, None]) & (pos[:, :, None] >= 0) & (pos[:, None] >= 0)


def attend(x: View, v, mask) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of masked attention in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (x.q, x.k, v))
    group = q.shape[1] // k.shape[1]
    logit = np.einsum("bhtd,bhsd->bhts", q, np.repeat(k, group, 1)) * q.shape[-1] ** -0.5
    top = np.max(np.where(mask, logit, -np.inf), -1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    p = np.where(mask, np.exp(np.minimum(logit - top, 0)), 0)
    total = p.sum(-1, keepdims=True)
    out = np.einsum("bhts,bhsd->bhtd", p / np.where(total > 0, total, 1), np.repeat(v, group, 1))
    with np.errstate(divide="ignore"):
        return out, (np.log(total) + np.where(total > 0, top, 0))[..., 0]
