"""CriticalKV: what a value can do to the output counts. Source: arXiv:2502.03805; NVIDIA/kvpress CriticalKVPress, CriticalAdaKVPress."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxtok.core import check, select
from jaxtok.core.protocols import CacheCompressor, CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.score import output_norm, to_kv_heads
from jaxtok.core.types import KV, Evidence, Needs, Plan, live_count
from jaxtok.core.wrap import Wrapper


@register(
    "criticalkv",
    site="cache",
    paper="arXiv:2502.03805",
    title="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
    authors="Yuan Feng and Junlin Lv and Yukun Cao and Xike Xie and S Kevin Zhou",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(Wrapper):
    """Spend half of `base`'s budget on its best scores, the rest on those that weigh most in the output.

        stage 1: the floor(first * K) best by s_j, at least one (unless first = 0); protected tokens are among them
        stage 2: of the others the best by (s_j + epsilon) |v_j W_O|_1, up to K in all

    s: base's score (>= 0 is meant), K: the slots that `base` gives the head, W_O [d c]: the rows of the output projection of a query head;
    the norm is averaged over the h/g query heads. Equal values give base's own choice, and so does first = 1. A base that already weighs
    by values (expected attention) should not do so here: vnorm=False.

    Ada-CriticalKV: `base` = `ada_kv` around a scorer. Its budgets K_h then come from the scorer's own scores. `safeguard`: stage 1 keeps
    at least the floor(safeguard * mean K) best of every head; kvpress's CriticalAdaKVPress sets it to AdaKV's alpha.
    `epsilon` is in the units of the base's score: SnapKV's is a sum over its window here and a mean in kvpress, whose tokens are kept at
    epsilon = 1e-4 * window (and at 1e-4 for bases with the same units, as expected attention). Kept tokens are those of kvpress 0.5.5.
    """

    base: CacheCompressor
    first: float = 0.5
    epsilon: float = 1e-4
    safeguard: float = 0.0

    def __post_init__(self):
        if not isinstance(self.base, CacheScorer) and not (isinstance(self.base, CacheCompressor) and self.base.shares):
            raise TypeError(
                f"criticalkv needs the scores of its base, a CacheScorer or ada_kv; got {self.base!r}. Put other wrappers around"
            )
        check.between("first", self.first, 0.0, 1.0)
        check.between("safeguard", self.safeguard, 0.0, 1.0)
        check.at_least("epsilon", self.epsilon, 0)

    @property
    def scorer(self) -> CacheScorer:
        """Whose scores these are."""
        return self.base if isinstance(self.base, CacheScorer) else self.base.base  # type: ignore[attr-defined]

    @property
    def needs(self) -> Needs:
        return self.base.needs | Needs(weights=("o",))

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        o = check.given("weights", evidence.weights)["o"]
        score = select.finite(self.scorer.score(params, kv, evidence))
        even = self.base.plan(params, kv, evidence, keep)  # asked for its budgets
        kept, slots = live_count(even.index), even.index.shape[-1]
        live, safe = kv.pos >= 0, self.scorer.protect.mask(kv.pos, kv.seen)
        free = live & ~safe
        taken = jnp.sum(safe, -1, dtype=jnp.int32)
        room = jnp.maximum(kept - taken, 0)
        mean = jnp.sum(kept, -1, keepdims=True, dtype=jnp.int32) // kept.shape[-1]
        least = jnp.maximum(_part(kept, self.first), _part(mean, self.safeguard))
        first = select.choose(score, free, jnp.clip(least - taken, 0, room), most=slots)
        v = jnp.where(live[..., None], kv.v.astype(jnp.float32), 0.0)
        weighed = (score + self.epsilon) * to_kv_heads(output_norm(v, o, 1), v.shape[1])
        second = select.choose(weighed, free & ~first, room - jnp.sum(first, -1, dtype=jnp.int32), most=slots)
        return select.pack(safe | first | second, slots, jnp.where(safe, jnp.inf, score))


def _part(count: jax.Array, share: float) -> jax.Array:
    """floor(share * count), at least one unless the share is 0."""
    exact = Fraction(str(share)).limit_denominator(1000)
    return jnp.maximum(count * exact.numerator // exact.denominator, min(exact.numerator, 1))
