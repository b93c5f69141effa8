"""Site attention: a trained attention that replaces a decoder layer's own, in training, in prefill and step by step."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float

from jaxtok.core.layer import Halves
from jaxtok.core.protocols import Method
from jaxtok.core.reader import Sight


class Rows(NamedTuple):
    """Rows that attend, besides their queries. In a parallel pass they stand in order, live rows first: row i has order i."""

    pos: jax.Array  # i32 [b n] order, -1 = dead
    count: jax.Array  # i32 [b] live rows of the sequence, these included
    mark: jax.Array  # bool [b n] tokens that the method has put into the text (its `token`)
    see: Sight


class Attention(Method):
    """Site attention: a trained attention that replaces a decoder layer's own.

    A layer may attend several times (SCOUT's mixer and checkpoints, the two sublayers of meta-tokens): `compose` puts the halves of the
    model's layer together and calls attend(j, q, k, v, *more) -> [b h n d] for its j-th attention, j < `times`. What j does is said twice:
    `attend` for all rows in parallel, `step` for one more row with the state that `start` begins. The composition is written once and
    serves both, and what the model knows (norms, projections, rotary embedding) stays the model's. Keys and queries arrive rotated.
    `more`: other arrays by row [b e n ...] that the j-th attention wants; all three get them as their last arguments, `start` none when it
    begins an empty cache.

    `own`: the layer's entry of `init_params`. States are NamedTuples of arrays with the batch as leading axis; a dead row (pos -1) must
    leave them as they are.
    """

    times: ClassVar[int] = 1
    token: int | None = None  # id of the tokens that the method puts into the text; None = it puts none

    def init_params(self, key: jax.Array, cfg) -> tuple[Any, ...]:
        """Learned weights, one entry a layer."""
        return tuple(self.layer_params(jax.random.fold_in(key, i), cfg) for i in range(cfg.layers))

    def layer_params(self, key: jax.Array, cfg) -> Any:
        """Learned weights of one layer."""
        return {}

    def compose(self, own, half: Halves, x: Float[Array, "b n c"], attend: Callable[..., Array]) -> Float[Array, "b n c"]:
        """One layer of the model."""
        return half.mlp(half.out(x, attend(0, *half.qkv(x))))

    def attend(
        self, j: int, q: Float[Array, "b h n d"], k: Float[Array, "b g n d"], v: Float[Array, "b g n d"], rows: Rows
    ) -> Float[Array, "b h n d"]:
        """The j-th attention of a layer over whole sequences. Values of dead rows may be anything finite."""
        raise NotImplementedError(f"{type(self).__name__} must attend")

    def start(
        self, j: int, q: Float[Array, "b h n d"], k: Float[Array, "b g n d"], v: Float[Array, "b g n d"], rows: Rows, slots: int
    ) -> Any:
        """The state of the j-th attention after these rows (n may be 0), with room for `slots` tokens in all."""
        raise NotImplementedError(f"{type(self).__name__} must begin a state")

    def step(
        self, j: int, state, q: Float[Array, "b h 1 d"], k: Float[Array, "b g 1 d"], v: Float[Array, "b g 1 d"], rows: Rows
    ) -> tuple[Float[Array, "b h 1 d"], Any]:
        """The j-th attention of one more row, and the state with it."""
        raise NotImplementedError(f"{type(self).__name__} must attend step by step")

    def validate(self, recipe, cfg) -> None:
        """ValueError where it cannot work beside the recipe's other methods or in this decoder."""
        beside = [site for site in ("layers", "cache", "policy", "reader", "heads", "edits", "sparsify") if getattr(recipe, site)]
        if beside:
            raise ValueError(f"{self.name} keeps a cache of its own; use it without {' and '.join(beside)} (prompt goes with it)")
        if any(cfg.local) or cfg.mrope:
            raise ValueError(f"{self.name} takes a decoder whose layers are global and whose rows have one rotary id, not {cfg.family}")
        if self.token is not None and self.token >= cfg.vocab:
            raise ValueError(f"{self.name} has token={self.token}; the vocabulary has {cfg.vocab}: give the model a row for it")
