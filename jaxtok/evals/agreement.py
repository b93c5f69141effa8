"""How near a method's next-token distributions are to the full model's, on the full model's own continuation."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def divergence(full: Float[Array, "*b vocab"], logits: Float[Array, "*b vocab"]) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """(KL(full || method) in nats, whether both put the same token first) from logits, in float32.

    KL = sum over the vocabulary of p_full (log p_full - log p_method), >= 0; a token that the full model rules out (-inf) adds 0.
    """
    a, b = (jax.nn.log_softmax(x.astype(jnp.float32), -1) for x in (full, logits))
    kl = jnp.sum(jnp.where(a > -jnp.inf, jnp.exp(a) * (a - b), 0.0), -1)
    return jnp.maximum(kl, 0.0), jnp.argmax(a, -1) == jnp.argmax(b, -1)


def mean_over(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Means of the rows of `values` [b t] over what `counted` [b t] marks; nan for a row with nothing."""
    number = counted.sum(1)
    total = np.where(counted, values, 0.0).sum(1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
