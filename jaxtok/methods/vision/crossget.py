"""CrossGET. Source: arXiv:2305.17455; sdc17/CrossGET (CLIP/clip/reducer.py, LLaVA/llava/model/reducer.py), BSD-3."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.matching import bipartite, by_falling, cosine, mean_keys, merge_plan, movable, removal, unit
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.types import SPECIAL, DensePlan, Evidence, Needs, Tokens

MODES = ("image", "text", "llava")


def graph_matching(like: Float[Array, "b n n"], importance: Float[Array, "b n"], free, remove, most: int) -> tuple[Array, Array]:
    """Complete-graph soft matching -> (mask of the `remove` sources, for each of them the row it joins, else -1).

    Rows are ranked by their largest similarity; a row looks at those ranked behind it only: key = importance - max of these
    similarities; the smallest keys are sources, and each joins the row most like it of all that are none.
    """
    n = like.shape[-1]
    pair = free[:, :, None] & free[:, None] & ~jnp.eye(n, dtype=bool)[None]
    like = jnp.where(pair, like, -jnp.inf)
    rank = by_falling(jnp.max(like, -1), free)
    behind = jnp.max(jnp.where(rank[:, :, None] < rank[:, None], like, -jnp.inf), -1)
    key = jnp.where(free & (behind > -jnp.inf), behind - importance, -jnp.inf)
    source = free & (key > -jnp.inf) & (by_falling(key, free) < remove[:, None])
    partner, _ = bipartite(like, source, free & ~source, remove, most)
    return source, partner


@register(
    "crossget",
    site="vit",
    paper="arXiv:2305.17455",
    title="CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers",
    authors="Dachuan Shi and Chaofan Tao and Anyi Rao and Zhendong Yang and Chun Yuan and Jiaqi Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossGET(Reducer):
    """Merge rows that are alike and unimportant to the cross token, by complete-graph soft matching, between attention and MLP.

        C_ij = cos(k_i, k_j), keys of all heads side by side (mode "llava": averaged over heads)
        importance I_i = cos(k_i, q): q the query of the cross token ("image") or of the end-of-text row ("text");
                   "llava": mean attention of all rows but the cross token to i, plus the cross token's attention to i (means over heads)
        sources and destinations: see `graph_matching`;   for each source s of a destination d  (w_s, w_d) = 2 softmax(I_s, I_d)
        x_d' = (size_d x_d + sum over its sources (w_s size_s x_s + (w_d - 1) size_d x_d)) / (size_d + sum size_s)

    The cross token is one row behind the others, made anew before each layer: x <- stop_gradient(x) + a learned vector of that layer
    (`init_params`; it needs light training, `js_loss`), and taken away at the end (stays=True: left there, for that loss). cross=False
    (a model without it): the class row takes its part. SPECIAL rows neither go nor are joined; `special` counts them and the cross token
    (static): 2 for image towers. Mode "text" makes the first and the last live row SPECIAL (begin and end of text: 3 in all).

    `remove` rows go, at most half of the others. Order stays. Equal importances weigh by size alone, as ToMe. remove=0 changes nothing but by the cross
    token. Ties (two rows are each other's nearest): the first row ranks first. Gradients do not pass through weights, as in the official
    code. `keep` [b]: live rows to leave, the cross token counted. Call the encoder with proportional=True.
    """

    at: ClassVar[str] = "attn"

    remove: int
    mode: str = "image"
    cross: bool = True
    stays: bool = False
    special: int = 2

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("special", self.special, 0)
        check.one_of("mode", self.mode, MODES)

    @property
    def needs(self) -> Needs:
        if self.mode == "llava":
            return Needs(keys=True, received=True, rows=int(self.cross), cls=not self.cross)
        return Needs(keys=True, turned=2**30 if self.mode == "text" else int(self.cross), lead=not self.cross)

    def init_params(self, key, cfg):
        return {"cross": 0.02 * jax.random.normal(key, (cfg.width,))} if self.cross else {}

    def begin(self, params, tokens: Tokens) -> Tokens:
        kind = tokens.kind
        if self.mode == "text":
            ends = (tokens.pos == 0) | (tokens.pos == jnp.max(tokens.pos, -1, keepdims=True)) & (tokens.pos >= 0)
            kind = jnp.where(ends, jnp.asarray(SPECIAL, kind.dtype), kind)
        there = jnp.any(tokens.pos >= 0, -1)
        add = lambda a, value: jnp.concatenate([a, jnp.broadcast_to(value, (a.shape[0], 1, *a.shape[2:])).astype(a.dtype)], 1)
        one = lambda value, dead: jnp.where(there, value, dead)[:, None]
        return tokens._replace(
            x=add(tokens.x, jnp.zeros((), tokens.x.dtype)),
            pos=add(tokens.pos, one(tokens.seen, -1)),
            rope=add(tokens.rope, one(tokens.seen, 0)[..., None]),
            size=add(tokens.size, one(1.0, 0.0)),
            kind=add(kind, jnp.full((1, 1), SPECIAL, jnp.int8)),
            segment=add(tokens.segment, jnp.full((1, 1), -1, jnp.int32)),
            cell=add(tokens.cell, jnp.full((1, 1, 1), -1, jnp.int32)),
        )

    def enter(self, params, tokens: Tokens) -> Tokens:
        fresh = jax.lax.stop_gradient(tokens.x[:, -1]) + params["cross"].astype(tokens.x.dtype)[None]
        return tokens._replace(x=tokens.x.at[:, -1].set(fresh))

    def count(self, n: int, n_kind: int) -> int:
        return n - min(self.remove, max(n - self.special, 0) // 2)

    def importance(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "b n"]:
        if self.mode == "llava":
            received = jnp.mean(check.given("received", evidence.received).astype(jnp.float32), 1)
            of = evidence.rows[:, :, -1] if self.cross else evidence.cls  # type: ignore[index]
            ours = jnp.mean(check.given("rows", of).astype(jnp.float32), 1)
            others = jnp.maximum(jnp.sum((tokens.pos >= 0).astype(jnp.float32), -1, keepdims=True) - 1.0, 1.0)
            return (received - ours) / others + ours
        b, g, n, d = check.given("keys", evidence.keys).shape
        if not self.cross:
            q = check.given("lead", evidence.lead)
        elif self.mode == "text":  # the last SPECIAL row before the cross token
            row = jnp.where((tokens.pos >= 0) & (tokens.kind == SPECIAL), tokens.pos, -1)[:, :-1]
            end = jnp.argmax(row, -1)[:, None, None, None]
            q = jnp.take_along_axis(check.given("turned", evidence.turned), end, 2)[:, :, 0]
        else:
            q = check.given("turned", evidence.turned)[:, :, -1]
        return jnp.einsum("bnc,bc->bn", unit(self.metric(evidence)), unit(q.reshape(b, g * d)))

    def metric(self, evidence: Evidence) -> Float[Array, "b n c"]:
        if self.mode == "llava":
            return mean_keys(evidence)
        k = check.given("keys", evidence.keys)
        return jnp.swapaxes(k, 1, 2).reshape(k.shape[0], k.shape[2], -1).astype(jnp.float32)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, DensePlan]:
        b, n = tokens.pos.shape
        live, free, room = tokens.pos >= 0, movable(tokens), self.count(n, n)
        importance = jax.lax.stop_gradient(self.importance(tokens, evidence))
        k = self.metric(evidence)
        remove = removal(live, keep, n - room, room, jnp.sum(free, -1, dtype=jnp.int32) // 2)
        source, partner = graph_matching(cosine(k, k), importance, free, remove, n)
        row = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (b, n))
        into = jnp.where(source, partner, row)
        plan = merge_plan(jnp.where(live & ~source, row, -1), jnp.where(live, into, -1), None, room)
        theirs = jnp.take_along_axis(importance, into, 1)
        share = 2 * jax.nn.sigmoid(importance - theirs)  # w_s; w_d = 2 - w_s
        add = jax.vmap(lambda i, a: jnp.zeros((n,), jnp.float32).at[i].add(a))
        size = jnp.where(live, tokens.size, 0.0)
        total = add(into, size)
        own = size * (1.0 + add(into, jnp.where(source, 1.0 - share, 0.0)))
        weight = jnp.where(source, share * size, own) / jnp.maximum(jnp.take_along_axis(total, into, 1), 1e-9)
        w = jnp.swapaxes(jax.nn.one_hot(plan.assign, room, dtype=jnp.float32), 1, 2) * weight[:, None]
        return state, DensePlan(w, plan.index, plan.assign)


def js_loss(image: Float[Array, "b c"], text: Float[Array, "b c"]) -> Float[Array, ""]:
    """The loss that trains the cross tokens of two towers: (KL(m || p_image) + KL(m || p_text)) / 2, p softmaxes over features and m
    their mean; of the cross tokens behind the towers' final norms and projections, whose weights are to be detached. Mean over the batch.
    """
    a, b = (jax.nn.log_softmax(x.astype(jnp.float32), -1) for x in (image, text))
    m = (jnp.exp(a) + jnp.exp(b)) / 2
    kl = lambda p: jnp.sum(m * (jnp.log(m) - p), -1)
    return jnp.mean(kl(a) + kl(b)) / 2
