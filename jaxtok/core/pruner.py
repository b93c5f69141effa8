"""Site layers: which image rows stay between two layers of a decoder. A method supplies the score, or the choice; the base owns the rest."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.reduce import POSITIONS
from jaxtok.core.reducer import Reducer
from jaxtok.core.select import choose, pack
from jaxtok.core.selector import asking, pictured, room
from jaxtok.core.types import Evidence, Plan, Tokens


def questions(tokens: Tokens, evidence: Evidence) -> tuple[Float[Array, "b w n"], Bool[Array, "b w"]]:
    """(attention of the last w rows, mean over heads, 0 where a row is no live text behind the image; which rows are such text)."""
    rows = jax.lax.stop_gradient(check.given("rows", evidence.rows))
    asks = asking(tokens)[:, -rows.shape[2] :]
    return jnp.where(asks[..., None], jnp.mean(rows, 1), 0.0), asks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruner(Reducer):
    """Of a sequence's image rows at most `capacity` stay, in their order; text and SPECIAL rows (newlines) always do.

    images: image rows that come to this place, at most (static: what the decoder was given, or what the place before has left); the
    number of rows then falls by images - capacity, also for a prompt with fewer pictures, whose text may find no room (`lost`). A capacity
    of `images` or more changes nothing. positions: "keep" the rotary ids, "repack" or "keep_mrope". `keep` [b] counts all live rows that
    are left. ValueError for what is out of range.
    """

    capacity: int
    images: int
    positions: str = "keep"

    def __post_init__(self):
        check.count("capacity", self.capacity, 0)
        check.count("images", self.images)
        check.one_of("positions", self.positions, POSITIONS)

    def count(self, n: int, n_kind: int) -> int:
        if n < self.images:
            raise ValueError(f"{self.name} is told of images={self.images} rows, but {n} rows come to it; give what enters its layer")
        return n - max(self.images - self.capacity, 0)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Float[Array, "b n"]:
        """The higher, the rather an image row stays."""
        raise NotImplementedError(f"{type(self).__name__} must score its rows or choose them")

    def stay(
        self, params, state: Held, tokens: Tokens, evidence: Evidence, free: Bool[Array, "b n"], room: Int[Array, " b"]
    ) -> Bool[Array, "b n"]:
        """Which of the `free` rows stay, `room` of them at most."""
        score = jax.lax.stop_gradient(self.score(params, state, tokens, evidence))
        return choose(score, free, room, most=self.capacity)

    def observe(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Held:
        """The state before the choice: what several places gather."""
        return state

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        free, fixed = pictured(tokens), (tokens.pos >= 0) & ~pictured(tokens)
        state = self.observe(params, state, tokens, evidence)
        mask = self.stay(params, state, tokens, evidence, free, room(tokens, keep, self.capacity)) & free
        rows = self.count(free.shape[1], self.images)
        return state, pack(mask | fixed, rows, jnp.where(fixed, jnp.inf, 0.0))
