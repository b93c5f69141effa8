"""Key norms. Source: arXiv:2406.11430; the authors' code is alessiodevoto/l2compress; kvpress has it as Knorm."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect


@register(
    "k_norm",
    site="cache",
    paper="arXiv:2406.11430",
    title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    authors="Alessio Devoto and Yu Zhao and Simone Scardapane and Pasquale Minervini",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(CacheScorer):
    """Keep the keys of least norm: those with low norms get much attention.  score_j = -|k_j|_2.

    The rotary embedding turns keys and leaves norms, so rotated and raw keys give the same. In a layer whose keys have equal norms
    (a key norm without weights) all scores tie and the oldest stay.

    Norms are float32: in bfloat16 most of a head's keys tie. Nothing is protected by default, as in kvpress. Layers can be left alone
    as the authors' code allows by giving them their own capacity (`per_layer`).
    """

    capacity: int
    protect: Protect = CacheScorer.protect

    def __post_init__(self):
        check.kind("protect", self.protect, Protect)
        check.budget("capacity", self.capacity, self.protect.total)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        k = kv.k.astype(jnp.float32)
        return -jnp.sqrt(jnp.sum(k * k, -1))
