"""KVzip: what it takes to say the context again. Source: arXiv:2505.23416; snu-mllab/KVzip; NVIDIA/kvpress KVzipPress."""

import dataclasses
import math
from fractions import Fraction
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import CacheScorer, top_slots
from jaxtok.core.registry import register
from jaxtok.core.score import output_norm, to_kv_heads
from jaxtok.core.types import KV, Evidence, Needs, Plan, Protect


@register(
    "kvzip",
    site="cache",
    paper="arXiv:2505.23416",
    title="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    authors="Jang-Hyun Kim and Jinuk Kim and Sangwoo Kwon and Jae W. Lee and Sangdoo Yun and Hyun Oh Song",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(CacheScorer):
    """Keep the keys that the model attends to most while it repeats the context.

        score_j = max over the h/g query heads, and over the queries i of the second reading, of A_ij

    The context is read once more behind its own cache, after a request to repeat it, in chunks: A is the attention of a chunk's
    repetition among the first tokens, the chunk itself in the cache and the repetition. `decode.prefill_reread` does this; a plain prefill
    is refused. The first `sinks` tokens stay. Independent of any question, at two to three times the cost of a prefill.

    `plus` (KVzip+): A_ij |v_j W_O|_2 / |x_i| in place of A_ij, with the query head's own W_O and x_i the normed row that enters the layer.
    `share`: "head": each head keeps `capacity` (the form for one static size). "layer": the heads of a layer share g * capacity by their
    joint ranking; "model", the paper's: all heads of all layers share l * g * capacity. Every head then has ceil(slack * capacity) slots,
    at most n; only a head's so many best stand in the joint ranking, so nothing is lost and the sum is exact, but more than `slack` times
    the average none can have. Short rows and sinks count as everywhere.

    Kept tokens are those of kvpress 0.5.5 (layerwise=True is share="layer", its default share="model") where slack leaves room and where its
    total, n l g less floor(removed * n l g), is a whole number a head.
    """

    passes: ClassVar[str] = "decode.prefill_reread"
    capacity: int
    sinks: int = 4
    plus: bool = False
    share: str = "head"
    slack: float = 2.0

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.one_of("share", self.share, ("head", "layer", "model"))
        check.between("slack", self.slack, 1.0, 1e6)
        check.budget("capacity", self.capacity, self.sinks)

    @property
    def needs(self) -> Needs:
        return Needs(peak=True, unit=self.plus, weights=("o",) if self.plus else ())

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(sinks=self.sinks)

    @property
    def slots(self) -> int:
        return self.capacity if self.share == "head" else math.ceil(Fraction(str(self.slack)) * self.capacity)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        peak = check.given("peak", evidence.peak)
        if self.plus:
            v = jnp.where((kv.pos >= 0)[..., None], kv.v.astype(jnp.float32), 0.0)
            peak = peak * output_norm(v, check.given("weights", evidence.weights)["o"], 2)
        return to_kv_heads(peak, kv.k.shape[1], "max")

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        keep = self.capacity if keep is None else keep
        return top_slots(kv, self.score(params, kv, evidence), self.protect.mask(kv.pos, kv.seen), self.slots, keep)

    def budgets(self, params, kvs: list[KV], evidence: list[Evidence], keep=None) -> Int[Array, "l b g"] | None:
        if self.share == "head":
            return None
        pos = jnp.stack([kv.pos for kv in kvs])  # [l b g s]
        score = select.finite(jnp.stack([self.score(params, *each) for each in zip(kvs, evidence, strict=True)]))
        live, safe = pos >= 0, jnp.stack([self.protect.mask(kv.pos, kv.seen) for kv in kvs])
        l, b, g, n = pos.shape
        limit = jnp.stack([budget.per_head(None if keep is None else keep[i], (b, g), min(self.capacity, n)) for i in range(l)])
        taken = jnp.sum(safe, -1, dtype=jnp.int32)
        total = jnp.minimum(limit, jnp.sum(live, -1, dtype=jnp.int32)) - taken  # what equal heads would keep of the others
        candidate = select.choose(score, live & ~safe, jnp.maximum(min(self.slots, n) - taken, 0))
        axes = (1, 0, 2, 3) if self.share == "model" else (0, 1, 2, 3)
        across = lambda x: jnp.transpose(x, axes[: x.ndim])  # [b l g s], or [l b g s]: the shared axes last
        joint = (b, l * g * n) if self.share == "model" else (l, b, g * n)
        room = jnp.sum(jnp.maximum(across(total), 0), (1, 2) if self.share == "model" else 2, dtype=jnp.int32)
        most = min(self.capacity, n) * g * (l if self.share == "model" else 1)
        best = select.choose(across(score).reshape(joint), across(candidate).reshape(joint), room, most=most)
        counts = jnp.sum(best.reshape(across(score).shape), -1, dtype=jnp.int32)
        return across(counts) + taken
