"""Attention to listed blocks of keys, written plainly in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def block_sparse(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    block_index: Int[Array, "b e nq m"],
    block_count: Int[Array, "b e nq"],
    *,
    q_pos: Int[Array, "b t"],
    k_pos: Int[Array, "b g s"],
    bias: Float[Array, "b g s"] | None = None,
    token_mask: Bool[Array, "b e nq m block_k"] | None = None,
    block_q: int,
    block_k: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b h t c"], Float[Array, "b h t"]]:
    """See `jaxtok_kernels.block_sparse.block_sparse`."""
    (h, t, d), s, m = q.shape[1:], k.shape[2], block_index.shape[3]
    heads = lambda x: jnp.repeat(x, h // x.shape[1], 1)
    within = jnp.arange(s, dtype=jnp.int32)[None, None, None, None] - block_index[..., None] * block_k  # [b e nq m s]
    used = jnp.arange(m, dtype=jnp.int32)[None, None, None] < block_count[..., None]
    listed = used[..., None] & (within >= 0) & (within < block_k)
    if token_mask is not None:
        listed = listed & jnp.take_along_axis(token_mask, jnp.clip(within, 0, block_k - 1), -1)
    listed = jnp.repeat(jnp.any(listed, 3), block_q, 2)[:, :, :t]  # [b e t s]
    wide = lambda x: heads(x.astype(jnp.float32))
    logit = jnp.einsum("bhtd,bhsd->bhts", wide(q), wide(k), precision="highest") * (d**-0.5 if scale is None else scale)
    logit = logit if softcap is None else softcap * jnp.tanh(logit / softcap)
    logit = logit if bias is None else logit + wide(bias)[:, :, None]
    mine, theirs = q_pos[:, None, :, None], heads(k_pos)[:, :, None]
    seen = heads(listed) & (mine >= 0) & (theirs >= 0)
    seen = seen & (theirs <= mine) if causal else seen
    seen = seen if window is None else seen & (mine - theirs < window)
    top = jnp.max(jnp.where(seen, logit, -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
    mass = jnp.where(seen, jnp.exp(jnp.where(seen, logit - jnp.where(top > -jnp.inf, top, 0.0), 0.0)), 0.0)
    total = jnp.sum(mass, -1, keepdims=True)
    live = total > 0
    norm = jnp.where(live, total, 1.0)
    out = jnp.einsum("bhts,bhsc->bhtc", mass / norm, wide(v), precision="highest")
    return out, jnp.where(live, jnp.where(live, top, 0.0) + jnp.log(norm), -jnp.inf)[..., 0]
