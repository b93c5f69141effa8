"""LLaVA-PruMerge and PruMerge+. Source: arXiv:2403.15388; formulas from knowledge of the paper and its code: our reading, not checked."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.score import softmax
from jaxtok.core.select import choose
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


@register(
    "prumerge",
    site="select",
    paper="arXiv:2403.15388",
    title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    authors="Yuzhang Shang and Mu Cai and Bingxin Xu and Yong Jae Lee and Yan Yan",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMerge(Selector):
    """Keep the outliers of class attention; each takes in the rows of its nearest keys, one more row the rest. Our reading throughout.

        a = softmax of q_CLS . k_j / sqrt(heads * d), heads side by side (one wide head), over all live rows
        outliers: a_j > Q3 + 1.5 (Q3 - Q1), quartiles of a over the image rows (linear interpolation); K of them, the K largest
        for each kept i: its `near` other rows of largest cos(k_i, k_j), kept ones among them;  x'_i = x_i + sum of a_j x_j
        and one row: sum of a_j x_j over the rows that are not kept

    K adapts to the image up to capacity - 1; adaptive=False: K = capacity - 1. plus=True (PruMerge+): rows at every `stride`-th place of
    the raster join the outliers (None = max(floor(n / K) // 3, 1), about three grid rows an outlier), the whole cut to the capacity by a.
    `near` is cut to the rows that there are. Kept rows in raster order, then the one of the rest, which takes the place of its most
    attended row (none where nothing is left). Sizes follow a row's share. No budget makes it the identity: rows that stay take in
    others. One image a sequence. Ties: the older row.
    """

    near: int = 32
    adaptive: bool = True
    plus: bool = False
    stride: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check.count("capacity", self.capacity, 2)
        check.count("near", self.near, 0)
        if self.stride is not None:
            check.count("stride", self.stride, 1, 2**20)
        for name in ("adaptive", "plus"):
            check.kind(name, getattr(self, name), bool)
        if self.crops != 1:
            raise ValueError(f"PruMerge condenses one image, got crops={self.crops}")

    @property
    def needs(self) -> Needs:
        return Needs(lead=True, keys=True)

    def attention(self, tokens: Tokens, evidence: Evidence):
        """f32 [b n] over all live rows."""
        q, k = (
            jnp.clip(x.astype(jnp.float32), -1e15, 1e15) for x in (check.given("lead", evidence.lead), check.given("keys", evidence.keys))
        )
        logits = jnp.einsum("bhd,bhnd->bn", q, k) / (q.shape[1] * q.shape[2]) ** 0.5
        return softmax(logits, tokens.pos >= 0)

    def outliers(self, a, free):
        """i32 [b]: how many rows lie above the upper fence."""
        n = jnp.sum(free, -1, dtype=jnp.int32)[:, None]
        rising = jnp.sort(jnp.where(free, a, jnp.inf), -1)

        def quantile(share):
            at = share * jnp.maximum(n - 1, 0).astype(jnp.float32)
            low = jnp.floor(at).astype(jnp.int32)
            one, two = (jnp.take_along_axis(rising, jnp.clip(i, 0, jnp.maximum(n - 1, 0)), 1) for i in (low, low + 1))
            one, two = (jnp.where(n > 0, x, 0.0) for x in (one, two))
            return one + (two - one) * (at - low.astype(jnp.float32))

        q1, q3 = quantile(0.25), quantile(0.75)
        return jnp.sum(free & (a > q3 + 1.5 * (q3 - q1)), -1, dtype=jnp.int32)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, DensePlan]:
        free = pictured(tokens)
        fixed = (tokens.pos >= 0) & ~free
        n, evidence = free.shape[1], jax.lax.stop_gradient(evidence)
        room = jnp.maximum(self.room(tokens, keep) - 1, 0)
        a = self.attention(tokens, evidence)
        k = jnp.minimum(self.outliers(a, free), room) if self.adaptive else room
        stays = choose(a, free, k)
        if self.plus:
            raster, many = jnp.cumsum(free, -1, dtype=jnp.int32) - 1, jnp.sum(free, -1, dtype=jnp.int32)
            step = jnp.maximum(many // jnp.maximum(k, 1) // 3, 1)[:, None] if self.stride is None else self.stride
            stays = choose(a, stays | (free & (raster % step == 0)), room)
        rest = free & ~stays
        metric = jnp.swapaxes(check.given("keys", evidence.keys), 1, 2).reshape(free.shape[0], n, -1)
        eye = jnp.eye(n, dtype=bool)[None]
        other = free[:, None] & ~eye & stays[..., None]
        close = choose(cosine(metric, metric), other, min(self.near, n)) if n else other
        w = jnp.where(close, a[:, None], 0.0) + (eye & (stays | fixed)[..., None]).astype(jnp.float32)
        top = jnp.argmax(jnp.where(rest, a, -1.0), -1)[:, None] == jnp.arange(n)[None]
        lead = rest & top
        w = w + jnp.where(lead[..., None] & rest[:, None], a[:, None], 0.0)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        rank = jnp.where(fixed | stays, row, jnp.where(lead, n, -1))
        order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)[:, n - self.count(n, n) :]
        index = jnp.where(jnp.take_along_axis(rank, order, 1) >= 0, order, -1)
        return state, DensePlan(gather(w, index), index)
