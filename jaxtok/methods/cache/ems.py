"""EMS, evict then merge. Source: arXiv:2412.08521 (no public code found)."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import CacheCompressor, CacheScorer, top_slots
from jaxtok.core.reduce import gather, move, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.score import nearest, to_kv_heads
from jaxtok.core.types import KV, Evidence, Needs, Plan, Protect


@register(
    "ems",
    site="cache",
    paper="arXiv:2412.08521",
    title="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance",
    authors="Yingxin Li and Ye Li and Yuan Meng and Xinzhu Ma and Zihan Geng and Shutao Xia and Zhi Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EMS(CacheCompressor):
    """Keep the keys that count far and near, evict the least of the others, and merge what is between into the kept key most like it.

        global_j = sum over all queries i of A_ij / how many of them see j,    local_j = the same over the last `window` queries
        score_j  = max(global_j / mean_j global, local_j / mean_j local)           (combine="sum": their sum)
        centres: the `capacity` best;  to be merged: the next round(merge * capacity);  the rest is evicted
        j of the second kind joins argmax over centres c of cos(k_j, k_c) where that is >= tau, else it is evicted (the zero class)
        centre <- sum over its members of score_j (k_j, v_j) / sum of their scores,   at the centre's position

    for each KV head by itself; A is the mean over its h/g query heads, means are over live keys, keys are those of the cache (rotated, so
    a mean is only sensible of near positions: what `tau` is for). Dividing by how many see j takes the causal mask's bias to early keys
    away: min(seen - pos_j, the queries of the call). `protect`: tokens that are centres whatever their score. `count=True`: a centre's
    bias is the log of how many tokens it stands for; the paper's stands for one. merge=0 and tau > 1 are eviction by the score; a member
    equal to its centre leaves it as it is.

    Everything has a static shape: capacity centres, round(merge * capacity) candidates of any budget `keep` (merge * keep are then used).
    Merged keys cannot be said by a plan alone unless `count`, so beside a step policy take count=True. Memory O(256 capacity) a head.

    Our reading, as there is no code: the combination by the maximum of scores scaled to a mean of 1, window 32, tau .6, merge 1, nothing
    protected. No figure of the paper's is claimed with these.
    """

    capacity: int
    window: int = 32
    merge: float = 1.0
    tau: float = 0.6
    combine: str = "max"
    count: bool = False
    protect: Protect = CacheScorer.protect

    def __post_init__(self):
        check.kind("protect", self.protect, Protect)
        check.kind("count", self.count, bool)
        check.count("window", self.window)
        check.between("merge", self.merge, 0.0, 64.0)
        check.between("tau", self.tau, -1.0, 2.0)
        check.one_of("combine", self.combine, ("max", "sum"))
        check.budget("capacity", self.capacity, self.protect.total)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window, received=True)

    @property
    def edits(self) -> bool:  # type: ignore[override]
        return self.merge > 0 and not self.count

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        """Importance, float32, of mean 1 (max: at least) over the live keys of a head."""
        g = kv.k.shape[1]
        rows = check.given("rows", evidence.rows)[:, :, -self.window :]
        near = _per_query(to_kv_heads(jnp.sum(rows, 2), g), kv)
        far = _per_query(to_kv_heads(check.given("received", evidence.received), g), kv)
        return jnp.maximum(far, near) if self.combine == "max" else far + near

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        check.cache(kv)
        b, g, n = kv.pos.shape
        cap, live = min(self.capacity, n), kv.pos >= 0
        score = select.finite(self.score(params, kv, evidence))
        centres = top_slots(kv, score, self.protect.mask(kv.pos, kv.seen), self.capacity, keep)
        most = min(self._share(cap), n)
        if not most:
            return centres
        kept = centres.assign >= 0
        between = select.pack(select.choose(score, live & ~kept, self._share(budget.per_head(keep, (b, g), cap)), most=most), most)
        like, centre = nearest(gather(kv.k, between.index), gather(kv.k, centres.index), centres.index >= 0)
        centre = jnp.where((between.index >= 0) & (like >= self.tau), centre, -1)
        joins = jnp.where(between.assign >= 0, gather(centre, between.assign), -1)
        weight = jnp.where(live, jnp.maximum(score, 1e-6), 0.0)  # a centre that nobody looks at stays what it is
        return centres._replace(assign=jnp.where(kept, centres.assign, joins), weight=weight)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        check.cache(kv)
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        plan = self.plan(params, kv, evidence, keep)
        return reduce_kv(plan, kv, count=self.count), move(plan, evidence)

    def _share(self, keep):
        """round(merge * keep), half up, of an int or an array."""
        exact = Fraction(str(self.merge)).limit_denominator(1000)
        p, q = exact.numerator, exact.denominator
        return keep // q * p + (2 * p * (keep % q) + q) // (2 * q)  # inside int32


def _per_query(attention: Float[Array, "b g s"], kv: KV) -> Float[Array, "b g s"]:
    """Attention summed over the last queries -> the mean over those of them that see each key, scaled to a mean of 1 over the live keys."""
    live = kv.pos >= 0
    attention = jnp.where(live, attention, 0.0)
    queries = jnp.round(jnp.sum(attention, -1, keepdims=True))  # each gives 1
    sees = jnp.minimum((kv.seen[:, None, None] - kv.pos).astype(jnp.float32), queries)
    each = jnp.where(live, attention / jnp.maximum(sees, 1.0), 0.0)
    mean = jnp.sum(each, -1, keepdims=True) / jnp.maximum(jnp.sum(live, -1, keepdims=True), 1).astype(jnp.float32)
    return each / jnp.where(mean > 0, mean, 1.0)
