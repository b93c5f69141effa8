"""Qwen2.5-VL as pure functions: pictures of any size, their 2 x 2 merged patches in the text, rotary ids of three axes.

`embed` turns pictures and token ids into the rows of the decoder (the tower reduced by `recipe.vit`, its merged output by
`recipe.select`); what follows is the decoder's: `decoder.prefill(cfg.text, params, tokens, recipe, new=...)`. Parameters are the decoder's,
and beside them

    "vision": those of `encoder.init`,  "projector": norm [v], up [4v 4v], up_bias, down [4v c], down_bias

One compiled program serves pictures of all sizes under a static number of patches: which window and which 2 x 2 unit a patch belongs to is
worked out from its `cell`, and a windowed layer attends by window numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import POSITIONS, gather, move, reduce
from jaxtok.core.select import from_index, pack
from jaxtok.core.types import IMAGE, Evidence, Needs, Tokens
from jaxtok.models import blocks, decoder, encoder, vit
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.ops.attention import Impl

PLAIN = Recipe()
FIELDS = {"received": -1, "cls": -1, "looked": -1, "keys": -2, "values": -2, "hidden": -2, "change": -3}  # where the token axis is


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVlConfig:
    """Qwen2.5-VL: a windowed tower of any picture size, a merger of 2 x 2 patches, a decoder with three rotary axes."""

    family: str = "qwen2_5_vl"  # Hugging Face model_type
    vision: EncoderConfig
    text: Config
    image_token: int  # the placeholder's id
    video_token: int | None = None  # of videos, which are not taken; kept for saving
    ends: tuple[int, int] | None = None  # the ids before and behind a picture's placeholders; kept for saving

    def __post_init__(self):
        if self.vision.rope_theta is None or self.vision.patch[0] != self.vision.patch[1]:
            raise ValueError("vision is no tower of any picture size; give one with rope_theta and square patches")
        if not self.text.mrope:
            raise ValueError("text has one rotary axis; give mrope, the frequencies of each of three")

    @property
    def patch(self) -> int:
        """Values of a patch."""
        return self.vision.channels * self.vision.frames * self.vision.patch[0] ** 2


def shapes(cfg: QwenVlConfig) -> dict[str, Any]:
    """Name -> shape of every array of `params`."""
    v, c = cfg.vision.width, cfg.text.width
    wide = v * cfg.vision.merge**2
    projector = {"norm": (v,), "up": (wide, wide), "up_bias": (wide,), "down": (wide, c), "down_bias": (c,)}
    return blocks.shapes(cfg.text) | {"vision": encoder.shapes(cfg.vision), "projector": projector}


def init(cfg: QwenVlConfig, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters, as those of the parts; the merger's matrices N(0, 1/in)."""
    a, b, c, d = jax.random.split(key, 4)
    draw = lambda key, shape: (shape[0] ** -0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    want = shapes(cfg)["projector"]
    projector = {"up": draw(c, want["up"]), "down": draw(d, want["down"]), "norm": jnp.ones(want["norm"], dtype)}
    projector |= {name: jnp.zeros(want[name], dtype) for name in ("up_bias", "down_bias")}
    return blocks.init(cfg.text, a, dtype) | {"vision": encoder.init(cfg.vision, b, dtype), "projector": projector}


# --- pictures to merged rows ---------------------------------------------------------------------------------------------


class Laid(NamedTuple):
    """Pictures as rows of patches, unit by unit: four neighbours in a row belong together."""

    x: Array  # [b i r p]
    cell: Array  # i32 [b i r 2] row and column of each patch
    live: Array  # bool [b i r]
    units: Array  # i32 [b i 2] rows and columns of merged units; 0 where there is no picture
    wide: Array  # i32 [b i] units a row in the order of x


def lay(cfg: QwenVlConfig, images: Float[Array, "b i r p"] | Float[Array, "b i y x ch"], grid: Int[Array, "b i a"] | None) -> Laid:
    """Pictures in either form as rows of patches; see `embed`."""
    side, merge = cfg.vision.patch[0], cfg.vision.merge
    b, pictures = images.shape[:2]
    if grid is not None and (grid.shape[:2] != (b, pictures) or grid.ndim != 3 or grid.shape[2] not in (2, 3)):
        raise ValueError(
            f"grid is {list(grid.shape)} for {b} x {pictures} pictures; give [b i 2]: rows and columns of patches, or [b i 3] with the frames before them"
        )
    if images.ndim == 4:
        if images.shape[3] != cfg.patch or images.shape[2] % merge**2 or grid is None:
            raise ValueError(
                f"patches are {list(images.shape)}, grid {None if grid is None else list(grid.shape)}; give [b i r {cfg.patch}], r a multiple of {merge**2}, and a grid"
            )
        x, n = images, images.shape[2]
    elif images.ndim == 5:
        x, n = _cut(cfg, images)
    else:
        raise ValueError(
            f"images are {list(images.shape)}; give flattened patches [b i r {cfg.patch}] or pictures [b i y x {cfg.vision.channels}]"
        )
    most = None if images.ndim == 4 else (images.shape[2] // side, images.shape[3] // side)
    if grid is None:
        grid = jnp.broadcast_to(jnp.asarray(most, jnp.int32)[None, None], (b, pictures, 2))
    size = grid[..., -2:].astype(jnp.int32)
    fits = (size > 0).all(-1) & (size % merge == 0).all(-1)
    if grid.shape[-1] == 3:
        fits = fits & (grid[..., 0] == 1)
    # rows times columns could overflow: both are at most n first
    fits = fits & (size <= n).all(-1) if most is None else fits & (size <= jnp.asarray(most, jnp.int32)[None, None]).all(-1)
    units = jnp.where(fits[..., None], size // merge, 0)
    fits = fits & (units[..., 0] * units[..., 1] <= n // merge**2)
    units = jnp.where(fits[..., None], units, 0)
    wide = units[..., 1] if most is None else jnp.full((b, pictures), most[1] // merge, jnp.int32)
    j = jnp.arange(n, dtype=jnp.int32)[None, None]
    unit, inner, cols = j // merge**2, j % merge**2, jnp.maximum(wide, 1)[..., None]
    row, col = unit // cols * merge + inner // merge, unit % cols * merge + inner % merge
    live = (row < units[..., :1] * merge) & (col < units[..., 1:] * merge)
    return Laid(x, jnp.stack([row, col], -1), live, units, wide)


def _cut(cfg: QwenVlConfig, images: Float[Array, "b i y x ch"]) -> tuple[Array, int]:
    side, merge, frames = cfg.vision.patch[0], cfg.vision.merge, cfg.vision.frames
    b, pictures, y, x, ch = images.shape
    if ch != cfg.vision.channels or y % (side * merge) or x % (side * merge) or not y * x:
        raise ValueError(
            f"pictures of {y} x {x} pixels and {ch} channels; sides must be multiples of {side * merge}, channels {cfg.vision.channels}: see models.smart_resize"
        )
    rows, cols = y // (side * merge), x // (side * merge)
    cut = images.reshape(b, pictures, rows, merge, side, cols, merge, side, ch)
    cut = cut.transpose(0, 1, 2, 5, 3, 6, 8, 4, 7)[:, :, :, :, :, :, :, None]  # row, column, inner row, inner column, channel, frame, y, x
    n = rows * cols * merge**2
    return jnp.broadcast_to(cut, (*cut.shape[:7], frames, side, side)).reshape(b, pictures, n, cfg.patch), n


def tower_rows(cfg: QwenVlConfig, params, laid: Laid) -> Tokens:
    """The tower's rows [b*i n]: patches window by window (dead rows first), `cell` their place in the picture."""
    b, pictures, n = laid.live.shape
    flat = lambda x: x.reshape(b * pictures, *x.shape[2:])
    own, live = params["vision"], flat(laid.live)
    dead = jnp.full(live.shape, -1, jnp.int32)
    x = encoder.linear(own, "patch", flat(laid.x).astype(own["patch"].dtype))
    tokens = Tokens(
        x=x,
        pos=jnp.where(live, 0, -1),
        rope=jnp.zeros((*live.shape, 1), jnp.int32),
        size=live.astype(jnp.float32),
        kind=jnp.full(live.shape, IMAGE, jnp.int8),
        segment=dead,
        cell=jnp.where(live[..., None], flat(laid.cell), -1),
        source=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), live.shape),
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros(live.shape[:1], jnp.int32),
        lost=jnp.zeros(live.shape[:1], jnp.int32),
    )
    order = jnp.argsort(encoder.windows(cfg.vision, tokens), axis=-1, stable=True).astype(jnp.int32)
    tokens = reduce(from_index(jnp.where(jnp.take_along_axis(live, order, 1), order, -1), n), tokens)
    pos = blocks.positions(tokens.pos >= 0)
    return tokens._replace(pos=pos, rope=jnp.maximum(pos, 0)[..., None])


def join(cfg: QwenVlConfig, params, encoded: vit.Encoded, several: bool = False) -> vit.Encoded:
    """The merger: each merge x merge rows in a row (counted from the last) become one, in raster order; `cell` its place among the units.

    Where nothing was dropped before, these rows are a unit; behind a pruner they are consecutive survivors, and a row stands in the unit
    of its first one. What is left over is counted in `lost`. Evidence about a merged row is the mean of that about its patches, so of
    attention: the mean over a unit's patches of the sum over all patches' queries. several: it leads with an axis of layers.
    """
    (tokens, evidence), k, p = encoded, cfg.vision.merge**2, params["projector"]
    b, n = tokens.pos.shape
    u = n // k
    lead = n - u * k

    def fold(x: Array, axis: int) -> Array:
        """[... n ...] to [... u k ...]."""
        axis %= x.ndim
        x = jax.lax.slice_in_dim(x, lead, n, axis=axis)
        return x.reshape(*x.shape[:axis], u, k, *x.shape[axis + 1 :])

    y = fold(blocks.norm(tokens.x, p["norm"], cfg.vision.norm_eps), 1).reshape(b, u, -1)
    y = encoder.linear(p, "down", encoder.act("gelu", encoder.linear(p, "up", y)))
    alive = fold(tokens.pos >= 0, 1).all(-1)
    cell = fold(tokens.cell, 1)[:, :, 0] // cfg.vision.merge
    place = jnp.where(alive, cell[..., 0] * encoder.FAR + cell[..., 1], -1)
    order = jnp.argsort(place, axis=-1, stable=True).astype(jnp.int32)
    live = jnp.take_along_axis(alive, order, 1)
    plan = from_index(jnp.where(live, order, -1), u)
    old = tokens.source.reshape(b, -1, k)  # of each unit's patches: the row
    group = jnp.where(old >= lead, (old - lead) // k, -1)
    now = jnp.take_along_axis(plan.assign[:, None], jnp.maximum(group, 0), 2)
    pos = blocks.positions(live)
    merged = Tokens(
        x=gather(y.astype(params["embed"].dtype), plan.index),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=live.astype(jnp.float32),
        kind=jnp.full((b, u), IMAGE, jnp.int8),
        segment=jnp.full((b, u), -1, jnp.int32),
        cell=jnp.where(live[..., None], jnp.take_along_axis(cell, order[..., None], 1), -1),
        source=jnp.max(jnp.where(group >= 0, now, -1), -1),
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros((b,), jnp.int32),
        lost=tokens.lost + jnp.sum(tokens.pos >= 0, -1, dtype=jnp.int32) - k * jnp.sum(alive, -1, dtype=jnp.int32),
        score=None if tokens.score is None else gather(jnp.mean(fold(tokens.score, 1), 2), plan.index),
    )
    mean = lambda x, axis: jnp.mean(fold(x, axis).astype(jnp.float32), axis % x.ndim + 1).astype(x.dtype)
    told: dict[str, Any] = {name: mean(x, axis) for name, axis in FIELDS.items() if (x := getattr(evidence, name)) is not None}
    seen = Evidence(**told, weights=evidence.weights, layer=evidence.layer, key=evidence.key)
    one = lambda e: move(plan, e)
    return vit.Encoded(merged, (jax.vmap(one) if several else one)(seen))


def validate(cfg: QwenVlConfig, recipe: Recipe) -> None:
    """ValueError where a method of site vit or select cannot work on this tower."""
    for k, method in recipe.vit:
        own = method.layer(k, cfg.vision.layers)
        if own.at != "block" or own.restore is not None or own.cross:
            raise ValueError(
                f"{method.name} acts at {own.at!r} and merges or brings rows back: rows of this tower stand in windows and are joined "
                f"{cfg.vision.merge} x {cfg.vision.merge} behind it; drop rows between layers ('block'), or reduce at site select"
            )
        if own.needs.cls or own.needs.lead:
            raise ValueError(f"{method.name} looks at the class row, which this tower has not (FlowCut: query='mean')")
    if recipe.select is not None:
        asked = recipe.select.needs
        there = Needs(**{name: getattr(asked, name) for name in (*FIELDS, "text", "weights", "layers")})
        if asked != there:
            odd = [name for name in Needs._fields if getattr(asked, name) != getattr(there, name)]
            raise ValueError(
                f"{recipe.select.name} needs {', '.join(odd)} of the tower's last layers; of merged rows there is {', '.join(FIELDS)}"
            )


def see(
    cfg: QwenVlConfig,
    params,
    laid: Laid,
    recipe: Recipe = PLAIN,
    *,
    told=None,
    keep=None,
    key=None,
    proportional=False,
    impl: Impl = "auto",
) -> Tokens:
    """What is left of each picture in the decoder's width, rows [b*i m c]; `source`: of each unit of `laid`, its row."""
    validate(cfg, recipe)
    pictures = laid.live.shape[:2]
    own = params["vision"] | ({"methods": params["methods"]} if "methods" in params else {})
    limit = None if keep is None or "vit" not in keep else {"vit": keep["vit"]}
    rows = tower_rows(cfg, params, laid)
    found = vit.encode(cfg.vision, own, rows, recipe, keep=limit, key=key, proportional=proportional, impl=impl)
    found = join(cfg, params, found, recipe.select is not None and bool(recipe.select.needs.layers))
    budget = None if keep is None or keep.get("select") is None else jnp.asarray(keep["select"])
    if budget is not None:
        budget = jnp.broadcast_to(budget if budget.ndim == 2 else budget.reshape(-1, 1), pictures).reshape(-1)
    return vit.select(own, found, recipe, keep=budget, **(told or {}))


# --- the rows of the decoder -----------------------------------------------------------------------------------------------


def embed(
    cfg: QwenVlConfig,
    params,
    images: Float[Array, "b i r p"] | Float[Array, "b i y x ch"],
    grid: Int[Array, "b i a"] | None,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    recipe: Recipe = PLAIN,
    *,
    positions: str | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    ends: tuple[int, ...] = (),
    rows: int | None = None,
    impl: Impl = "auto",
) -> Tokens:
    """The decoder's rows of prompts with up to `i` pictures each: text and, where the placeholders stand, what is left of the pictures.

    images: flattened patches [b i r p] as Hugging Face's processor writes them (`models.smart_resize` makes and pads them), or pictures
    [b i y x ch], smaller ones in the upper left corner. grid: rows and columns of patches of each picture (or frames = 1, rows, columns),
    traced: one program serves all sizes; 0 = no such picture; None = the whole [y x]. ids: with a placeholder for each 2 x 2 unit of each
    picture, in the order of the pictures. live: the real ids (None = all); padding may stand anywhere.

    Rotary ids: a picture's rows at (start, start + row, start + column) of its units, text behind it goes on with the largest + 1, as
    Hugging Face counts. positions, of what `recipe` leaves: "keep_mrope": these ids, the next one follows the largest that is left; "keep":
    these ids, the next one is that of the whole prompt; "repack": 0, 1, 2, ... on all axes. None: "keep_mrope" (recipe.select.positions
    does not decide: it speaks of models with one rotary axis).

    rows: the static number of rows; None = n, enough for any prompt. A reduced prompt needs its text + i times what stays of a picture:
    give that to save. In `lost`: rows that find no room (the oldest), placeholders that stand for no whole picture, patches that fill no
    unit. `source[j]` says where the j-th id is now. keep, key, proportional, ends: as in `vlm.embed` ("vit" counts patches).
    ValueError: ids, pictures or grids of other shapes, a method that cannot work on the tower, a budget of another site.
    """
    (b, pictures), n = images.shape[:2], ids.shape[1]
    check.one_of("positions", positions, (None, *POSITIONS))
    if ids.shape[0] != b or (live is not None and live.shape != ids.shape):
        raise ValueError(f"{b} rows of pictures, ids {ids.shape}, live {None if live is None else live.shape}; all must agree on the batch")
    if unknown := sorted(set(keep or ()) - {"vit", "select"}):
        raise ValueError(f"keep has {', '.join(map(repr, unknown))}; here budgets go by vit and select, the others to decoder.prefill")
    laid, told = lay(cfg, images, grid), {}
    if recipe.select is not None and recipe.select.needs.text:
        words = (ids != cfg.image_token) & (True if live is None else live)
        told["text"] = jnp.repeat(blocks.mean_embedding(cfg.text, params, ids, words), pictures, 0)
    seen = see(cfg, params, laid, recipe, told=told, keep=keep, key=key, proportional=proportional, impl=impl)
    text, index = decoder.embed(cfg.text, params, ids, live, ends), pack(jnp.ones(ids.shape, bool) if live is None else live).index
    return arrange(place(cfg, text, index, ids, laid, seen), n if rows is None else rows, positions or "keep_mrope")


def arrange(joined: Tokens, rows: int, positions: str) -> Tokens:
    """Rows that stand anywhere in their order, dead ones first, the oldest left out where there are more than `rows`."""
    total = joined.pos.shape[1]
    if not 1 <= rows <= total:
        raise ValueError(f"rows={rows}; give 1 to {total}, room for text and for what is left of the pictures")
    order = jnp.argsort(joined.pos, axis=-1, stable=True)[:, total - rows :].astype(jnp.int32)
    joined = joined._replace(lost=joined.lost + jnp.maximum(jnp.sum(joined.pos >= 0, -1, dtype=jnp.int32) - rows, 0))
    plan = from_index(jnp.where(jnp.take_along_axis(joined.pos, order, 1) >= 0, order, -1), total)
    return reduce(plan, joined, positions)


def place(cfg: QwenVlConfig, text: Tokens, index: Int[Array, "b n"], ids: Int[Array, "b n"], laid: Laid, seen: Tokens) -> Tokens:
    """Rows of text and, behind them, of pictures, each with its order, its three rotary ids and the ids it stands for. `index`: the id of each row."""
    (b, n), pictures = ids.shape, laid.units.shape[1]
    m = seen.pos.shape[1]
    mark = (gather(ids, index) == cfg.image_token) & (text.pos >= 0)
    height, width = laid.units[..., 0], laid.units[..., 1]
    count = height * width
    end = jnp.cumsum(count, -1)
    first = end - count  # the number of a picture's first placeholder
    there = (count > 0) & (end <= jnp.sum(mark, -1, dtype=jnp.int32)[:, None])
    where = jnp.sort(jnp.where(mark, jnp.arange(n, dtype=jnp.int32)[None], n - 1), -1)  # rows of the placeholders, first to last
    order_of = lambda number: jnp.take_along_axis(text.pos, jnp.take_along_axis(where, jnp.clip(number, 0, n - 1), 1), 1)
    begin = order_of(first)
    saved = jnp.where(there, count - jnp.maximum(height, width), 0)  # by so many ids a picture is shorter than its placeholders
    before = lambda pos: jnp.sum(jnp.where(begin[:, None] < pos[..., None], saved[:, None], 0), -1, dtype=jnp.int32)
    # the pictures' rows
    cut = lambda x: x.reshape(b, pictures * m, *x.shape[2:])
    cell = cut(seen.cell)
    which = jnp.repeat(jnp.arange(pictures, dtype=jnp.int32), m)
    of = lambda x: x[:, which]
    alive = cut(seen.pos >= 0) & of(there)
    pos = jnp.where(alive, order_of(of(first) + cell[..., 0] * of(width) + cell[..., 1]), -1)
    start = of(begin - before(begin))[..., None]
    rope = start + jnp.concatenate([jnp.zeros_like(start), jnp.maximum(cell, 0)], -1)
    # which row stands for a placeholder
    number = jnp.where(mark, jnp.cumsum(mark, -1, dtype=jnp.int32) - 1, -1)
    picture = jnp.sum(number[..., None] >= end[:, None], -1, dtype=jnp.int32)
    mine = jnp.minimum(picture, pictures - 1)
    get = lambda x: jnp.take_along_axis(x, mine, 1)
    inner, cols = number - get(first), jnp.maximum(get(width), 1)
    unit = inner // cols * get(laid.wide) + inner % cols
    table = seen.source.reshape(b, -1)
    slots = table.shape[1] // pictures
    now = jnp.take_along_axis(table, jnp.clip(mine * slots + unit, 0, table.shape[1] - 1), 1)
    stands = mark & (picture < pictures) & get(there) & (now >= 0)
    row = jnp.where(mark, jnp.where(stands, n + mine * m + now, -1), jnp.arange(n, dtype=jnp.int32)[None])
    both = lambda a, x: jnp.concatenate([a, cut(x).astype(a.dtype)], 1)
    order = jnp.concatenate([jnp.where(mark, -1, text.pos), pos], 1)
    words = jnp.maximum(text.pos - before(text.pos), 0)[..., None]
    return Tokens(
        x=both(text.x, seen.x),
        pos=order,
        rope=jnp.where(order[..., None] >= 0, jnp.concatenate([jnp.broadcast_to(words, (b, n, 3)), rope], 1), 0),
        size=jnp.where(order >= 0, both(text.size, seen.size), 0.0),
        kind=both(text.kind, seen.kind),
        segment=both(text.segment, seen.segment),
        cell=both(text.cell, seen.cell),
        source=jnp.where(text.source < 0, -1, jnp.take_along_axis(row, jnp.maximum(text.source, 0), 1)),
        seen=text.seen,
        delta=text.delta - jnp.sum(saved, -1, dtype=jnp.int32),
        lost=text.lost
        + jnp.sum(seen.lost.reshape(b, pictures), -1)
        + jnp.sum(mark, -1, dtype=jnp.int32)
        - jnp.sum(jnp.where(there, count, 0), -1, dtype=jnp.int32),
        score=None if seen.score is None else both(jnp.zeros_like(text.size), seen.score),
    )
