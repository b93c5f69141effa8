"""The grouped softmax of landmark attention, in blocks whose last key is the landmark."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.ops._chunked import bounded


def grouped_softmax(
    logit: Float[Array, "*B nb block"], seen: Bool[Array, "*B nb block"], own: Bool[Array, "*B nb"]
) -> tuple[Float[Array, "*B nb block"], Float[Array, "*B"]]:
    """Weights f32 of the keys of a list of blocks for each query, and the log of their normaliser.

        G0    = the query's own block's tokens and the landmarks of its other blocks;   P = softmax over G0
        own   token j:  P(j)              other block c, token j:  P(landmark_c) softmax_c(j)          landmarks: 0

    Two levels are one softmax over logit_j + logit_landmark - logsumexp_c for the tokens of other blocks. A block of which no token is
    seen, or whose landmark is not, counts for nothing; so does the own block's landmark. Weights sum to 1, or to 0 where nothing is
    seen (logarithm -inf). If every landmark's logit is its block's logsumexp, this is the plain softmax over the tokens.

    Source: arXiv:2305.16300; epfml/landmark-attention, lm_benchmark/models/landmark.py.
    """
    x = jnp.where(seen, bounded(logit.astype(jnp.float32), 1e37), -jnp.inf)  # what is added to them below stays finite
    tokens, gate = x[..., :-1], x[..., -1]
    top = _finite(jnp.max(tokens, -1, keepdims=True, initial=-jnp.inf))
    mass = jnp.sum(jnp.exp(tokens - top), -1)
    inside = top[..., 0] + jnp.log(jnp.where(mass > 0, mass, 1.0))
    shift = jnp.where((mass > 0) & (gate > -jnp.inf), _finite(gate) - inside, -jnp.inf)
    y = jnp.where(own[..., None], tokens, jnp.where(shift[..., None] > -jnp.inf, tokens + _finite(shift)[..., None], -jnp.inf))
    peak = _finite(jnp.max(y, (-2, -1), keepdims=True, initial=-jnp.inf))
    weight = jnp.exp(y - peak)
    total = jnp.sum(weight, (-2, -1), keepdims=True)
    some = total > 0
    weight = weight / jnp.where(some, total, 1.0)
    norm = jnp.where(some, peak + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)[..., 0, 0]
    return jnp.concatenate([weight, jnp.zeros_like(weight[..., :1])], -1), norm


def _finite(x: Array) -> Array:
    return jnp.where(x > -jnp.inf, x, 0.0)
