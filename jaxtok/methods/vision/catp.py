"""CATP, stage 1. Source: arXiv:2508.07871 (no code found)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.diverse import facility
from jaxtok.core.matching import cosine, unit
from jaxtok.core.registry import register
from jaxtok.core.select import first_picks
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "catp.select",
    site="select",
    paper="arXiv:2508.07871",
    title="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    authors="Yanshu Li and Jianjiang Yang and Zhennan Shen and Ligong Han and Haoyan Xu and Ruixiang Tang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CATPSelect(Selector):
    """Keep rows that stand for all of an image and fit its text: greedy facility location with an alignment bonus.

        maximise  sum over the image's rows x of max over kept y of s(y, x)  +  weight * sum over kept y of s(y, t)
        s = (1 + cosine) / 2,   t = mean embedding of the text that goes with the image (`Evidence.text`, in the space of these rows)

    one row after another, `capacity` of them: the paper's floor(S (1 - R / 2)) of S rows at an overall ratio R pruned (R = 0: the
    identity). weight (lambda1) = 0.7; 0: facility location alone, whose gains never grow. Call it on what a projector made of one image
    a sequence, with select(..., text=): each image of a multimodal prompt has the text of its own example. Raster order, repacked. Ties:
    the older row. O(K n^2) work, O(n^2) memory. Stage 2 acts between the decoder's layers.
    """

    weight: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        check.between("weight", self.weight, 0, 1e6)

    @property
    def needs(self) -> Needs:
        return Needs(text=True)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        x, text = jax.lax.stop_gradient((tokens.x, check.given("text", evidence.text)))
        like = (1 + cosine(x, x)) / 2
        fits = (1 + jnp.sum(unit(x) * unit(text)[:, None], -1)) / 2
        return first_picks(facility(like, free, self.capacity, self.weight * fits), room, free.shape[1])
