"""Quest. Source: arXiv:2406.10774; mit-han-lab/Quest, evaluation/quest_attention.py."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check, score, select
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.types import KV, KeyIndex


class Pages(NamedTuple):
    """Bounds of the live keys of each page of `block` slots, in the keys' dtype; zeros where a page holds none."""

    low: jax.Array  # [b g p d]
    high: jax.Array  # [b g p d]


@register(
    "quest",
    site="reader",
    paper="arXiv:2406.10774",
    title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    authors="Jiaming Tang and Yilong Zhao and Kan Zhu and Guangxuan Xiao and Baris Kasikci and Song Han",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(Reader):
    """Read the pages of keys that may hold the largest logits; nothing is evicted.

        U_p = sum over channels c of  max(q_c low_pc, q_c high_pc)  >=  q . k_j  for every key j of page p

    `low` and `high` are the smallest and largest live key of the page in each channel, kept up to date as slots are written and
    vacated. A step reads the best max(3, `pages`) pages; the first `dense_layers` layers and calls with several queries (prefill, a new
    turn) read all. pages * block >= the cache is full attention; block=1 reads the exact top keys. The newest page is not forced in.

    Departure: the official code selects for each of the h query heads on repeated keys; here the g KV heads select by the `group` max
    (or mean) of U over their query heads: with the max, U still bounds every logit of the group. Needs rotated keys.
    Pages are blocks of slots, so left padding that is no multiple of `block` moves their borders against the text's.
    """

    pages: int
    block: int = 16
    dense_layers: int = 2
    group: str = "max"

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"pages": max(1, capacity // given.get("block", cls.block))}

    def __post_init__(self):
        check.count("pages", self.pages, 1)
        check.count("block", self.block, 1)
        check.count("dense_layers", self.dense_layers, 0)
        check.one_of("group", self.group, tuple(score.REDUCTIONS))

    def start(self, params, layer: int, kv: KV, h: int = 1) -> Any:
        check.cache(kv)
        if layer < self.dense_layers:
            return ()
        b, g, s, d = kv.k.shape
        if s % self.block:
            raise ValueError(f"quest reads pages of {self.block} slots, but the cache has {s}; round it up to a multiple")
        return bounds(kv.k.reshape(b, g, -1, self.block, d), kv.pos.reshape(b, g, -1, self.block) >= 0)

    def update(self, params, state, kv: KV, slot: Int[Array, "b g"]) -> Any:
        if not isinstance(state, Pages):
            return state
        page = slot // self.block
        where = page[..., None] * self.block + jnp.arange(self.block, dtype=jnp.int32)[None, None]
        new = bounds(gather(kv.k, where), gather(kv.pos, where) >= 0)
        b, g = jnp.indices(page.shape, sparse=True)
        return jax.tree.map(lambda old, x: old.at[b, g, page].set(x), state, new)

    def read(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos, kv: KV, see: Sight
    ) -> tuple[Any, Any, KeyIndex | None]:
        check.reading(q, pos, kv)
        b, h, t, d = q.shape
        g, s = kv.pos.shape[1:]
        count = max(3, self.pages)
        if not isinstance(state, Pages) or t > 1 or s <= count * self.block:
            return state, carry, None
        query = score.grouped(q[:, :, 0].astype(jnp.float32), g)
        bound = jnp.einsum("bgqd,bgpd->bgqp", jnp.maximum(query, 0), state.high.astype(jnp.float32))
        bound = bound + jnp.einsum("bgqd,bgpd->bgqp", jnp.minimum(query, 0), state.low.astype(jnp.float32))
        bound = score.to_kv_heads(bound.reshape(b, h, -1), g, self.group)
        some = jnp.max(kv.pos.reshape(b, g, -1, self.block), -1) >= 0
        best, page = lax.top_k(jnp.where(some, select.finite(bound), -jnp.inf), count)
        return state, carry, KeyIndex(jnp.sort(jnp.where(best > -jnp.inf, page, -1), -1))

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """Two bounds a page and all positions; each query head's bound of a page, 4 bytes, goes to memory and back twice."""
        b, g, s, d = kv.k.shape
        count = max(3, self.pages)
        if layer < self.dense_layers or s <= count * self.block:
            return Traffic(0, attended(kv, h))
        choose = b * s // self.block * (2 * g * d * kv.k.dtype.itemsize + 16 * h) + 4 * b * g * s
        return Traffic(choose, attended(kv, h, count * self.block))


def bounds(k: Float[Array, "*P block d"], live: Bool[Array, "*P block"]) -> Pages:
    """The least and the largest live key of each page and channel."""
    some, big = jnp.any(live, -1)[..., None], jnp.finfo(k.dtype).max
    low = jnp.min(jnp.where(live[..., None], k, big), -2)
    high = jnp.max(jnp.where(live[..., None], k, -big), -2)
    return Pages(jnp.where(some, low, 0), jnp.where(some, high, 0))
