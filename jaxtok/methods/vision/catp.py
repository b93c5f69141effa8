"""CATP: before the decoder and between its layers. Source: arXiv:2508.07871 (no code found)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxtok.core import budget, check
from jaxtok.core.diverse import facility
from jaxtok.core.matching import cosine, unit
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.select import first_picks
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.stages import StagedPruner, schedule
from jaxtok.core.types import SPECIAL, TEXT, Evidence, Needs, Tokens


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
    the older row. O(K n^2) work, O(n^2) memory.
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


def query_sample(tokens: Tokens) -> Bool[Array, "b n"]:
    """Live rows of the last image of a prompt of several and of what stands behind it: those behind the last TEXT row before the last
    image row. SPECIAL rows (newlines) part no image."""
    live = tokens.pos >= 0
    end = jnp.max(jnp.where(pictured(tokens), tokens.pos, -1), -1, keepdims=True)
    text = live & (tokens.kind == TEXT) & (tokens.pos < end)
    return live & (tokens.pos > jnp.max(jnp.where(text, tokens.pos, -1), -1, keepdims=True))


@register(
    "catp.layers",
    site="layers",
    paper="arXiv:2508.07871",
    title="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    authors="Yanshu Li and Jianjiang Yang and Zhennan Shen and Ligong Han and Haoyan Xu and Ruixiang Tang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CATPLayers(StagedPruner):
    """Of the demonstrations' images keep what the question turns to from one layer to the next, then of its own image what fits these.

        part="context": rows of the demonstrations' images, all together:  max(0, A_j - A'_j) + weight * cos(h_j, mean of h over the query sample)
        part="query":   rows of the query's image:                         cos(h_j, mean of h over the rows before the query sample)

    A: attention of the last row in the layer that ran, mean over heads; A': the same of the layer before it, seen at a place before this one
    (`watch`; 0 where there was none); h: rows as they enter the layer. weight (lambda2) = 0.6. With two `stages` the first is "context", the
    second "query" (the kept context: the demonstrations' text too). Which is which is told by order: the query's image is the last one of
    the prompt, apart from the others by text, and what stands behind it is its text (`query_sample`; text of the query before its image
    counts as context). `capacity` counts image rows of both parts; those of the other part go only when it cannot be met without. A
    single image is the query's. Means are over TEXT and image rows. Our reading (no code): the layers are counted as by FastV (K = 6:
    six have run), and `ratio` of each part's rows stays in the end. Ties: the older row. The paper's schedule: `catp`.
    """

    part: str = "context"
    weight: float = 0.6

    def __post_init__(self):
        super().__post_init__()
        check.one_of("part", self.part, ("context", "query"))
        check.between("weight", self.weight, 0, 1e6)
        if len(self.stages) > 2:
            raise ValueError(f"stages={self.stages}: the demonstrations' images go at one place, the query's at a second")

    def layer(self, i: int, layers: int) -> "CATPLayers":
        method = super().layer(i, layers)
        assert isinstance(method, CATPLayers)
        return dataclasses.replace(method, part="query") if len(self.stages) == 2 and i >= self.stages[1][0] else method

    @property
    def needs(self) -> Needs:
        return Needs(rows=1) if self.passive or self.part == "context" else Needs()

    def start(self, params, tokens: Tokens) -> Held:
        return Held(slots=jnp.zeros(tokens.pos.shape, jnp.float32))

    def observe(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Held:
        return Held(slots=self._last(evidence)) if self.passive else state

    def _last(self, evidence: Evidence):
        return jnp.mean(check.given("rows", evidence.rows)[:, :, -1].astype(jnp.float32), 1)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        query = query_sample(tokens)
        told = (tokens.pos >= 0) & (tokens.kind != SPECIAL) & (query if self.part == "context" else ~query)
        x = unit(tokens.x)
        h = jnp.where(told[..., None], tokens.x.astype(jnp.float32), 0.0)
        mean = jnp.sum(h, 1) / jnp.maximum(jnp.sum(told, -1, keepdims=True), 1).astype(jnp.float32)
        fits = jnp.sum(x * unit(mean)[:, None], -1)
        if self.part == "query":
            return jnp.where(query, fits, 2.0 + fits)  # above all of the query's
        turned = jnp.maximum(self._last(evidence) - state.slots, 0.0)
        return jnp.where(query, 3.0 + 2 * self.weight, 0.0) + turned + self.weight * fits


def catp(rows: int = 576, shots: int = 4, *, ratio: float = 0.222, layer: int = 6, weights: tuple[float, float] = (0.7, 0.6)) -> Recipe:
    """The paper's recipe for `shots` demonstrations and a query of one image of `rows` rows each, of which the fraction `ratio` is kept
    (1 - R): floor(rows (1 + ratio) / 2) of each before the decoder, `ratio` of the demonstrations' before 0-based `layer` (10 for 13B), of
    the query's before the next."""
    check.count("shots", shots)
    check.count("layer", layer, 2)
    check.share("ratio", ratio)
    each = (rows + budget.floored(ratio, rows)) // 2
    context, query = budget.floored(ratio, shots * rows), max(budget.floored(ratio, rows), 1)
    stages = ((layer, context + each), (layer + 1, context + query))
    method = CATPLayers(capacity=stages[1][1], images=(shots + 1) * each, stages=stages, watch=(layer - 1,), weight=weights[1])
    return Recipe(select=CATPSelect(capacity=each, special=0, weight=weights[0]), layers=schedule(method))
