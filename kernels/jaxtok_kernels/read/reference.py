"""Attention to listed blocks of a cache, written plainly in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def read(
    q: Float[Array, "b e r d"],
    q_pos: Int[Array, "b r"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    k_pos: Int[Array, "b g s"],
    bias: Float[Array, "b g s"],
    index: Int[Array, "b e m"] | None,
    ids: Int[Array, "b e n"] | None = None,
    freqs: Float[Array, " f"] | None = None,
    *,
    block: int = 1,
    stride: int | None = None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "b e r c"], Float[Array, "b e r"]]:
    """See `jaxtok_kernels.read.read`."""
    (b, g, s, _), e = k.shape, q.shape[1]
    if index is None:
        index, block, stride = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None, None], (b, e, s)), 1, 1
    within = jnp.arange(s, dtype=jnp.int32)[None, None, :, None] - index[:, :, None] * (block if stride is None else stride)
    listed = jnp.any((index[:, :, None] >= 0) & (within >= 0) & (within < block), -1)  # [b e s]
    wide = lambda x: jnp.repeat(x, e // g, 1)
    keys, values, at, extra = (wide(x) for x in (k.astype(jnp.float32), v.astype(jnp.float32), k_pos, bias))
    if ids is not None and freqs is not None:
        slot = (index[..., None] * (block if stride is None else stride) + jnp.arange(block, dtype=jnp.int32)[None, None, None]).reshape(
            b, e, -1
        )
        slot = jnp.where(jnp.repeat(index, block, -1) < 0, s, slot)
        b_, e_ = jnp.indices((b, e), sparse=True)
        at_ids = jnp.zeros((b, e, s + 1), jnp.int32).at[b_[..., None], e_[..., None], slot].set(ids)[..., :s]
        angle, f = at_ids[..., None].astype(jnp.float32) * freqs[None, None, None], freqs.shape[0]
        x, y = keys[..., :f], keys[..., f : 2 * f]
        turned = x * jnp.cos(angle) - y * jnp.sin(angle), y * jnp.cos(angle) + x * jnp.sin(angle)
        keys = jnp.concatenate([*turned, keys[..., 2 * f :]], -1).astype(k.dtype).astype(jnp.float32)
    logit = jnp.einsum("berd,besd->bers", q.astype(jnp.float32), keys, precision="highest") * scale
    logit = logit if softcap is None else softcap * jnp.tanh(logit / softcap)
    logit = logit + extra[:, :, None]
    mine, theirs = q_pos[:, None, :, None], at[:, :, None, :]
    seen = (theirs >= 0) & (theirs <= mine) & listed[:, :, None]
    seen = seen if window is None else seen & (mine - theirs < window)
    top = jnp.max(jnp.where(seen, logit, -jnp.inf), -1, keepdims=True)
    mass = jnp.where(seen, jnp.exp(logit - jnp.where(top > -jnp.inf, top, 0.0)), 0.0)
    total = jnp.sum(mass, -1, keepdims=True)
    out = jnp.einsum("bers,besc->berc", mass / jnp.where(total > 0, total, 1.0), values, precision="highest")
    return out, jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)[..., 0]
