"""AdaKV: the heads of a layer share one budget."""

import dataclasses
import math
from fractions import Fraction
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import CacheCompressor, CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan, live_count
from jaxtok.core.wrap import Wrapper


@register(
    "ada_kv",
    site="cache",
    paper="arXiv:2407.11550",
    title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    authors="Yuan Feng and Junlin Lv and Yukun Cao and Xike Xie and S. Kevin Zhou",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(Wrapper):
    """Spread the slots that `base` would keep over the KV heads of a layer by one joint ranking of its scores.

    With c = the slots that `base` leaves to unprotected tokens in each head and g heads: a_h = how many of the layer's g*c highest
    unprotected scores lie in head h; c_h = (1 - alpha) a_h + alpha c; head h keeps its protected tokens and its c_h best others.

    The c_h are rounded by largest remainder (ties: the lower head), so that sum_h c_h = g*c exactly; a short row has fewer
    candidates, c is then what `base` would keep of it. A traced `keep` is the average over heads. alpha = 1 is `base`; so are heads
    of equal scores.

    variant: "paper" as above. "official" (FFY0/AdaKV): c_h = round_half_even(float32((1 - alpha) a_h) + floor(alpha c)); the sum is
    then not g*c (251 of 256 was seen). "kvpress": every head keeps its best floor(alpha * keep), protected ones included, at least one
    unless alpha is 0; the rest of g*c goes to the jointly best of what remains.
    `normalize` (official option): in the joint ranking a head's scores (>= 0) count times the share of its c best in its sum.
    `skip` (official option): the first `skip` layers use `base` as it is.

    Memory: every head has ceil(slack * capacity) static slots, at most n, which is what is allocated; a budget is so made honest
    at slack = 1 only. Slots beyond a head's budget are dead. What a head with more than `slack` times the average has no room for
    goes to the best remaining candidates of the heads that have; `lost` counts protected tokens that found no room.

    Needs a base that scores (`CacheScorer`); wrap `PerLayer` or `KeyRerotation` around this, not inside.
    """

    shares: ClassVar[bool] = True

    takes = CacheScorer

    base: CacheScorer
    alpha: float = 0.2
    slack: float = 1.5
    skip: int = 0
    normalize: bool = False
    variant: str = "paper"

    def __post_init__(self):
        self.check_base()
        check.between("alpha", self.alpha, 0.0, 1.0)
        check.between("slack", self.slack, 1.0, 1e6)
        check.at_least("skip", self.skip, 0)
        check.one_of("variant", self.variant, ("paper", "official", "kvpress"))

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """The average budget of a head."""
        return self.base.capacity

    @property
    def slots(self) -> int:
        return self._room(self.base.slots)

    def _room(self, slots: int) -> int:
        """Static slots of each head where `base` has `slots`; heads of equal budgets need no slack."""
        return slots if self.alpha == 1 else math.ceil(Fraction(str(self.slack)) * slots)

    def layer(self, i: int, layers: int) -> CacheCompressor:
        base = self.base.layer(i, layers)
        return base if i < self.skip else dataclasses.replace(self, base=base)

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        score = select.finite(self.base.score(params, kv, evidence))
        live, safe = kv.pos >= 0, self.base.protect.mask(kv.pos, kv.seen)
        even = self.base.plan(params, kv, evidence, keep)  # asked for its budgets, which may be its own affair (a pyramid)
        kept, slots = live_count(even.index), even.index.shape[-1]
        mask = select.choose(score, live, self.heads(score, live, safe, kept, slots), safe)
        return select.pack(mask, self._room(slots), jnp.where(safe, jnp.inf, score))

    def heads(
        self, score: Float[Array, "b g s"], live: Bool[Array, "b g s"], safe: Bool[Array, "b g s"], keep: Int[Array, "b g"], most: int
    ) -> Int[Array, "b g"]:
        """How many unprotected slots each head keeps where `base` keeps `keep` <= `most` of all."""
        free = live & ~safe
        taken, there = jnp.sum(safe, -1, dtype=jnp.int32), jnp.sum(free, -1, dtype=jnp.int32)
        room = jnp.clip(keep - taken, 0, there)  # what the base would keep
        total = jnp.sum(room, -1, dtype=jnp.int32)
        alpha = Fraction(str(self.alpha)).limit_denominator(1000)
        p, q = alpha.numerator, alpha.denominator
        joint = score
        if self.normalize:
            best = select.choose(score, live, room, safe) & free
            whole = jnp.sum(jnp.where(free, score, 0.0), -1)
            share = jnp.sum(jnp.where(best, score, 0.0), -1) / jnp.where(whole > 0, whole, 1.0)
            joint = score * share[..., None]
        if self.variant == "kvpress":
            least = jnp.clip(jnp.maximum(keep * p // q, min(p, 1)) - taken, 0, room)
            first = select.choose(score, free, least)
            count = least + _picks(joint, free & ~first, total - jnp.sum(least, -1, dtype=jnp.int32), most)
        elif self.variant == "official":
            picks = _picks(joint, free, total, most).astype(jnp.float32)
            even = jnp.round(picks * (1 - self.alpha) + (room * p // q).astype(jnp.float32))
            count = jnp.clip(even.astype(jnp.int32), 0, there)
        else:
            count = budget.apportion((q - p) * _picks(joint, free, total, most) + p * room, q)
        fits = jnp.maximum(self._room(most) - taken, 0)
        if self._room(most) >= min(live.shape[-1], live.shape[-2] * most):
            return count  # every head has room for all that it can get
        within = jnp.minimum(count, fits)
        more = select.choose(score, free, fits) & ~select.choose(score, free, within)
        return within + _picks(joint, more, jnp.sum(count - within, -1, dtype=jnp.int32), most)


def _picks(score, candidate, total, most: int):
    """i32 [b g]: how many of the `total` [b] highest candidates of all heads lie in each; at most `most` a head on average."""
    b, g, n = score.shape
    top = select.choose(score.reshape(b, g * n), candidate.reshape(b, g * n), total, most=g * most)
    return jnp.sum(top.reshape(b, g, n), -1, dtype=jnp.int32)
