"""TOVA. Source: arXiv:2401.06104; schwartz-lab-NLP/TOVA, tova_cache.py; kvpress TOVAPress."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs


@register(
    "tova",
    site="policy",
    paper="arXiv:2401.06104",
    title="Transformers are Multi-State RNNs",
    authors="Matanel Oren and Michael Hassid and Nir Yarden and Yossi Adi and Roy Schwartz",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(CachePolicy):
    """Drop the token that the newest query attends to least; all heads of a layer keep the same tokens.

        score_j = mean over all h heads of  softmax over the live keys of (q_newest . k / sqrt(d))_j

    Nothing is accumulated: only the newest query counts. After a prefill the best `capacity` by its last query stay; then each step
    evicts the argmin. Positions stay those of the text. capacity >= the text is full attention.

    variant="official" (default) and the paper let the newest token go where it scores least; "kvpress" always keeps it.

    Needs the heads' slots to hold the same tokens: a cache compressed per head beforehand has no mean over heads.
    """

    aligned: ClassVar[bool] = True

    capacity: int
    variant: str = "official"

    def __post_init__(self):
        check.one_of("variant", self.variant, ("kvpress", "official"))
        check.budget("capacity", self.capacity)

    @property
    def needs(self) -> Needs:
        return Needs(rows=1)

    @property
    def step_needs(self) -> Needs:
        return Needs(rows=1)

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        newest = check.given("rows", evidence.rows)[:, :, -1].astype(jnp.float32)
        return Held(jnp.broadcast_to(jnp.mean(newest, 1, keepdims=True), kv.pos.shape))

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        return self.start(params, kv, evidence)

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        newest = kv.pos == kv.seen[:, None, None] - 1
        return newest & (kv.pos >= 0) & (self.variant == "kvpress"), state.slots
