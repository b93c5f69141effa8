"""DropKV: what each key's loss would do to the outputs. Source: NVIDIA/kvpress pull request 285."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.score import grouped
from jaxtok.core.types import KV, Evidence, Needs, Protect


@register(
    "drop_kv",
    site="cache",
    paper="https://github.com/NVIDIA/kvpress/pull/285",
    title="KVPress",
    authors="NVIDIA",
    year=2026,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropKV(CacheScorer):
    """Keep the keys whose removal alone would change the attention outputs of the last `window` queries most.

        o_i = sum_j p_ij v_j,     r_ij = p_ij / (1 - p_ij) (o_i - v_j)  =  o_i without key j, minus o_i,
        score_j = sum over the window's queries i, and over the h/g query heads of the group, of |r_ij|^2

    p: attention of the window over all keys that the query sees. r is exact: leaving out one key rescales the others by 1 / (1 - p_ij).
    So the score is the squared error of each eviction by itself, summed over the window: an oracle to hold other scores against, blind
    only to what several evictions do together and to queries beyond the window. A key that nobody attends to scores 0, and so does one
    whose value is the output itself. A query that sees one key only says nothing (r = 0: there is no output without it). Where a key takes
    more than half of a query, 1 - p and o - v cancel; there o without it is summed from the other keys.

    `recent`: newest tokens that stay whatever their score (None = `window`; our reading: the last keys are seen by few of its queries).
    Time O(w h n d); memory O(h n d), one query at a time.
    """

    capacity: int
    window: int = 64
    recent: int | None = None

    def __post_init__(self):
        check.count("window", self.window, 1)
        if self.recent is not None:
            check.count("recent", self.recent, 0)
        check.budget("capacity", self.capacity, self.protect.total)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window if self.recent is None else self.recent)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows = check.given("rows", evidence.rows)[:, :, -self.window :].astype(jnp.float32)
        b, g, s, _ = kv.k.shape
        v = jnp.where((kv.pos >= 0)[..., None], kv.v.astype(jnp.float32), 0.0)[:, :, None]  # [b g 1 s c]

        def mean(p):
            return jnp.einsum("bgqs,bgsc->bgqc", p, v[:, :, 0])

        def add(total, p):  # p [b g q s]: one query of each head
            most = p > 0.5
            rest = jnp.where(most, 0.0, p)
            left = jnp.sum(rest, -1, keepdims=True)  # 1 - p of the key over a half, to all its digits
            out, without = mean(p), mean(rest / jnp.where(left > 0, left, 1.0))
            gap = jnp.sum((v - jnp.where(most[..., None], without[:, :, :, None], out[:, :, :, None])) ** 2, -1)
            return total + jnp.sum(jnp.where(most, jnp.where(left > 0, p, 0.0), p / (1.0 - rest)) ** 2 * gap, 2), None

        each = jnp.moveaxis(grouped(rows, g), 3, 0)
        return jax.lax.scan(add, jnp.zeros((b, g, s), jnp.float32), each)[0]
