"""TidalDecode. Source: arXiv:2410.05076; DerrickYLJ/TidalDecode, src/tidal_build/modify_llama.py, src/models/llama_tidaldecoding.py."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxtok.core import check, score
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.registry import register
from jaxtok.core.types import KV
from jaxtok.ops.read import attend_all, attend_scores, attend_slots


@register(
    "tidaldecode",
    site="reader",
    paper="arXiv:2410.05076",
    title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    authors="Lijie Yang and Zhihao Zhang and Zhuofu Chen and Zikun Li and Zhihao Jia",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TidalDecode(Reader):
    """Choose tokens in two layers of a decode step; the layers between and above attend to that choice only.

        layers < dense_layers                     attend to everything
        layer dense_layers, layers in corrections attend to everything, and choose the `top_k` largest logits q . k
        other layers                              attend to the last choice

    The choice is made anew at every step and nothing is kept between steps. Prefill and calls with several queries attend to everything.
    No sinks and no recent tokens are forced in: the new token is read where it is among the top. top_k >= the cache is full attention,
    and so is dense_layers = the model's layers; selection layers always are.

    `group`: the official code chooses for each of the h query heads ("none"); "max" (default) and "mean" reduce the logits over the
    query heads of a KV head, which then reads one set. `corrections`: 13 is the paper's for Llama-3-8B (12 in the official kernel build,
    9 its default argument). Logits are compared after soft-cap, scale and the cache's bias. Needs rotated keys.

    Raises: ValueError for a correction at or below the first selection layer.
    """

    top_k: int = 512
    dense_layers: int = 2
    corrections: tuple[int, ...] = (13,)
    group: str = "max"
    attends = True

    def __post_init__(self):
        check.at_least("top_k", self.top_k, 1)
        check.at_least("dense_layers", self.dense_layers, 0)
        check.one_of("group", self.group, ("none", *score.REDUCTIONS))
        if any(layer <= self.dense_layers for layer in self.corrections):
            raise ValueError(f"corrections={self.corrections} must come after layer {self.dense_layers}, the first that selects")

    def selects(self, layer: int) -> bool:
        """Whether a layer attends to everything and chooses."""
        return layer == self.dense_layers or layer in self.corrections

    def attend(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, Array, Array]:
        check.reading(q, pos, kv)
        if q.shape[2] > 1 or kv.pos.shape[-1] <= self.top_k or layer < self.dense_layers:
            return state, carry, *attend_all(q, pos, kv, see)
        if not self.selects(layer):
            return state, carry, *attend_slots(q, pos, kv, carry, see)
        out, lse, logit = attend_scores(q, pos, kv, see)
        logit = logit[:, :, 0]
        if self.group != "none":
            logit = score.to_kv_heads(logit, kv.pos.shape[1], self.group)
        best, slot = lax.top_k(logit, self.top_k)
        return state, jnp.sort(jnp.where(best > -jnp.inf, slot, -1), -1), out, lse

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """A layer that selects compares 4-byte logits on top of full attention; one that reuses a choice reads `top_k` slots."""
        b, g, s, _ = kv.k.shape
        if s <= self.top_k or layer < self.dense_layers:
            return Traffic(0, attended(kv, h))
        if self.selects(layer):
            return Traffic(4 * b * s * (h if self.group == "none" else h + 2 * g), attended(kv, h))
        return Traffic(0, attended(kv, h, self.top_k) if self.group != "none" else attended(kv, h, self.top_k * h // g))
