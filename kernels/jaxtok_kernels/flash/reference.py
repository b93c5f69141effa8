"""Attention over positions and segments, written plainly in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def logits(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    *,
    q_pos: Int[Array, "b t"],
    k_pos: Int[Array, "b s"] | Int[Array, "b g s"],
    bias: Float[Array, "b g s"] | None = None,
    q_segment: Int[Array, "b t"] | None = None,
    k_segment: Int[Array, "b s"] | Int[Array, "b g s"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
) -> tuple[Float[Array, "b h t s"], Bool[Array, "b h t s"]]:
    """The logits, and which pairs are visible."""
    (b, h, t, d), (g, s) = q.shape, k.shape[1:3]
    wide = lambda x: jnp.repeat(jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (b, g, s)), h // g, 1)[:, :, None]
    mine, theirs = q_pos[:, None, :, None], wide(k_pos)
    see = (mine >= 0) & (theirs >= 0)
    see = see & (theirs <= mine) if causal else see
    see = see if window is None else see & (mine - theirs < window)
    if q_segment is not None and k_segment is not None:
        see = see & (q_segment[:, None, :, None] == wide(k_segment))
    if diagonal is not None:
        see = see & (jnp.arange(s)[None, None, None] <= jnp.arange(t)[None, None, :, None] + diagonal)
    product = jnp.einsum("bhtd,bhsd->bhts", q.astype(jnp.float32), jnp.repeat(k, h // g, 1).astype(jnp.float32), precision="highest")
    logit = jnp.where(see, product, 0.0) * (d**-0.5 if scale is None else scale)  # a product of what lies in dead rows may overflow
    logit = logit if softcap is None else softcap * jnp.tanh(logit / softcap)
    return (logit if bias is None else logit + wide(bias)), jnp.broadcast_to(see, logit.shape)


def flash(q, k, v, **options) -> tuple[Float[Array, "b h t c"], Float[Array, "b h t"]]:
    """See `jaxtok_kernels.flash.flash`; out is float32. Its gradient is the automatic one."""
    logit, see = logits(q, k, **options)
    some = see.any(-1, keepdims=True)
    top = jnp.where(some, jnp.max(jnp.where(see, logit, -jnp.inf), -1, keepdims=True), 0.0)
    mass = jnp.where(see, jnp.exp(jnp.where(see, logit - top, 0.0)), 0.0)
    total = jnp.where(some, jnp.sum(mass, -1, keepdims=True), 1.0)
    values = jnp.repeat(v, q.shape[1] // k.shape[1], 1).astype(jnp.float32)
    out = jnp.einsum("bhts,bhsc->bhtc", mass / total, values, precision="highest")
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
