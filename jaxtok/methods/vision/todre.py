"""ToDRE. Source: arXiv:2505.18757 v2 (no code found)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.diverse import max_sum
from jaxtok.core.matching import cosine
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import POSITIONS
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import first_picks, pack
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import Evidence, Needs, Plan, Tokens, live_count


@register(
    "todre.select",
    site="select",
    paper="arXiv:2505.18757",
    title="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    authors="Duo Li and Zuhao Yang and Xiaoqin Zhang and Ling Shao and Shijian Lu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToDRESelect(Selector):
    """Keep a pivot and rows unlike what is kept: greedy max-sum diversity in the language model's embedding space.

        pivot = argmax_j of the mean over heads of A[CLS, j] in the last layer that ran (of the thumbnail, where there are crops)
        then argmin_v of sum over picked c of cos(x_v, x_c), until `capacity` rows are picked (about 10%: 288 of 2,880)

    Rows stay in raster order, repacked. pivot="cls", or "random" for encoders without a class row: the row of the largest number drawn
    from the call's key, or from key 0 where it has none. For video the paper takes the frame of the largest maximum: with one sequence of all frames (no
    crops) that is the same argmax. The abstract's "k-center" is the wording of version 1. Ties: the older row. K picks one after
    another: O(K n) after one [n n] product. Stage 2, between the language model's layers: `ToDRELayers`; both: `todre`.
    """

    pivot: str = "cls"

    def __post_init__(self):
        super().__post_init__()
        check.one_of("pivot", self.pivot, ("cls", "random"))

    @property
    def needs(self) -> Needs:
        return Needs(cls=self.pivot == "cls")

    def score(self, params, tokens: Tokens, evidence: Evidence):
        if self.pivot == "random":
            key = jax.random.key(0) if evidence.key is None else evidence.key
            return jnp.broadcast_to(jax.random.uniform(key, tokens.pos.shape[1:])[None], tokens.pos.shape)
        return jnp.mean(check.given("cls", evidence.cls).astype(jnp.float32), 1)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        x = jax.lax.stop_gradient(tokens.x)
        first = jnp.where(self.group(tokens) == 0, jax.lax.stop_gradient(self.score(params, tokens, evidence)), -1.0)
        return first_picks(max_sum(cosine(x, x), free, self.capacity, first), room, free.shape[1])


@register(
    "todre.layers",
    site="layers",
    paper="arXiv:2505.18757",
    title="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    authors="Duo Li and Zuhao Yang and Xiaoqin Zhang and Ling Shao and Shijian Lu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToDRELayers(Reducer):
    """Drop all image rows where text and images no longer look at each other.

        a(t -> v) = sum over i in T, j in V of A_ij / sum over i in T, all j of A_ij,   A: attention of layer K - 1, mean over heads
        a(v -> t) likewise;   all of V go before layer K where both are below tau

    V: live image rows, T: all other live rows. Both sums run over the whole row, so the denominators are |T| and |V|; text before an image
    cannot see it and lowers a(t -> v), text behind it is not seen by it and lowers a(v -> t). tau=0: nothing goes.

    Whether they go is data, so the static number of rows stays and what is spared are dead rows: the layers behind cost as much as before.
    The saving is real for tau=None: then they go always, and `images` rows are taken off the static number. tau is our reading (the
    paper's value was not seen), and so are the kept rotary ids. A traced `keep` that the rows exceed drops them too.
    """

    floor: ClassVar[bool] = True  # all or none

    images: int
    tau: float | None = 0.1
    positions: str = "keep"

    def __post_init__(self):
        check.count("images", self.images)
        check.one_of("positions", self.positions, POSITIONS)
        if self.tau is not None:
            check.between("tau", self.tau, 0, 1e9)

    @property
    def needs(self) -> Needs:
        return Needs() if self.tau is None else Needs(received=True, looked=True)

    def count(self, n: int, n_kind: int) -> int:
        if n < self.images:
            raise ValueError(f"{self.name} is told of images={self.images} rows, but {n} rows come to it; give what enters its layer")
        return n - (self.images if self.tau is None else 0)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        live, image = tokens.pos >= 0, pictured(tokens)
        rest, go = live & ~image, jnp.ones(live.shape[:1], bool)
        if self.tau is not None:
            given = (check.given(name, getattr(evidence, name)) for name in ("received", "looked"))
            every, seen = (jnp.mean(jax.lax.stop_gradient(x), 1) for x in given)
            share = lambda x, among, of: jnp.sum(jnp.where(among, x, 0.0), -1) / jnp.maximum(jnp.sum(of, -1).astype(jnp.float32), 1.0)
            go = (share(every - seen, image, rest) < self.tau) & (share(seen, rest, image) < self.tau)
        if keep is not None:
            go |= keep < live_count(tokens.pos)
        stays = jnp.where(go[:, None], rest, live)
        return state, pack(stays, self.count(live.shape[1], self.images), jnp.where(rest, jnp.inf, 0.0))


def todre(
    images: int,
    capacity: int,
    layers: int = 32,
    at: tuple[int, ...] | None = None,
    by: int | None = None,
    tau: float = 0.1,
    **options,
) -> Recipe:
    """Both stages: `capacity` of `images` rows enter a decoder of `layers` layers, and all of them may go before the layers `at`.

    at: default (7 layers / 8,). by: before this layer they go whatever the attention is, which makes the saving real for what follows.
    tau: of `ToDRELayers`. options: of `ToDRESelect`. ValueError for places out of order.
    """
    check.count("images", images)
    check.count("capacity", capacity, 1, images)
    check.count("layers", layers)
    at = (7 * layers // 8,) if at is None else at
    if by is not None and at and by <= max(at):
        raise ValueError(f"by={by}: all rows go behind the layers at={at} that may drop them")
    places = tuple((k, ToDRELayers(images=capacity, tau=tau)) for k in at)
    places += () if by is None else ((by, ToDRELayers(images=capacity, tau=None)),)
    return Recipe(select=ToDRESelect(capacity=capacity, **options), layers=places)
