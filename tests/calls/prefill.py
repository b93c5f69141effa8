"""Calls of what sparsifiers and the block-sparse op are made of."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import sparsifier
from jaxtok.core.types import BlockTable
from jaxtok.ops import block_sparse, boundaries
from tests.calls.cases import Case, case
from tests.calls.values import Sizes, Values


def grid(s: Sizes) -> tuple[int, int, int, int]:
    """Sizes of blocks of queries and keys, and their numbers."""
    bq, bk = s.one(1, 3, 4, 64), s.one(2, 1, 5)
    return bq, bk, -(-s.n // bq), -(-s.n // bk)


def view(s: Sizes, live, q=None, k=None) -> sparsifier.View:
    """Rows with the live ones first."""
    row = jnp.arange(s.n, dtype=jnp.int32)[None]
    pos = jnp.where(row < jnp.sum(live, -1, keepdims=True), row, -1)
    none = jnp.zeros((s.b, 1, s.n, 1))
    return sparsifier.View(none if q is None else q, none if k is None else k, pos, window=s.one(None, 3))


def tables(s: Sizes, v: Values) -> BlockTable:
    """A table of any blocks, each at most once in a list, with any counts."""
    bq, bk, nq, nk = grid(s)
    m = min(nk, max(1, s.m))
    index = np.argsort(v.floats(s.b, s.g, nq, nk), -1, kind="stable").astype(np.int32)[..., :m]
    mask = v.mask(s.b, s.g, nq, m, bk) if s.i % 2 else None
    return BlockTable(index, v.ints(0, m, s.b, s.g, nq).astype(np.int32), mask)


for _place in (sparsifier.newest, sparsifier.oldest):
    case(f"core.sparsifier.{_place.__name__}")(
        lambda s, place=_place: Case(lambda live: place(view(s, live), *grid(s)[:2], s.m), lambda v: {"live": v.mask(s.b, s.n)})
    )
case("core.sparsifier.reach")(
    lambda s: Case(lambda live: sparsifier.reach(view(s, live), *grid(s)[:2]), lambda v: {"live": v.mask(s.b, s.n)})
)


@case("core.sparsifier.best_blocks")
def _(s):
    nq, nk = grid(s)[2:]

    def arrays(v):
        return {"score": v.floats(s.b, s.h, nq, nk), "candidate": v.mask(s.b, 1, nq, nk), "forced": v.mask(s.b, 1, nq, nk)}

    return Case(sparsifier.best_blocks, arrays, {"most": s.m})


case("core.sparsifier.for_heads")(
    lambda s: Case(lambda score, x: sparsifier.for_heads(sparsifier.best_blocks(score, x, x, s.m), s.h), lambda v: one_list(s, v))
)


def one_list(s: Sizes, v: Values) -> dict:
    nq, nk = grid(s)[2:]
    return {"score": v.floats(s.b, 1, nq, nk), "x": v.mask(s.b, 1, nq, nk)}


@case("core.sparsifier.with_tokens")
def _(s):
    fn = lambda table, tokens: sparsifier.with_tokens(table._replace(mask=None), tokens, grid(s)[1])
    return Case(fn, lambda v: {"table": tables(s, v), "tokens": v.mask(s.b, 1, grid(s)[2], s.n)})


case("core.sparsifier.block_means")(
    lambda s: Case(sparsifier.block_means, lambda v: {"x": v.rows(s.b, s.h, s.n, s.d), "live": v.mask(s.b, s.n)}, {"block": s.m})
)


@case("core.sparsifier.between")
def _(s):
    nq, nk = grid(s)[2:]
    return Case(
        sparsifier.between,
        lambda v: {"value": v.floats(s.b, s.h, s.n), "low": v.ints(-3, s.n + 3, nq, nk), "high": v.ints(-3, s.n + 3, nq, nk)},
        infinite=True,
    )


@case("core.sparsifier.chunk_sums")
def _(s):
    def arrays(v):
        return {"x": v.rows(s.b, s.n, s.d), "number": np.sort(v.ints(0, s.m, s.b, s.n), -1).astype(np.int32), "live": v.mask(s.b, s.n)}

    return Case(sparsifier.chunk_sums, arrays, {"chunks": s.m}, infinite=True)


@case("ops.block_sparse.lines")
def _(s):
    how = {"window": s.one(None, 3), "softcap": s.one(None, None, 30.0), "scale": s.one(None, 1.0, 1e-3)}
    fn = lambda q, k, live: block_sparse.lines(q, k, view(s, live).pos, last=s.m, **how)
    return Case(fn, lambda v: {"q": v.rows(s.b, s.h, s.n, s.d), "k": v.rows(s.b, s.g, s.n, s.d), "live": v.mask(s.b, s.n)})


case("ops.boundaries.init")(lambda s: Case(lambda x: boundaries.init(jax.random.key(0), s.g * s.d, 2, 3), lambda v: {"x": v.mask(1)}))


@case("ops.boundaries.boundary_logits")
def _(s):
    p = boundaries.init(jax.random.key(0), s.g * s.d, s.one(1, 4), 3)
    fn = lambda k, live: boundaries.boundary_logits(p, k, live)
    return Case(fn, lambda v: {"k": v.rows(s.b, s.g, s.n, s.d), "live": v.mask(s.b, s.n)}, infinite=True)


@case("ops.block_sparse.block_sparse")
def _(s):
    def fn(q, k, v, table, live, bias):
        pos = view(s, live).pos
        how = {"window": s.one(None, 3), "softcap": s.one(None, None, 30.0), "scale": s.one(None, 1.0, 1e-3)}
        return block_sparse.block_sparse(q, k, v, table, q_pos=pos, k_pos=pos, bias=bias, block_q=grid(s)[0], block_k=grid(s)[1], **how)

    def arrays(v):
        rows = {name: v.rows(s.b, e, s.n, s.d) for name, e in (("q", s.h), ("k", s.g), ("v", s.g))}
        return rows | {"table": tables(s, v), "live": v.mask(s.b, s.n), "bias": v.kv().bias}

    return Case(fn, arrays, infinite=True)


case("ops.block_sparse.listed")(
    lambda s: Case(
        lambda table: block_sparse.listed(table, t=s.n, s=s.n, block_q=grid(s)[0], block_k=grid(s)[1]),
        lambda v: {"table": tables(s, v)},
    )
)
case("ops.block_sparse.density")(
    lambda s: Case(
        lambda table, live: block_sparse.density(table, view(s, live).pos, block_q=grid(s)[0], block_k=grid(s)[1]),
        lambda v: {"table": tables(s, v), "live": v.mask(s.b, s.n)},
    )
)


@case("ops.block_sparse.low_bit")
def _(s):
    def fn(q, k, live):
        pos = view(s, live).pos
        wide = jnp.broadcast_to(pos[:, None], (s.b, s.g, s.n))
        how = {"tile": s.one(2, 16), "bits": s.one(4, 8, 2), "scale": s.one(1.0, 0.1)}
        return block_sparse.low_bit(q, k, q_pos=pos, k_pos=wide, block_q=grid(s)[0], block_k=grid(s)[1], **how)

    return Case(fn, lambda v: {"q": v.rows(s.b, s.h, s.n, s.d), "k": v.rows(s.b, s.g, s.n, s.d), "live": v.mask(s.b, s.n)}, infinite=True)
