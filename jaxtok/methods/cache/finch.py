"""FINCH: the question decides what stays of the context. Source: arXiv:2408.00167 (TACL); NVIDIA/kvpress FinchPress."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import budget, check, score, segments, select
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import gather, ranks, segment_sum
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Plan, Protect, live_count


@register(
    "finch",
    site="cache",
    paper="arXiv:2408.00167",
    title="Finch: Prompt-guided Key-Value Cache Compression",
    authors="Giulio Corallo and Paolo Papotti",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Finch(CacheScorer):
    """Keep the question, the last `window` tokens, and the keys that it attends to most, early and late question tokens counting alike.

        score_j = mean over the h/g query heads of  mean over the question's queries i of  n_i A_ij,    j before the question

    A: softmax attention over all keys that query i sees. n_i: how many those are (live slots of the head), which undoes that a row over
    more keys gives each of them less. `normalize=False`: n_i = 1, SnapKV's score without pooling. The question is counted in `capacity`.

    variant="kvpress": n_i is the 0-based place of the query, one less than it sees.
    `chunk`: the budget is shared out over runs of `chunk` live tokens by order, in proportion to their tokens and rounded by largest
    remainder (ties: the older run); each keeps its best, the question first (kvpress rounds each run's share down, at least one). What
    the question takes beyond its run's share the lowest of the other runs' choices make up for. The paper reads a long context so, run by
    run; here attention is that of one pass.

    The paper moves what stays to compact positions: wrap in `key_rerotation` (KeyRerotation(base=Finch(...))), which is kvpress's
    rerotate_keys=True. The question's length is static: pad, or compile one method a length.
    """

    capacity: int
    window: int = 64
    normalize: bool = True
    chunk: int | None = None
    variant: str = "paper"

    def __post_init__(self):
        check.count("window", self.window, 1)
        check.one_of("variant", self.variant, ("paper", "kvpress"))
        if self.chunk is not None:
            check.count("chunk", self.chunk, 1)
        check.budget("capacity", self.capacity, self.window)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows = check.given("rows", evidence.rows)[:, :, -self.window :]
        g, w, h = kv.k.shape[1], rows.shape[2], rows.shape[1]
        if self.normalize:
            place = live_count(kv.pos)[..., None] - jnp.arange(w, 0, -1, dtype=jnp.int32)[None, None]  # [b g w] 0-based
            seen = jnp.maximum(place + int(self.variant == "paper"), 0).astype(jnp.float32)
            rows = rows * jnp.repeat(seen, h // g, 1)[..., None]
        return score.to_kv_heads(jnp.mean(rows, 2), g)

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        whole = super().plan(params, kv, evidence, keep)
        if self.chunk is None:
            return whole
        n = kv.pos.shape[-1]
        size = min(self.chunk, n)
        if size * n >= 2**31:
            raise ValueError(f"chunks of {size} in a cache of {n} slots overflow int32 in the shares; take chunk <= {2**31 // n - 1}")
        live, safe = kv.pos >= 0, self.protect.mask(kv.pos, kv.seen)
        free, count, length = live & ~safe, live_count(whole.index), live_count(kv.pos)
        part = jnp.where(live, ranks(kv.pos) // size, -1)
        many = -(-n // size)
        tokens, taken = (segment_sum(x, part, many).astype(jnp.int32) for x in (live, safe))
        share = jnp.maximum(budget.apportion(tokens * count[..., None], length) - taken, 0)
        value = select.finite(self.score(params, kv, evidence))
        mine = free & (segments.rank(jnp.where(free, value, -jnp.inf), part) < gather(share, part))
        mask = select.choose(value, safe | mine, jnp.maximum(count - jnp.sum(safe, -1, dtype=jnp.int32), 0), safe)
        return select.pack(mask, whole.index.shape[-1], jnp.where(safe, jnp.inf, value))
