"""ActQKV. Source: arXiv:2502.13542 (no code found)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check, select
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.score import grouped
from jaxtok.core.types import KV, KeyIndex


class Blocks(NamedTuple):
    """What stands for each block of slots, and how many of them this layer retrieves in the next step."""

    mean: jax.Array  # [b g p d] mean live key, in the keys' dtype; 0 where a block holds none
    share: jax.Array  # i32 [b]


@register(
    "actqkv",
    site="reader",
    paper="arXiv:2502.13542",
    title="Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference",
    authors="Qingfa Xiao and Jiachuan Wang and Haoyang Li and Cheng Deng and Jiaqi Tang and Shuangyin Li and Yongqi Zhang and Jun Wang and Lei Chen",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActQKV(Reader):
    """Retrieve blocks for a window of queries by one probe query, as many a layer as its scores are spread out.

        bias_i   = sum over channels c of ((q_ic - mu_c) / sigma_c)^2      mu, sigma over the window's live queries, a head at a time
        probe    = sum_i (bias_i / sum bias) q_i                          `weighting`: "linear"; "softmax" of bias; "mean" = plain mean
        p        = softmax over blocks of probe . mean key / sqrt(d), averaged over the query heads of a KV head
        read     = blocks of the first `n_init` and the last `n_local` tokens, and the k_l best others by p
        k_l      = largest remainder of  layers * k * H_l / sum H,  at most `most` blocks;   H_l = entropy of p, mean over KV heads

    k = (budget - n_init - n_local) // block blocks a layer on average, so that the layers' sum is fixed whatever the entropies. The
    entropies are those of the step before (a step cannot know its later layers); the first step, and windows of several queries
    (`decode.prefill_chunked(read=True)`), take k everywhere. One query, or equal ones: sigma = 0 and the probe is their mean. One query
    far from equal others: the probe is close to it. Equal entropies: k in every layer. A text within the budget is read whole.

    Our reading, since only the paper's summary was at hand: the mean key as a block's representative, rotated queries and keys at true
    positions, the first and last tokens (as in the InfLLM family; inside the budget), entropies of the step before, and the cap `most`,
    which is the static size of the gather (default 2 k).

    Raises: ValueError for a budget without room for one block, or `most` under k.
    """

    budget: int = 2048
    block: int = 32
    n_init: int = 128
    n_local: int = 512
    most: int | None = None
    weighting: str = "linear"

    def __post_init__(self):
        for name, least in (("block", 1), ("n_init", 0), ("n_local", 1)):
            check.at_least(name, getattr(self, name), least)
        check.one_of("weighting", self.weighting, ("linear", "softmax", "mean"))
        if self.mean < 1:
            raise ValueError(
                f"budget={self.budget} has no room for a block of {self.block} beside {self.n_init} first and {self.n_local} last tokens"
            )
        if self.cap < self.mean:
            raise ValueError(f"most={self.most} blocks a layer is under the mean of {self.mean}; raise most or lower budget")

    @property
    def mean(self) -> int:
        """Blocks that a layer retrieves on average."""
        return (self.budget - self.n_init - self.n_local) // self.block

    @property
    def cap(self) -> int:
        """Blocks that a layer retrieves at most."""
        return 2 * self.mean if self.most is None else self.most

    @property
    def edges(self) -> int:
        """Blocks of the first and last tokens; a range may begin within a block."""
        pages = lambda n: -(-n // self.block) + (self.block > 1 and n > 0)
        return pages(self.n_init) + pages(self.n_local)

    def _covers(self, s: int) -> bool:
        if s % self.block:
            raise ValueError(f"actqkv reads blocks of {self.block} slots, but the cache has {s}; round it up to a multiple")
        return self.budget >= s

    def start(self, params, layer: int, kv: KV, h: int) -> Any:
        check.cache(kv)
        b, g, s, d = kv.k.shape
        if self._covers(s):
            return ()
        mean = means(kv.k.reshape(b, g, -1, self.block, d), kv.pos.reshape(b, g, -1, self.block) >= 0)
        return Blocks(mean, jnp.full((b,), self.mean, jnp.int32))

    def update(self, params, state, kv: KV, slot: Int[Array, "b g"]) -> Any:
        if not isinstance(state, Blocks):
            return state
        page = slot // self.block
        where = page[..., None] * self.block + jnp.arange(self.block, dtype=jnp.int32)[None, None]
        b, g = jnp.indices(page.shape, sparse=True)
        return state._replace(mean=state.mean.at[b, g, page].set(means(gather(kv.k, where), gather(kv.pos, where) >= 0)))

    def read(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, KeyIndex | None]:
        check.reading(q, pos, kv)
        if not isinstance(state, Blocks):
            return state, carry, None
        b, g, s = kv.pos.shape
        newest = jnp.max(kv.pos.reshape(b, g, -1, self.block), -1)
        oldest = jnp.min(jnp.where(kv.pos < 0, jnp.iinfo(jnp.int32).max, kv.pos).reshape(b, g, -1, self.block), -1)
        queries = jnp.maximum(jnp.sum(pos >= 0, -1, dtype=jnp.int32), 1) - 1  # the first query of a call has its local window too
        edge = (newest >= 0) & ((oldest < self.n_init) | (newest >= (kv.seen - self.n_local - queries)[:, None, None]))
        share = self.blocks(self.probe(q, pos), state.mean, (newest >= 0) & ~edge)
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), -1)
        best, page = lax.top_k(share, min(self.cap, share.shape[-1]))
        count = jnp.full((b,), self.mean, jnp.int32) if q.shape[2] > 1 else state.share
        count = jnp.where(kv.seen <= self.budget, self.cap, count)  # a text that the budget covers is read whole
        page = jnp.where((best > 0) & (jnp.arange(best.shape[-1])[None, None] < count[:, None, None]), page, -1)
        forced = self.edges + -(-(q.shape[2] - 1) // self.block)
        some, at = lax.top_k(edge.astype(jnp.int32), min(forced, edge.shape[-1]))
        index = jnp.sort(jnp.concatenate([page, jnp.where(some > 0, at, -1)], -1), -1)
        return state, (*(carry or ()), jnp.mean(entropy, 1)), KeyIndex(index)

    def finish(self, params, states: tuple, carry) -> tuple:
        if not carry:
            return states
        share = apportion(jnp.stack(carry, -1), self.mean * len(carry), self.cap)
        return tuple(state._replace(share=share[:, i]) for i, state in enumerate(states))

    def probe(self, q: Float[Array, "b h t d"], pos: Int[Array, "b t"]) -> Float[Array, "b h d"]:
        """The live queries of a window weighted by how far each is from their mean."""
        live = (pos >= 0)[:, None, :, None]
        q = jnp.where(live, q.astype(jnp.float32), 0.0)
        number = jnp.maximum(jnp.sum(live, 2, keepdims=True), 1).astype(jnp.float32)
        mean = jnp.sum(q, 2, keepdims=True) / number
        away = jnp.where(live, q - mean, 0.0) ** 2
        spread = jnp.sum(away, 2, keepdims=True) / number
        even = jnp.broadcast_to(live.astype(jnp.float32) / number, (*q.shape[:3], 1))
        some = spread > 1e-12 * mean**2  # equal queries differ from their mean by rounding only
        bias = jnp.sum(jnp.where(some, away / jnp.where(some, spread, 1.0), 0.0), -1, keepdims=True)
        if self.weighting == "mean":
            weight = even
        elif self.weighting == "linear":
            total = jnp.sum(bias, 2, keepdims=True)
            weight = jnp.where(total > 0, bias / jnp.where(total > 0, total, 1.0), even)
        else:
            mass = jnp.where(live, jnp.exp(bias - jnp.max(bias, 2, keepdims=True)), 0.0)
            weight = mass / jnp.maximum(jnp.sum(mass, 2, keepdims=True), 1e-30)
        return lax.stop_gradient(jnp.sum(weight * q, 2))

    def blocks(self, probe: Float[Array, "b h d"], mean: Float[Array, "b g p d"], candidate: Bool[Array, "b g p"]) -> Float[Array, "b g p"]:
        """Share of each candidate block; 0 elsewhere."""
        g, d = mean.shape[1], mean.shape[3]
        logit = jnp.einsum("bgqd,bgpd->bgqp", grouped(probe, g), lax.stop_gradient(mean).astype(jnp.float32)) * d**-0.5
        logit = jnp.where(candidate[:, :, None], logit, select.NEG)
        mass = jnp.where(candidate[:, :, None], jnp.exp(logit - jnp.max(logit, -1, keepdims=True)), 0.0)
        share = jnp.mean(mass / jnp.maximum(jnp.sum(mass, -1, keepdims=True), 1e-30), 2)
        return jnp.where(candidate, jnp.maximum(share, 1e-30), 0.0)

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """One mean key a block, 12 bytes of positions a slot, and a 4-byte score of each query head and block that goes to memory and back
        thrice."""
        b, g, s, d = kv.k.shape
        if self._covers(s):
            return Traffic(0, attended(kv, h))
        choose = b * s // self.block * (g * d * kv.k.dtype.itemsize + 24 * h) + 12 * b * g * s
        return Traffic(choose, attended(kv, h, (self.cap + self.edges) * self.block))


def means(k: Float[Array, "*P block d"], live: Bool[Array, "*P block"]) -> Float[Array, "*P d"]:
    """The mean live key of each block, in the keys' dtype."""
    total = jnp.sum(jnp.where(live[..., None], k.astype(jnp.float32), 0.0), -2)
    return (total / jnp.maximum(jnp.sum(live, -1), 1)[..., None].astype(jnp.float32)).astype(k.dtype)


def apportion(weight: Float[Array, "b l"], total: int, most: int) -> Int[Array, "b l"]:
    """Ints in proportion to `weight` that sum to `total`, none above `most`, by largest remainder; equal weights share alike."""
    top = jnp.max(weight, -1, keepdims=True)
    weight = jnp.where(top > 0, weight / jnp.where(top > 0, top, 1.0), 1.0) + 1e-6

    def halve(_, ends):  # the factor at which the capped shares sum to the total
        low, high = ends
        mid = (low + high) / 2
        under = jnp.sum(jnp.minimum(mid * weight, most), -1, keepdims=True) < total
        return jnp.where(under, mid, low), jnp.where(under, high, mid)

    start = jnp.zeros_like(top), most / jnp.min(weight, -1, keepdims=True)
    ideal = jnp.minimum(lax.fori_loop(0, 60, halve, start)[1] * weight, most)
    whole = jnp.floor(ideal + 1e-4).astype(jnp.int32)
    short = total - jnp.sum(whole, -1)
    return whole + select.choose(ideal - whole.astype(jnp.float32), whole < most, short).astype(jnp.int32)
