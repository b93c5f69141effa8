"""VTC-CLS. Source: arXiv:2412.05819; THU-MIG/VTC-CLS (clip_encoder.py, llava_arch.py), Apache-2.0: written from the formulas."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens

OVER = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}


@register(
    "vtc_cls",
    site="select",
    paper="arXiv:2412.05819",
    title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    authors="Ao Wang and Fengyuan Sun and Hui Chen and Zijia Lin and Jungong Han and Guiguang Ding",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VTCCLS(Selector):
    """Keep the image rows that the class row attends to over several layers.

        score_j = sum over `layers` l of the mean over heads of A^l[CLS, j]

    `layers`: 0-based, negative from the last that ran; the default is the official one for CLIP-L/14, 16 to 22 of 24 with the last left
    out (until=23). over: "sum", or "max", "min" over the layers. layers=(-1,): FasterVLM. Raster order, positions repacked. The rows are
    chosen before the projector, which changes nothing where a projector works row by row. Ties: the older row.
    """

    layers: tuple[int, ...] = (16, 17, 18, 19, 20, 21, 22)
    over: str = "sum"

    def __post_init__(self):
        super().__post_init__()
        check.kind("layers", self.layers, tuple)
        if not self.layers:
            raise ValueError("layers=() leaves nothing to sum; name one at least")
        for i in self.layers:
            check.count("layers", i, -(2**31))
        check.one_of("over", self.over, tuple(OVER))

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, layers=self.layers)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return OVER[self.over](jnp.mean(evidence.cls.astype(jnp.float32), 2), axis=0)
