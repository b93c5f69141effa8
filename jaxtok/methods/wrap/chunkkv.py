"""ChunkKV: chunks of text stay or go as a whole. Source: arXiv:2502.00299; NVIDIA/kvpress ChunkKVPress."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import check, segments, select
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import gather, ranks, segment_sum
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan, live_count
from jaxtok.core.wrap import Wrapper


@register(
    "chunkkv",
    site="cache",
    paper="arXiv:2502.00299",
    title="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
    authors="Xiang Liu and Zhenheng Tang and Peijie Dong and Zeyu Li and Yue Liu and Bo Li and Xuming Hu and Xiaowen Chu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(Wrapper):
    """Keep or drop chunks of `chunk` consecutive tokens as a whole, the same ones for all KV heads.

        S_j = sum over the g KV heads of base score_j,      S_chunk = mean of S_j over the chunk's tokens

    Live tokens are numbered by order; token j is in chunk j // chunk, and a short last chunk counts as a chunk. `base`'s protected tokens
    stay; the other chunks follow by falling S_chunk (over their unprotected tokens; ties: the older chunk) until the budget of `base` is
    spent. The chunk that no longer fits whole is cut to its tokens of highest S_j (our reading: the paper keeps floor(budget / chunk)
    chunks and says nothing of the rest); so chunk = 1 is `base` with one choice for all heads, and chunk >= n is that too.

    variant="kvpress": protected tokens count as chunk members of score (largest other score) + 1 and have no other right to stay;
    max(1, floor(chunks * budget / live tokens)) whole chunks stay, so more than the budget can (`slots` = capacity + chunk - 1) or less;
    a row of less than one chunk is cut by S_j (by each head's own score there).

    Heads of a cache must hold the same tokens when it arrives (true after a prefill): what is chosen is read off the first.
    """

    aligned: ClassVar[bool] = True

    takes = CacheScorer

    base: CacheScorer
    chunk: int = 20
    variant: str = "paper"

    def __post_init__(self):
        self.check_base()
        check.count("chunk", self.chunk, 1)
        check.one_of("variant", self.variant, ("paper", "kvpress"))

    @property
    def slots(self) -> int:
        return self.base.slots + self._spill

    @property
    def _spill(self) -> int:
        """Slots beyond the budget that whole chunks may take."""
        return self.chunk - 1 if self.variant == "kvpress" else 0

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        n = kv.pos.shape[-1]
        size = min(self.chunk, n)
        many = -(-n // size)
        if many * n >= 2**31:
            raise ValueError(f"{many} chunks in a cache of {n} slots overflow int32 in the shares; take a larger chunk than {self.chunk}")
        score = select.finite(self.base.score(params, kv, evidence))
        even = self.base.plan(params, kv, evidence, keep)  # asked for its budgets, which may be its own affair (a pyramid)
        count = jnp.min(live_count(even.index), -1)  # [b]
        live, safe = kv.pos[:, 0] >= 0, self.base.protect.mask(kv.pos, kv.seen)
        part = jnp.where(live, ranks(kv.pos[:, 0]) // size, -1)
        if self.variant == "kvpress":
            top = jnp.max(jnp.where((kv.pos >= 0) & ~safe, score, select.NEG), (1, 2), keepdims=True)
            score = jnp.where(safe, jnp.where(top > select.NEG, top + 1.0, 1.0), score)
            total = jnp.sum(score, 1)
            rank, _ = chunk_order(jnp.where(live, total, 0.0), part, many)
            length = live_count(kv.pos[:, 0])
            whole = jnp.maximum((-(-length // size)) * count // jnp.maximum(length, 1), 1)
            by_chunk = gather(rank, part) < whole[:, None]
            by_token = segments.rank(jnp.where(live, total, -jnp.inf), part) < count[:, None]
            mask = live & jnp.where((length < size)[:, None], by_token, by_chunk)
        else:
            safe = safe[:, 0]
            free = live & ~safe
            total = jnp.where(free, jnp.sum(score, 1), -jnp.inf)
            _, before = chunk_order(jnp.where(free, total, 0.0), jnp.where(free, part, -1), many)
            place = gather(before, part) + segments.rank(total, part)
            mask = safe | (free & (place < (count - jnp.sum(safe, -1, dtype=jnp.int32))[:, None]))
        mask = jnp.broadcast_to(mask[:, None], kv.pos.shape)
        return select.pack(mask, min(even.index.shape[-1] + self._spill, n))


def chunk_order(score: Float[Array, "b n"], part: Int[Array, "b n"], many: int) -> tuple[Int[Array, "b many"], Int[Array, "b many"]]:
    """Of each chunk: its place by falling mean score, and how many rows the better chunks have. Chunks without rows come last."""
    size = segment_sum((part >= 0).astype(jnp.float32), part, many)
    mean = segment_sum(score, part, many) / jnp.maximum(size, 1.0)
    order = jnp.argsort(jnp.where(size > 0, -mean, jnp.inf), axis=-1, stable=True)
    ordered = jnp.take_along_axis(size, order, -1).astype(jnp.int32)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return rank, jnp.take_along_axis(jnp.cumsum(ordered, -1, dtype=jnp.int32) - ordered, rank, -1)
