"""VisionDrop. Source: arXiv:2506.22283; Ruixxxx/VisionDrop (llava/visionzip/*, modeling_llama_visiondrop.py), Apache-2.0: written from the
formulas."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxtok.core import check
from jaxtok.core.condense import Condenser, condense
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.rotary import rotate_by
from jaxtok.core.selector import pictured, room
from jaxtok.core.types import DensePlan, Evidence, Needs, Plan, Tokens


@register(
    "visiondrop.select",
    site="select",
    paper="arXiv:2506.22283",
    title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
    authors="Rui Xu and Yunke Wang and Yong Luo and Bo Du",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionDropSelect(Condenser):
    """The encoder stage of VisionDrop, which is VisionZip's: what the class row attends to stays, the others merge by likeness.

        dominant: the class row and the capacity - contextual rows of largest sum over heads of A[CLS, j]
        of the n other rows every floor(n / c)-th is a target, c = contextual of them
        each other one goes to the target whose key is most like its own (mean over heads, cosine);  target' = target + mean of them

    in the last layer that ran (CLIP-L/14: the last but one). The class row stays a visual token (`with_cls`) and the paper counts it: its
    example, dominant 42 and contextual 6, is capacity=47, contextual=6. target + mean is no average: its length grows. contextual=0: the
    rows of largest class attention alone (ours: the code divides by zero). capacity >= n: all rows. Output: dominant rows in raster
    order, then the contextual ones. The stages between the decoder's layers: `VisionDropLayers`; all: `visiondrop`. Ties: the older row, the first target.
    """

    contextual: int = 6


@register(
    "visiondrop.layers",
    site="layers",
    paper="arXiv:2506.22283",
    title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
    authors="Rui Xu and Yunke Wang and Yong Luo and Bo Du",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionDropLayers(Pruner):
    """One stage between a decoder's layers: what the image rows themselves attend to stays, the others merge by likeness.

        score_j = mean over heads and image rows i of A_ij,   A: softmax attention of layer K itself (causal, over all keys), on its own input
        dominant: the capacity - contextual image rows of largest score
        of the n other ones every floor(n / c)-th is a target, c = contextual of them
        each other one goes to the target whose rotated key is most like its own (mean over heads, cosine);  target' = target + mean of them

    Only image rows ask, so no text decides; being causal, the mean favours early rows, which more rows see. target + mean is no average: its
    length grows. Order: text, dominant rows in raster order, contextual ones, text behind the images, and so numbered anew (positions="repack");
    otherwise contextual rows stay in their target's place. contextual=0: the dominant rows alone (ours: the code divides by zero).
    capacity >= live image rows: the identity. The official code knows no grouped key heads; here query heads read theirs. Ties: the older
    row, the first target.
    """

    contextual: int
    positions: str = "repack"

    def __post_init__(self):
        super().__post_init__()
        check.count("contextual", self.contextual, 0, self.capacity)

    @property
    def needs(self) -> Needs:
        return Needs(looked=True, keys=True, own=True)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Array:
        return jnp.mean(check.given("looked", evidence.looked), 1)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan | DensePlan]:
        if not self.contextual:
            return super().plan(params, state, tokens, evidence, keep)
        free, stop = pictured(tokens), jax.lax.stop_gradient
        keys = stop(check.given("keys", evidence.keys))
        keys = keys if evidence.freqs is None else rotate_by(keys, tokens.rope, evidence.freqs)
        metric, score = jnp.mean(keys.astype(jnp.float32), 1), stop(self.score(params, state, tokens, evidence))
        fixed, rows, inside = (tokens.pos >= 0) & ~free, self.count(free.shape[1], self.images), self.positions != "repack"
        return state, condense(tokens, metric, score, free, fixed, room(tokens, keep, self.capacity), self.contextual, rows, inside)


def visiondrop(
    enter: tuple[int, int] = (42, 6),
    stages: tuple[tuple[int, int], ...] = ((30, 5), (22, 4), (16, 3)),
    layers: tuple[int, ...] = (8, 16, 24),
) -> Recipe:
    """The paper's recipe: (dominant, contextual) rows that enter the decoder, the class row among the dominant ones, and are left before each
    of `layers` (0-based).

    Defaults: the paper's example for LLaVA-1.5's 32 layers, 32 rows in the mean over all layers. ValueError: stages and layers out of step.
    """
    for pair in (enter, *stages):
        check.kind("stage", pair, tuple)
        if len(pair) != 2:
            raise ValueError(f"a stage is (dominant, contextual), got {pair}")
        check.count("dominant", pair[0])
        check.count("contextual", pair[1], 0)
    left = [sum(pair) for pair in (enter, *stages)]
    if len(layers) != len(stages) or list(layers) != sorted(set(layers)) or left != sorted(left, reverse=True):
        raise ValueError(f"layers={layers} must ascend, and each goes with a stage of no more rows than the one before: {left}")
    places = zip(layers, stages, left, left[1:], strict=False)
    return Recipe(
        select=VisionDropSelect(capacity=left[0] - 1, contextual=enter[1]),
        layers=tuple((k, VisionDropLayers(capacity=now, images=before, contextual=c)) for k, (_, c), before, now in places),
    )
