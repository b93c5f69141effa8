"""Vision-language models as pure functions: a tower, a projector and a decoder, with the sites in between.

`embed` turns pictures and token ids into the rows of the decoder (the tower reduced by `recipe.vit`, its output by `recipe.select`); what
follows is the decoder's: `decoder.prefill(cfg.text, params, tokens, recipe, new=...)` with the sites layers, cache, policy and reader.
Parameters are the decoder's, and beside them

    "vision": those of `encoder.init`,  "projector": up [c_v c], up_bias, down [c c], down_bias
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
from jaxtok.core.types import SPECIAL, Tokens
from jaxtok.models import blocks, decoder, encoder, vit
from jaxtok.models.config import Config, EncoderConfig

PLAIN = Recipe()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """LLaVA-1.5 and its like: a tower whose patch rows, projected, stand in the text in the place of a placeholder each."""

    family: str = "llava"  # Hugging Face model_type
    vision: EncoderConfig
    text: Config
    until: int  # layers of the tower that run: the features are what the last of them leaves
    act: str = "gelu"  # of the projector
    image_token: int  # the placeholder's id
    cls: bool = False  # the class row is a feature too

    def __post_init__(self):
        if not 1 <= self.until <= self.vision.layers:
            raise ValueError(f"until={self.until}; the tower has {self.vision.layers} layers")
        if self.vision.image is None:
            raise ValueError("vision is a text tower; give an encoder of images")

    @property
    def patches(self) -> int:
        """Rows of a picture: the placeholders that stand for it."""
        rows, cols = self.vision.grid
        return rows * cols + (self.vision.cls if self.cls else 0)


def shapes(cfg: VlmConfig) -> dict[str, Any]:
    """Name -> shape of every array of `params`."""
    wide, c = cfg.vision.width, cfg.text.width
    projector = {"up": (wide, c), "up_bias": (c,), "down": (c, c), "down_bias": (c,)}
    return blocks.shapes(cfg.text) | {"vision": encoder.shapes(cfg.vision), "projector": projector}


def init(cfg: VlmConfig, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters, as those of the parts; the projector's matrices N(0, 1/in)."""
    a, b, c, d = jax.random.split(key, 4)
    draw = lambda key, n, m: (n**-0.5 * jax.random.normal(key, (n, m), jnp.float32)).astype(dtype)
    wide, width = cfg.vision.width, cfg.text.width
    zero = jnp.zeros((width,), dtype)
    projector = {"up": draw(c, wide, width), "up_bias": zero, "down": draw(d, width, width), "down_bias": zero}
    return blocks.init(cfg.text, a, dtype) | {"vision": encoder.init(cfg.vision, b, dtype), "projector": projector}


def embed(
    cfg: VlmConfig,
    params,
    images: Float[Array, "b i y x ch"],
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    recipe: Recipe = PLAIN,
    *,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    ends: tuple[int, ...] = (),
    rows: int | None = None,
    impl: str = "auto",
) -> Tokens:
    """The decoder's rows of prompts with `i` pictures each: text and, where the placeholders stand, what is left of the pictures.

    ids: with `cfg.patches` placeholders for each picture, as Hugging Face's processors write them; a prompt with fewer pictures has fewer
    placeholders (pictures beyond them are ignored). live: the real ids (None = all); padding may stand anywhere. rows: the static number of
    rows; None = n less what `recipe.vit` and `recipe.select` take from each picture, which is enough for prompts with all pictures (with
    fewer ones more text may be alive: give n). Counted in `lost`: the oldest rows that find no room, and placeholders that stand for no
    whole picture, which are dropped. `source[j]` says where the j-th id is now (a patch that was merged: where its group is). Positions as
    recipe.select.positions says; a tower reduced without it: "repack".

    keep: {"vit": as in `vit.encode`, "select": i32 [b] or [b i], live rows of a picture that stay}. `proportional`: log sizes in the tower.
    ends: as in `decoder.embed`. ValueError: ids or pictures of other shapes, a budget of another site.
    """
    (b, pictures), n = images.shape[:2], ids.shape[1]
    if ids.shape[0] != b or (live is not None and live.shape != ids.shape):
        raise ValueError(f"{b} rows of pictures, ids {ids.shape}, live {None if live is None else live.shape}; all must agree on the batch")
    if images.shape[2:4] != cfg.vision.image:
        raise ValueError(f"pictures of {images.shape[2:4]} pixels; the placeholders are those of {cfg.vision.image}: resize them")
    if unknown := sorted(set(keep or ()) - {"vit", "select"}):
        raise ValueError(f"keep has {', '.join(map(repr, unknown))}; here budgets go by vit and select, the others to decoder.prefill")
    room = pictures * cfg.patches
    if room > n:
        raise ValueError(f"{pictures} pictures of {cfg.patches} placeholders do not fit into {n} ids; pad ids to more")
    seen = _seen(cfg, params, images, ids, live, recipe, keep, key, proportional, impl)
    m = seen.pos.shape[1]
    if m > cfg.patches:
        raise ValueError(f"{m} rows of a picture for {cfg.patches} placeholders; select fewer")
    text = decoder.embed(cfg.text, params, ids, live, ends)
    mark = (gather(ids, _origin(text.source)) == cfg.image_token) & (text.pos >= 0)
    where = jnp.sort(jnp.where(mark, jnp.arange(n, dtype=jnp.int32)[None], n), -1)[:, :room]  # rows of the placeholders, first to last
    there = (where < n).reshape(b, pictures, cfg.patches)
    first = jnp.minimum(where, n - 1).reshape(b, pictures, cfg.patches)
    cut = lambda x: x.reshape(b, pictures * m, *x.shape[2:])
    positions = "repack" if recipe.select is None else recipe.select.positions
    # the r-th row that is left stands in the order of the r-th placeholder, or in that of its own patch
    rank = jnp.cumsum(seen.pos >= 0, -1, dtype=jnp.int32) - 1
    rank = rank if positions == "repack" else seen.pos - (0 if cfg.cls else cfg.vision.prefix)
    rank = rank.reshape(b, pictures, m)
    alive = (seen.pos >= 0).reshape(b, pictures, m) & there.all(-1, keepdims=True)
    home = jnp.take_along_axis(first, jnp.clip(rank, 0, cfg.patches - 1), 2).reshape(b, pictures * m)
    order = jnp.where(cut(alive.reshape(b * pictures, m)), jnp.take_along_axis(text.pos, home, 1), -1)
    both = lambda a, x: jnp.concatenate([a, cut(x).astype(a.dtype)], 1)
    pos = jnp.concatenate([jnp.where(mark, -1, text.pos), order], 1)
    now = jnp.where(seen.source < 0, -1, seen.source).reshape(b, pictures, -1)[:, :, -cfg.patches :]  # of each patch: its row
    now = jnp.where(now < 0, -1, n + jnp.arange(pictures, dtype=jnp.int32)[None, :, None] * m + now)
    stands = (
        jnp.zeros((b, n + 1), jnp.int32)
        .at[jnp.arange(b)[:, None], where]
        .set(jnp.where(there.all(-1, keepdims=True), now, -1).reshape(b, room), mode="drop")
    )
    source = jnp.where(mark, stands[:, :n], jnp.arange(n, dtype=jnp.int32)[None])  # row of `text` -> row of both
    joined = Tokens(
        x=both(text.x, seen.x),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=both(text.size, seen.size),
        kind=both(text.kind, seen.kind),
        segment=both(text.segment, seen.segment),
        cell=both(text.cell, seen.cell),
        source=jnp.where(text.source < 0, -1, gather(source, jnp.maximum(text.source, 0))),
        seen=text.seen,
        delta=text.delta,
        lost=text.lost
        + jnp.sum(seen.lost.reshape(b, pictures), -1)
        + jnp.sum(mark, -1, dtype=jnp.int32)
        - cfg.patches * jnp.sum(there.all(-1), -1, dtype=jnp.int32),
        score=None if seen.score is None else both(jnp.zeros_like(text.size), seen.score),
    )
    rows = n - room + pictures * m if rows is None else rows
    index = jnp.argsort(pos, axis=-1, stable=True)[:, n + pictures * m - rows :].astype(jnp.int32)
    joined = joined._replace(lost=joined.lost + jnp.maximum(jnp.sum(pos >= 0, -1, dtype=jnp.int32) - rows, 0))
    plan = from_index(jnp.where(jnp.take_along_axis(pos, index, 1) >= 0, index, -1), n + pictures * m)
    return reduce(plan, joined._replace(size=jnp.where(pos >= 0, joined.size, 0.0)), positions)


def _origin(source: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """Which id stands in each row; -1 = none."""
    n = source.shape[1]
    rows = jnp.where(source < 0, n, source)
    return jax.vmap(lambda i: jnp.full((n + 1,), -1, jnp.int32).at[i].set(jnp.arange(n, dtype=jnp.int32))[:n])(rows)


def _seen(cfg: VlmConfig, params, images, ids, live, recipe: Recipe, keep, key, proportional, impl) -> Tokens:
    """What is left of each picture, in the decoder's width: rows [b*i m c]."""
    (b, pictures), own = images.shape[:2], params["vision"]
    flat = images.reshape(b * pictures, *images.shape[2:])
    if "methods" in params:
        own = own | {"methods": params["methods"]}
    limit = None if keep is None or "vit" not in keep else {"vit": keep["vit"]}
    found = vit.encode(
        cfg.vision,
        own,
        vit.embed(cfg.vision, own, flat),
        recipe,
        until=cfg.until,
        keep=limit,
        key=key,
        proportional=proportional,
        impl=impl,
    )
    p = params["projector"]
    x = encoder.linear(p, "down", encoder.act(cfg.act, encoder.linear(p, "up", found.tokens.x)))
    found = found._replace(tokens=found.tokens._replace(x=x.astype(params["embed"].dtype)))
    if recipe.vit:  # mergers leave rows in an order of their own: back to that of the picture
        order = jnp.argsort(found.tokens.pos, axis=-1, stable=True).astype(jnp.int32)
        plan = from_index(jnp.where(jnp.take_along_axis(found.tokens.pos, order, 1) >= 0, order, -1), order.shape[1])
        one = lambda e: move(plan, e)
        evidence, needs = found.evidence, None if recipe.select is None else recipe.select.needs
        if needs is not None and needs != type(needs)():  # what nobody asks for may be about rows that were brought back since
            evidence = (jax.vmap(one) if needs.layers else one)(evidence)
        found = vit.Encoded(reduce(plan, found.tokens), evidence)
    budget = None if keep is None or keep.get("select") is None else jnp.asarray(keep["select"])
    if budget is not None:
        budget = jnp.broadcast_to(budget if budget.ndim == 2 else budget.reshape(-1, 1), (b, pictures)).reshape(-1)
    told: dict[str, Any] = {}
    if recipe.select is not None and recipe.select.needs.text:
        words = (ids != cfg.image_token) & (True if live is None else live)
        rows = blocks.embed(cfg.text, params, ids).astype(jnp.float32)
        mean = jnp.einsum("bnc,bn->bc", rows, words.astype(jnp.float32)) / jnp.maximum(jnp.sum(words, -1), 1).astype(jnp.float32)[:, None]
        told["text"] = jnp.repeat(mean, pictures, 0)
    tokens = vit.select(own, found, recipe, keep=budget, **told)
    if cfg.cls or getattr(recipe.select, "with_cls", False):
        return tokens
    special = cfg.vision.prefix
    return reduce(pack((tokens.kind != SPECIAL) & (tokens.pos >= 0), tokens.pos.shape[1] - special), tokens)
