"""An image in several sub-images: what an encoder makes of each, side by side in one sequence."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.types import CROP, IMAGE, SPECIAL, Evidence, Tokens
from jaxtok.models.vit import Encoded

BY_ROW = {
    "cls": -1,
    "received": -1,
    "peak": -1,
    "looked": -1,
    "keys": -2,
    "values": -2,
}  # where a field's token axis is; heads stand before it


def join(encoded: Encoded, crops: int, *, several: bool = False, with_cls: bool = False) -> Encoded:
    """b * crops sequences of n rows to b sequences of crops * n: the thumbnail (crop 0) first, then the crops, in the order of the batch.

    `segment` is the crop's number, kind IMAGE becomes CROP behind the thumbnail, `cell` stays the crop's own; orders run on, rotary ids
    follow them. Rows of kind SPECIAL (class rows) die, unless `with_cls`. several: the evidence leads with an axis of layers. Evidence by
    row stands side by side, `lead` is [b h crops d]; what has no such form (whole matrices, last rows, moments) is left out.
    ValueError unless the batch is a multiple of `crops`.
    """
    check.count("crops", crops)
    tokens, old = encoded
    many, n = tokens.pos.shape
    if many % crops:
        raise ValueError(f"{many} sequences are not images in {crops} crops each; give a multiple")
    b = many // crops
    flat = lambda x: x.reshape(b, crops * n, *x.shape[2:])
    number = jnp.broadcast_to(jnp.arange(crops, dtype=jnp.int32)[:, None], (crops, n)).reshape(1, -1)
    kind = flat(tokens.kind)
    live = flat(tokens.pos >= 0) & ((kind != SPECIAL) | with_cls)
    pos = jnp.where(live, jnp.cumsum(live, -1, dtype=jnp.int32) - 1, -1)
    rows = tokens.source.shape[1]
    shift = (jnp.arange(crops, dtype=jnp.int32) * n)[None, :, None]
    source = tokens.source.reshape(b, crops, rows)
    source = jnp.where(source >= 0, source + shift, -1).reshape(b, crops * rows)
    alive = jnp.take_along_axis(live, jnp.maximum(source, 0), 1)
    out = Tokens(
        x=flat(tokens.x),
        pos=pos,
        rope=jnp.broadcast_to(jnp.maximum(pos, 0)[..., None], (*pos.shape, tokens.rope.shape[-1])),
        size=jnp.where(live, flat(tokens.size), 0.0),
        kind=jnp.where((kind == IMAGE) & (number > 0), jnp.int8(CROP), kind),
        segment=jnp.broadcast_to(number, pos.shape),
        cell=flat(tokens.cell),
        source=jnp.where(alive, source, -1),
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros((b,), jnp.int32),
        lost=jnp.sum(tokens.lost.reshape(b, crops), -1),
        score=None if tokens.score is None else flat(tokens.score),
    )
    return Encoded(out, _evidence(old, crops, int(several)))


def _evidence(old: Evidence, crops: int, at: int) -> Evidence:
    """`at`: the batch axis."""

    def side(x: jax.Array, axis: int) -> jax.Array:
        """The crops of an image along (or, behind all but the last axis, before) a later axis."""
        axis = x.ndim + axis
        split = x.reshape(*x.shape[:at], -1, crops, *x.shape[at + 1 :])
        moved = jnp.moveaxis(split, at + 1, axis)  # now right before the token axis
        return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

    new: dict[str, Any] = {name: side(x, axis) for name, axis in BY_ROW.items() if (x := getattr(old, name)) is not None}
    if old.hidden is not None:
        new["hidden"] = side(old.hidden, -2)
    if old.lead is not None:
        lead = old.lead.reshape(*old.lead.shape[:at], -1, crops, *old.lead.shape[at + 1 :])
        new["lead"] = jnp.moveaxis(lead, at + 1, -2)
    return Evidence(**new, layer=old.layer, key=old.key)
