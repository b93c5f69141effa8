"""Block top-k: mean query against mean key. Source: the block-sparse pattern of arXiv:2407.02490 (MInference)."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.score import to_kv_heads
from jaxtok.core.sparsifier import Sparsifier, View, best_blocks, block_means, newest, oldest, reach
from jaxtok.core.types import BlockTable


@register("block_topk", paper="baseline", site="sparsify")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTopK(Sparsifier):
    """Every block of queries reads the blocks of keys whose mean key meets its mean query best.

        score_xy = mean of the queries of x . mean of the keys of y,   among blocks that some query of x may see

    `capacity` keys a block of queries, in whole blocks (rounded down, at least one). The block's own keys and the first `sinks` tokens are read
    in any case, inside the capacity. capacity >= n is plain attention. `shared`: one list a KV head, by the mean score of its h/g query
    heads; else each query head has its own. Causal by blocks of queries: what one reads depends on no token behind it.
    """

    capacity: int
    sinks: int = 0
    block_q: int = 64
    block_k: int = 64
    shared: bool = False
    tail: int = 0

    def __post_init__(self):
        for name, low in (("sinks", 0), ("block_q", 1), ("block_k", 1), ("tail", 0)):
            check.count(name, getattr(self, name), low)
        check.budget("capacity", self.capacity)
        check.kind("shared", self.shared, bool)

    def whole(self, n: int) -> bool:
        return self.capacity >= n

    def table(self, params, view: View) -> BlockTable:
        (b, h, g, _, d), size, live = view.sizes, (self.block_q, self.block_k), view.pos >= 0
        q, k = block_means(view.q, live, self.block_q), block_means(view.k, live, self.block_k)
        x, y = q.shape[2], k.shape[2]
        score = jnp.einsum("bgqxd,bgyd->bgqxy", q.reshape(b, g, h // g, x, d), k).reshape(b, h, x, y)
        score = to_kv_heads(score, g, "mean") if self.shared else score
        forced = newest(view, *size, 0) | oldest(view, *size, self.sinks)
        return best_blocks(score, reach(view, *size), forced, max(1, self.capacity // self.block_k))
