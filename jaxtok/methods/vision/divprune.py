"""DivPrune. Source: arXiv:2503.02175; vbdi/divprune (LLaVA/llava/model/llava_arch.py), CC BY-NC: written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core.diverse import first_far, max_min
from jaxtok.core.matching import cosine
from jaxtok.core.registry import register
from jaxtok.core.select import first_picks
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Tokens


@register(
    "divprune",
    site="select",
    paper="arXiv:2503.02175",
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    authors="Saeed Ranjbar Alvar and Gursimran Singh and Mohammad Akbari and Yong Zhang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DivPrune(Selector):
    """Keep rows that differ: greedy max-min diversity of the rows themselves (embeddings as the language model gets them).

        D_ij = 1 - cos(x_i, x_j);   first: the row furthest from its nearest neighbour;   then argmax_j min over picked i of D_ij

    until `capacity` rows are picked (the paper's round(ratio * n): jaxtok.core.budget.capacity, which rounds half up); they stay in raster
    order, repacked. Scaling rows changes nothing; no attention is read. K picks one after the other: O(K n) after one [n n] product.
    Ties: the older row. All crops of an image are one pool. Call it on what a projector made of the encoder's rows.
    """

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        x = jax.lax.stop_gradient(tokens.x)
        apart = 1.0 - cosine(x, x)
        return first_picks(max_min(apart, free, self.capacity, first_far(apart, free)), jnp.asarray(room), free.shape[1])
