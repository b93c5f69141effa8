"""ThinK: thinner keys. Source: arXiv:2407.21018; SalesforceAIResearch/ThinK; NVIDIA/kvpress ThinKPress."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.reduce import ranks, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.score import to_kv_heads
from jaxtok.core.types import KV, Evidence, Frozen, Needs, Plan, live_count


@register(
    "think",
    site="cache",
    paper="arXiv:2407.21018",
    title="ThinK: Thinner Key Cache by Query-Driven Pruning",
    authors="Yuhui Xu and Zhanming Jie and Hanze Dong and Lei Wang and Xudong Lu and Aojun Zhou and Amrita Saha and Caiming Xiong and Doyen Sahoo",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK(CacheCompressor):
    """Keep every token, and of its key the channels that count in the products with recent queries.

        score_c = mean over the h/g query heads of  mean over the last `window` queries of q_c^2  *  mean over the live keys of k_c^2

    q, k after the rotary embedding. Each KV head keeps its r = ratio * d best channels (round half up; ties: the lower channel), in order,
    for all keys but the `recent` newest, which keep all d and are joined by the keys to come. Old keys are stored with r channels and meet
    the same r channels of each query (`Frozen`), with the scale of d: s * (d - r) numbers a head are really gone, values stay. Dropped
    channels that are zero in all keys or all queries change nothing; ratio = 1 is the identity.

    No token is dropped, so `keep` has no meaning here and the capacity is without limit; to drop tokens too, chain it with a method that
    does: Chain(methods=(SnapKV(...), ThinK(...))) thins what that one keeps. It cannot stand beside a step policy, nor on raw keys.

    variant="kvpress": no recent keys, as kvpress prunes (to zeros, at no saving); its ratio is what is removed, and what we keep is d
    less floor(removed * d) there. `recent`: 32, the paper's; `ratio` .6: its 40% pruning.
    """

    reads_rotated: ClassVar[bool] = True

    ratio: float = 0.6
    window: int = 32
    recent: int = 32
    variant: str = "paper"

    def __post_init__(self):
        check.share("ratio", self.ratio)
        check.count("window", self.window)
        check.count("recent", self.recent, 0)
        check.one_of("variant", self.variant, ("paper", "kvpress"))

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return budget.UNLIMITED

    @property
    def needs(self) -> Needs:
        return Needs(turned=self.window)

    def resize(self, capacity: int) -> "ThinK":
        return self

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        return select.pack(kv.pos >= 0)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        return kv, evidence

    def channels(self, kv: KV, queries: Float[Array, "b h w d"]) -> Int[Array, "b g r"]:
        """The channels that each head keeps, ascending."""
        score = self.score(kv, queries)
        return jnp.sort(lax.top_k(score, self.kept(score.shape[-1]))[1].astype(jnp.int32), -1)

    def kept(self, d: int) -> int:
        """r of d channels."""
        if self.variant == "kvpress":
            return max(1, d - int(d * (1 - self.ratio)))
        return budget.capacity(self.ratio, d)

    def score(self, kv: KV, queries: Float[Array, "b h w d"]) -> Float[Array, "b g d"]:
        """The score of every channel up to a factor for each sequence; dead queries are 0."""
        q = queries[:, :, -self.window :].astype(jnp.float32)
        k = jnp.where((kv.pos >= 0)[..., None], kv.k.astype(jnp.float32), 0.0)
        count = jnp.maximum(live_count(kv.pos), 1).astype(jnp.float32)[..., None]
        return to_kv_heads(jnp.mean(q * q, 2), kv.k.shape[1]) * jnp.sum(k * k, 2) / count

    def freeze(self, params, kv: KV, evidence: Evidence) -> tuple[KV, Frozen | None]:
        s, d = kv.k.shape[2:]
        recent = 0 if self.variant == "kvpress" else min(self.recent, s)
        if self.kept(d) == d or recent == s:
            return kv, None
        channels = self.channels(kv, check.given("turned", evidence.turned))
        live = kv.pos >= 0
        new = live & (ranks(kv.pos) >= (live_count(kv.pos) - recent)[..., None])
        old = reduce_kv(select.pack(live & ~new, s - recent), kv)
        thin = jnp.take_along_axis(old.k, channels[:, :, None], -1)
        return reduce_kv(select.pack(new, recent), kv), Frozen(old._replace(k=thin, lost=jnp.zeros_like(old.lost)), channels)
