"""Flax nnx modules around the pure model functions. Optional: nothing else of jaxtok needs Flax.

A module holds the plain parameter dict, each array in an `nnx.Param`; caches go in and come out as arguments. Use it statelessly,
split once, under `jax.jit` (`nnx.jit` costs half a millisecond more a call):

>>> import jax, jax.numpy as jnp, jaxtok as jt
>>> from flax import nnx
>>> from jaxtok.flax import Decoder
>>> from jaxtok.methods import SnapKV
>>> from jaxtok.models import blocks
>>> from jaxtok.models.config import Config
>>> cfg = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)
>>> model = Decoder(cfg, blocks.init(cfg, jax.random.key(0)))  # or cfg, params, tokenizer = load(path)
>>> graph, state = nnx.split(model)  # state: the parameters, a pytree like any other
>>> recipe = jt.Recipe(cache=SnapKV(capacity=8, window=4))
>>> @jax.jit
... def prefill(state, ids):
...     model = nnx.merge(graph, state)
...     tokens, layers = model.prefill(model.embed(ids), recipe, new=4)
...     return model.logits(tokens.x[:, -1:]), layers
>>> @jax.jit
... def step(state, ids, layers):
...     model = nnx.merge(graph, state)
...     x, layers = model.step(model.lookup(ids), jnp.ones(ids.shape, bool), layers, recipe)
...     return model.logits(x), layers
>>> logits, layers = prefill(state, jnp.zeros((1, 20), jnp.int32))
>>> logits, layers = step(state, jnp.argmax(logits, -1), layers)
>>> logits.shape, layers[0][0].kv.k.shape
((1, 1, 32), (1, 2, 12, 8))

`model.plain()` is the dict again, for every pure function: `jt.decode.generate(cfg, model.plain(), tokens, layers, recipe, new=4)`.
Training: `nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)`, or optax on `state` itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Tokens
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers


class Pure(nnx.Module):
    """A tree of parameters as an nnx module: floating arrays become `nnx.Param`, others `nnx.Variable` (never trained)."""

    def __init__(self, params: Any):
        self.params = nnx.data(jax.tree.map(lambda x: (nnx.Param if jnp.issubdtype(x.dtype, jnp.floating) else nnx.Variable)(x), params))

    def plain(self) -> Any:
        """The tree as it was given: what the pure functions take."""
        return jax.tree.map(lambda x: x[...], self.params, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Decoder(Pure):
    """`jaxtok.models.decoder` as an nnx module: its functions with cfg and params filled in, nothing else."""

    def __init__(self, cfg: Config, params: blocks.Params):
        super().__init__(params)
        self.cfg = cfg

    def __call__(self, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, *, remat: bool = True) -> Float[Array, "b n vocab"]:
        """Logits of the parallel pass without a cache: `blocks.forward`. Layers may be a tuple or stacked."""
        return blocks.forward(self.cfg, self.plain(), ids, live, remat=remat)

    def embed(self, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, ends: tuple[int, ...] = ()) -> Tokens:
        """Tokens of padded prompts, for `prefill`: `decoder.embed`."""
        return decoder.embed(self.cfg, self.plain(), ids, live, ends)

    def lookup(self, ids: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        """Embeddings of new ids, for `step`: `blocks.embed`."""
        return blocks.embed(self.cfg, self.plain(), ids)

    def prefill(self, tokens: Tokens, recipe: Recipe = PLAIN, *, new: int, **options: Any) -> tuple[Tokens, Layers]:
        """Tokens after the last layer and caches with room for `new` more: `decoder.prefill`, which says what options there are."""
        return decoder.prefill(self.cfg, self.plain(), tokens, recipe, new=new, **options)

    def step(
        self, x: Float[Array, "b t c"], live: Bool[Array, "b t"], layers: Layers, recipe: Recipe = PLAIN, **options: Any
    ) -> tuple[Float[Array, "b t c"], Layers]:
        """Rows after the last layer and the caches with them: `decoder.step`, which says what options there are."""
        return decoder.step(self.cfg, self.plain(), x, live, layers, recipe, **options)

    def logits(self, x: Float[Array, "b n c"]) -> Float[Array, "b n vocab"]:
        """Float32 logits of the next token at each row: `decoder.logits`."""
        return decoder.logits(self.cfg, self.plain(), x)
