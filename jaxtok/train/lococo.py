"""Training of LoCoCo's memory: the text is read block by block, gradients go into the convolutions and alpha alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxtok.core.recipe import Recipe
from jaxtok.models import decoder
from jaxtok.models.config import Config


def trainable(path: str) -> bool:
    """Which leaves of params are trained, as `train.fit` asks: those of the step policy."""
    return path.startswith("methods/policy/")


def optimizer(rate: float | optax.Schedule, *, memory: float = 1000.0, alpha: float = 5.0) -> optax.GradientTransformation:
    """Adam at `rate`, times `memory` for the convolutions and times `alpha` for alpha (the official script's ratios)."""

    def scaled(times: float) -> optax.GradientTransformation:
        return optax.adam(rate * times if isinstance(rate, float | int) else lambda step: rate(step) * times)  # type: ignore[operator]

    label = lambda path, _: "alpha" if jax.tree_util.keystr(path[-1:], simple=True) == "alpha" else "memory"
    return optax.multi_transform(
        {"memory": scaled(memory), "alpha": scaled(alpha)}, lambda params: jax.tree_util.tree_map_with_path(label, params)
    )


def read(cfg: Config, params: Any, ids: Int[Array, "b n"], recipe: Recipe, chunk: int) -> Float[Array, "b n c"]:
    """The residual stream after the last layer of text read in blocks of `chunk`: each sees itself and what the policy left of those before.

    Differentiable through all blocks; a block is recomputed in the backward pass, so that memory is one block and a cache a block.
    """
    if recipe.policy is None or not recipe.policy.recurrent:
        raise ValueError(f"text is read in blocks through a recurrent step policy such as LoCoCo; the recipe's is {recipe.policy!r}")
    b, n = ids.shape
    if chunk < 1 or n % chunk:
        raise ValueError(f"{n} tokens do not divide into blocks of {chunk}")

    @jax.checkpoint
    def one(layers, part):
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, part), recipe, new=0, layers=layers)
        return layers, tokens.x

    layers = decoder.empty(cfg, params, b, recipe.policy.capacity + recipe.policy.every, recipe)
    _, x = jax.lax.scan(one, layers, jnp.swapaxes(ids.reshape(b, n // chunk, chunk), 0, 1))
    return jnp.swapaxes(x, 0, 1).reshape(b, n, -1)


def make_loss(cfg: Config, recipe: Recipe, *, chunk: int, skip: int = 1) -> Callable:
    """loss(params, {"ids": i32 [b n+1]}, key) -> (NLL a token after the first `skip` blocks, metrics), for `train.fit`.

    The first block has no memory before it and teaches nothing.
    """

    def loss_fn(params, batch, key):
        del key
        ids = batch["ids"]
        z = decoder.logits(cfg, params, read(cfg, params, ids[:, :-1], recipe, chunk)[:, skip * chunk :])
        nll = optax.softmax_cross_entropy_with_integer_labels(z, ids[:, 1 + skip * chunk :])
        alpha = params["methods"]["policy"]["alpha"]
        return jnp.mean(nll), {"alpha_low": jnp.min(alpha), "alpha_high": jnp.max(alpha)}

    return loss_fn
