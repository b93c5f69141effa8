"""SparseVLM. Source: arXiv:2410.04417; Gumpest/SparseVLMs (score.py, utils.py, modelling_sparse_llama.py), Apache-2.0: from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import check
from jaxtok.core.condense import density_peaks, stand
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner, questions
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.score import softmax
from jaxtok.core.select import choose, pack
from jaxtok.core.selector import asking, part, pictured, room
from jaxtok.core.types import DensePlan, Evidence, Needs, Plan, Tokens

KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


def clusters(gone: int, share: float = 0.3) -> int:
    """How many rows are made of `gone` dropped ones: floor(m / 10) + 1 of the m = floor(share * gone) + 1 best of them; 0 of none."""
    check.count("gone", gone, 0)
    check.between("share", share, 0, 1)
    return (int(gone * share) + 1) // 10 + 1 if gone and share else 0


@register(
    "sparsevlm",
    site="layers",
    paper="arXiv:2410.04417",
    title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    authors="Yuan Zhang and Chun-Kai Fan and Junpeng Ma and Wenzhao Zheng and Tao Huang and Kuan Cheng and Denis Gudovskiy and Tomoyuki Okuno "
    "and Yohei Nakata and Kurt Keutzer and Shanghang Zhang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVLM(Pruner):
    """Keep the image rows that the question's visual words attend to; the best of the dropped ones come back as cluster means.

        relevance of text row i behind the image: r_i = mean over image rows v of softmax_i(x_v . x_i),  x: rows where it first acts
        raters: r_i >= mean r;   P_ij: attention of layer K - 1, mean over heads, rater i, image row j;   score_j = mean over raters of P_ij
        kept: the image rows of largest score;   of the d dropped ones the floor(recycle * d) + 1 = m best make floor(m / 10) + 1 rows:
        density peaks of x behind layer K - 1 (`core.condense.density_peaks`), each the mean ("official") or the sum (variant="paper")

    capacity: image rows left, made ones among them; of them `made` are reserved. scale: adaptive count; None = the capacity, as the authors'
    tables have it. With rank(P) over raters and image rows (singular values above max(shape) eps s_1) at most

        floor(scale * rank + bias)   "official"     n - floor(scale * (n - rank))   "paper"

    stay, so how many do is data under the cap. More raters than the last `asks` rows are not heard. Where all rows find room nothing
    happens. Order: text, kept rows, made ones, text behind; numbered anew. `stages` ((K, images, capacity, made), ...): those of one instance
    at its places; at any other place it drops nothing, and its first one (`sparsevlm`: layer 0, whose rows are the embeddings) picks the
    raters. Our reading: r_i >= mean (the code: >), no 1 / sqrt(c) in the softmax, the sum of the paper, ties of density (the code adds noise).
    """

    made: int = 0
    recycle: float = 0.3
    scale: float | None = None
    bias: float = 0.0
    variant: str = "official"
    asks: int = 128
    stages: tuple[tuple[int, int, int, int], ...] = ()
    positions: str = "repack"

    def __post_init__(self):
        super().__post_init__()
        check.count("made", self.made, 0, self.capacity)
        check.between("recycle", self.recycle, 0, 1)
        check.one_of("variant", self.variant, ("official", "paper"))
        check.count("asks", self.asks)
        if self.scale is not None:
            check.between("scale", self.scale, 0, 1 if self.variant == "paper" else 1e6)
        check.between("bias", self.bias, -1e6, 1e6)
        check.kind("stages", self.stages, tuple)
        for stage in self.stages:
            check.kind("stage", stage, tuple)
            if len(stage) != 4:
                raise ValueError(f"a stage is (layer, images, capacity, made), got {stage}")
            for value in stage:
                check.count("stage", value, 0)

    def layer(self, i: int, layers: int) -> "SparseVLM":
        if not self.stages:
            return self
        here = {k: rest for k, *rest in self.stages}.get(i)
        if here is None:
            return dataclasses.replace(self, capacity=self.images, made=0, scale=None, stages=())
        return dataclasses.replace(self, images=here[0], capacity=here[1], made=here[2], stages=())

    @property
    def needs(self) -> Needs:
        return Needs() if self.capacity >= self.images and self.scale is None else Needs(rows=self.asks)

    def start(self, params, tokens: Tokens) -> Held:
        """Which rows rate, f32 [b n]."""
        image, text, x = pictured(tokens), asking(tokens), jax.lax.stop_gradient(tokens.x).astype(jnp.float32)
        like = softmax(jnp.einsum("bvc,bic->bvi", x, x), jnp.broadcast_to(text[:, None], (*text.shape, text.shape[1])))
        each = jnp.sum(jnp.where(image[..., None], like, 0.0), 1) / jnp.maximum(jnp.sum(image, -1, keepdims=True), 1).astype(jnp.float32)
        mean = jnp.sum(each, -1, keepdims=True) / jnp.maximum(jnp.sum(text, -1, keepdims=True), 1).astype(jnp.float32)
        return Held((text & (each >= mean * (1 - 1e-6))).astype(jnp.float32))

    def adaptive(self, p: Float[Array, "b w n"], raters: Int[Array, " b"], many: Int[Array, " b"]) -> Int[Array, " b"]:
        """How many image rows the rank of their attention allows."""
        if self.scale is None:
            return many
        values = jnp.linalg.svd(p, compute_uv=False)
        least = jnp.maximum(raters, many).astype(jnp.float32) * jnp.finfo(jnp.float32).eps
        rank = jnp.sum(values > least[:, None] * values[:, :1], -1).astype(jnp.float32)
        if self.variant == "paper":
            return many - jnp.floor(self.scale * (many.astype(jnp.float32) - rank) + 1e-4).astype(jnp.int32)
        return jnp.clip(jnp.floor(self.scale * rank + self.bias + 1e-4).astype(jnp.int32), 0, many)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan | DensePlan]:
        free, (b, n) = pictured(tokens), tokens.pos.shape
        fixed, rows, row = (tokens.pos >= 0) & ~free, self.count(n, self.images), jnp.arange(n, dtype=jnp.int32)[None]
        many, left = jnp.sum(free, -1, dtype=jnp.int32), room(tokens, keep, self.capacity)
        if self.needs == Needs():
            score = jnp.zeros((b, n), jnp.float32)
        else:
            attention, _ = questions(tokens, evidence)
            rates = state.slots[:, -attention.shape[1] :] > 0
            p = jnp.where(rates[..., None] & free[:, None], attention, 0.0)
            raters = jnp.sum(rates, -1, dtype=jnp.int32)
            score = jnp.sum(p, 1) / jnp.maximum(raters, 1).astype(jnp.float32)[:, None]
            left = jnp.minimum(left, self.adaptive(p, raters, many) + self.made)
        c = jnp.where(many <= left, 0, jnp.minimum(self.made, left))
        kept = choose(score, free, left - c, most=self.capacity)
        if not self.made:
            return state, pack(kept | fixed, rows, jnp.where(fixed, jnp.inf, 0.0))
        rest = free & ~kept
        gone = jnp.sum(rest, -1, dtype=jnp.int32)
        m = jnp.minimum(jnp.where(c > 0, part(gone, self.recycle) + 1, 0), gone)
        c = jnp.minimum(c, m // 10 + 1)
        back = choose(score, rest, m)
        order = jnp.argsort(jnp.where(back, row, n + row), axis=-1)[:, : int(self.images * self.recycle) + 2]  # those of `back` first
        live = jnp.take_along_axis(back, order, 1)
        centre, into = density_peaks(gather(tokens.x, jnp.where(live, order, -1)), live, c)
        into = jnp.where(into < 0, n, jnp.take_along_axis(order, jnp.maximum(into, 0), 1))
        joins = jax.vmap(lambda i, j: jnp.zeros((n + 1, n), jnp.float32).at[i, j].set(1.0)[:n])(into, order)
        joins = joins if self.variant == "paper" else joins / jnp.maximum(jnp.sum(joins, -1, keepdims=True), 1.0)
        made = jax.vmap(lambda i, at: jnp.zeros((n,), bool).at[i].set(at))(order, centre)
        w = joins + jnp.where((fixed | kept)[..., None], jnp.eye(n, dtype=jnp.float32)[None], 0.0)
        return state, stand(w, fixed | kept, made, free, rows, self.positions != "repack")


def sparsevlm(
    images: int = 576, kept: tuple[int, ...] = KEPT[192], layers: tuple[int, ...] = (3, 7, 16), recycle: float = 0.3, **options
) -> Recipe:
    """The authors' recipe: rows kept before each of `layers` (0-based; behind layers 2, 6 and 15), and `clusters` rows made of the others.

    Their tables' names count kept rows in the mean over 32 layers: 192 = (300, 200, 110), 128 = (303, 110, 36), 64 = (66, 30, 17) (`KEPT`),
    with 576 rows in two layers; three run on all of them, and the made rows come on top. options: of `SparseVLM`. ValueError: out of order.
    """
    check.count("images", images)
    if len(layers) != len(kept) or list(layers) != sorted({0, *layers} - {0}):
        raise ValueError(f"layers={layers} must ascend from 1, and each goes with a number of rows kept; got kept={kept}")
    stages, now = [], images
    for k, few in zip(layers, kept, strict=True):
        check.count("kept", few, 1, now)
        made = clusters(now - few, recycle)
        stages.append((k, now, few + made, made))
        now = few + made
    method = SparseVLM(capacity=now, images=images, recycle=recycle, stages=tuple(stages), **options)
    return Recipe(layers=tuple((k, method) for k in (0, *layers)))
