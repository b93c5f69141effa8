"""SALE's thresholds, one a layer and query head, found on prompts. Source: arXiv:2505.24179; BirdChristopher/SALE, kv_retrieve_calib.py.

tau = calibrate(cfg, params, ids, live, SALE())             # `tighter` joins those of several batches
params = params | {"methods": {"sparsify": {"tau": tau}}}
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.rotary import rotate_by
from jaxtok.core.sparsifier import Sparsifier
from jaxtok.core.types import Needs, Tokens
from jaxtok.models import blocks, cached, decoder, sparsify
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl, attention


def calibrate(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    method: Sparsifier,
    *,
    theta: float = 0.4,
    first: float = 0.008,
    least: float = 1e-4,
    impl: Impl = "auto",
) -> Float[Array, "l h"]:
    """The largest threshold first / 2^i of each head whose output stays near the dense one's; 0 (a dense head) where none above `least` does.

        tau_lh <- tau_lh / 2  while  sum over live rows and channels of |o - o_dense|  >=  theta * live rows;   tau <= least becomes 0

    The error is averaged over the prompts, each by its own rows. `method`: SALE, whose `tau` is not used; prompts must be longer than its
    `least`. The paper takes key-value retrieval prompts. Layers see the dense model's inputs, so each is judged alone. All heads of a
    layer are tried at once. One compiled program under jit (`cfg`, `method` and the numbers static).

    ValueError: shapes, numbers out of range, prompts that the method reads whole.
    """
    Recipe(sparsify=method).validate(cfg)
    for name, value in (("theta", theta), ("first", first), ("least", least)):
        check.between(name, value, 0, 1e30)
    if not 0 < least < first:
        raise ValueError(f"thresholds go from first={first} down to least={least}; give 0 < least < first")
    if method.whole(ids.shape[1]):
        raise ValueError(f"{method.name} reads prompts of {ids.shape[1]} tokens whole; calibrate it on longer ones")
    tokens, out = decoder.embed(cfg, params, ids, live), []
    for i, p in enumerate(params["layers"]):
        out.append(_layer(cfg, p, i, tokens, method, theta, first, least, impl))
        tokens, _ = cached.attend_rows(cfg, p, i, tokens, None, decoder.PLAIN, Needs(), False, None, impl)
    return jnp.stack(out)


def _layer(cfg: Config, p, i: int, tokens: Tokens, method: Sparsifier, theta: float, first: float, least: float, impl: Impl) -> Array:
    """f32 [h]: the thresholds of one layer."""
    freqs, (q, k, v) = jnp.asarray(blocks.frequencies(cfg, i)), blocks.qkv(cfg, p, tokens.x)
    q, k = (rotate_by(x, tokens.rope, freqs, blocks.axes(cfg, tokens.rope)) for x in (q, k))
    see: dict[str, Any] = dict(window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale, impl=impl)
    dense, _ = attention(q, k, v, q_pos=tokens.pos, k_pos=tokens.pos, diagonal=0, **see)
    alive = (tokens.pos >= 0)[:, None, :, None]
    rows = jnp.maximum(jnp.sum(tokens.pos >= 0, -1), 1).astype(jnp.float32)[:, None]

    def error(tau):
        table = jnp.zeros((cfg.layers, cfg.heads), jnp.float32).at[i].set(tau)
        sparse, _ = sparsify.attend(method, {"tau": table}, i, q, k, v, tokens.pos, **see)
        change = jnp.abs(sparse.astype(jnp.float32) - dense.astype(jnp.float32))
        return jnp.mean(jnp.sum(jnp.where(alive, change, 0.0), (2, 3)) / rows, 0)

    def halve(state):
        tau, _ = state
        bad = (tau > 0) & (error(tau) >= theta)
        lower = jnp.where(tau / 2 <= least, 0.0, tau / 2)
        return jnp.where(bad, lower, tau), jnp.any(bad)

    start = jnp.full((cfg.heads,), first, jnp.float32), jnp.ones((), bool)
    return lax.while_loop(lambda state: state[1], halve, start)[0]


def tighter(a: Float[Array, "l h"], b: Float[Array, "l h"]) -> Float[Array, "l h"]:
    """The thresholds under which both of two calibrations' prompts stay near: the smaller ones."""
    return jnp.minimum(a, b)
