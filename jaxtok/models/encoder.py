"""The parts of an encoder layer as pure functions of (cfg, parameters, arrays), and what parameters there are.

Parameters are one plain dict (weights [in, out], y = x @ w):

    {"patch": [p*p*ch c], "patch_bias" | "embed": [vocab c],  "cls": [c], "dist": [c], "registers": [r c],  "pos": [. c],
     "stem_norm", "norm", "head" [c out], "head_dist", "map": attention pooling,  "layers": a tuple of l dicts}

    a layer: norm1, q, k, v, o, norm2, up, down (and gate, scale1, scale2); each norm and each product may have a `<name>_bias`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.recipe import Recipe
from jaxtok.core.rotary import rotate_by
from jaxtok.core.score import change, moments
from jaxtok.core.types import Evidence, Needs, Tokens
from jaxtok.models import blocks
from jaxtok.models.config import EncoderConfig
from jaxtok.models.observe import observe
from jaxtok.ops.attention import Impl, attention

FAR = 2**14  # more columns of windows than a picture has


def norm(cfg: EncoderConfig, p, name: str, x: Array) -> Array:
    if cfg.rms:
        return blocks.norm(x, p[name], cfg.norm_eps)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + cfg.norm_eps)
    shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
    return (y * p[name].astype(jnp.float32).reshape(shape) + p[name + "_bias"].astype(jnp.float32).reshape(shape)).astype(x.dtype)


def linear(p, name: str, x: Array) -> Array:
    y = x @ p[name]
    return y + p[name + "_bias"].reshape((1,) * (x.ndim - 1) + (-1,)) if name + "_bias" in p else y


def act(kind: str, x: Array) -> Array:
    if kind == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if kind == "gelu":  # by erf, as PyTorch does: jax.nn.gelu's erfc costs the CPU twice as much
        y = x.astype(jnp.float32)
        return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)
    return {"gelu_tanh": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}[kind](x)


def heads(cfg: EncoderConfig, x: Array) -> Array:
    return x.reshape(*x.shape[:2], cfg.heads, -1).transpose(0, 2, 1, 3)


def before(cfg: EncoderConfig, p, x: Array) -> Array:
    """What the attention block reads."""
    return x if cfg.post else norm(cfg, p, "norm1", x)


def windows(cfg: EncoderConfig, tokens: Tokens) -> Array:
    """i32 [b n]: the number of the window that each patch stands in, by rows of windows; -1 for dead rows."""
    at = tokens.cell // (cfg.window or FAR)
    return jnp.where(tokens.pos >= 0, at[..., 0] * FAR + at[..., 1], -1)


def turned(cfg: EncoderConfig, tokens: Tokens, *heads: Array) -> tuple[Array, ...]:
    """Queries or keys turned by the row and the column of their patch, where the tower has rotary positions."""
    if cfg.rope_theta is None:
        return heads
    r = cfg.head_dim // 4
    freq = np.tile(cfg.rope_theta ** (-np.arange(r) / r), 2).astype(np.float32)
    return tuple(rotate_by(x, jnp.maximum(tokens.cell, 0), freq, (0,) * r + (1,) * r) for x in heads)


def sight(cfg: EncoderConfig, i: int, tokens: Tokens) -> dict[str, Any]:
    """Who sees whom in layer i: everyone, or those of the same window (whose number takes the place of the order)."""
    if cfg.window is None or i in cfg.whole:
        return dict(q_pos=tokens.pos, k_pos=tokens.pos, causal=cfg.causal)
    at = windows(cfg, tokens)
    return dict(q_pos=at, k_pos=at, causal=True, window=1)


def attend(cfg: EncoderConfig, p, i: int, tokens: Tokens, needs: Needs, proportional: bool, key, impl: Impl, probs=None, normed=None):
    """(attention block's output [b n c] before the residual sum, evidence). `probs` [b h n n]: attend by these.

    Evidence `cls` of a tower of any picture size, which has no class row: what a row receives of all live ones on average.
    """
    y = before(cfg, p, tokens.x) if normed is None else normed
    q, k, v = (heads(cfg, linear(p, name, y)) for name in "qkv")
    live = tokens.pos >= 0
    size = jnp.where(live & (tokens.size > 0), tokens.size, 1.0)
    bias = jnp.broadcast_to(jnp.log(size)[:, None], k.shape[:3]) if proportional else None
    see: dict[str, Any] = sight(cfg, i, tokens) | {"bias": bias}
    to_q, to_k = turned(cfg, tokens, q, k)
    if probs is not None:
        out, lse = jnp.einsum("bhqk,bhkd->bhqd", probs.astype(v.dtype), v), None
    else:
        out, lse = attention(to_q, to_k, v, impl=impl, **see)
    block = linear(p, "o", out.transpose(0, 2, 1, 3).reshape(*y.shape[:2], -1))
    seen: dict[str, Any] = {"layer": jnp.full((), i, jnp.int32), "key": None if key is None else jax.random.fold_in(key, i)}
    if needs != Needs():
        lse = attention(to_q, to_k, k[..., :1], impl=impl, **see)[1] if lse is None else lse
        mean = needs.cls and cfg.rope_theta is not None
        asked = needs._replace(cls=False, received=True) if mean else needs
        seen |= observe(asked, to_q, to_k, lse, see, tokens=tokens) | {
            "keys": k if needs.keys else None,
            "values": v if needs.values else None,
            "hidden": tokens.x if needs.hidden else None,
            "weights": {name: p[name] for name in needs.weights} if needs.weights else None,
        }
        if mean:
            seen["cls"] = seen["received"] / jnp.maximum(jnp.sum(live, -1), 1).astype(jnp.float32)[:, None, None]
        if needs.queries is not None:
            seen["queries"] = moments(q, tokens.pos >= needs.queries)
        if needs.change:
            seen["change"] = change(y, block)[:, :, None]
    return block, Evidence(**seen)


def mixed(cfg: EncoderConfig, p, i: int, tokens: Tokens, recipe: Recipe, own, state, proportional: bool, impl: Impl, normed=None):
    """(attention block's output, state) of recipe.attention in the place of layer i's own; None where the layer keeps its own. `own`: of all layers."""
    if not isinstance(recipe.attention, Mixer) or cfg.causal or cfg.window is not None:
        raise ValueError(
            f"{recipe.attention.name} attends in the layers of a decoder, not of an encoder"  # type: ignore[union-attr]
            if not isinstance(recipe.attention, Mixer)
            else f"{recipe.attention.name} lets all rows see each other; this tower is causal={cfg.causal}, window={cfg.window}"
        )
    method = recipe.attention.layer(i, cfg.layers)
    if method is None:
        return None
    y = before(cfg, p, tokens.x) if normed is None else normed
    q, k, v = (heads(cfg, linear(p, name, y)) for name in "qkv")
    q, k = turned(cfg, tokens, q, k)
    size = jnp.where((tokens.pos >= 0) & (tokens.size > 0), tokens.size, 1.0) if proportional else jnp.ones(tokens.pos.shape, jnp.float32)
    bias = jnp.broadcast_to(jnp.log(size)[:, None], k.shape[:3]) if proportional else None
    attend = lambda q, k, v: attention(q, k, v, impl=impl, bias=bias, **sight(cfg, i, tokens))[0]
    out = lambda x: linear(p, "o", x.transpose(0, 2, 1, 3).reshape(*y.shape[:2], -1))
    grid = None if cfg.image is None or cfg.prefix else cfg.grid
    return method.mix(own[i] if own else {}, state, i, Layer(y, q, k, v, tokens.pos, size, grid, attend, out))


def join(cfg: EncoderConfig, p, x: Array, block: Array, n: int) -> Array:
    """The residual sum behind block n (1 attention, 2 MLP)."""
    x = x + (block * p[f"scale{n}"][None, None] if cfg.layer_scale else block)
    return norm(cfg, p, f"norm{n}", x) if cfg.post else x


def mlp(cfg: EncoderConfig, p, y: Array) -> Array:
    up = linear(p, "up", y)
    inner = act(cfg.act, linear(p, "gate", y)) * up if cfg.gated else act(cfg.act, up)
    return linear(p, "down", inner)


# --- parameters --------------------------------------------------------------------------------------------------------------


def shapes(cfg: EncoderConfig) -> dict[str, Any]:
    """Name -> shape of every array of `params`; layers as a tuple of dicts."""
    c, f = cfg.width, cfg.hidden
    norm = lambda name: {name: (c,)} | ({} if cfg.rms else {name + "_bias": (c,)})
    product = lambda name, a, b, bias=True: {name: (a, b)} | ({name + "_bias": (b,)} if bias else {})
    mlp = (product("gate", c, f) if cfg.gated else {}) | product("up", c, f) | product("down", f, c)
    inner = cfg.inner or c
    qkvo = {k: s for name in "qkv" for k, s in product(name, c, inner, cfg.qkv_bias).items()} | product("o", inner, c)
    layer = norm("norm1") | qkvo | norm("norm2") | mlp | ({"scale1": (c,), "scale2": (c,)} if cfg.layer_scale else {})
    out: dict[str, Any] = {"layers": (layer,) * cfg.layers}
    if cfg.vocab is not None:
        out |= {"embed": (cfg.vocab, c), "pos": (cfg.context, c)}
    else:
        out |= product("patch", math.prod(cfg.patch) * cfg.channels * cfg.frames, c, cfg.patch_bias)
        out |= {"pos": (cfg.cls + cfg.distilled + math.prod(cfg.grid), c)} if cfg.rope_theta is None else {}
        out |= {"cls": (c,)} if cfg.cls else {}
        out |= ({"dist": (c,)} if cfg.distilled else {}) | ({"registers": (cfg.registers, c)} if cfg.registers else {})
    out |= norm("stem_norm") if cfg.stem_norm else {}
    out |= norm("norm") if cfg.final_norm else {}
    wide = 2 * c if cfg.pool == "cls_mean" else c
    out |= product("head", wide, cfg.out, cfg.out_bias) if cfg.out is not None else {}
    out |= product("head_dist", c, cfg.out, cfg.out_bias) if cfg.pool == "cls_dist" and cfg.out is not None else {}
    if cfg.pool == "map":
        full = {k: s for name in "qkvo" for k, s in product(name, c, c).items()}
        out["map"] = {"probe": (c,)} | full | norm("norm") | mlp
    return out


def init(cfg: EncoderConfig, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: matrices N(0, 1/in), those that write the residual stream divided by sqrt(2 l), norms and scales 1, biases 0."""

    def draw(key, name, shape):
        if name.endswith("_bias"):
            return jnp.zeros(shape, dtype)
        if name.startswith(("norm", "stem_norm", "scale")):
            return jnp.ones(shape, dtype)
        std = (
            0.02
            if name in ("pos", "cls", "dist", "registers", "probe")
            else shape[0] ** -0.5 / (math.sqrt(2 * cfg.layers) if name in ("o", "down") else 1.0)
        )
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(cfg), is_leaf=blocks.is_shape)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([draw(k, path[-1].key, shape) for k, (path, shape) in zip(keys, leaves, strict=True)])
