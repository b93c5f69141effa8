"""TransPrune. Source: arXiv:2507.20630; liaolea/TransPrune (modeling_llama_transprune.py), MIT: written from the formulas."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import budget, check
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.selector import pictured
from jaxtok.core.stages import StagedPruner, schedule
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "transprune",
    site="layers",
    paper="arXiv:2507.20630",
    title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
    authors="Ao Li and Yuxiang Duan and Jinghui Zhang and Congbo Ma and Yutong Xie and Gustavo Carneiro and Mohammad Yaqub and Hu Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransPrune(StagedPruner):
    """Keep image rows that layers change much, in length and direction, and that the instruction looks at.

        of a layer that ran, for its attention block and its MLP: in = the normed rows that enter, out = what the block adds to the stream
        w_j = |out_j| / |in_j| * exp(1 - cos_j) / sum over all live rows i of exp(1 - cos_i),   cos_j = cos(out_j, in_j)
        TTV_j += w_j of the attention block + w_j of the MLP,   from the first place on
        IGA_j = mean over heads and the text rows behind the image of their attention to j, in the layer that follows
        score_j = TTV_j / sum TTV + IGA_j / sum IGA,   sums over image rows

    Before 0-based layer K the layer that ran is K - 1 and the one that follows is K, whose queries and keys are computed ahead. guide=False:
    TTV alone, which needs no attention weights. Used at one place alone, TTV is that of one layer. Rows are numbered anew at each stage
    (positions="repack"). Each sequence has its own sum over i (the official code's runs over the batch, which it has of size 1), and
    query heads may share keys (there they may not). Ties: the older row. The paper's schedule: `transprune`.
    """

    guide: bool = True
    positions: str = "repack"

    def __post_init__(self):
        super().__post_init__()
        check.kind("guide", self.guide, bool)

    @property
    def needs(self) -> Needs:
        return Needs(change=True) if self.passive or not self.guide else Needs(change=True, asked=True, own=True)

    def start(self, params, tokens: Tokens) -> Held:
        return Held(slots=jnp.zeros(tokens.pos.shape, jnp.float32))

    def observe(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Held:
        ratio, cos = jnp.moveaxis(check.given("change", evidence.change).astype(jnp.float32), -1, 0)
        turn = jnp.where((tokens.pos >= 0)[..., None], jnp.exp(1 - cos), 0.0)
        share = turn / jnp.maximum(jnp.sum(turn, 1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return Held(slots=state.slots + jnp.sum(jnp.where(turn > 0, ratio, 0.0) * share, -1))

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        free, tiny = pictured(tokens), jnp.finfo(jnp.float32).tiny
        portion = lambda a: jnp.where(free, a, 0.0) / jnp.maximum(jnp.sum(jnp.where(free, a, 0.0), -1, keepdims=True), tiny)
        if not self.guide:
            return portion(state.slots)
        return portion(state.slots) + portion(jnp.mean(check.given("asked", evidence.asked).astype(jnp.float32), 1))


def transprune(
    images: int = 576,
    *,
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125),
    places: tuple[int, ...] = (7, 9, 12),
    first: int = 7,
    guide: bool = True,
    positions: str = "repack",
) -> Recipe:
    """The paper's recipe: of `images` rows floor(ratio * images) stay after each number of layers of `places`; TTV is summed over the
    layers `first` (counted from 1) to the last place."""
    check.count("first", first)
    if len(ratios) != len(places) or not places:
        raise ValueError(f"ratios={ratios} and places={places} must be equally many, one or more")
    stages = tuple((k, budget.floored(r, images)) for k, r in zip(places, ratios, strict=True))
    watch = tuple(k for k in range(first, places[-1]) if k not in places)
    method = TransPrune(capacity=stages[-1][1], images=images, stages=stages, watch=watch, guide=guide, positions=positions)
    return Recipe(layers=schedule(method))
