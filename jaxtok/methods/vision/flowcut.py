"""FlowCut: in the vision encoder and between the decoder's layers. Source: arXiv:2505.19536; TungChintao/FlowCut (flowcut/, FlowCut_Qwen/), Apache-2.0."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.matching import movable
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.recipe import Recipe
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.score import softmax
from jaxtok.core.select import choose, pack
from jaxtok.core.selector import pictured
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


class Flow(NamedTuple):
    """What FlowCut reads of a layer, f32 [b n] each; 0 for rows that are not candidates."""

    attention: Array  # from the class row (or of the mean query)
    semantic: Array  # softmax of the class row's value with the others'
    value: Array  # length of the mean value, L1
    score: Array


def portion(a: Float[Array, "*B n"]) -> Float[Array, "*B n"]:
    """Each row's part of the sum over the last axis; 0 where that is 0."""
    return a / jnp.maximum(jnp.sum(a, -1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@register(
    "flowcut.vit",
    site="vit",
    paper="arXiv:2505.19536",
    title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    authors="Jintao Tong and Wenwei Jin and Pengda Qin and Anqi Li and Yixiong Zou and Yuhong Li and Yuhua Li and Ruixuan Li",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowCutVit(Reducer):
    """Drop rows behind every other layer of a vision encoder until `capacity` are left, by a score that is carried along.

        c_j = attention of the class row to j, s_j = softmax_j(v_cls . v_j) (unscaled), both mean over heads;   w_j = |mean over heads of v_j|_1
        score_j = (c_j / sum c + s_j / sum s) w_j;   C = score at first, then (C + score) / 2 behind each layer, while n > capacity
        behind layer i, t = last - 1 - i layers before the end, t even:  r = round((n - capacity) / sqrt(t) (1 - (H(c) / log n)^2)),
        H the entropy of c / sum c;   the max(n - r, capacity) rows of largest C stay;   t = 0: `capacity` rows stay

    n counts live rows that are not SPECIAL (`special` of those, static; they stay). query="mean" (Qwen2-VL): c_j = softmax_j(mean query .
    k_j / sqrt(d)), no class row, score = c w, H of c with log(c + 1e-7). `last`: the place (in a recipe) where `capacity` rows are left;
    None = layers - 2 ("cls": the features are those of the second to last layer) or layers ("mean"). Name the same method at the places 1 to last
    (`schedule`); its state runs through them. Behind the last place nothing more goes. Used alone it leaves `capacity` rows by one layer's score.

    How many go is data: rows die, and the static number falls at the last place. variant="official" shares the largest r of the batch, as
    the official code does, so that images depend on each other; "paper": each image its own. Rounding: half to even. Kept rows stay in order.
    A capacity of all rows changes nothing. Uniform attention drops nothing before the last place. `keep` [b]: live rows left there.
    """

    capacity: int
    query: str = "cls"
    last: int | None = None
    left: int = 0
    special: int = 1
    variant: str = "paper"

    def __post_init__(self):
        check.count("capacity", self.capacity)
        check.count("left", self.left, 0)
        check.count("special", self.special, 0)
        check.one_of("query", self.query, ("cls", "mean"))
        check.one_of("variant", self.variant, ("official", "paper"))
        if self.last is not None:
            check.count("last", self.last)

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, values=True) if self.query == "cls" else Needs(keys=True, values=True, queries=0)

    def layer(self, i: int, layers: int) -> "FlowCutVit":
        last = self.last or (layers - 2 if self.query == "cls" else layers)
        return dataclasses.replace(self, left=max(last - i, 0))

    def start(self, params, tokens: Tokens) -> Held:
        return Held(slots=jnp.zeros(tokens.pos.shape, jnp.float32), rest=jnp.zeros((), bool))

    def count(self, n: int, n_kind: int) -> int:
        return n if self.left else min(n, self.special + self.capacity)

    def flow(self, tokens: Tokens, evidence: Evidence) -> Flow:
        live, free = tokens.pos >= 0, movable(tokens)
        v = check.given("values", evidence.values).astype(jnp.float32)
        weigh = lambda logit: jnp.mean(jax.nn.softmax(jnp.where(live[:, None], logit, jnp.finfo(jnp.float32).min), -1), 1)
        value = jnp.sum(jnp.abs(jnp.mean(v, 1)), -1)
        if self.query == "mean":
            mean, k = check.given("queries", evidence.queries)[0], check.given("keys", evidence.keys).astype(jnp.float32)
            attention = jnp.where(free, weigh(jnp.einsum("bhd,bhnd->bhn", mean, k) * k.shape[-1] ** -0.5), 0.0)
            return Flow(attention, jnp.zeros_like(value), value, attention * value)
        attention = jnp.where(free, jnp.mean(check.given("cls", evidence.cls).astype(jnp.float32), 1), 0.0)
        first = jnp.take_along_axis(v, jnp.argmax(live, -1)[:, None, None, None], 2)
        semantic = jnp.where(free, weigh(jnp.einsum("bhqd,bhnd->bhn", first, v)), 0.0)
        return Flow(attention, semantic, value, (portion(attention) + portion(semantic)) * value)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        b, n = tokens.pos.shape
        live, free = tokens.pos >= 0, movable(tokens)
        fixed = live & ~free
        number = jnp.sum(free, -1, dtype=jnp.int32)
        target = jnp.full((b,), self.capacity, jnp.int32)
        if keep is not None:
            target = jnp.clip(keep - jnp.sum(fixed, -1, dtype=jnp.int32), 0, target)
        flow = self.flow(tokens, evidence)
        more = (number > target)[:, None]
        score = jnp.where(more, jnp.where(state.rest, 0.5 * state.slots + 0.5 * flow.score, flow.score), state.slots)
        state = Held(slots=jnp.where(free, score, 0.0), rest=jnp.ones((), bool))
        stays = number
        if not self.left:
            stays = jnp.minimum(number, target)
        elif self.left % 2 == 0:
            stays = jnp.minimum(number, jnp.maximum(number - self._dropped(flow.attention, number, target), target))
        return state, pack(choose(score, free, stays) | fixed, self.count(n, n))

    def _dropped(self, attention, number, target):
        p = attention
        if self.query == "cls":
            p = portion(p)
        entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0) if self.query == "cls" else p + 1e-7), -1)
        most = jnp.log(jnp.maximum(number, 2).astype(jnp.float32))
        r = (number - target).astype(jnp.float32) / self.left**0.5 * (1.0 - (entropy / most) ** 2)
        r = jnp.where(number > target, jnp.maximum(r, 0.0), 0.0)
        r = jnp.broadcast_to(jnp.max(r), r.shape) if self.variant == "official" else r
        return jnp.round(r).astype(jnp.int32)


def schedule(
    capacity: int, layers: int, query: str = "cls", special: int = 1, variant: str = "paper"
) -> tuple[tuple[int, FlowCutVit], ...]:
    """The entries of Recipe.vit for an encoder of `layers` layers."""
    last = layers - 2 if query == "cls" else layers
    method = FlowCutVit(capacity=capacity, query=query, special=special, variant=variant)
    return tuple((i, method) for i in range(1, last + 1))


@register(
    "flowcut.layers",
    site="layers",
    paper="arXiv:2505.19536",
    title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    authors="Jintao Tong and Wenwei Jin and Pengda Qin and Anqi Li and Yixiong Zou and Yuhong Li and Yuhua Li and Ruixuan Li",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowCutLayers(Pruner):
    """Keep the image rows of largest flow from the prompt's last row, in the layer before.

        c_j = softmax over image rows of q_last . k_j / sqrt(d),   s_j = the same of v_last . v_j / sqrt(d),   each the mean over heads
        score_j = (c_j / sum c + s_j / sum s) |mean over heads of v_j|_1

    The paper's second step for pictures in crops and for Qwen2-VL, in 0-based layer 1: before layer 2 (`flowcut`). Rows are numbered anew
    (positions="repack"). c comes from the attention row of the layer (its softmax over all keys, of which the image's part is taken). The
    official code asks with the last row of the instruction and drops what stands behind it (it is the prompt's end); that is not copied.
    Ties: the older row.
    """

    positions: str = "repack"

    @property
    def needs(self) -> Needs:
        return Needs(rows=1, values=True)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        free, v = pictured(tokens), check.given("values", evidence.values).astype(jnp.float32)
        row = jnp.where(free[:, None], check.given("rows", evidence.rows)[:, :, -1].astype(jnp.float32), 0.0)
        near = jnp.einsum("bgd,bgnd->bgn", v[:, :, -1], v) * v.shape[-1] ** -0.5  # the last row is the last token
        semantic = jnp.mean(softmax(near, jnp.broadcast_to(free[:, None], near.shape)), 1)  # as over query heads: each KV head has as many
        return (portion(jnp.mean(portion(row), 1)) + portion(semantic)) * jnp.sum(jnp.abs(jnp.mean(v, 1)), -1)


def flowcut(
    capacity: int, *, layers: int = 24, crops: int = 1, query: str = "cls", merge: int = 4, special: int = 1, variant: str = "paper"
) -> Recipe:
    """The paper's recipe that leaves `capacity` rows in all: of one picture in the tower (of `layers` layers); of `crops` (LLaVA-NeXT)
    capacity // 2 each in the tower, then `capacity` before the decoder's layer 2; query="mean" (Qwen2-VL, whose merger joins `merge` rows
    to one; special=0): 2 capacity merge in the tower, then `capacity`. Newline rows that a model adds stay, beside the capacity."""
    check.count("capacity", capacity)
    check.count("crops", crops)
    check.count("merge", merge)
    entering = 2 * capacity if query == "mean" else capacity if crops == 1 else max(capacity // 2, 1) * crops
    tower = schedule(entering * merge if query == "mean" else entering // crops, layers, query, special, variant)
    inside = ((2, FlowCutLayers(capacity=capacity, images=entering)),) if entering > capacity else ()
    return Recipe(vit=tower, layers=inside)
