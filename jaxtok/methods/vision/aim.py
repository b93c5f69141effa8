"""AIM, merging. Source: arXiv:2412.03248; LaVi-Lab/AIM (llava/model/token_merge.py), Apache-2.0: written from the formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxtok.core.compose import compose
from jaxtok.core.matching import bipartite, cosine, merge_plan, packed_order, scatter
from jaxtok.core.reduce import apply, gather
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import Evidence, Plan, Tokens


@register(
    "aim.select",
    site="select",
    paper="arXiv:2412.03248",
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    authors="Yiwu Zhong and Zhuoming Liu and Yin Li and Liwei Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AIMSelect(Selector):
    """Merge image rows that are alike before the language model, in rounds of a bipartite matching on the rows themselves.

        a round: even rows A, odd rows B, S_ij = cos(x_i, x_j); the r rows of A most like their best partner join it
        x'_j = (x_j + sum of those that joined) / (1 + their number): a plain mean, whatever they stand for

    Rounds remove half of the rows, the last one what is left to remove: 25% of 196 rows takes 98, then 49. Output of a round: what stays
    of A by falling similarity, then B in order (the place in the image is lost). A sequence is an image or one frame of a video, pooled
    before as the model does; other rows (kind SPECIAL) stay in front. capacity = all rows: the identity. Ties: the older row. Pruning
    between the decoder's layers is another method.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.crops != 1:
            raise ValueError(f"AIM merges one image or frame a sequence, got crops={self.crops}")

    def _round(self, x, free, fixed, remove, most: int) -> Plan:
        """All rows in, all rows out, the live ones last."""
        b, n = free.shape
        order = packed_order(free)
        take = lambda a: jnp.take_along_axis(a, order, 1)
        here = take(free)
        y = jnp.take_along_axis(x, order[..., None], 1)
        partner, best = bipartite(cosine(y[:, ::2], y[:, 1::2]), here[:, ::2], here[:, 1::2], remove, most)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        falling = jnp.argsort(jnp.argsort(-best, axis=-1, stable=True), axis=-1).astype(jnp.int32)
        place = jnp.broadcast_to(2 * n + row, (b, n)).at[:, ::2].set(n + falling)
        goes = jnp.zeros((b, n), jnp.int32).at[:, ::2].set(partner + 1) - 1
        into = jnp.where(goes >= 0, 2 * goes + 1, row)
        rank = scatter(order, jnp.where(here & (goes < 0), place, -1))
        into = scatter(order, jnp.where(here, jnp.take_along_axis(order, into, 1), -1))
        as_is = fixed | (free & (remove == 0)[:, None])
        rank, into = jnp.where(as_is, row, rank), jnp.where(as_is, row, into)
        return merge_plan(rank, into, jnp.ones((b, n), jnp.float32), n)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        free = pictured(tokens)
        fixed = (tokens.pos >= 0) & ~free
        b, n = free.shape
        room = jnp.maximum(self.room(tokens, keep), 1)
        x = jax.lax.stop_gradient(tokens.x)
        rows = self.count(n, n)
        rounds = max(math.ceil(math.log2(n)), 1) if keep is not None else max(math.ceil(math.log2(max(n / self.capacity, 1))), 1)
        whole = None
        for _ in range(rounds):
            many = jnp.sum(free, -1, dtype=jnp.int32)
            plan = self._round(x, free, fixed, jnp.clip(many - room, 0, many // 2), n // 2)
            x = apply(plan, x)
            free, fixed = (gather(a, plan.index) for a in (free, fixed))
            whole = plan if whole is None else compose(whole, plan)
        assert isinstance(whole, Plan)
        last = Plan(whole.index[:, n - rows :], jnp.maximum(whole.assign - (n - rows), -1), whole.weight, whole.lost)
        return state, last._replace(lost=jnp.sum(whole.index[:, : n - rows] >= 0, -1, dtype=jnp.int32))
