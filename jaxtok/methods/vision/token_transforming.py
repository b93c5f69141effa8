"""Token Transforming (many to many). Source: arXiv:2506.05709; AuroraZengfh/TokenTransforming (no code of it): written from the formulas."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.matching import cosine, movable
from jaxtok.core.protocols import Held
from jaxtok.core.reduce import gather
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import choose, pack
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


def softmax(like: Float[Array, "b m n"], pair: Bool[Array, "b m n"], tau: float) -> Float[Array, "b m n"]:
    """softmax over j of tau * cos(x_i, x_j), over the pairs that count."""
    return jax.nn.softmax(jnp.where(pair, tau * like, jnp.finfo(jnp.float32).min), -1)


@register(
    "token_transforming",
    site="vit",
    paper="arXiv:2506.05709",
    title="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration",
    authors="Fanhu Zeng and Deli Yu and Zhenglun Kong and Hao Tang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTransforming(Reducer):
    """Y = W X: each of `capacity` informative rows becomes a mixture of all rows; before a layer, on the attention of the one before.

        informative: the `capacity` rows of largest attention (mean over heads) from the class row, or received in all (`score`)
        W_ij = softmax over j of tau cos(x_i, x_j), i among the informative rows, j among all;   SPECIAL rows: W_ii = 1

    Sizes go along: a row's size is split over the mixtures by its weights in them. Rows of W sum to 1. With `restore` = K2 the rows are
    brought back before layer K2 (dense tasks): x_j = sum_i W_ij y_i / sum_i W_ij; then name the method once in a recipe. What the paper
    publishes of W is not confirmed by code ("our reading"): `weight_fn`(cos, mask of pairs, tau) takes another; tau has no published value.

    `capacity` counts rows that are not SPECIAL (`special` of these, static). tau -> inf keeps the informative rows as they are; tau = 0
    makes them all the mean. A sequence that fits stays as it is. `keep` [b]: live rows to leave, SPECIAL ones counted.
    """

    capacity: int
    tau: float = 10.0
    score: str = "cls"
    special: int = 1
    restore: int | None = None
    weight_fn: Callable = softmax

    def __post_init__(self):
        check.count("capacity", self.capacity)
        check.count("special", self.special, 0)
        check.one_of("score", self.score, ("cls", "received"))
        check.at_least("tau", self.tau, 0)

    @property
    def needs(self) -> Needs:
        return Needs(cls=self.score == "cls", received=self.score == "received")

    def count(self, n: int, n_kind: int) -> int:
        return min(n, self.special + self.capacity)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, DensePlan]:
        b, n = tokens.pos.shape
        live, free, room = tokens.pos >= 0, movable(tokens), self.count(n, n)
        seen = jnp.mean(check.given(self.score, getattr(evidence, self.score)).astype(jnp.float32), 1)
        fixed = live & ~free
        budget = jnp.full((b,), room, jnp.int32) if keep is None else jnp.minimum(keep, room)
        chosen = choose(seen, free, jnp.maximum(budget - jnp.sum(fixed, -1, dtype=jnp.int32), 0)) | fixed
        index = pack(chosen, room).index
        whole = jnp.all(chosen == live, -1)[:, None]
        one = jax.nn.one_hot(index, n, dtype=jnp.float32)
        mixes = gather(free, index) & ~whole & (index >= 0)
        rows = gather(tokens.x, index)
        mixed = self.weight_fn(cosine(rows, tokens.x), jnp.broadcast_to(free[:, None], (b, room, n)), self.tau)
        w = jnp.where(mixes[..., None], mixed, one)
        if self.restore is not None:
            safe = jnp.where(index < 0, n, index)
            held = jax.vmap(lambda i, a: jnp.zeros((n + 1, n), jnp.float32).at[i].set(a)[:n])(safe, w)
            state = Held(slots=held)
        return state, DensePlan(w, index)

    def undo(self, params, state: Held, tokens: Tokens, before: Tokens) -> Array:
        w = jnp.where((tokens.pos >= 0)[..., None], state.slots, 0.0)
        mass = jnp.sum(w, 1)
        back = jnp.einsum("bmn,bmc->bnc", w / jnp.where(mass > 0, mass, 1.0)[:, None], tokens.x.astype(jnp.float32))
        return jnp.where((mass > 0)[..., None], back, before.x.astype(jnp.float32)).astype(before.x.dtype)
