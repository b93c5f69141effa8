"""CaM: an evicted value is shared out over the survivors behind it, by the toss of a coin. Source: Zhang et al., ICML 2024; kvpress CAMPress."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.reduce import gather, move, ranks, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.score import to_kv_heads
from jaxtok.core.types import KV, Evidence, Needs, Plan
from jaxtok.core.wrap import Wrapper


@register(
    "cam",
    site="cache",
    paper="https://openreview.net/forum?id=LCTmppB165",
    title="CaM: Cache Merging for Memory-efficient LLMs Inference",
    authors="Yuxin Zhang and Yuxuan Du and Gen Luo and Yunshan Zhong and Zhenyu Zhang and Shiwei Liu and Rongrong Ji",
    year=2024,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CaM(Wrapper):
    """Keep what `base` keeps, and add the value of each token that goes, in equal parts, to the kept tokens behind it.

        targets of j: the first `window` kept tokens newer than j (fewer near the end: m_j of them)
        p_j = min(1, A_j / mean of A over the targets),    c_j ~ Bernoulli(p_j),    v_i <- v_i + sum over the j that have i of c_j v_j / m_j

    A: attention received in this prefill, mean over the h/g query heads. A token with no kept token behind it, and one that nobody attends
    to, goes without trace. Keys, positions and counts stay. `sample=False` takes p_j itself for c_j: the mean of the draws.

    Draws are a function of (the model's key, or `seed` and the layer; the position): the same for all heads and rows of a batch.
    The paper and kvpress (CAMPress) merge while generating, the tokens since the last time; here it happens once, to all that the
    compression evicts: our reading for this site. window=32 is kvpress's. Time O(n w d), one target at a time.
    """

    edits: ClassVar[bool] = True

    base: CacheCompressor
    window: int = 32
    sample: bool = True
    seed: int = 0

    def __post_init__(self):
        self.check_base()
        if self.base.edits or self.base.rotates:
            raise ValueError(f"{self.base.name} changes what it keeps; put cam inside, around the scorer")
        check.count("window", self.window)

    @property
    def needs(self) -> Needs:
        return self.base.needs | Needs(received=True)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        plan = self.plan(params, kv, evidence, keep)
        if plan.weight is not None:
            raise ValueError(f"{self.base.name} merges by itself; cam goes around a method that selects")
        left = reduce_kv(plan, kv)
        return left._replace(v=self.merged(plan, kv, evidence)), move(plan, evidence)

    def merged(self, plan: Plan, kv: KV, evidence: Evidence) -> Float[Array, "b g m d"]:
        """Values of the kept slots with the shares of the evicted added."""
        live = kv.pos >= 0
        attention = jnp.where(live, to_kv_heads(check.given("received", evidence.received), kv.k.shape[1]), 0.0)
        rank, kept = ranks(kv.pos), plan.assign >= 0
        order = jnp.argsort(jnp.where(live, rank, -1), axis=-1)  # slots by age, dead ones first
        ordered = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 3)), 2)
        here, a, v = ordered(kept), ordered(attention), ordered(jnp.where(live[..., None], kv.v.astype(jnp.float32), 0.0))
        n = here.shape[-1]
        # kept token number i, counted from 0, is the target of what went since kept token number i - window
        number = jnp.cumsum(here.astype(jnp.int32), -1)  # how many kept ones up to here: of an evicted one, its first target
        total = number[..., -1:]
        m = jnp.clip(total - number, 0, self.window)
        slot = jnp.where(here, number - 1, n)
        b, g, _ = slot.shape
        at = jnp.indices((b, g), sparse=True)
        compact = lambda x: jnp.zeros((b, g, n + 1), x.dtype).at[at[0][..., None], at[1][..., None], slot].set(x)[..., :n]
        ahead = jnp.pad(jnp.cumsum(compact(jnp.where(here, a, 0.0)), -1), ((0, 0), (0, 0), (1, 0)))  # [b g n + 1] sums over kept
        mean = (gather(ahead, number + m) - gather(ahead, number)) / jnp.maximum(m, 1).astype(jnp.float32)
        chance = jnp.where(mean > 0, jnp.minimum(a / jnp.where(mean > 0, mean, 1.0), 1.0), jnp.where(a > 0, 1.0, 0.0))
        gone = ordered(live) & ~here & (m > 0)
        toss = (self.draw(evidence, ordered(kv.pos)) < chance).astype(jnp.float32) if self.sample else chance
        share = jnp.where(gone, toss, 0.0) / jnp.maximum(m, 1).astype(jnp.float32)
        sums = jnp.zeros((b, g, n + 1, v.shape[-1]), jnp.float32)

        def add(i, sums):
            into = jnp.where(gone & (i < m), number + i, n)
            return sums.at[at[0][..., None], at[1][..., None], into].add(share[..., None] * v)

        sums = jax.lax.fori_loop(0, self.window, add, sums)
        place = jnp.argsort(order, axis=-1)  # of each slot, in order of age
        mine = jnp.take_along_axis(jnp.where(here[..., None], v + gather(sums, jnp.maximum(number - 1, 0)), v), place[..., None], 2)
        return gather(mine, plan.index).astype(kv.v.dtype)

    def draw(self, evidence: Evidence, pos) -> Float[Array, "b g n"]:
        """Uniform numbers in [0, 1), one a position."""
        if evidence.key is not None:
            key = jax.random.fold_in(evidence.key, self.seed)
        else:
            key = jax.random.fold_in(jax.random.key(self.seed), 0 if evidence.layer is None else evidence.layer)
        each = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), dtype=jnp.float32))
        return each(jnp.maximum(pos, 0).ravel()).reshape(pos.shape)
