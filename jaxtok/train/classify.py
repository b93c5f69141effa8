"""Classification by an encoder, whatever attends in it: the loss for `fit`, and the share that is right.

recipe = Recipe(attention=BiFormer(side=7))
params = encoder.init(cfg, key) | {"methods": recipe.init_params(key, cfg)}
state = fit(make_loss(cfg, recipe), params, data, optimizer=..., steps=...)
right(cfg, state.params, batch, recipe)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.models import vit
from jaxtok.models.config import EncoderConfig
from jaxtok.models.vit import PLAIN


def logits(cfg: EncoderConfig, params, batch: Mapping[str, Any], recipe: Recipe = PLAIN, **options: Any) -> Float[Array, "b out"]:
    """Of {"images": [b y x ch]}, or of {"ids": i32 [b n], "live": bool [b n]}; options as `vit.encode`."""
    if cfg.vocab is not None:
        tokens = vit.embed_text(cfg, params, batch["ids"], batch["live"])
    else:
        tokens = vit.embed(cfg, params, batch["images"])
    return vit.head(cfg, params, vit.encode(cfg, params, tokens, recipe, **options).tokens)


def make_loss(cfg: EncoderConfig, recipe: Recipe = PLAIN, *, smooth: float = 0.0, **options: Any) -> Callable:
    """loss_fn of `fit` for batches of `logits` with "label": i32 [b]. loss = mean over rows of CE(logits, label), in which the label has
    1 - smooth and all classes share `smooth`; the metric `right` is the share of rows whose best class is the label."""
    check.between("smooth", smooth, 0, 1)
    classes = cfg.out
    if classes is None:
        raise ValueError("the encoder has no head: give EncoderConfig(out=classes)")

    def loss_fn(params, batch, key):
        said = logits(cfg, params, batch, recipe, key=key, **options)
        want = optax.smooth_labels(jax.nn.one_hot(batch["label"], classes, dtype=said.dtype), smooth)
        hit = jnp.argmax(said, -1).astype(jnp.int32) == batch["label"]
        return jnp.mean(optax.softmax_cross_entropy(said, want)), {"right": jnp.mean(hit.astype(jnp.float32))}

    return loss_fn


def right(
    cfg: EncoderConfig, params, batch: Mapping[str, np.ndarray], recipe: Recipe = PLAIN, *, size: int = 100, **options: Any
) -> Bool[np.ndarray, " b"]:
    """Which rows get their label as the best class; `size` rows at once, which must divide the batch. Compiled anew in each call."""
    count = len(batch["label"])
    size = min(size, count)
    if not count or count % size:
        raise ValueError(f"{count} rows in batches of {size}; the number must divide")
    best = jax.jit(lambda params, part: jnp.argmax(logits(cfg, params, part, recipe, **options), -1))
    parts = [{name: x[i : i + size] for name, x in batch.items()} for i in range(0, count, size)]
    return np.concatenate([np.asarray(best(params, part)) == part["label"] for part in parts])
