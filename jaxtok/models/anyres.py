"""Pictures in crops, as LLaVA-NeXT takes them ("anyres"): the grid of crops of a picture, which of its patches count, how they stand.

A picture of height and width `size` is scaled into the best of several resolutions (`pinpoints`, multiples of a crop's sides), padded
there on both sides and cut into a grid of crops; it is also squeezed into one more, the thumbnail. The rows of a picture are those of the
thumbnail, then by raster the patches of the joined crops without the padding, with a learned newline row at the end of each line.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxtok.core.types import SPECIAL, Tokens
from jaxtok.models import crops
from jaxtok.models.vit import Encoded

MOST_SIDE = 2**15 - 1  # pixels
Pinpoints = tuple[tuple[int, int], ...]  # height, width
Size = Sequence[Any] | np.ndarray  # height, width


# --- on the host -------------------------------------------------------------------------------------------------------


def best(pinpoints: Pinpoints, size: Size) -> tuple[int, int]:
    """The resolution in which most of the picture's pixels stay, among those the smallest, of equals the first; in Python's floats, as
    transformers decides it."""
    height, width = (int(side) for side in size)
    if not 1 <= min(height, width) <= max(height, width) <= MOST_SIDE:
        raise ValueError(f"a picture of {height} by {width} pixels; sides go from 1 to {MOST_SIDE}")

    def fit(point: tuple[int, int]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        stay = min(int(width * scale) * int(height * scale), width * height)
        return stay, stay - point[0] * point[1]

    return max(pinpoints, key=fit)


def placeholders(pinpoints: Pinpoints, image: tuple[int, int], grid: tuple[int, int], size: Size) -> int:
    """How many placeholders stand for a picture; a crop is `image` pixels and a `grid` of patches."""
    point = best(pinpoints, size)
    lines, wide = (p // side * g for p, side, g in zip(point, image, grid, strict=True))
    _, (lines, wide) = _window(int(size[0]), int(size[1]), lines, wide, lambda c, a, b: a if c else b)
    return grid[0] * grid[1] + lines * (wide + 1)


def _window(height: Any, width: Any, lines: Any, wide: Any, where: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((lines, columns) of padding before the picture, (lines, columns) of it) among `lines` x `wide` joined patches; whole numbers."""
    flat = width * lines > wide * height
    top = where(flat, (lines - height * wide // width) // 2, 0)
    left = where(flat, 0, (wide - width * lines // height) // 2)
    return (top, left), (lines - 2 * top, wide - 2 * left)


def most(pinpoints: Pinpoints, image: tuple[int, int], grid: tuple[int, int], parts: int) -> tuple[int, int]:
    """(rows of a picture in at most `parts` sub-images, newlines among them), at most."""
    table = [(y // image[0], x // image[1]) for y, x in pinpoints]
    table = [(y * grid[0], x * grid[1]) for y, x in table if y * x < parts]
    if not table:
        raise ValueError(f"pictures in {parts} sub-images; the smallest of {list(pinpoints)} has more, thumbnail included")
    return grid[0] * grid[1] + max(y * (x + 1) for y, x in table), max(y for y, _ in table)


# --- in the program ----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How pictures [b] are laid out; all 0 where there is none: size 0, or more crops than there is room for."""

    grid: Int[Array, "b 2"]  # crops: rows and columns
    skip: Int[Array, "b 2"]  # lines and columns of padding before the picture, in joined patches
    shape: Int[Array, "b 2"]  # lines and columns of the picture
    many: Int[Array, " b"]  # rows, those of the thumbnail and the newlines too


def layout(pinpoints: Pinpoints, image: tuple[int, int], grid: tuple[int, int], sizes: Int[Array, "b 2"], parts: int) -> Layout:
    """That of pictures whose original `sizes` (height, width) may be traced; `parts` sub-images each at most, thumbnail included."""
    fits = jnp.all((sizes > 0) & (sizes <= MOST_SIDE), -1)
    whole = jnp.clip(sizes.astype(jnp.int32), 1, MOST_SIDE)
    height, width = whole[:, :1], whole[:, 1:]
    y, x = jnp.asarray(pinpoints, jnp.int32)[None].transpose(2, 0, 1)
    p, q = (jnp.where(x * height < y * width, a, b) for a, b in ((x, y), (width, height)))
    there = _scaled(jnp.broadcast_to(whole[:, None], (*q.shape, 2)), p[..., None], q[..., None])
    stay = jnp.minimum(there[..., 0] * there[..., 1], height * width)
    area = jnp.where(stay == jnp.max(stay, -1, keepdims=True), y * x, jnp.iinfo(jnp.int32).max)
    cut = (jnp.asarray(pinpoints, jnp.int32) // jnp.asarray([image], jnp.int32))[jnp.argmin(area, -1)]
    height, width = whole[:, 0], whole[:, 1]
    fits = fits & (cut[:, 0] * cut[:, 1] < parts)
    skip, shape = _window(height, width, cut[:, 0] * grid[0], cut[:, 1] * grid[1], jnp.where)
    many = grid[0] * grid[1] + shape[0] * (shape[1] + 1)
    none = lambda a: jnp.where(fits.reshape(-1, *[1] * (a.ndim - 1)), a, 0).astype(jnp.int32)
    return Layout(none(cut), none(jnp.stack(skip, -1)), none(jnp.stack(shape, -1)), none(many))


def _scaled(a: Array, p: Array, q: Array) -> Array:
    """int(a * (p / q)) in 64-bit floats, by whole numbers from 1 to 2**15 - 1: where the true product is whole, it may be one less.

    p / q is rounded to 53 bits: down by r / (q 2**s), if r = p 2**s mod q is under q / 2. Then a whole product k comes out below k where
    a r / (q 2**s) is more than half the distance of k to the next smaller float, 2**(e - 52), e the exponent of that float.
    """
    a, p, q = (jnp.asarray(v).astype(jnp.uint32) for v in (a, p, q))
    bits = lambda v: 32 - lax.clz(v).astype(jnp.int32)
    shift = lambda v, by: v << jnp.maximum(by, 0).astype(jnp.uint32)
    k = a * p // q
    t = bits(p) - bits(q)
    t = t - (shift(p, -t) < shift(q, t)).astype(jnp.int32)  # floor(log2(p / q))
    r, left = p % q, 52 - t
    for _ in range(5):  # at most 67 places
        step = jnp.minimum(left, 15)
        r, left = shift(r, step) % q, left - step
    e = bits(jnp.maximum(k, 1) - 1) - 1
    low = (a * p % q == 0) & (2 * r < q) & (4 * a * r > shift(q, e - t + 1))
    return (k - low.astype(jnp.uint32)).astype(jnp.int32)


def places(plan: Layout, grid: tuple[int, int], parts: int) -> Int[Array, "b p n"]:
    """The place of each patch of each sub-image among the rows of its picture; -1 = padding."""
    y, x = (jnp.asarray(i.reshape(1, 1, -1), jnp.int32) for i in np.indices(grid))
    pick = lambda a, i: a[:, i, None, None]
    crop = jnp.arange(parts - 1, dtype=jnp.int32)[None, :, None]
    across = jnp.maximum(pick(plan.grid, 1), 1)
    y = y + crop // across * grid[0] - pick(plan.skip, 0)
    x = x + crop % across * grid[1] - pick(plan.skip, 1)
    inside = (y >= 0) & (x >= 0) & (y < pick(plan.shape, 0)) & (x < pick(plan.shape, 1)) & (crop < pick(plan.grid, 0) * across)
    n = grid[0] * grid[1]
    first = jnp.where(plan.many[:, None, None] > 0, jnp.arange(n, dtype=jnp.int32)[None, None], -1)
    return jnp.concatenate([first, jnp.where(inside, n + y * (pick(plan.shape, 1) + 1) + x, -1)], 1)


def join(found: Encoded, place: Int[Array, "b p n"], cols: int, *, several: bool, with_cls: bool) -> Encoded:
    """The rows of the sub-images of each picture side by side (`crops.join`), without the padding.

    found: [b*p ...] of an encoder whose patches are by `cols` columns, in the order of the batch. A merged row that stands on padding
    stands on its first patch of the picture instead; it goes where it has none.
    """
    b, p, n = place.shape
    tokens, flat = found.tokens, place.reshape(b * p, n)
    prefix = tokens.source.shape[1] - n
    row = jnp.arange(tokens.pos.shape[1], dtype=jnp.int32)[None]
    own = tokens.pos - prefix
    special = tokens.kind == SPECIAL
    counts = lambda i: jnp.take_along_axis(flat, jnp.clip(i, 0, n - 1), 1) >= 0
    now = jnp.where(flat >= 0, tokens.source[:, prefix:], -1)
    patch = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), now.shape)
    rows = jnp.where(now < 0, row.shape[1], now)
    first = jax.vmap(lambda r, j: jnp.full((row.shape[1] + 1,), n, jnp.int32).at[r].min(j)[:-1])(rows, patch)
    home = jnp.where(counts(own), own, first)
    live = (tokens.pos >= 0) & jnp.where(special, jnp.any(flat >= 0, -1, keepdims=True), home < n)
    cell = jnp.where(special[..., None], tokens.cell, jnp.stack([home // cols, home % cols], -1))
    return crops.join(
        Encoded(tokens._replace(pos=jnp.where(live, tokens.pos, -1), cell=cell), found.evidence), p, several=several, with_cls=with_cls
    )


def lay(tokens: Tokens, plan: Layout, place: Int[Array, "b p n"], cols: int, newline: Float[Array, " c"], lines: int) -> Tokens:
    """The rows of each picture as they stand before a decoder, [b m + lines]: `pos` is a row's place, `source` goes by places.

    tokens: what is left of `join`. Crop rows and newlines stand by place, the thumbnail's rows first, in the order they have. A class row
    stands at the first row of its sub-image that counts.
    """
    b, m = tokens.pos.shape
    p, n = place.shape[1:]
    flat = place.reshape(b, p * n)
    crop = jnp.maximum(tokens.segment, 0)
    at = jnp.take_along_axis(flat, jnp.clip(crop * n + tokens.cell[..., 0] * cols + tokens.cell[..., 1], 0, p * n - 1), 1)
    start = jnp.min(jnp.where(place >= 0, place, jnp.iinfo(jnp.int32).max), -1)
    at = jnp.where(tokens.kind == SPECIAL, jnp.take_along_axis(start, crop, 1), at)
    at = jnp.where(tokens.pos >= 0, at, -1)
    y, wide = jnp.arange(lines, dtype=jnp.int32)[None], plan.shape[:, 1:]
    ends = jnp.where(y < plan.shape[:, :1], n + y * (wide + 1) + wide, -1)
    key = jnp.concatenate([jnp.where((crop == 0) & (at >= 0), 0, at), ends], 1)
    order = jnp.argsort(key, axis=-1, stable=True).astype(jnp.int32)
    back = jnp.argsort(order, axis=-1).astype(jnp.int32)
    both = lambda a, x: jnp.take_along_axis(
        jnp.concatenate([a, jnp.broadcast_to(jnp.asarray(x, a.dtype), (b, lines, *a.shape[2:]))], 1),
        order.reshape(b, -1, *[1] * (a.ndim - 2)),
        1,
    )
    pos = both(at, ends)
    prefix = tokens.source.shape[1] // p - n
    now = tokens.source.reshape(b, p, -1)[:, :, prefix:].reshape(b, p * n)
    now = jnp.where(now < 0, -1, jnp.take_along_axis(back, jnp.maximum(now, 0), 1))
    rows = p * n + lines
    targets = jnp.concatenate([flat, ends], 1)
    targets = jnp.where(targets < 0, rows, targets)
    source = jnp.full((b, rows), -1, jnp.int32).at[jnp.arange(b)[:, None], targets].set(jnp.concatenate([now, back[:, m:]], 1), mode="drop")
    return tokens._replace(
        x=both(tokens.x, newline),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=jnp.where(pos >= 0, both(tokens.size, 1.0), 0.0),
        kind=both(tokens.kind, SPECIAL),
        segment=both(tokens.segment, -1),
        cell=both(tokens.cell, -1),
        source=source,
        score=None if tokens.score is None else both(tokens.score, 0.0),
    )
