"""Where chunks of keys begin: the logits of DHSA's predictor. Source: arXiv:2510.24606; xiongsiheng/DHSA, legacy/boundary_predictor."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check


def init(key: jax.Array, channels: int, width: int = 4, hidden: int = 256) -> dict[str, jax.Array]:
    """A random predictor for keys of `channels` channels (all KV heads side by side) that looks at `width` keys on both sides."""
    for name, value in (("channels", channels), ("width", width), ("hidden", hidden)):
        check.count(name, value)
    shapes = {"depth": (width, channels), "point": (channels, hidden), "into": (4 * hidden + 1, hidden), "out": (hidden, 1)}
    draw = lambda i, shape: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32) * shape[0] ** -0.5
    out = {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    return out | {name + "_bias": jnp.zeros(shape[-1], jnp.float32) for name, shape in shapes.items()}


def boundary_logits(p, k: Float[Array, "b g n d"], live: Bool[Array, "b n"]) -> Float[Array, "b n"]:
    """How likely a chunk begins at each row, from the `width` keys before it and from it on; zeros past the ends. Higher = likelier."""
    w, x = p["depth"].shape[0], jnp.where(live[:, None, :, None], k.astype(jnp.float32), 0.0)
    x = jnp.moveaxis(x, 1, 2).reshape(k.shape[0], k.shape[2], -1)
    n, x = x.shape[1], jnp.pad(x, ((0, 0), (w, w), (0, 0)))
    y = sum(x[:, i : i + n + w] * p["depth"][i][None, None] for i in range(w)) + p["depth_bias"][None, None]
    y = jax.nn.relu(jax.nn.relu(y) @ p["point"] + p["point_bias"][None, None])
    left, right = y[:, :n], y[:, w : w + n]
    lengths = jnp.linalg.norm(left, axis=-1, keepdims=True) * jnp.linalg.norm(right, axis=-1, keepdims=True)
    near = jnp.sum(left * right, -1, keepdims=True) / jnp.maximum(lengths, 1e-8)
    y = jnp.concatenate([left, right, jnp.abs(left - right), left * right, near], -1)
    y = jax.nn.relu(y @ p["into"] + p["into_bias"][None, None])
    return (y @ p["out"] + p["out_bias"][None, None])[..., 0]
