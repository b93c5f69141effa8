"""DyVTE's gates, trained against a frozen model: may the image leave here? Source: arXiv:2411.19628.

recipe = dyvte(images=576, layers=cfg.layers)
params = {"gates": recipe.init_params(key, cfg)["layers"], "model": model}
state = fit(make_loss(cfg), params, data, optimizer=..., steps=..., trainable=lambda path: path.startswith("gates"))
model | {"methods": {"layers": state.params["gates"]}}      # what `decoder.prefill(..., recipe)` takes
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.selector import pictured
from jaxtok.core.types import Needs, Tokens
from jaxtok.methods.vision.dyvte import gate, look
from jaxtok.models import blocks, cached
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN


class Told(NamedTuple):
    """A model's answers, and what a gate would read before each layer."""

    logits: Array  # f32 [b n vocab]
    looks: Array  # f32 [l b 2c]


def answers(cfg: Config, params, tokens: Tokens, leave: Int[Array, ""] | None = None, prompt: Bool[Array, "b n"] | None = None) -> Told:
    """The model over whole rows; from 0-based layer `leave` on (None = never) image rows are dead. `prompt`: the rows that gates look at."""
    looks, image = [], pictured(tokens)
    for i, p in enumerate(params["layers"]):
        if leave is not None:
            tokens = tokens._replace(pos=jnp.where(image & (i >= leave), -1, tokens.pos))
        looks.append(look(tokens if prompt is None else tokens._replace(pos=jnp.where(prompt, tokens.pos, -1))))
        tokens, _ = cached.attend_rows(cfg, p, i, tokens, None, PLAIN, Needs(), False, None, "auto")
    return Told(blocks.logits(cfg, params, tokens.x), jnp.stack(looks))


def may_leave(
    full: Float[Array, "b n v"],
    short: Float[Array, "b n v"],
    target: Int[Array, "b n"],
    label: Bool[Array, "b n"],
    agree: float = 0.99,
    worse: float = 1.03,
) -> Bool[Array, " b"]:
    """Whether an answer is the same without the image: over the rows of `label`, the best token is the same in more than `agree` of them,
    and the mean cross entropy of `target` under `short` is below `worse` times that under `full`. False where nothing is labelled."""
    number = jnp.sum(label, -1)
    mean = lambda x: jnp.sum(jnp.where(label, x, 0.0), -1) / jnp.maximum(number, 1).astype(jnp.float32)
    loss = lambda y: mean(optax.softmax_cross_entropy_with_integer_labels(y, jnp.where(label, target, 0)))
    same = mean((jnp.argmax(full, -1) == jnp.argmax(short, -1)).astype(jnp.float32))
    return (number > 0) & (same > agree) & (loss(short) < worse * loss(full))


def make_loss(cfg: Config, *, agree: float = 0.99, worse: float = 1.03) -> Callable:
    """loss_fn of `fit` for params {"gates": one a place 1 to L - 1, "model": the frozen model} and batches {"tokens": the decoder's rows
    (prompt and answer), "target": i32 [b n] the token that follows each row, "label": bool [b n] the rows whose next token is the answer's}.

        k drawn from 1 to L - 1;   y = may_leave(full model, the same with the image rows dead from layer k on)
        loss = mean over the batch of CE(gate_k(look at the prompt's rows before layer k), y)

    The prompt ends with the first labelled row: that is where the gate decides when the model is used (our reading; so is a gate of its own for each
    layer). The batch runs twice, without gradients.
    """
    check.between("agree", agree, 0, 1)
    check.at_least("worse", worse, 0)
    check.count("layers", cfg.layers, 2)

    def loss_fn(params, batch, key):
        model, tokens, label = jax.lax.stop_gradient(params["model"]), batch["tokens"], batch["label"]
        place = jax.random.randint(key, (), 1, cfg.layers)
        end = jnp.min(jnp.where(label, tokens.pos, jnp.iinfo(jnp.int32).max), -1, keepdims=True)
        full = answers(cfg, model, tokens, prompt=tokens.pos <= end)
        short = answers(cfg, model, tokens, place)
        goes = jax.lax.stop_gradient(may_leave(full.logits, short.logits, batch["target"], label, agree, worse)).astype(jnp.int32)
        mine = jax.tree.map(lambda *a: jnp.stack(a)[place - 1], *params["gates"])
        said = gate(mine, jax.lax.stop_gradient(full.looks)[place])
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(said, goes))
        right = jnp.mean((jnp.argmax(said, -1).astype(jnp.int32) == goes).astype(jnp.float32))
        return loss, {"exit": jnp.mean(goes.astype(jnp.float32)), "right": right}

    return loss_fn
