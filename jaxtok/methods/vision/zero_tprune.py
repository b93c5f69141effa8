"""Zero-TPrune. Source: arXiv:2305.17328 (no official code): written from the formulas; what is our reading is said."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import by_falling, cosine, mean_keys, movable, removal
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.score import pagerank
from jaxtok.core.select import choose, pack
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


@register(
    "zero_tprune",
    site="vit",
    paper="arXiv:2305.17328",
    title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
    authors="Hongjie Wang and Bhishma Dedhia and Niraj K. Jha",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroTPrune(Reducer):
    """Drop rows alike to important ones, then unimportant ones, by the attention graph; between attention and MLP, on this layer's own.

        s^h = weighted PageRank of head h: s_0 = 1/N, s' = A^T s, `iterations` times
        heads: those with lowest <= Var(N s^h) <= highest (all, if none is);   s = sqrt(mean over these heads of (s^h)^2)
        I': s of all rows;  S: the less important half of them against the other: the `similar` rows of largest max_j cos(k_i, k_j) go
        I: s again, of what is left; the least important go until `remove` rows are gone

    k are the keys averaged over heads. SPECIAL rows (`special` of them, static) vote and are never dropped. `iterations`: a number, or
    (first three layers, middle, last three). Our reading: variances are taken of s scaled to mean 1 (probabilities of many rows vary too
    little for the published bounds), and the second s is that of the attention among the rows left, each row's sum 1 again, so that
    duplicates do not vote. Counts are not published for all models: `remove` and `similar` are yours to choose a layer.

    remove=0 changes nothing. One iteration from 1/N is the mean attention received. `remove` says how many rows stay at most (a shorter
    sequence loses only what is above that); `keep` [b]: live rows to leave at most. Ties: the older row stays.
    """

    at: ClassVar[str] = "attn"

    remove: int
    similar: int = 10
    iterations: int | tuple[int, int, int] = (40, 8, 1)
    lowest: float = 0.01
    highest: float = 0.7
    special: int = 1

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("similar", self.similar, 0)
        check.count("special", self.special, 0)
        for times in (self.iterations,) if isinstance(self.iterations, int) else self.iterations:
            check.count("iterations", times)
        if not isinstance(self.iterations, int) and len(self.iterations) != 3:
            raise ValueError(f"iterations is a number or (first, middle, last), got {self.iterations}")
        check.real("lowest", self.lowest)
        check.at_least("highest", self.highest, self.lowest)

    @property
    def needs(self) -> Needs:
        return Needs(probs=True, keys=True)

    def layer(self, i: int, layers: int) -> "ZeroTPrune":
        if isinstance(self.iterations, int):
            return self
        first, middle, last = self.iterations
        return dataclasses.replace(self, iterations=first if i < 3 else last if i >= layers - 3 else middle)

    def count(self, n: int, n_kind: int) -> int:
        return n - min(self.remove, max(n - self.special - 1, 0))

    def importance(self, probs, among):
        """[b n] of the rows `among`."""
        s = pagerank(probs, among, self.iterations if isinstance(self.iterations, int) else self.iterations[1])
        number = jnp.maximum(jnp.sum(among.astype(jnp.float32), -1), 1.0)[:, None]
        spread = jnp.sum(jnp.where(among[:, None], (s * number[..., None] - 1.0) ** 2, 0.0), -1) / number
        heads = (spread >= self.lowest) & (spread <= self.highest)
        heads = (heads | ~jnp.any(heads, -1, keepdims=True)).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(heads[..., None] * s * s, 1) / jnp.sum(heads, -1, keepdims=True))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        live, free, room = tokens.pos >= 0, movable(tokens), self.count(n, n)
        probs, metric = check.given("probs", evidence.probs), mean_keys(evidence)
        number = jnp.sum(free, -1, dtype=jnp.int32)
        keep = jnp.full(number.shape, room, jnp.int32) if keep is None else keep
        remove = removal(live, keep, n - room, room, jnp.maximum(number - 1, 0))
        rank = by_falling(self.importance(probs, live), free)
        better = free & (rank < (number - number // 2)[:, None])
        worse = free & ~better
        like = jnp.max(jnp.where(better[:, None], cosine(metric, metric), -jnp.inf), -1)
        gone = choose(like, worse, jnp.minimum(remove, self.similar), most=min(self.similar, n))
        left = live & ~gone
        stays = number - remove
        kept = choose(self.importance(probs, left), left & free, stays) | (live & ~free)
        return state, pack(kept, room)
