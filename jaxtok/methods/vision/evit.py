"""EViT. Source: arXiv:2202.07800; youweiliang/evit (evit.py), Apache-2.0."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import movable
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import choose, pack
from jaxtok.core.types import DensePlan, Evidence, Needs, Plan, Tokens


@register(
    "evit",
    site="vit",
    paper="arXiv:2202.07800",
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    authors="Youwei Liang and Chongjian Ge and Zhan Tong and Yibing Song and Jue Wang and Pengtao Xie",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EViT(Reducer):
    """Keep the rows that the class row attends to most and fuse the others into one, between attention and MLP.

        a_j = attention of the class row to j after the softmax, mean over heads;   the ceil(ratio rows) of largest a stay
        one more row, the last:  x = sum over the dropped of a_j x_j  (not divided by sum a_j)

    In later layers the fused row competes like any other. `capacity` gives the number of rows that stay besides SPECIAL rows (`special`,
    static) and the fused one, in place of `ratio`. The paper's recipe: layers 3, 6, 9, ratio 0.7. A sequence that fits stays as it is and gets no fused row. Kept
    rows stay in order (official: by falling score). fuse=False drops the rest. `keep` [b]: live rows to leave, all counted.
    """

    at: ClassVar[str] = "attn"

    ratio: float = 0.7
    capacity: int | None = None
    fuse: bool = True
    special: int = 1

    def __post_init__(self):
        check.count("special", self.special, 0)
        if self.capacity is not None:
            check.count("capacity", self.capacity)
        else:
            check.share("ratio", self.ratio)

    @property
    def needs(self) -> Needs:
        return Needs(cls=True)

    def count(self, n: int, n_kind: int) -> int:
        rows = max(n - self.special, 0)
        kept = math.ceil(self.ratio * rows) if self.capacity is None else self.capacity
        return min(n, self.special + kept + self.fuse)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan | DensePlan]:
        b, n = tokens.pos.shape
        live, free, room = tokens.pos >= 0, movable(tokens), self.count(n, n)
        a = jnp.mean(check.given("cls", evidence.cls).astype(jnp.float32), 1)
        fixed = live & ~free
        budget = jnp.full((b,), room, jnp.int32) if keep is None else jnp.minimum(keep, room)
        cut = jnp.sum(live, -1, dtype=jnp.int32) > budget
        fused = cut & self.fuse
        stays = jnp.maximum(budget - jnp.sum(fixed, -1, dtype=jnp.int32) - fused.astype(jnp.int32), 0)
        kept = choose(a, free, stays) | fixed
        if not self.fuse:
            return state, pack(kept, room)
        rest, plan = free & ~kept, pack(kept, room)
        fused = jnp.any(rest, -1)
        # the kept rows stand last, or one further to the front where the fused row is the last
        shift = lambda x: jnp.where(fused[:, None], jnp.roll(x, -1, 1), x)
        best = jnp.argmax(jnp.where(rest, a, -1.0), -1).astype(jnp.int32)
        index = shift(plan.index).at[:, -1].set(jnp.where(fused, best, plan.index[:, -1]))
        assign = jnp.where(kept, plan.assign - fused.astype(jnp.int32)[:, None], jnp.where(rest, room - 1, -1))
        w = jax.nn.one_hot(index, n, dtype=jnp.float32)
        w = w.at[:, -1].set(jnp.where(fused[:, None], jnp.where(rest, a, 0.0), w[:, -1]))
        return state, DensePlan(w, index, assign)


def schedule(ratio: float = 0.7, layers: tuple[int, ...] = (3, 6, 9), fuse: bool = True) -> tuple[tuple[int, EViT], ...]:
    """The entries of Recipe.vit."""
    return tuple((i, EViT(ratio=ratio, fuse=fuse)) for i in layers)
