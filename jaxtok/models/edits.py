"""Site edits: a prefill in which less is computed for image rows than for text.

The softmax of a row over text keys and image keys is that over each of the two, merged by their logsumexps; so heads can be shut to image
keys without renormalisation, and image rows can look at near ones alone. After the prefill the image keys stand in `Part.frozen`, with
their gate: steps, and calls that continue, read them there and know nothing of edits.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxtok.core.edit import LayerEdit, Spared
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, grow_kv, reduce
from jaxtok.core.rotary import rotate_by
from jaxtok.core.select import pack
from jaxtok.core.selector import pictured
from jaxtok.core.types import KV, TEXT, Frozen, Needs, Part, Plan, Tokens
from jaxtok.models import blocks, cached
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl, attention, merge
from jaxtok.ops.near import Near, attend_near, neighbours, pictures


class Split(NamedTuple):
    """The rows of a prefill, text and image apart."""

    text: Plan  # [b n - images]
    image: Plan  # [b images]
    back: Array  # i32 [b n] where each row stands when the image rows come behind the text; -1 = dead
    cell: Array  # i32 [b images 2]
    picture: Array  # i32 [b images]


def prefill(cfg: Config, params, tokens: Tokens, recipe: Recipe, *, new: int, proportional: bool, impl: Impl):
    """`decoder.prefill` of a recipe with an edit -> (tokens, layers)."""
    (edit,), learned, out = recipe.edits, params.get("methods", {}).get("edits", ({},))[0], []
    tokens, split = _enter(edit, tokens)
    near: dict[Any, Near] = {}
    for i, p in enumerate(params["layers"]):
        if split is not None and edit.until is not None and i >= edit.until:
            tokens, split = reduce(split.text, tokens), None
        if split is None:
            tokens, found = cached.attend_rows(cfg, p, i, tokens, None, recipe, Needs(), proportional, None, impl)
            out.append(cached.settle(cfg, params, i, found, None, recipe, new, None))
            continue
        spared = edit.layer(learned, i, cfg)
        at = (spared.reach, spared.causal)
        if spared.reach is not None and at not in near:
            live = split.image.index >= 0
            near[at] = neighbours(split.cell, split.picture, live, reach=spared.reach, causal=spared.causal)
        tokens, part = _layer(cfg, p, i, tokens, split, spared, near.get(at), new, proportional, impl)
        out.append((part,))
    return tokens, tuple(out)


def _enter(edit: LayerEdit, tokens: Tokens) -> tuple[Tokens, Split]:
    """The rows that find room, and where they are."""
    n, most = tokens.pos.shape[1], edit.images
    if most >= n:
        raise ValueError(f"{edit.name} is told of images={most} rows, but {n} rows come in all, text too; give fewer or pad the prompt")
    live, image = tokens.pos >= 0, pictured(tokens)
    newest = lambda mask, room: mask & (jnp.cumsum(mask[:, ::-1], -1)[:, ::-1] <= room)
    stay = newest(image, most) | newest(live & ~image, n - most)
    lost = jnp.sum(live & ~stay, -1, dtype=jnp.int32)
    tokens = reduce(pack(stay, n), tokens._replace(lost=tokens.lost + lost))
    live, image = tokens.pos >= 0, pictured(tokens)
    texts, images = pack(live & ~image, n - most), pack(image, most)
    before = jnp.cumsum(live & (tokens.kind == TEXT), -1, dtype=jnp.int32)  # pictures with text between them are two
    apart = jnp.stack([gather(x, images.index) for x in (before, tokens.segment)], -1)
    cell = jnp.where((images.index >= 0)[..., None], gather(tokens.cell, images.index), -1)
    back = jnp.where(image, jnp.where(images.assign < 0, -1, images.assign + n - most), texts.assign)
    return tokens, Split(texts, images, back, cell, pictures(cell, apart))


def _layer(
    cfg: Config, p, i: int, tokens: Tokens, split: Split, spared: Spared, near: Near | None, new: int, proportional: bool, impl: Impl
) -> tuple[Tokens, Part]:
    """One layer over text and image rows -> (tokens, its cache: text keys with room for `new`, image keys frozen)."""
    q, k, v = blocks.qkv(cfg, p, tokens.x)
    freqs, image = blocks.frequencies(cfg, i), pictured(tokens)
    q, k = rotate_by(q, tokens.rope, freqs), rotate_by(k, tokens.rope, freqs)
    size = jnp.where((tokens.pos >= 0) & (tokens.size > 0), tokens.size, 1.0)
    bias = jnp.log(size) if proportional else jnp.zeros_like(size)
    text = _kv(split.text, k, v, bias, tokens)
    seen = _kv(split.image, k, v, bias, tokens)
    see: dict[str, Any] = dict(window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale, impl=impl, out_dtype=jnp.float32)

    def attend(q, q_pos, kv: KV, diagonal: int):
        return attention(q, kv.k, kv.v, q_pos=q_pos, k_pos=kv.pos, bias=kv.bias, diagonal=diagonal, **see)

    asks = lambda plan: (_rows(q, plan), jnp.where(plan.index >= 0, gather(tokens.pos, plan.index), -1))
    out, lse = attend(q, tokens.pos, text, 0)  # the j-th text row is no row before the j-th
    of_text = attend(*asks(split.text), seen, split.image.index.shape[1])
    if near is None:
        of_image = attend(*asks(split.image), seen, 0)
    else:
        weigh = seen.bias[:, 0] if proportional else None
        of_image = attend_near(_rows(q, split.image), seen.k, seen.v, near, bias=weigh, softcap=cfg.softcap, scale=cfg.scale)
    there = split.back[:, None] >= 0
    home = jnp.broadcast_to(jnp.maximum(split.back, 0)[:, None], (*q.shape[:2], q.shape[2]))
    far = gather(jnp.concatenate([of_text[0], of_image[0]], 2), home)
    far_lse = jnp.where(there, gather(jnp.concatenate([of_text[1], of_image[1]], 2), home), -jnp.inf)
    far = far if spared.read is None else far * spared.read[None, :, None, None]
    out, _ = merge(out, lse, far, far_lse)
    if spared.write is not None:
        out = jnp.where(image[:, None, :, None], out * spared.write[None, :, None, None], out)
    x = blocks.out_proj(cfg, p, tokens.x, out.astype(tokens.x.dtype))
    gate = None if spared.read is None else jnp.broadcast_to(spared.read[None], (x.shape[0], cfg.heads))
    kv = grow_kv(text._replace(cursor=jnp.full((), text.k.shape[2], jnp.int32)), text.k.shape[2] + new)
    return tokens._replace(x=_mlp(cfg, p, x, split, spared.channels)), Part(kv, Held(), (), Frozen(seen, None, gate))


def _rows(x: Array, plan: Plan) -> Array:
    """The rows of x [b e n d] that a plan [b m] takes."""
    return gather(x, jnp.broadcast_to(plan.index[:, None], (*x.shape[:2], plan.index.shape[1])))


def _kv(plan: Plan, k: Array, v: Array, bias: Array, tokens: Tokens) -> KV:
    """The cache of some rows, each slot with its order."""
    (b, g), m = k.shape[:2], plan.index.shape[1]
    wide = lambda x: jnp.broadcast_to(x[:, None], (b, g, m))
    return KV(
        k=_rows(k, plan),
        v=_rows(v, plan),
        pos=wide(jnp.where(plan.index >= 0, gather(tokens.pos, plan.index), -1)),
        bias=wide(gather(bias, plan.index)),
        seen=tokens.seen,
        delta=tokens.delta,
        cursor=jnp.full((), m, jnp.int32),
        lost=jnp.broadcast_to(tokens.lost[:, None], (b, g)),
    )


def _mlp(cfg: Config, p, x: Array, split: Split, channels: int | None) -> Array:
    """The MLP, of which image rows go through the first channels only: all rows through these, the text rows through the others too."""
    if channels is None or channels >= cfg.hidden:
        return blocks.mlp(cfg, p, x)
    y = blocks.normed(cfg, p, x, "mlp_norm")
    rest = blocks.channels(cfg, p, gather(y, split.text.index), slice(channels, None))
    return blocks.after_mlp(cfg, p, x, blocks.channels(cfg, p, y, slice(channels)) + gather(rest, split.text.assign))
