"""ToDRE, stage 1. Source: arXiv:2505.18757 v2 (no code found)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.diverse import max_sum
from jaxtok.core.matching import cosine
from jaxtok.core.registry import register
from jaxtok.core.select import first_picks
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "todre.select",
    site="select",
    paper="arXiv:2505.18757",
    title="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    authors="Duo Li and Zuhao Yang and Xiaoqin Zhang and Ling Shao and Shijian Lu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToDRESelect(Selector):
    """Keep a pivot and rows unlike what is kept: greedy max-sum diversity in the language model's embedding space.

        pivot = argmax_j of the mean over heads of A[CLS, j] in the last layer that ran (of the thumbnail, where there are crops)
        then argmin_v of sum over picked c of cos(x_v, x_c), until `capacity` rows are picked (about 10%: 288 of 2,880)

    Rows stay in raster order, repacked. pivot="cls", or "random" for encoders without a class row: the row of the largest number drawn
    from the call's key, or from key 0 where it has none. For video the paper takes the frame of the largest maximum: with one sequence of all frames (no
    crops) that is the same argmax. The abstract's "k-center" is the wording of version 1. Ties: the older row. K picks one after
    another: O(K n) after one [n n] product. Stage 2 acts between the language model's layers.
    """

    pivot: str = "cls"

    def __post_init__(self):
        super().__post_init__()
        check.one_of("pivot", self.pivot, ("cls", "random"))

    @property
    def needs(self) -> Needs:
        return Needs(cls=self.pivot == "cls")

    def score(self, params, tokens: Tokens, evidence: Evidence):
        if self.pivot == "random":
            key = jax.random.key(0) if evidence.key is None else evidence.key
            return jnp.broadcast_to(jax.random.uniform(key, tokens.pos.shape[1:])[None], tokens.pos.shape)
        return jnp.mean(evidence.cls.astype(jnp.float32), 1)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        x = jax.lax.stop_gradient(tokens.x)
        first = jnp.where(self.group(tokens) == 0, jax.lax.stop_gradient(self.score(params, tokens, evidence)), -1.0)
        return first_picks(max_sum(cosine(x, x), free, self.capacity, first), room, free.shape[1])
