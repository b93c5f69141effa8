"""Chunked: every stretch of the text keeps its share."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxtok.core import budget, check, segments, select
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import gather, move, ranks, reduce_kv, segment_sum
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan, live_count
from jaxtok.core.wrap import Wrapper


@register(
    "chunked",
    site="cache",
    paper="https://github.com/NVIDIA/kvpress",
    title="KVPress",
    authors="NVIDIA",
    year=2024,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunked(Wrapper):
    """Compress each run of `chunk` live tokens by itself, all to the same ratio.

    Per head, with live tokens numbered 0, 1, ... by order: token j is in chunk j // chunk (the last one may be short). `base` scores a
    chunk as if it were the whole cache: its slots alone, with their evidence. Of the K unprotected tokens that `base` would keep,
    chunk i with a_i of the A unprotected tokens keeps its best K a_i / A, rounded by largest remainder (ties: the older chunk), so
    that the sum is exactly K. Protected tokens (by their order in the whole text) stay beside that.

    chunk >= n is `base`. Statistics over keys (KeyDiff's mean) are the chunk's; attention that the model reports was seen over
    the whole context, where kvpress (ChunkPress) computes it again inside each chunk; kvpress keeps max(1, floor) of each chunk and
    lets the window of each chunk be protected. Not ChunkKV, which keeps or drops chunks as a whole.
    """

    takes = CacheScorer

    base: CacheScorer
    chunk: int = 1024

    def __post_init__(self):
        self.check_base()
        check.count("chunk", self.chunk, 1)
        if self.base.needs.hidden:
            raise ValueError(f"{self.base.name} reads hidden rows, which are not kept per head; chunked cannot cut them")

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        n = kv.pos.shape[-1]
        size = min(self.chunk, n)
        if size * n >= 2**31:
            raise ValueError(f"chunks of {size} in a cache of {n} slots overflow int32 in the shares; take chunk <= {2**31 // n - 1}")
        live, safe = kv.pos >= 0, self.base.protect.mask(kv.pos, kv.seen)
        free = live & ~safe
        part = jnp.where(live, ranks(kv.pos) // size, -1)
        score = select.finite(self.scores(params, kv, evidence, size))
        whole = self.base.plan(params, kv, evidence, keep)  # asked for its budgets, which may be its own affair (a pyramid)
        there = jnp.sum(free, -1, dtype=jnp.int32)
        room = jnp.clip(live_count(whole.index) - jnp.sum(safe, -1, dtype=jnp.int32), 0, there)
        members = segment_sum(free, part, -(-n // size)).astype(jnp.int32)
        share = gather(budget.apportion(members * room[..., None], there), part)
        rank = segments.rank(jnp.where(free, score, -jnp.inf), part)
        return select.pack(safe | (free & (rank < share)), whole.index.shape[-1], jnp.where(safe, jnp.inf, score))

    def scores(self, params, kv: KV, evidence: Evidence, size: int) -> Float[Array, "b g s"]:
        """`base`'s scores of each chunk of `size` live slots, put back to the slots."""
        n = kv.pos.shape[-1]
        many = -(-n // size)
        if many == 1:
            return self.base.score(params, kv, evidence)
        count = live_count(kv.pos)[..., None]  # [b g 1]
        order = jnp.argsort(kv.pos, axis=-1).astype(jnp.int32)  # dead slots first
        number = jnp.arange(many, dtype=jnp.int32)
        short = size - jnp.clip(count - number[None, None] * size, 0, size)  # [b g many]: a chunk's dead rows, which stand first

        def one(i):
            row = jnp.arange(size, dtype=jnp.int32)[None, None] - jnp.take(short, i, axis=2)[..., None]
            slot = jnp.where(row < 0, -1, gather(order, jnp.clip(n - count + i * size + row, 0, n - 1)))
            plan = select.from_index(slot, n)
            key = None if evidence.key is None else jax.random.fold_in(evidence.key, i)
            return self.base.score(params, reduce_kv(plan, kv), move(plan, evidence)._replace(key=key))

        by_chunk = jnp.moveaxis(lax.map(one, number), 0, 2).reshape(*kv.pos.shape[:2], many * size)
        rank = ranks(kv.pos)
        return gather(by_chunk, rank + gather(short, rank // size))
