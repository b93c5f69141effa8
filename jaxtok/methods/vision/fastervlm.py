"""FasterVLM. Source: arXiv:2412.01818; Theia-4869/FasterVLM (clip_encoder.py, llava_arch.py), Apache-2.0: written from the formulas."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core.registry import register
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "fastervlm",
    site="select",
    paper="arXiv:2412.01818",
    title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    authors="Qizhe Zhang and Aosong Cheng and Ming Lu and Zhiyong Zhuo and Minqi Wang and Jiajun Cao and Shaobo Guo and Qi She and Shanghang Zhang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterVLM(Selector):
    """Keep the image rows that the class row attends to.

        score_j = mean over heads of A[CLS, j]    (A: softmax attention of the last layer that ran; LLaVA stops after the last but one)

    The `capacity` best of an image stay in raster order; of an image in `crops` sub-images (thumbnail included), capacity / crops of each,
    one more of the first ones where it does not divide (the paper's T is per sub-image: capacity = T * crops). The class row's attention to
    itself is left out without renormalising, which changes no order. Newline rows always stay. capacity = all rows: the identity. Ties: the
    older row. An encoder without a class row has no such score: its first row would take its place.
    """

    @property
    def needs(self) -> Needs:
        return Needs(cls=True)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return jnp.mean(evidence.cls.astype(jnp.float32), 1)
