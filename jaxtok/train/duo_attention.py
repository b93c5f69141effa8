"""DuoAttention's gates: learned by distillation on passkeys, or guessed from mean queries and keys (kvpress). Source: arXiv:2410.10819;
mit-han-lab/duo-attention (train.py, loss.py, patch/streaming_attn.py); NVIDIA/kvpress DuoAttentionPress.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.reduce import gather, oldest_first
from jaxtok.core.rotary import rotate_by
from jaxtok.core.types import Needs
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.ops.attention import attention, merge
from jaxtok.train.loop import TrainState, fit


def gated(
    cfg: Config,
    params,
    gates: Float[Array, "l g"],
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    *,
    sinks: int = 128,
    recent: int = 256,
    remat: bool = True,
) -> Float[Array, "b n c"]:
    """The residual stream after the last layer where every head mixes full and streaming attention:

        out = gate * full + (1 - gate) * streaming,    streaming sees j <= i with j < sinks or i - j < recent,    gates clipped to 0 to 1

    All gates 1: `blocks.hidden`. Gates of 0 and 1: the split cache of DuoAttention(sinks, recent - 1 kept) read token by token (a deployed
    head sees the `recent` tokens of its cache and itself, a trained one `recent` in all; so the official code).
    """
    check.count("sinks", sinks, 0)
    check.count("recent", recent, 1)
    if gates.shape != (cfg.layers, cfg.kv_heads):
        raise ValueError(f"gates {list(gates.shape)} must be one for each layer and KV head, [{cfg.layers} {cfg.kv_heads}]")
    if live is not None and live.shape != ids.shape:
        raise ValueError(f"live {live.shape} must have the shape of ids {ids.shape}")
    pos = blocks.positions(jnp.ones(ids.shape, bool) if live is None else live)
    begin = oldest_first(pos)[:, : min(sinks, ids.shape[1])]  # where the first tokens are
    begin_pos = jnp.where(begin >= 0, gather(pos, begin), -1)
    gates = jnp.repeat(jnp.clip(gates, 0.0, 1.0), cfg.heads // cfg.kv_heads, 1)

    def layer(i: int, p, x, gate):
        q, k, v = blocks.qkv(cfg, p, x)
        freq, window = blocks.frequencies(cfg, i), cfg.layer_window(i)
        q, k = rotate_by(q, pos, freq), rotate_by(k, pos, freq)
        see: dict[str, Any] = dict(softcap=cfg.softcap, scale=cfg.scale)
        full, _ = attention(q, k, v, q_pos=pos, k_pos=pos, window=window, diagonal=0, **see)
        near = recent if window is None else min(recent, window)
        out, lse = attention(q, k, v, q_pos=pos, k_pos=pos, window=near, diagonal=0, **see)
        if sinks and (window is None or window > recent):
            # the first tokens as a query `recent` earlier would see them: those that the window has left behind
            first = lambda x: gather(x, jnp.broadcast_to(begin[:, None], (*x.shape[:2], begin.shape[1])))
            ago, reach = jnp.where(pos >= recent, pos - recent, -1), None if window is None else window - recent
            out, _ = merge(out, lse, *attention(q, first(k), first(v), q_pos=ago, k_pos=begin_pos, window=reach, **see))
        share = gate[None, :, None, None]
        mixed = share * full.astype(jnp.float32) + (1 - share) * out.astype(jnp.float32)
        return blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, mixed.astype(x.dtype)))

    x = blocks.embed(cfg, params, ids)
    for i, p in enumerate(blocks.unstack(params)["layers"]):
        run = functools.partial(layer, i)
        x = (jax.checkpoint(run) if remat else run)(p, x, gates[i])
    return x


def make_loss(cfg: Config, *, sinks: int = 128, recent: int = 256, weight: float | int = 0.05) -> Callable:
    """loss_fn of `fit` for params {"gates": [l g], "model": the frozen model} and batches {"ids", "live", "label"} ([b n], the last two bool).

        loss = mean over the labelled tokens and the channels of (H_full - H_gated)^2  +  weight * mean of |gates|

    H: the rows after the last layer, normed as for the output head. `label` marks the tokens of the answers. (The paper sums |gates|; the
    official code, followed here, takes their mean.)
    """
    check.at_least("weight", weight, 0)

    def loss_fn(params, batch, key):
        ids, live, label = batch["ids"], batch["live"], batch["label"]
        model = jax.lax.stop_gradient(params["model"])
        normed = lambda x: blocks.norm(x, model["norm"], cfg.norm_eps, cfg.norm_offset).astype(jnp.float32)
        full = jax.lax.stop_gradient(normed(blocks.hidden(cfg, model, ids, live)))
        mixed = normed(gated(cfg, model, params["gates"], ids, live, sinks=sinks, recent=recent))
        apart = jnp.mean((full - mixed) ** 2, -1)
        distill = jnp.sum(jnp.where(label, apart, 0.0)) / jnp.maximum(jnp.sum(label), 1).astype(jnp.float32)
        size = jnp.mean(jnp.abs(params["gates"]))
        return distill + weight * size, {"distill": distill, "size": size}

    return loss_fn


def rate(steps: int, lr: float | int = 0.02) -> Callable:
    """The learning rate of 0-based `step`: from a tenth of lr up to it in the first fifth of `steps`, and back to a tenth in the last."""
    check.count("steps", steps, 1)
    fifth = max(steps // 5, 1)

    def at(step):
        step = jnp.asarray(step, jnp.float32)
        return lr * jnp.minimum(1.0, jnp.minimum(jnp.maximum((step + 1) / fifth, 0.1), jnp.maximum((steps - step) / fifth, 0.1)))

    return at


def optimizer(steps: int, lr: float | int = 0.02) -> optax.GradientTransformation:
    """AdamW without decay at `rate`; what is trained stays in 0 to 1 (the official code clips before each pass, the same gates)."""

    def inside(updates, state, params):
        return jax.tree.map(lambda u, p: jnp.clip(p + u, 0.0, 1.0) - p, updates, params), state

    clip = optax.GradientTransformation(lambda params: optax.EmptyState(), inside)  # type: ignore[arg-type]
    return optax.chain(optax.adamw(rate(steps, lr), weight_decay=0.0), clip)


def learn(
    cfg: Config,
    params,
    data: Any,
    *,
    steps: int = 2000,
    lr: float | int = 0.02,
    sinks: int = 128,
    recent: int = 256,
    weight: float | int = 0.05,
    start: float | int = 1.0,
    **options,
) -> tuple[Float[np.ndarray, "l g"], TrainState]:
    """(gates, state) after training on batches of `data` (`make_loss` says which; passkeys in long texts). The model stays as it is.

    options: those of `fit` (directory, log_every, on_log, ...).
    """
    check.between("start", start, 0, 1)
    whole = {"gates": jnp.full((cfg.layers, cfg.kv_heads), start, jnp.float32), "model": blocks.unstack(params)}
    loss = make_loss(cfg, sinks=sinks, recent=recent, weight=weight)
    trained = lambda path: path.split("/")[0] == "gates"
    state = fit(loss, whole, data, optimizer=optimizer(steps, lr), steps=steps, trainable=trained, **options)
    return np.asarray(state.params["gates"]), state


@functools.partial(jax.jit, static_argnames=("cfg", "length"))
def proxy(cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, *, length: int = 500) -> Float[Array, "l g"]:
    """A guess at the gates without training (kvpress's on-the-fly scores): the area under the cumulated attention of a mean query to mean keys.

        q, k = means over a text of queries and keys before the rotary embedding (q/k norms done),   a = softmax_j(q_L . k_j / sqrt(d))
        with that query at position L - 1 and that key at every position j < L = `length`;    score = mean_j sum_{i <= j} a_i

    then the mean over the h/g query heads and over the texts (rows of `ids`). Attention that does not fall off with the distance gives
    (L + 1) / 2L, recent tokens alone 1 / L, the first token alone 1: a larger score wants the whole cache. Heads are ranked by it.
    """
    check.count("length", length, 1)
    live = jnp.ones(ids.shape, bool) if live is None else live
    tokens = decoder.embed(cfg, params, ids, live)
    evidence = decoder.survey(cfg, blocks.unstack(params), tokens, Needs(queries=0, keys=True))[2]
    there, at, out = tokens.pos >= 0, jnp.arange(length, dtype=jnp.int32)[None], []
    number = jnp.maximum(jnp.sum(there, -1), 1).astype(jnp.float32)[:, None, None]
    for i, (seen,) in enumerate(evidence):
        q = check.given("queries", seen.queries)[0]
        k = jnp.sum(jnp.where(there[:, None, :, None], check.given("keys", seen.keys).astype(jnp.float32), 0.0), 2) / number
        freq = blocks.frequencies(cfg, i)
        q = rotate_by(q[:, :, None], jnp.full((q.shape[0], 1), length - 1, jnp.int32), freq)
        k = rotate_by(jnp.repeat(k[:, :, None], length, 2), jnp.broadcast_to(at, (k.shape[0], length)), freq)
        k = jnp.repeat(k, cfg.heads // cfg.kv_heads, 1)
        weight = jax.nn.softmax(jnp.einsum("bhid,bhjd->bhij", q, k)[:, :, 0] * cfg.head_dim**-0.5, -1)
        area = jnp.mean(jnp.cumsum(weight, -1), -1)
        out.append(jnp.mean(area.reshape(area.shape[0], cfg.kv_heads, -1), (0, 2)))
    return jnp.stack(out)
