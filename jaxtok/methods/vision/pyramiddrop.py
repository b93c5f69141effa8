"""PyramidDrop. Source: arXiv:2410.17247; Cooperx521/PyramidDrop (modeling_llama_pdrop.py), MIT: written from the formulas."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "pyramiddrop",
    site="layers",
    paper="arXiv:2410.17247",
    title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    authors="Long Xing and Qidong Huang and Xiaoyi Dong and Jiajie Lu and Pan Zhang and Yuhang Zang and Yuhang Cao and Conghui He and "
    "Jiaqi Wang and Feng Wu and Dahua Lin",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(Pruner):
    """One stage: keep the image rows that the last token of the instruction will attend to most in the layer to come.

        score_j = mean over heads of A[last, j],   A = softmax attention of layer K itself, on its own input

    for a method that acts before 0-based layer K; only the last row asks, so the look ahead costs the keys of all rows and one query.
    `pyramiddrop` builds the paper's three stages. A capacity of `images` (ratio 1) is the identity; one stage with positions="keep" is
    FastV with the attention of layer K in the place of layer K - 1's. Rows are numbered anew at each stage. Ties: the older row.
    The official code knows no grouped key heads; here query heads read theirs. Its training mode (the mean over the tokens that precede
    each answer) is left out.
    """

    positions: str = "repack"

    @property
    def needs(self) -> Needs:
        return Needs(rows=1, own=True)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        return jnp.mean(check.given("rows", evidence.rows)[:, :, -1], 1)


def pyramiddrop(images: int, layers: tuple[int, ...] = (8, 16, 24), ratios: tuple[float, ...] = (0.5, 0.25, 0.125), **options) -> Recipe:
    """The paper's recipe: before each of `layers` (0-based; after that many layers) int(ratio * images) of the `images` rows are left.

    Defaults: LLaVA-1.5's 32 layers; 576 image rows then count as 270 in the mean over all layers. options: of `PyramidDrop`. ValueError:
    as many layers as ratios, both in order.
    """
    check.count("images", images)
    if len(layers) != len(ratios) or list(layers) != sorted(set(layers)) or list(ratios) != sorted(ratios, reverse=True):
        raise ValueError(f"layers={layers} must ascend, and each goes with a ratio, at most the one before; got ratios={ratios}")
    for ratio in ratios:
        check.share("ratio", ratio)
    left = [images, *(int(images * ratio) for ratio in ratios)]
    stages = zip(layers, left[1:], left, strict=False)
    return Recipe(layers=tuple((k, PyramidDrop(capacity=now, images=before, **options)) for k, now, before in stages))
