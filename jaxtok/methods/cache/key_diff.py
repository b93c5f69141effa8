"""KeyDiff: keys unlike the others. Source: arXiv:2504.15364; kvpress has it as KeyDiffPress."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect


@register(
    "key_diff",
    site="cache",
    paper="arXiv:2504.15364",
    title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
    authors="Junyoung Park and Dalton Jones and Matthew J. Morse and Raghavv Goel and Mingu Lee and Chris Lott",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(CacheScorer):
    """Keep the keys least like the mean key.  score_j = -cos(k_j, a),  a = mean over the live i of k_i / |k_i|.

    Keys are taken as the cache holds them (rotated, unless a policy stores them raw). Two keys, or keys that all point the same way,
    tie up to rounding, which then decides; the length of a key does not count; a key of zero length scores 0. Nothing is protected by default, as in
    kvpress. Float32 throughout. The mean is over the cache at compression time; the paper's block-wise prefill re-computes it for each
    block, which is `prefill` on a compressed cache here.
    """

    capacity: int
    protect: Protect = CacheScorer.protect

    def __post_init__(self):
        check.kind("protect", self.protect, Protect)
        check.budget("capacity", self.capacity, self.protect.total)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        k = jnp.where(kv.pos[..., None] >= 0, kv.k.astype(jnp.float32), 0.0)
        unit = k / jnp.maximum(jnp.sqrt(jnp.sum(k * k, -1, keepdims=True)), 1e-12)
        anchor = jnp.sum(unit, 2, keepdims=True)  # the length of the anchor drops out of the cosine
        anchor = anchor / jnp.maximum(jnp.sqrt(jnp.sum(anchor * anchor, -1, keepdims=True)), 1e-12)
        return -jnp.sum(unit * anchor, -1)
