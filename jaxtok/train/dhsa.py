"""DHSA's boundary predictor, trained on a frozen model: where attention changes. Source: arXiv:2510.24606; xiongsiheng/DHSA, legacy/.

method = DHSA(capacity=1024, predicted=True)
params = {"predictor": method.init_params(key, cfg)["predictor"], "model": model}
state = fit(make_loss(cfg, method), params, data, optimizer=..., steps=..., trainable=lambda path: path.startswith("predictor"))
model | {"methods": {"sparsify": {"predictor": state.params["predictor"]}}}      # what `decoder.prefill(..., recipe)` takes
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.types import Needs
from jaxtok.methods.prefill.dhsa import DHSA
from jaxtok.models import cached, decoder, sparsify
from jaxtok.models.config import Config
from jaxtok.ops.attention import attention
from jaxtok.ops.boundaries import boundary_logits
from jaxtok.ops.evidence import rows


def ratios(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    pos: Int[Array, "b n"],
    *,
    width: int = 4,
    reach: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "b n"]:
    """How much attention to the keys before a row differs from that to the keys from it on; 0 within 2 `width` rows of the ends.

        ratio_j = (max(P, F) + 1e-6) / (min(P, F) + 1e-6),   A = attention, mean over heads
        P = sum over queries i >= j + width - 1 of A_i,j-width + .. + A_i,j-1;   F = the same of A_ij + .. + A_i,j+width-1

    Rows stand with the live ones first (core.sparsifier.View), q and k after the rotary embedding. reach: only so many queries count
    (4096 where attention slides, in the code); None = all. The whole attention matrix is made: for prompts to train on.
    """
    check.count("width", width)
    n, see = pos.shape[1], dict[str, Any](q_pos=pos, k_pos=pos, window=window, softcap=softcap, scale=scale)
    if reach is not None:
        check.count("reach", reach)
    a = jnp.mean(rows(q, k, attention(q, k, k[..., :1], **see)[1], **see), 1)
    later = jnp.flip(jnp.cumsum(jnp.flip(a, 1), 1), 1)  # of queries i and after
    later = jnp.pad(later, ((0, 0), (0, 1), (0, 0)))
    j = jnp.arange(n, dtype=jnp.int32)
    begin = jnp.minimum(j + width - 1, n)
    end = jnp.full_like(begin, n) if reach is None else jnp.minimum(begin + reach, n)

    def mass(offset):
        at = jnp.clip(j + offset, 0, n - 1)
        return later[:, begin, at] - later[:, end, at]

    past, future = (sum(mass(c + s * width) for c in range(width)) for s in (-1, 0))
    ratio = (jnp.maximum(past, future) + 1e-6) / (jnp.minimum(past, future) + 1e-6)
    length = jnp.sum(pos >= 0, -1, keepdims=True, dtype=jnp.int32)
    inside = (j[None] >= 2 * width) & (j[None] <= length - 2 * width)
    return jnp.where(inside, ratio, 0.0)


def loss(
    predictor, k: Float[Array, "b g n d"], live: Bool[Array, "b n"], ratio: Float[Array, "b n"], *, gamma: float = 2.0
) -> Float[Array, ""]:
    """Focal cross-entropy of `boundary_logits` to soft labels y = sigmoid(4 log ratio), mean over the rows that have a ratio.

    p = sigmoid(logit);   loss = -y (1 - p)^gamma log p - (1 - y) p^gamma log(1 - p)
    """
    check.between("gamma", gamma, 0, 1e3)
    logit = boundary_logits(predictor, k, live)
    there = ratio > 0
    y = jax.nn.sigmoid(4 * jnp.log(jnp.where(there, ratio, 1.0)))
    p = jax.nn.sigmoid(logit)
    each = -y * (1 - p) ** gamma * jax.nn.log_sigmoid(logit) - (1 - y) * p**gamma * jax.nn.log_sigmoid(-logit)
    return jnp.sum(jnp.where(there, each, 0.0)) / jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)


def make_loss(cfg: Config, method: DHSA, *, gamma: float = 2.0) -> Callable:
    """loss_fn(params, (ids i32 [b n], live bool [b n]), key) for `fit`: `loss` on the keys and attention of every layer, mean over layers.

    params: {"predictor", "model"}; one predictor for all layers, as in the code. Labels and keys are the model's own and get no gradient.
    In layers that slide, the queries that count reach as far as the window. ValueError without a method of variant "chunks".
    """
    if method.variant != "chunks":
        raise ValueError(f"a predictor finds chunks; variant={method.variant!r} has none, give variant='chunks'")

    def loss_fn(params, batch, key):
        (ids, live), model, each = batch, jax.lax.stop_gradient(params["model"]), []
        tokens = decoder.embed(cfg, model, ids, live)
        for i, p in enumerate(model["layers"]):
            pos, window = tokens.pos, cfg.layer_window(i)
            needs = Needs(turned=ids.shape[1])
            tokens, ((kv, seen),) = cached.attend_rows(cfg, p, i, tokens, None, decoder.PLAIN, needs, False, None, "auto")
            view = sparsify.aligned(check.given("turned", seen.turned), kv.k, pos, i)
            see: dict[str, Any] = dict(reach=window, window=window, softcap=cfg.softcap, scale=cfg.scale)
            ratio = ratios(view.q, view.k, view.pos, width=method.width, **see)
            each.append(loss(params["predictor"], view.k, view.pos >= 0, ratio, gamma=gamma))
        return jnp.mean(jnp.stack(each)), {}

    return loss_fn
