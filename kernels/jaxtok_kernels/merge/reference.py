"""The best match of each row and the merge of rows into groups, written plainly in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def match(a: Float[Array, "b n d"], c: Float[Array, "b m d"], bias: Float[Array, "b m"] | None = None):
    """See `jaxtok_kernels.merge.match`."""
    score = jnp.einsum("bnd,bmd->bnm", a.astype(jnp.float32), c.astype(jnp.float32), precision="highest")
    score = score if bias is None else score + bias[:, None]
    best = jnp.max(score, -1)
    return best, jnp.where(best > -jnp.inf, jnp.argmax(score, -1).astype(jnp.int32), -1)


def segment_merge(x: Float[Array, "b n c"], weight: Float[Array, "b n"], assign: Int[Array, "b n"], m: int, *, mean: bool = True):
    """See `jaxtok_kernels.merge.segment_merge`."""
    mine = (assign[:, None] == jnp.arange(m, dtype=jnp.int32)[None, :, None]) & (weight != 0)[:, None]
    share = jnp.where(mine, weight[:, None], 0.0)
    if mean:
        mass = jnp.sum(share, -1, keepdims=True)
        share = share / jnp.where(mass > 0, mass, 1.0)
    rows = jnp.where(jnp.any(mine, 1)[..., None], x.astype(jnp.float32), 0.0)
    out = jnp.einsum("bmn,bnc->bmc", share, rows, precision="highest")
    return out.astype(x.dtype) if mean else out
