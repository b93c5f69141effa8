"""LagKV: tokens that stand out against the text that follows. Source: arXiv:2504.04704; NVIDIA/kvpress LagKVPress."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check, segments
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import gather, oldest_first, ranks
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect, live_count


@register(
    "lagkv",
    site="cache",
    paper="arXiv:2504.04704",
    title="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    authors="Manlai Liang and JiaMing Zhang and Xiong Li and Jinlong Li",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(CacheScorer):
    """Keep the tokens whose keys and values spread most when scaled by the range of the next `lag` tokens. No attention, no queries.

    Live tokens behind the first `sinks` are cut into runs of `lag` by order. With lo, hi [d] = channel-wise min and max of run r + 1:

        x~ = (x - lo) / (hi - lo),   u_j = softmax over the tokens of run r of std over channels (d - 1) of x~_j,   x = k, then v
        score_j = (how many tokens of run r have less (u^k + u^v) / 2) / lag,   in [0, 1)

    Each run so keeps the same share, up to ties between runs, which go to the older one. `cross=True`: (u^k + u^v) / 2 itself, which
    compares runs (for AdaKV). The last whole run and what follows it have no run to be compared with: they stay before all others, the
    newest first where the budget is smaller than they are. A row of fewer than sinks + 2 * lag tokens is all such: it keeps its sinks and
    its newest tokens. The sinks always stay.

    A channel that is constant over run r + 1 is not scaled (kvpress divides by zero). Keys are taken as the cache holds them (rotated, unless a policy stores
    them raw). kvpress leaves the order of that last stretch to
    chance where the budget is too small; scores are otherwise those of 0.5.5.
    """

    capacity: int
    sinks: int = 4
    lag: int = 128
    cross: bool = False

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.count("lag", self.lag, 2)
        check.budget("capacity", self.capacity, self.sinks)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(sinks=self.sinks)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        lag, (b, g, n, _) = self.lag, kv.k.shape
        runs = max(n - self.sinks, 0) // lag
        rank, length = ranks(kv.pos) - self.sinks, live_count(kv.pos)[..., None] - self.sinks
        scored = jnp.clip(length // lag - 1, 0, None) * lag  # [b g 1] rows that have a run behind theirs
        newest = 1.0 + rank.astype(jnp.float32) / n
        if runs < 2:
            return newest
        slot = oldest_first(kv.pos)[..., self.sinks : self.sinks + runs * lag]
        packed = lambda x: gather(x, slot).astype(jnp.float32).reshape(b, g, runs, lag, -1)
        value = (stand_out(packed(kv.k)) + stand_out(packed(kv.v))) / 2
        if not self.cross:
            one = jnp.zeros(value.shape, jnp.int32)
            value = (lag - 1 - segments.rank(value, one)).astype(jnp.float32) / lag
        back = gather(value.reshape(b, g, -1), jnp.clip(rank, 0, (runs - 1) * lag - 1))
        return jnp.where(rank < scored, back, newest)


def stand_out(x: Float[Array, "b g r w d"]) -> Float[Array, "b g q w"]:
    """u of every run but the last (q = r - 1), against the run behind it."""
    this, after = x[:, :, :-1], x[:, :, 1:]
    lo = jnp.min(after, 3, keepdims=True)
    span = jnp.max(after, 3, keepdims=True) - lo
    scaled = (this - lo) / jnp.where(span > 0, span, 1.0)
    return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)
