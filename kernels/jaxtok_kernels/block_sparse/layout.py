"""What the block-sparse kernels share: the static options, arrays cut into padded blocks, and the table seen from the keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

UNUSED = 2**31 - 1  # fills a row of the transposed table: sorts behind every entry


class Spec(NamedTuple):
    """The static options of a call."""

    block_q: int
    block_k: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    count: bool


class Tables(NamedTuple):
    """The integer arguments of a call, which have no gradient."""

    index: jax.Array  # i32 [b e nq max_blocks]
    count: jax.Array  # i32 [b e nq]
    q_pos: jax.Array  # i32 [b t]
    k_pos: jax.Array  # i32 [b g s]
    mask: jax.Array | None  # bool [b e nq max_blocks block_k]


def up(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def tiles(x, block: int, rows: int, width: int, fill=0):
    """[*B n c] -> [*B blocks rows width]: blocks of `block` rows, each filled up to [rows width]."""
    n, c = x.shape[-2:]
    blocks, lead = -(-n // block), [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [*lead, (0, blocks * block - n), (0, width - c)], constant_values=fill)
    x = x.reshape(*x.shape[:-2], blocks, block, width)
    return jnp.pad(x, [*lead, (0, 0), (0, rows - block), (0, 0)], constant_values=fill)


def untile(x, block: int, n: int, c: int):
    """The array [*B n c] that `tiles` cut up."""
    x = x[..., :block, :c]
    return x.reshape(*x.shape[:-3], -1, c)[..., :n, :]


def lanes(x, block: int, width: int, fill=0):
    """[*B n] -> [*B blocks 1 width]: blocks of values along the last axis."""
    return jnp.swapaxes(tiles(x[..., None], block, width, 1, fill), -1, -2)


def unlane(x, block: int, n: int):
    """The array [*B n] that `lanes` cut up: [*B blocks width] -> [*B n]."""
    x = x[..., :block]
    return x.reshape(*x.shape[:-2], -1)[..., :n]


def visible(spec: Spec, mine, theirs):
    """Which keys at `theirs` a query at `mine` sees; the two broadcast."""
    seen = (theirs >= 0) & (mine >= 0)
    seen = seen & (theirs <= mine) if spec.causal else seen
    return seen if spec.window is None else seen & (mine - theirs < spec.window)


def transpose(index, count, g: int, nk: int):
    """i32 [b g nk 1 + (e/g) nq]: how many query blocks list each key block, then which.

    An entry is (list * nq + query block) * max_blocks + place in that list, with the list counted within its KV head; ascending. A key
    block may be listed by every query block, so no smaller static width is safe: 4 b e nk nq bytes, 34 MB at 128k tokens, 8 lists, 128-blocks.
    """
    b, e, nq, m = index.shape
    share = e // g
    place = jnp.arange(m, dtype=jnp.int32)[None, None, None]
    index = jnp.where(place < count[..., None], index, nk).reshape(b, g, share * nq, m)
    entry = jnp.arange(share * nq * m, dtype=jnp.int32).reshape(1, 1, share * nq, m)
    at = jnp.indices((b, g, share * nq), sparse=True)
    b_, g_, i_ = (x[..., None] for x in at)
    table = jnp.full((b, g, nk, share * nq), UNUSED, jnp.int32)
    table = table.at[b_, g_, index, i_].set(jnp.broadcast_to(entry, index.shape), mode="drop")
    many = jnp.sum(table < UNUSED, -1, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([many, jnp.sort(table, -1)], -1)
