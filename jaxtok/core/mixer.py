"""What replaces the attention of an encoder's layers: every row sees every other, in a sequence or on a grid of patches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxtok.core.protocols import Method


class Layer(NamedTuple):
    """What an encoder's layer gives to the method that attends in its place; made anew in each layer, while the model is traced."""

    x: jax.Array  # [b n c] the rows as the attention block reads them (normed)
    q: jax.Array  # [b h n d] by the layer's own weights, turned where the tower has rotary positions; likewise k, v
    k: jax.Array
    v: jax.Array
    pos: jax.Array  # i32 [b n]; -1 = dead
    size: jax.Array  # f32 [b n] what a row counts as a key: its size in a model that attends in proportion, else 1
    grid: tuple[int, int] | None  # static: rows and columns of patches, where the rows are those of a picture and nothing else
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v -> [b h n d]: what the layer itself would do
    out: Callable[[jax.Array], jax.Array]  # [b h n d] -> [b n c]: the layer's output projection


class Mixer(Method):
    """Site attention of an encoder: attention that every layer has in the place of its own.

    A layer's weights q, k, v, o stay those of the model; what a method has beside them is `params["methods"]["attention"]`, a tuple of
    one dict a layer. An instance for one layer comes from `layer`; None leaves that layer its own attention.
    """

    def layer(self, i: int, layers: int) -> "Mixer | None":
        """The instance for 0-based layer `i` of `layers`."""
        return self

    def init_params(self, key: jax.Array, cfg) -> tuple[dict[str, Array], ...]:
        """One dict of learned weights a layer, in float32."""
        own = [self.layer(i, cfg.layers) for i in range(cfg.layers)]
        return tuple({} if m is None else m.weights(jax.random.fold_in(key, i), cfg, i) for i, m in enumerate(own))

    def weights(self, key: jax.Array, cfg, i: int) -> dict[str, Array]:
        """Learned weights of 0-based layer `i` of a model of configuration `cfg` (width, heads, head_dim)."""
        return {}

    def validate(self, recipe, cfg) -> None:
        """ValueError: a decoder asks whether it can take this method."""
        raise ValueError(f"{self.name} lets all rows see each other: it attends in an encoder (models.vit), not in a decoder")

    def mix(self, params: dict[str, Array], state: Any, i: int, layer: Layer) -> tuple[Array, Any]:
        """(what the attention block of 0-based layer `i` adds to the rows [b n c], the state for the next layer).

        `params`: of this layer. The state is () before the first layer; it has no axis of rows, since they may be merged on the way.
        """
        raise NotImplementedError(f"{type(self).__name__} must mix rows")
