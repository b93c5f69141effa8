"""The rotary embedding as an operation on keys: place them, move them, take them back."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate_by(
    x: Float[Array, "b e n d"], ids: Int[Array, "*i"], freq: Float[Array | np.ndarray, " r"], axes: Sequence[int] | None = None
) -> Float[Array, "b e n d"]:
    """Rotate channel i against channel i + r (half-split convention) of each head by ids * freq[i]; channels from 2r on pass.

    `ids` are rotary ids [b n], or [b n a] (a rotary axes), or [b e n a] when heads differ. `axes` names for each of the r
    frequencies the rotary axis it follows (M-RoPE); None = axis 0, which needs a = 1. Negative ids (dead rows) are harmless.
    Computed in float32. rotate_by(., -ids) undoes it, and rotations add: re-placing a key from i to j is ids = j - i.
    """
    if freq.ndim != 1 or x.ndim != 4 or ids.ndim not in (2, 3, 4):
        raise ValueError(
            f"freq, x, ids are {[list(a.shape) for a in (freq, x, ids)]}; they must be [r], [b e n d] and [b n], [b n a] or [b e n a]"
        )
    r = freq.shape[0]
    if ids.ndim == 2:
        ids = ids[..., None]
    if ids.ndim == 3:
        ids = ids[:, None]
    a = ids.shape[-1]
    if axes is None and a != 1:
        raise ValueError(f"ids have {a} rotary axes; name the axis of each of the {r} frequencies with axes=")
    if axes is not None and (len(axes) != r or min(axes) < 0 or max(axes) >= a):
        raise ValueError(f"axes has {len(axes)} entries in {min(axes)}..{max(axes)}; need {r} entries, each in 0..{a - 1}")
    place = ids if axes is None else ids[..., np.asarray(axes)]
    angle = place.astype(jnp.float32) * jnp.asarray(freq)[None, None, None]
    return _rotate(x, jnp.cos(angle), jnp.sin(angle))


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    r = cos.shape[-1]
    y = x[..., : 2 * r].astype(jnp.float32)
    lo, hi = y[..., :r], y[..., r:]
    y = jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x.dtype)
    return y if 2 * r == x.shape[-1] else jnp.concatenate([y, x[..., 2 * r :]], axis=-1)


def turn(
    x: Float[Array, "b e n d"], ids: Int[Array, "b e n"], freqs: Float[Array, " r"], most: int | None = None
) -> Float[Array, "b e n d"]:
    """`rotate_by` with an id for each head and row: a stored key moves from id p to p' by turn(k, p' - p, freqs).

    most: promises ids in 0 .. most - 1 (others are moved there): cosines and sines are worked out once for an id, not for each row.
    """
    if most is None:
        return rotate_by(x, ids[..., None], freqs)
    angle = jnp.arange(most, dtype=jnp.float32)[:, None] * freqs[None]
    at = jnp.clip(ids, 0, most - 1)
    return _rotate(x, jnp.cos(angle)[at], jnp.sin(angle)[at])
