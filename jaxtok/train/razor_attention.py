"""RazorAttention's head search: which heads look back at what stood there before. Source: arXiv:2407.15891; mindspore_gs (ra_config.py)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.core import check
from jaxtok.core.rotary import rotate_by
from jaxtok.core.score import to_kv_heads
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.ops.attention import attention

PERIOD, REPEATS, LOW, HIGH = 2500, 4, 10_000, 12_500


class Found(NamedTuple):
    """Shares of attention, of each layer and KV head."""

    echo: np.ndarray  # f32 [l g] to earlier occurrences of the token itself
    induction: np.ndarray  # f32 [l g] to what followed its earlier occurrences


def repeated(cfg: Config, *, period: int = PERIOD, repeats: int = REPEATS, batch: int = 1, seed: int = 0) -> Int[np.ndarray, "b n"]:
    """`period` random token ids, `repeats` times over, behind bos where the model has one.

    Ids are drawn from 10,000 to 12,499 as in the paper, or from the whole of a smaller vocabulary; all different where there are enough.
    """
    for name, value, low in (("period", period, 1), ("repeats", repeats, 2), ("batch", batch, 1)):
        check.count(name, value, low)
    low, high = (LOW, HIGH) if cfg.vocab >= HIGH else (0, cfg.vocab)
    rng = np.random.default_rng(seed)
    once = np.stack(
        [rng.permutation(high - low)[:period] if period <= high - low else rng.integers(0, high - low, period) for _ in range(batch)]
    )
    bos = np.full((batch, 0 if cfg.bos is None else 1), cfg.bos or 0)
    return np.concatenate([bos, np.tile(once + low, repeats)], 1).astype(np.int32)


def search(cfg: Config, params, ids: Int[np.ndarray, "b n"] | None = None, *, period: int = PERIOD, repeats: int = REPEATS) -> Found:
    """The echo and induction scores of every KV head on repeated random tokens (`ids`: those of `repeated` with these numbers, its default).

        echo      = mean over the queries i that repeat an earlier token, of  sum over m >= 1 of P[i, i - m period]
        induction = the same of  P[i, i - m period + 1],     P = causal softmax attention

    and then the largest over the h/g query heads of a KV head. (The mean over repeated queries is our reading; every head is divided alike,
    so no order depends on it.) Sliding windows hold. O(n) memory: no row of P exists. `methods.policy.razor_attention.full_heads` takes the
    best of both.
    """
    ids = repeated(cfg, period=period, repeats=repeats) if ids is None else np.asarray(ids)
    first = 0 if cfg.bos is None else 1
    if ids.ndim != 2 or ids.shape[1] != first + repeats * period or repeats < 2:
        raise ValueError(
            f"ids {list(ids.shape)} must be [b {first + repeats * period}]: {first} bos and {repeats} >= 2 times {period} tokens"
        )
    echo, induction = _scores(cfg, period, repeats, blocks.unstack(params), jnp.asarray(ids, jnp.int32))
    return Found(np.asarray(echo), np.asarray(induction))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(cfg: Config, period: int, repeats: int, params, ids: Int[Array, "b n"]) -> tuple[Float[Array, "l g"], Float[Array, "l g"]]:
    pos = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    x, out = blocks.embed(cfg, params, ids), []
    for i, p in enumerate(params["layers"]):
        q, k, v = blocks.qkv(cfg, p, x)
        freq, window = blocks.frequencies(cfg, i), cfg.layer_window(i)
        q, k = rotate_by(q, pos, freq), rotate_by(k, pos, freq)
        o, lse = attention(q, k, v, q_pos=pos, k_pos=pos, window=window, softcap=cfg.softcap, scale=cfg.scale, diagonal=0)
        out.append([_looks_back(cfg, window, period, repeats, q, k, lse, after) for after in (0, 1)])
        x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, o))
    return tuple(jnp.stack(scores) for scores in zip(*out, strict=True))  # type: ignore[return-value]


def _looks_back(cfg: Config, window: int | None, period: int, repeats: int, q, k, lse, after: int) -> Float[Array, " g"]:
    """The share of attention that goes to the tokens m periods before, or `after` behind those."""
    first, n = 0 if cfg.bos is None else 1, q.shape[2]
    total = jnp.zeros(q.shape[:2], jnp.float32)
    for m in range(1, repeats):
        back = m * period - after
        if window is not None and back >= window:
            continue
        mine = slice(first + m * period, n)
        keys = jnp.repeat(k[:, :, first + after : n - back], q.shape[1] // k.shape[1], 1)
        logit = jnp.sum(q[:, :, mine].astype(jnp.float32) * keys.astype(jnp.float32), -1)
        logit = logit * (q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale)
        logit = logit if cfg.softcap is None else cfg.softcap * jnp.tanh(logit / cfg.softcap)
        total += jnp.sum(jnp.exp(logit - lse[:, :, mine]), -1)
    return jnp.mean(to_kv_heads(total / ((repeats - 1) * period), k.shape[1], "max"), 0)
