"""CurDKV: keys and values of large leverage. Source: arXiv:2509.15038; NVIDIA/kvpress CURPress."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import gather, oldest_first, ranks
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect

KINDS = ("product", "mean", "key", "value")


@register(
    "cur",
    site="cache",
    paper="arXiv:2509.15038",
    title="Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
    authors="Ayan Sengupta and Siddhant Chaudhary and Tanmoy Chakraborty",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CUR(CacheScorer):
    """Keep the tokens whose key and value are long for their neighbourhood, the row leverage of an approximate CUR decomposition.

        a_j = |k_j|^2 / sum over j's neighbourhood of |k|^2,   c_j = the same of v,
        score_j = a_j c_j ("product"), (a_j + c_j) / 2 ("mean"), a_j ("key") or c_j ("value"), divided by its sum over live tokens

    Neighbourhoods are the runs of `local` live tokens by order, the last one short; None = no division, the squared lengths themselves.
    The first `sinks` stay. The last division changes no order within a head; it is there for AdaKV, which compares heads.
    `rank`: lengths after a random Gaussian projection to that many channels (the paper's approximate leverage), drawn from the model's
    key (`evidence.key`) or from `seed` and the layer, the same for all heads and rows of a batch; None = exact lengths, kvpress's default.

    local=1 scores all tokens alike, so the oldest stay. A token of zero length scores 0. Kept tokens are those of kvpress 0.5.5 (rank=None).
    """

    capacity: int
    sinks: int = 4
    local: int | None = 16
    kind: str = "product"
    rank: int | None = None
    seed: int = 0

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.one_of("kind", self.kind, KINDS)
        for name in ("local", "rank"):
            if getattr(self, name) is not None:
                check.count(name, getattr(self, name), 1)
        check.budget("capacity", self.capacity, self.sinks)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(sinks=self.sinks)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        slot, rank = oldest_first(kv.pos), ranks(kv.pos)
        key, value = (self.leverage(gather(x, slot).astype(jnp.float32), evidence) for x in (kv.k, kv.v))  # by rank, dead ones 0
        score = {"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[self.kind]
        total = jnp.sum(score, -1, keepdims=True)
        return gather(score / jnp.where(total > 0, total, 1.0), rank)

    def leverage(self, x: Float[Array, "b g n d"], evidence: Evidence) -> Float[Array, "b g n"]:
        """Squared lengths of rows that stand by order, each as a share of its neighbourhood's."""
        b, g, n, d = x.shape
        if self.rank is not None:
            key = jax.random.key(self.seed) if evidence.key is None else jax.random.fold_in(evidence.key, self.seed)
            if evidence.key is None and evidence.layer is not None:
                key = jax.random.fold_in(key, evidence.layer)
            x = x @ (jax.random.normal(key, (d, self.rank), jnp.float32) / self.rank**0.5)
        square = jnp.sum(x * x, -1)
        if self.local is None:
            return square
        runs = jnp.pad(square, ((0, 0), (0, 0), (0, -n % self.local))).reshape(b, g, -(-n // self.local), self.local)
        total = jnp.sum(runs, -1, keepdims=True)
        return (runs / jnp.where(total > 0, total, 1.0)).reshape(b, g, -(-n // self.local) * self.local)[..., :n]
