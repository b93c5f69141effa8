"""Vision-language models as pure functions: a tower, a projector and a decoder, with the sites in between.

`embed` turns pictures and token ids into the rows of the decoder (the tower reduced by `recipe.vit`, its output by `recipe.select`); what
follows is the decoder's: `decoder.prefill(cfg.text, params, tokens, recipe, new=...)` with the sites layers, cache, policy and reader.
Parameters are the decoder's, and beside them

    "vision": those of `encoder.init`,  "projector": up [c_v c], up_bias, down [c c], down_bias,  "newline": [c], of pictures in crops
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, move, reduce
from jaxtok.core.select import from_index, pack
from jaxtok.core.types import IMAGE, SPECIAL, Evidence, Needs, Tokens
from jaxtok.models import anyres, blocks, decoder, encoder, vit
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.ops.attention import Impl

PLAIN = Recipe()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """LLaVA-1.5 and its like: a tower whose patch rows, projected, stand in the text in the place of a placeholder each. With `pinpoints`
    (LLaVA-NeXT) a picture is a thumbnail and a grid of crops, as `models.anyres` lays them out."""

    family: str = "llava"  # Hugging Face model_type
    vision: EncoderConfig
    text: Config
    until: int  # layers of the tower that run: the features are what the last of them leaves
    act: str = "gelu"  # of the projector
    image_token: int  # the placeholder's id
    cls: bool = False  # the class row is a feature too
    pinpoints: tuple[tuple[int, int], ...] = ()  # height, width that a picture may be scaled into, multiples of `vision.image`

    def __post_init__(self):
        if not 1 <= self.until <= self.vision.layers:
            raise ValueError(f"until={self.until}; the tower has {self.vision.layers} layers")
        if self.vision.image is None:
            raise ValueError("vision is a text tower; give an encoder of images")
        for point in self.pinpoints:
            if len(point) != 2 or any(not 1 <= a <= anyres.MOST_SIDE or a % b for a, b in zip(point, self.vision.image, strict=True)):
                raise ValueError(f"pinpoint {point} is no grid of crops of {self.vision.image} pixels")
        if self.pinpoints and self.cls and self.vision.prefix:
            raise ValueError("a picture in crops has no place for class rows; leave cls=True out")

    @property
    def patches(self) -> int:
        """Rows of a picture, or of one crop of it: the placeholders that stand for it."""
        rows, cols = self.vision.grid
        return rows * cols + (self.vision.cls if self.cls else 0)

    @property
    def parts(self) -> int:
        """Sub-images of a picture at most, thumbnail included; 1 = pictures are not cut."""
        y, x = self.vision.image or (1, 1)
        return 1 + max((a // y * (b // x) for a, b in self.pinpoints), default=0)

    def most(self, parts: int) -> tuple[int, int]:
        """(rows of a picture in at most `parts` sub-images, newline rows among them), at most. ValueError where no picture has so few."""
        if not self.pinpoints:
            return self.patches, 0
        return anyres.most(self.pinpoints, self.vision.image or (1, 1), self.vision.grid, parts)

    def placeholders(self, size: anyres.Size) -> int:
        """How many placeholders stand for a picture of this height and width, as Hugging Face's processors write them."""
        if not self.pinpoints:
            return self.patches
        return anyres.placeholders(self.pinpoints, self.vision.image or (1, 1), self.vision.grid, size)


def shapes(cfg: VlmConfig) -> dict[str, Any]:
    """Name -> shape of every array of `params`."""
    wide, c = cfg.vision.width, cfg.text.width
    projector = {"up": (wide, c), "up_bias": (c,), "down": (c, c), "down_bias": (c,)}
    newline = {"newline": (c,)} if cfg.pinpoints else {}
    return blocks.shapes(cfg.text) | {"vision": encoder.shapes(cfg.vision), "projector": projector} | newline


def init(cfg: VlmConfig, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters, as those of the parts; the projector's matrices N(0, 1/in), the newline N(0, 1/c)."""
    a, b, c, d = jax.random.split(key, 4)
    draw = lambda key, n, m: (n**-0.5 * jax.random.normal(key, (n, m), jnp.float32)).astype(dtype)
    wide, width = cfg.vision.width, cfg.text.width
    zero = jnp.zeros((width,), dtype)
    projector = {"up": draw(c, wide, width), "up_bias": zero, "down": draw(d, width, width), "down_bias": zero}
    newline = {"newline": draw(jax.random.fold_in(key, 4), width, 1)[:, 0]} if cfg.pinpoints else {}
    return blocks.init(cfg.text, a, dtype) | {"vision": encoder.init(cfg.vision, b, dtype), "projector": projector} | newline


def embed(
    cfg: VlmConfig,
    params,
    images: Float[Array, "b i y x ch"] | Float[Array, "b i p y x ch"],
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    recipe: Recipe = PLAIN,
    *,
    sizes: Int[Array, "b i 2"] | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    ends: tuple[int, ...] = (),
    rows: int | None = None,
    impl: Impl = "auto",
) -> Tokens:
    """The decoder's rows of prompts with `i` pictures each: text and, where the placeholders stand, what is left of the pictures.

    ids: with `cfg.placeholders` for each picture, as Hugging Face's processors write them; a prompt with fewer pictures has fewer
    placeholders (pictures beyond them are ignored). live: the real ids (None = all); padding may stand anywhere. rows: the static number of
    rows; None = n less what `recipe.vit` and `recipe.select` take from each picture, which is enough for prompts with all pictures (with
    fewer ones more text may be alive: give n). Counted in `lost`: the oldest rows that find no room, and placeholders that stand for no
    whole picture, which are dropped. `source[j]` says where the j-th id is now (a patch that was merged: where its group is). Positions as
    recipe.select.positions says; a tower reduced without it: "repack".

    Pictures in crops (`cfg.pinpoints`): images [b i p y x ch], the thumbnail first, then the crops by raster, then anything; `sizes`: the
    original heights and widths, which may be traced (0 = no picture); `models.image_anyres` makes both. One with more than p - 1 crops is no
    picture. A tower's methods act on each sub-image; recipe.select acts on the patch rows of a picture, without padding, side by side (its
    `crops`: p; kinds IMAGE in the thumbnail, CROP else, `segment` the crop, `cell` in it) and leaves all newline rows (kind SPECIAL), which
    it does not see. What is left stands in the order of the placeholders; the thumbnail's rows in that which the method gives them. n must
    have room for the largest pictures in p sub-images, `cfg.most(p)` rows each, or `rows` be given.

    keep: {"vit": as in `vit.encode`, "select": i32 [b] or [b i], live rows of a picture that stay, newlines apart}. `proportional`: log
    sizes in the tower. ends: as in `decoder.embed`. ValueError: ids or pictures of other shapes, a budget of another site.
    """
    (b, pictures), n, cut = images.shape[:2], ids.shape[1], bool(cfg.pinpoints)
    if ids.shape[0] != b or (live is not None and live.shape != ids.shape):
        raise ValueError(f"{b} rows of pictures, ids {ids.shape}, live {None if live is None else live.shape}; all must agree on the batch")
    if images.ndim != 5 + cut or (sizes is not None) != cut or (sizes is not None and sizes.shape != (b, pictures, 2)):
        want = (
            "[b i p y x ch] and sizes [b i 2]: the crops of each picture" if cut else "[b i y x ch] and no sizes: pictures that are not cut"
        )
        raise ValueError(f"images {images.shape} and sizes {None if sizes is None else sizes.shape}; {cfg.family} takes {want}")
    if images.shape[-3:-1] != cfg.vision.image:
        raise ValueError(f"pictures of {images.shape[-3:-1]} pixels; the placeholders are those of {cfg.vision.image}: resize them")
    if unknown := sorted(set(keep or ()) - {"vit", "select"}):
        raise ValueError(f"keep has {', '.join(map(repr, unknown))}; here budgets go by vit and select, the others to decoder.prefill")
    parts = images.shape[2] if cut else 1
    most, lines = cfg.most(parts)
    if pictures * most > n and (rows is None or not cut):
        raise ValueError(f"{pictures} pictures of {most} placeholders do not fit into {n} ids; pad ids to more")
    positions = "repack" if recipe.select is None else recipe.select.positions
    with_cls = getattr(recipe.select, "with_cls", False)
    if cut and with_cls and positions != "repack":
        raise ValueError(f"{recipe.select.name} keeps class rows, which have no place in a picture in crops; give positions='repack'")  # type: ignore[union-attr]
    flat = images.reshape(b * pictures * parts, *images.shape[-3:])
    found = _tower(cfg, params, flat, recipe, None if keep is None else keep.get("vit"), key, proportional, impl)
    told = _told(cfg, params, recipe, pictures, ids, live, keep)
    if cfg.pinpoints and sizes is not None:
        grid, several = cfg.vision.grid, recipe.select is not None and bool(recipe.select.needs.layers)
        plan = anyres.layout(cfg.pinpoints, cfg.vision.image or (1, 1), grid, sizes.reshape(-1, 2), parts)
        place = anyres.places(plan, grid, parts)
        found = anyres.join(found, place, grid[1], several=several, with_cls=with_cls)
        tokens = vit.select(params["vision"] | _methods(params), found, recipe, grid=plan.grid, **told)
        seen = anyres.lay(tokens, plan, place, grid[1], params["newline"], lines)
        if with_cls:  # class rows are rows of the picture now; newlines, of no crop, are not
            seen = seen._replace(kind=jnp.where((seen.kind == SPECIAL) & (seen.segment >= 0), jnp.int8(IMAGE), seen.kind))
        many = plan.many.reshape(b, pictures)
    else:
        tokens = vit.select(params["vision"] | _methods(params), found, recipe, **told)
        if not (cfg.cls or with_cls):
            stays = (tokens.kind != SPECIAL) & (tokens.pos >= 0)
            tokens = reduce(pack(stays, tokens.pos.shape[1] - cfg.vision.prefix), tokens)
        else:  # the class row is a row of the picture now
            tokens = tokens._replace(kind=jnp.where(tokens.kind == SPECIAL, jnp.int8(IMAGE), tokens.kind))
        place = tokens.pos if cfg.cls else jnp.maximum(tokens.pos - cfg.vision.prefix, 0)
        seen = tokens._replace(pos=jnp.where(tokens.pos >= 0, place, -1), source=tokens.source[:, -most:])
        many = jnp.full((b, pictures), most, jnp.int32)
        if tokens.pos.shape[1] > most:
            raise ValueError(f"{tokens.pos.shape[1]} rows of a picture for {most} placeholders; select fewer")
    text = decoder.embed(cfg.text, params, ids, live, ends)
    mark = (gather(ids, _origin(text.source)) == cfg.image_token) & (text.pos >= 0)
    rows = min(n, n + pictures * (seen.pos.shape[1] - most)) if rows is None else rows
    return _insert(text, mark, seen, many, most, positions, rows)


def _insert(text: Tokens, mark: Bool[Array, "b n"], seen: Tokens, many: Int[Array, "b i"], most: int, positions: str, rows: int) -> Tokens:
    """Text, and in the place of the marked rows those of the pictures: `rows` rows, live ones last.

    many: the marks of each picture, `most` at most; a picture without all of them is left out. seen [b*i m]: its rows; `pos` says which of
    its marks a row stands for (-1 = dead), `source` [b*i most or more] which row is now that of a mark. "repack": the r-th live row stands in
    the order of the r-th mark; else each in that of its own.
    """
    (b, pictures), n, m = many.shape, mark.shape[1], seen.pos.shape[1]
    where = jnp.sort(jnp.where(mark, jnp.arange(n, dtype=jnp.int32)[None], n), -1)  # rows of the marks, first to last
    start = jnp.cumsum(many, -1) - many
    there = (many > 0) & (start + many <= jnp.sum(mark, -1, keepdims=True))
    each = lambda rank: jnp.take_along_axis(where, jnp.clip(start[..., None] + rank, 0, n - 1).reshape(b, -1), 1)  # [b i r] -> [b i*r]
    cut = lambda x: x.reshape(b, pictures * m, *x.shape[2:])
    rank = jnp.cumsum(seen.pos >= 0, -1, dtype=jnp.int32) - 1 if positions == "repack" else seen.pos
    rank = jnp.clip(rank.reshape(b, pictures, m), 0, jnp.maximum(many[..., None] - 1, 0))
    alive = (cut(seen.pos).reshape(b, pictures, m) >= 0) & there[..., None]
    order = jnp.take_along_axis(text.pos, jnp.minimum(each(rank), n - 1), 1)
    pos = jnp.concatenate([jnp.where(mark, -1, text.pos), jnp.where(alive.reshape(b, -1), order, -1)], 1)
    both = lambda a, x: jnp.concatenate([a, cut(x).astype(a.dtype)], 1)
    mine = jnp.arange(most, dtype=jnp.int32)[None, None]
    now = seen.source[:, :most].reshape(b, pictures, most)
    now = jnp.where(now < 0, -1, n + jnp.arange(pictures, dtype=jnp.int32)[None, :, None] * m + now)
    target = jnp.where((there[..., None] & (mine < many[..., None])).reshape(b, -1), each(jnp.broadcast_to(mine, now.shape)), n)
    stands = jnp.full((b, n + 1), -1, jnp.int32).at[jnp.arange(b)[:, None], target].set(now.reshape(b, -1))
    source = jnp.where(mark, stands[:, :n], jnp.arange(n, dtype=jnp.int32)[None])  # row of `text` -> row of both
    dropped = jnp.sum(mark, -1, dtype=jnp.int32) - jnp.sum(jnp.where(there, many, 0), -1, dtype=jnp.int32)
    joined = Tokens(
        x=both(text.x, seen.x),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=jnp.where(pos >= 0, both(text.size, seen.size), 0.0),
        kind=both(text.kind, seen.kind),
        segment=both(text.segment, seen.segment),
        cell=both(text.cell, seen.cell),
        source=jnp.where(text.source < 0, -1, gather(source, jnp.maximum(text.source, 0))),
        seen=text.seen,
        delta=text.delta,
        lost=text.lost
        + jnp.sum(seen.lost.reshape(b, pictures), -1)
        + dropped
        + jnp.maximum(jnp.sum(pos >= 0, -1, dtype=jnp.int32) - rows, 0),
        score=None if seen.score is None else both(jnp.zeros_like(text.size), seen.score),
    )
    index = jnp.argsort(pos, axis=-1, stable=True)[:, max(n + pictures * m - rows, 0) :].astype(jnp.int32)
    plan = from_index(jnp.where(jnp.take_along_axis(pos, index, 1) >= 0, index, -1), n + pictures * m)
    return reduce(plan, joined, positions)


def _origin(source: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """Which id stands in each row; -1 = none."""
    n = source.shape[1]
    rows = jnp.where(source < 0, n, source)
    return jax.vmap(lambda i: jnp.full((n + 1,), -1, jnp.int32).at[i].set(jnp.arange(n, dtype=jnp.int32))[:n])(rows)


def _methods(params) -> dict[str, Any]:
    return {"methods": params["methods"]} if "methods" in params else {}


def _tower(cfg: VlmConfig, params, images, recipe: Recipe, keep, key, proportional: bool, impl: Impl) -> vit.Encoded:
    """What the tower and the projector make of each image: rows in the decoder's width, in the order of the image."""
    own = params["vision"] | _methods(params)
    limit = None if keep is None else {"vit": keep}
    rows = vit.embed(cfg.vision, own, images)
    found = vit.encode(cfg.vision, own, rows, recipe, until=cfg.until, keep=limit, key=key, proportional=proportional, impl=impl)
    p = params["projector"]
    x = encoder.linear(p, "down", encoder.act(cfg.act, encoder.linear(p, "up", found.tokens.x)))
    found = found._replace(tokens=found.tokens._replace(x=x.astype(params["embed"].dtype)))
    needs = Needs() if recipe.select is None else recipe.select.needs
    if needs == Needs():  # what there is may be about rows that were brought back since
        found = found._replace(evidence=Evidence())
    if recipe.vit:  # mergers leave rows in an order of their own: back to that of the picture
        order = jnp.argsort(found.tokens.pos, axis=-1, stable=True).astype(jnp.int32)
        plan = from_index(jnp.where(jnp.take_along_axis(found.tokens.pos, order, 1) >= 0, order, -1), order.shape[1])
        one = lambda e: move(plan, e)
        found = vit.Encoded(reduce(plan, found.tokens), (jax.vmap(one) if needs.layers else one)(found.evidence))
    return found


def _told(cfg: VlmConfig, params, recipe: Recipe, pictures: int, ids, live, keep) -> dict[str, Any]:
    """Budget of each picture, and what a method asks of the text."""
    b, told = ids.shape[0], {}
    budget = None if keep is None or keep.get("select") is None else jnp.asarray(keep["select"])
    if budget is not None:
        told["keep"] = jnp.broadcast_to(budget if budget.ndim == 2 else budget.reshape(-1, 1), (b, pictures)).reshape(-1)
    if recipe.select is not None and recipe.select.needs.text:
        words = (ids != cfg.image_token) & (True if live is None else live)
        told["text"] = jnp.repeat(blocks.mean_embedding(cfg.text, params, ids, words), pictures, 0)
    return told
