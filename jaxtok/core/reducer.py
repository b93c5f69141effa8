"""What a method must supply where rows of a sequence are dropped or merged: in an encoder, at its output, between a decoder's layers."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxtok.core import reduce
from jaxtok.core.protocols import Held, Method
from jaxtok.core.types import DensePlan, Evidence, Plan, Tokens


class Reducer(Method):
    """Sites vit, select, layers: rows of a sequence are dropped or merged.

    Site vit, `at`: "block" before the layer (K = number of layers: behind the last one); "attn" between its attention and its MLP, on its own evidence; "around" before its attention
    and undone after it; "ahead" before the layer, whose attention matrix of the unreduced rows is reduced too and used in the place of its
    own. With `restore` = K2 what a "block" method did is undone before layer K2, or at the end. Sites select and layers: "block".
    """

    at: ClassVar[str] = "block"
    restore: int | None = None
    positions: str = "keep"
    conserves: ClassVar[bool] = False  # sizes and the size-weighted sum of x stay
    trim: int | None = None  # site layers: from this layer on, caches hold in the end no row that was dropped later
    cross: bool = False  # site vit: a row of its own stands last while it acts (`begin`, `enter`)

    def layer(self, i: int, layers: int) -> "Reducer":
        """The instance for 0-based layer `i` of `layers`."""
        return self

    def start(self, params, tokens: Tokens) -> Held:
        """State carried over one forward pass, shared by all places where a recipe names this very method; `slots` go by row of `tokens`."""
        return Held()

    def begin(self, params, tokens: Tokens) -> Tokens:
        """With `cross`: the rows and one more, before the first layer that it acts in; the encoder takes that row away at the end."""
        raise NotImplementedError(f"{type(self).__name__} must say what its row is")

    def enter(self, params, tokens: Tokens) -> Tokens:
        """With `cross`: the rows as they enter a layer in which it acts."""
        return tokens

    def count(self, n: int, n_kind: int) -> int:
        """Static number of rows left of `n`, of which `n_kind` are of the kinds this method may reduce."""
        raise NotImplementedError(f"{type(self).__name__} must say how many rows it leaves")

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan | DensePlan]:
        """(state before the rows move, plan [b m]); `keep` [b]: traced number of live rows at or under the capacity."""
        raise NotImplementedError(f"{type(self).__name__} must make a plan")

    def mark(self, params, state: Held, tokens: Tokens, evidence: Evidence) -> Array | None:
        """f32 [b n]: `Tokens.score` of the rows as they were planned, which goes with them to later sites; None leaves what is there."""
        return None

    def undo(self, params, state: Held, tokens: Tokens, before: Tokens) -> Array:
        """x [b n c] of the rows `before` the reduction, from what they have become: each row takes that of its group, a dropped one
        keeps its own. `before.source` says for each of them where it is now in `tokens`."""
        back = reduce.gather(tokens.x, before.source)
        return jnp.where((before.source >= 0)[..., None], back, before.x)
