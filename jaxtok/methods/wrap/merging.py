"""Merging: an evicted value joins the survivor of the most similar key. Source: NVIDIA/kvpress MergingPress."""

import dataclasses
from fractions import Fraction
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check, select
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.reduce import gather, move, reduce_kv, segment_sum
from jaxtok.core.registry import register
from jaxtok.core.score import nearest
from jaxtok.core.types import KV, Evidence, Plan
from jaxtok.core.wrap import Wrapper


@register(
    "merging",
    site="cache",
    paper="https://github.com/NVIDIA/kvpress",
    title="KVPress",
    authors="NVIDIA",
    year=2026,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging(Wrapper):
    """Keep what `base` keeps, and fold the value of each token that goes into the kept token of the most similar key.

        t(j) = argmax over kept i of cos(k_j, k_i),    w_j = max(cos, 0) |v_j| / (|v_j| + |v_t(j)| + 1e-6)
        v_i <- (v_i + sum over the j with t(j) = i of w_j v_j) / (1 + sum of their w_j)

    for j evicted with cos >= `threshold`; of these only the most similar, m - ceil((1 - fraction)(m - 1)) of m evicted tokens. Keys (taken
    as the cache holds them: rotated), positions and counts stay as they are: a slot goes on standing for one token. Each head merges by
    itself. Nothing evicted, or no key alike, changes nothing; equal keys and values merge to themselves.

    Values are those of kvpress 0.5.5 (its gate of a `fraction` fails where its quantile falls between a similarity and the threshold's
    -inf; ours counts). Inspired by ToMe and D2O, says kvpress. Time O(n m d), memory O(256 m) a head.
    """

    edits: ClassVar[bool] = True

    base: CacheCompressor
    threshold: float = 0.0
    fraction: float = 1.0

    def __post_init__(self):
        self.check_base()
        if self.base.edits or self.base.rotates:
            raise ValueError(f"{self.base.name} changes what it keeps; put merging inside, around the scorer")
        check.between("threshold", self.threshold, -1.0, 1.0)
        check.share("fraction", self.fraction)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        plan = self.plan(params, kv, evidence, keep)
        if plan.weight is not None:
            raise ValueError(f"{self.base.name} merges by itself; merging goes around a method that selects")
        left = reduce_kv(plan, kv)
        return left._replace(v=self.merged(plan, kv, left)), move(plan, evidence)

    def merged(self, plan: Plan, kv: KV, left: KV) -> Float[Array, "b g m d"]:
        """Values of the kept slots with those of the evicted folded in."""
        gone, m = (kv.pos >= 0) & (plan.assign < 0), plan.index.shape[-1]
        like, target = nearest(kv.k, left.k, left.pos >= 0)
        exact = Fraction(str(self.fraction)).limit_denominator(1000)
        p, q = exact.denominator - exact.numerator, exact.denominator
        many = jnp.sum(gone, -1, dtype=jnp.int32)
        fits = many + (-(many - 1) * p) // q  # m - ceil((1 - fraction)(m - 1))
        joins = select.choose(like, gone & (like >= self.threshold), jnp.maximum(fits, 0))
        v = jnp.where((kv.pos >= 0)[..., None], kv.v.astype(jnp.float32), 0.0)
        mine = left.v.astype(jnp.float32)
        length = lambda x: jnp.minimum(jnp.sqrt(jnp.sum(x * x, -1)), 1e30)  # squares may overflow
        own = length(v)
        w = jnp.where(joins, jnp.maximum(like, 0.0), 0.0) * own / (own + gather(length(mine), target) + 1e-6)
        into = jnp.where(joins, target, -1)
        mass = segment_sum(w, into, m)[..., None]
        return ((mine + segment_sum(w[..., None] * v, into, m)) / (1.0 + mass)).astype(kv.v.dtype)
