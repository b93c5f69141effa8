"""The arrays of a decoder's layer, for the model and for methods that have layers of their own."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Halves(NamedTuple):
    """What a decoder's layer is made of, as functions of rows [b n c]; a method puts them together anew."""

    normed: Callable[[jax.Array], jax.Array]  # x -> the rows that q, k and v are made of
    qkv: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]  # x -> q [b h n d], k, v [b g n d], after norm and rotary embedding
    out: Callable[[jax.Array, jax.Array], jax.Array]  # x, o [b h n d] -> x + the output projection of o
    mlp: Callable[[jax.Array], jax.Array]  # x -> x + MLP of normed x
    using: Callable[[dict[str, jax.Array]], "Halves"]  # the same with other weights, named as a layer's


def layer_shapes(cfg) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays of one layer."""
    c, d, f, q, kv = cfg.width, cfg.head_dim, cfg.hidden, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    out: dict[str, tuple[int, ...]] = {"attn_norm": (c,), "q": (c, q), "k": (c, kv), "v": (c, kv), "o": (q, c)}
    out |= {"mlp_norm": (c,), "gate": (c, f), "up": (c, f), "down": (f, c)}
    if cfg.qkv_bias:
        out |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if cfg.qk_norm:
        out |= {"q_norm": (d,), "k_norm": (d,)}
    if cfg.sandwich:
        out |= {"attn_post_norm": (c,), "mlp_post_norm": (c,)}
    return out


def draw(cfg, key: jax.Array, name: str, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A layer's array at the start: matrices N(0, 1/in), those that write the residual stream (o, down) divided by sqrt(2 l), norms 1,
    biases 0."""
    if len(shape) == 1:
        return jnp.full(shape, 1.0 - cfg.norm_offset if name.endswith("norm") else 0.0, dtype)
    std = shape[0] ** -0.5 / (math.sqrt(2 * cfg.layers) if name in ("o", "down") else 1.0)
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def draw_layer(cfg, key: jax.Array, mlp: bool = True) -> dict[str, jax.Array]:
    """The arrays of a layer at the start, or (mlp=False) those of its attention alone."""
    inside = ("mlp_norm", "gate", "up", "down", "mlp_post_norm")
    shapes = {name: shape for name, shape in layer_shapes(cfg).items() if mlp or name not in inside}
    return {name: draw(cfg, jax.random.fold_in(key, i), name, shape) for i, (name, shape) in enumerate(sorted(shapes.items()))}
