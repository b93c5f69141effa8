"""Attention to listed blocks of keys in plain XLA: one block of queries after another, its listed blocks gathered."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtok_kernels.block_sparse.layout import Spec, Tables, tiles, untile, visible

MOST = float(np.finfo(np.float32).max)


class _Row(NamedTuple):
    """What a block of queries gets, with an axis nq in front where all rows are meant."""

    q: jax.Array  # [b e h/e*block_q d]
    index: jax.Array  # [b e m]
    count: jax.Array  # [b e]
    pos: jax.Array  # [b block_q]
    mask: jax.Array | None  # [b e m block_k]


def forward(spec: Spec, q, k, v, bias, tables: Tables):
    """See `jaxtok_kernels.block_sparse.block_sparse`. Memory beside the arrays: keys, values and logits of one row of blocks."""
    b, e, nq, m = tables.index.shape
    cut = _keys(spec, k, v, bias, tables)
    out, lse = lax.map(lambda row: _attend(spec, row, *_gather(row.index, cut)), _rows(spec, q, tables))
    out, lse = _whole(spec, out, q), _whole(spec, lse[..., None], q)[..., 0]
    return (out, lse, jnp.full((b, e, nq, 2), m, jnp.int32)) if spec.count else (out, lse)


def backward(spec: Spec, q, k, v, bias, tables: Tables, out, lse, dout, dlse):
    """dq, dk, dv, dbias: each row of blocks again, its share of dk, dv and dbias added in place, in float32."""
    (g, s), e = k.shape[1:3], tables.index.shape[1]
    cut = _keys(spec, k, v, bias, tables)
    given = _rows(spec, q, tables), _queries(spec, dout.astype(q.dtype), e), _queries(spec, dlse[..., None], e)[..., 0]

    def step(sums, x):
        row, dout, dlse = x
        floats, stands = _gather(row.index, cut)
        _, pull = jax.vjp(lambda q, *floats: _attend(spec, row._replace(q=q), floats, stands), row.q, *floats)
        dq, *parts = pull((dout, dlse))
        at = _where(row.index, g)
        return [None if p is None else y.at[at].add(p.astype(jnp.float32)) for y, p in zip(sums, parts, strict=True)], dq

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), list(cut[0]))
    (*sums, dbias), dq = lax.scan(step, sums, given)
    dk, dv = (untile(x, spec.block_k, s, x.shape[-1]).astype(k.dtype) for x in sums)
    return _whole(spec, dq, q), dk, dv, None if dbias is None else dbias.reshape(*dbias.shape[:2], -1)[..., :s]


def _queries(spec: Spec, x, e: int):
    """[b h t c] -> [nq b e h/e*block_q c]."""
    b, h, t, c = x.shape
    x = jnp.moveaxis(tiles(x.reshape(b, e, h // e, t, c), spec.block_q, spec.block_q, c), 3, 0)
    return x.reshape(*x.shape[:3], -1, c)


def _whole(spec: Spec, x, q):
    """What `_queries` cut up: [nq b e h/e*block_q c] -> [b h t c]."""
    (b, h, t, _), e, c = q.shape, x.shape[2], x.shape[-1]
    x = jnp.moveaxis(x.reshape(*x.shape[:3], h // e, spec.block_q, c), 0, 3)
    return untile(x, spec.block_q, t, c).reshape(b, h, t, c)


def _rows(spec: Spec, q, tables: Tables) -> _Row:
    first = lambda x: jnp.moveaxis(x, 2, 0)
    pos = tiles(tables.q_pos[..., None], spec.block_q, spec.block_q, 1, -1)[..., 0]
    index, count, mask = first(tables.index), first(tables.count), None if tables.mask is None else first(tables.mask)
    return _Row(_queries(spec, q, tables.index.shape[1]), index, count, jnp.moveaxis(pos, 1, 0), mask)


def _keys(spec: Spec, k, v, bias, tables: Tables):
    """((keys, values, biases or None), positions), each [b g nk block_k ..]."""
    block = spec.block_k
    flat = lambda x, fill: tiles(x[..., None], block, block, 1, fill)[..., 0]
    floats = tiles(k, block, block, k.shape[3]), tiles(v, block, block, v.shape[3]), None if bias is None else flat(bias, 0)
    return floats, flat(tables.k_pos, -1)


def _where(index, g: int):
    """Where the blocks [b e m] of the lists lie in arrays [b g nk ..]."""
    b_, e_, _ = jnp.indices((*index.shape[:2], 1), sparse=True)
    return b_, e_ // (index.shape[1] // g), index


def _gather(index, cut):
    at = _where(index, cut[1].shape[1])
    return jax.tree.map(lambda x: x[at], cut)


def _attend(spec: Spec, row: _Row, floats, stands):
    """(out [b e h/e*block_q c], lse): a block of queries against its m gathered blocks [b e m block_k ..]."""
    join = lambda x, n=0: x.reshape(*x.shape[:2], -1, *x.shape[4:])
    (keys, values), extra, theirs = map(join, floats[:2]), floats[2], join(stands)[:, :, None]
    b, e, r, _ = row.q.shape
    precision = lax.Precision.HIGHEST if row.q.dtype == jnp.float32 else None
    dot = lambda spec, x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=precision)
    logit = dot("berd,besd->bers", row.q, keys) * spec.scale
    logit = logit if spec.softcap is None else spec.softcap * jnp.tanh(logit / spec.softcap)
    logit = logit if extra is None else logit + join(extra)[:, :, None]
    logit = jnp.minimum(
        jnp.where(logit > -MOST, logit, -MOST), MOST
    )  # products of finite numbers may overflow; inf - inf counts as the lowest
    used = jnp.arange(row.index.shape[2], dtype=jnp.int32)[None, None] < row.count[..., None]  # [b e m]
    used = jnp.broadcast_to(used[..., None], stands.shape) if row.mask is None else used[..., None] & row.mask
    seen = visible(spec, row.pos[:, None, :, None], theirs) & join(used)[:, :, None]  # [b e block_q s]
    seen = jnp.broadcast_to(seen[:, :, None], (b, e, r // spec.block_q, *seen.shape[2:])).reshape(logit.shape)
    logit = jnp.where(seen, logit, -jnp.inf)
    top = lax.stop_gradient(jnp.max(logit, -1, keepdims=True))
    live = top > -jnp.inf
    mass = jnp.exp(logit - jnp.where(live, top, 0.0))
    total = jnp.where(live, jnp.sum(mass, -1, keepdims=True), 1.0)
    out = dot("bers,besc->berc", mass.astype(values.dtype), values) / total
    return out.astype(row.q.dtype), jnp.where(live, jnp.where(live, top, 0.0) + jnp.log(total), -jnp.inf)[..., 0]
