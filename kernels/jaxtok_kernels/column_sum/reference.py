"""Column sums of the attention matrix, written plainly in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok_kernels.flash.reference import logits


def column_sum(q, k, lse, **options) -> Float[Array, "b h s"]:
    """See `jaxtok_kernels.column_sum.column_sum`."""
    logit, see = logits(q, k, **options)
    saved = jnp.where(lse > -jnp.inf, lse, 0.0)[..., None]
    return jnp.sum(jnp.where(see, jnp.exp(jnp.where(see, logit - saved, 0.0)), 0.0), 2)
