"""One layer of the decoder with its caches: rows of a prefill, and what becomes of a cache after it (a step: steps.py).

A layer's heads may stand in several groups (`Recipe.heads`), each a `Part` with slots of its own; where there is one group, it holds
all heads. `decoder.py` walks the layers.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, grow_kv, move, reduce_kv, representative
from jaxtok.core.rotary import rotate_by
from jaxtok.core.score import change, moments
from jaxtok.core.types import KV, Evidence, Frozen, Needs, Part, Tokens
from jaxtok.models import blocks, sparsify
from jaxtok.models.config import Config
from jaxtok.models.observe import held, in_order, observe
from jaxtok.ops import offload
from jaxtok.ops.attention import Impl, Shared, attention, merge
from jaxtok.ops.cache import append, place
from jaxtok.ops.evidence import rows


def raw(recipe: Recipe) -> bool:
    """Whether keys are stored before the rotary embedding."""
    return (recipe.policy is not None and recipe.policy.raw) or (recipe.reader is not None and recipe.reader.raw)


def whole(site: str, keep) -> Array:
    """A traced budget as i32; TypeError for a share."""
    keep = jnp.asarray(keep)
    if not jnp.issubdtype(keep.dtype, jnp.integer):
        raise TypeError(
            f"keep[{site!r}] counts slots (integers), got {keep.dtype}; turn a ratio into slots with jaxtok.core.budget.keep(ratio, live)"
        )
    return keep.astype(jnp.int32)


def by_layer(keep, site: str, cfg: Config, b: int) -> list[Array | None]:
    """The traced budgets of one site, layer by layer."""
    return [budget_of(keep, site, i, cfg, b) for i in range(cfg.layers)]


def budget_of(keep, site: str, i: int, cfg: Config, b: int) -> Int[Array, "b e"] | None:
    """The traced budget of one site in layer i, [b 1] or by head, or None."""
    if keep is None or keep.get(site) is None:
        return None
    if jnp.ndim(keep[site]) == 3:
        return whole(site, keep[site])[i]
    return jnp.broadcast_to(whole(site, keep[site]), (cfg.layers, b))[i][:, None]


def head_groups(cfg: Config, recipe: Recipe, i: int) -> tuple[int, ...]:
    """How many KV heads each group of layer i has."""
    return recipe.heads[i] if recipe.heads else (cfg.kv_heads,)


def at_hand(i: int, freqs: Array, key: Array | None) -> dict[str, Any]:
    """What evidence always says: which layer, its frequencies, a key of its own."""
    return {"freqs": freqs, "layer": jnp.full((), i, jnp.int32), "key": None if key is None else jax.random.fold_in(key, i)}


def attend_rows(
    cfg: Config,
    p,
    i: int,
    tokens: Tokens,
    past: tuple[Part, ...] | None,
    recipe: Recipe,
    needs: Needs,
    proportional: bool,
    key,
    impl: Impl,
    among=None,
    learned=None,
) -> tuple[Tokens, list[tuple[KV, Evidence]]]:
    """One layer over the rows of a prefill -> (tokens, for each head group the cache with these rows and evidence over its slots).

    `among` bool [b s]: attention evidence as if of the slots of `past` only these were there. `learned`: params["methods"], of which the
    sparsifier's are read; it acts in a prefill of its own (past=None), and its logsumexp is the one that evidence is made with.
    """
    q, k, v = blocks.qkv(cfg, p, tokens.x)
    group, freqs = cfg.heads // cfg.kv_heads, jnp.asarray(blocks.frequencies(cfg, i))
    common = {
        "hidden": tokens.x if needs.hidden else None,
        "weights": {name: p[name] for name in needs.weights} if needs.weights else None,
        **at_hand(i, freqs, key),
    }
    length = jnp.linalg.norm(blocks.normed(cfg, p, tokens.x).astype(jnp.float32), axis=-1) if needs.unit else None
    outs, found, g = [], [], 0
    ordered = functools.partial(in_order, impl) if isinstance(impl, Shared) and impl.placed and past is None else lambda *x: x
    for part in (None,) if past is None else past:
        heads = k.shape[1] if part is None else part.kv.k.shape[1]
        mine = q[:, g * group : (g + heads) * group], k[:, g : g + heads], v[:, g : g + heads]
        out, kv, seen = _attend_group(
            cfg, i, tokens, part, mine, freqs, recipe, needs, proportional, impl, among, length, common["key"], learned
        )
        outs.append(out)
        found.append(ordered(kv, Evidence(**seen, **common)))
        g += heads
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, 1)
    middle = blocks.out_proj(cfg, p, tokens.x, out)
    after = blocks.mlp(cfg, p, middle)
    if needs.change:
        ends = blocks.normed(cfg, p, tokens.x), middle - tokens.x, blocks.normed(cfg, p, middle, "mlp_norm"), after - middle
        moved = jnp.stack([change(*ends[:2]), change(*ends[2:])], 2)
        found = [(kv, evidence._replace(change=moved)) for kv, evidence in found]
    return tokens._replace(x=after), found


def _attend_group(
    cfg, i, tokens, part, qkv, freqs, recipe, needs, proportional, impl, among, length, key, learned
) -> tuple[Array, KV, dict[str, Any]]:
    """The rows' attention in one head group -> (values, cache with these rows, its evidence)."""
    q, k, v = qkv
    (b, g, n), live, unturned = k.shape[:3], tokens.pos >= 0, raw(recipe)
    if part is not None and not g:
        return q, part.kv._replace(seen=part.kv.seen + tokens.seen, delta=part.kv.delta + tokens.delta), {}
    size = jnp.where(live & (tokens.size > 0), tokens.size, 1.0)
    bias = jnp.broadcast_to((jnp.log(size) if proportional else jnp.zeros_like(size))[:, None], (b, g, n))
    if part is None:
        pos = tokens.pos
        turned_q, turned_k = (rotate_by(x, tokens.rope, freqs, blocks.axes(cfg, tokens.rope)) for x in (q, k))
        kv = KV(
            k=k if unturned else turned_k,
            v=v,
            pos=jnp.broadcast_to(pos[:, None], (b, g, n)),
            bias=bias,
            seen=tokens.seen,
            delta=tokens.delta,
            cursor=jnp.full((), n, jnp.int32),
            lost=jnp.broadcast_to(tokens.lost[:, None], (b, g)),
            segment=jnp.broadcast_to(tokens.segment[:, None], (b, g, n))
            if recipe.reader is not None and recipe.reader.needs.segment
            else None,
        )
        keys, diagonal = turned_k, 0
    else:
        known = recipe.reader.segments(part.reader) if recipe.reader is not None and recipe.reader.needs.segment else None
        if known is None and recipe.reader is not None and recipe.reader.needs.segment:
            raise ValueError(
                f"{recipe.reader.name} has not kept the segments of these caches, made without it or within its budget; "
                "prefill at once, or with read=True"
            )
        if needs.keys or needs.hidden:
            raise ValueError("a method needs the unrotated keys or the hidden rows of the whole cache; they are not kept after a prefill")
        past = offload.together(part.kv)
        pos = jnp.where(live, tokens.pos + past.seen[:, None], -1)
        shift = (past.seen + past.delta)[:, None, None]
        turned_q, turned_k = (rotate_by(x, tokens.rope + shift, freqs, blocks.axes(cfg, tokens.rope)) for x in (q, k))
        kv = append(grow_kv(past, past.k.shape[2] + n), k if unturned else turned_k, v, pos, bias)
        kv = kv._replace(seen=past.seen + tokens.seen, delta=past.delta + tokens.delta)
        if known is not None:  # the sentence that is open goes on
            more = jnp.where(tokens.segment < 0, -1, tokens.segment + known[1][:, None])
            old = jnp.pad(known[0], ((0, 0), (0, 0), (0, n)), constant_values=-1)
            more = jnp.broadcast_to(more[:, None], (b, g, n))
            kv = kv._replace(segment=jax.lax.dynamic_update_slice_in_dim(old, more, past.cursor, 2))
        keys, diagonal = kv.k, past.k.shape[2]
        if unturned:
            turned_q, keys = place(q, kv, past.cursor, freqs)
    see: dict[str, Any] = dict(q_pos=pos, k_pos=kv.pos, bias=kv.bias, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
    if part is None:  # all heads have the same rows: less to mask, and less to hand on where devices share them
        see |= {"k_pos": pos, "bias": bias if proportional else None}
    if part is None and recipe.sparsify is not None:
        rest = {name: see[name] for name in ("bias", "window", "softcap", "scale")}
        own = (learned or {}).get("sparsify", {})
        out, lse = sparsify.attend(recipe.sparsify.layer(i, cfg.layers), own, i, turned_q, keys, kv.v, pos, impl=impl, **rest)
    else:
        out, lse = attention(turned_q, keys, kv.v, impl=impl, diagonal=diagonal, **see)
    looked: dict[str, Any] = see
    look_lse = lse
    if among is not None:
        there = jnp.pad(among, ((0, 0), (0, n)), constant_values=True)
        looked = see | {"k_pos": jnp.where(there[:, None], kv.pos, -1)}
        look_lse = attention(turned_q, keys, kv.v, impl=impl, diagonal=diagonal, **looked)[1]
    seen = observe(needs, turned_q, keys, look_lse, looked, diagonal, length, i, key, tokens, impl) | {
        "keys": k if needs.keys else None,
        "values": v if needs.values else None,
        "queries": moments(q, live & (pos >= needs.queries)) if needs.queries is not None else None,
    }
    if part is not None and part.frozen is not None:
        out, _ = merge(out, lse, *attend_frozen(cfg, part.frozen, turned_q, see, impl))
    return out, kv, seen


def look_back(cfg: Config, p, i: int, tokens: Tokens, w: int, impl: Impl, proportional: bool = False) -> Float[Array, "b h w n"]:
    """Attention of the last w tokens over all of them, from the queries of these rows and the keys of all."""
    last, freqs = jax.tree.map(lambda x: x[:, -w:], (tokens.x, tokens.rope, tokens.pos)), jnp.asarray(blocks.frequencies(cfg, i))
    q = rotate_by(blocks.qkv(cfg, p, last[0])[0], last[1], freqs, blocks.axes(cfg, last[1]))
    k = rotate_by(blocks.qkv(cfg, p, tokens.x)[1], tokens.rope, freqs, blocks.axes(cfg, tokens.rope))
    see = _sight(cfg, i, tokens, proportional) | {"q_pos": last[2]}
    return rows(q, k, attention(q, k, k, impl=impl, **see)[1], **see)


def foresee(cfg: Config, p, i: int, tokens: Tokens, needs: Needs, proportional: bool, key, impl: Impl) -> Evidence:
    """What layer i would make of rows that it has not run on yet; for attention of the last rows alone, only these ask."""
    freqs = jnp.asarray(blocks.frequencies(cfg, i))
    common = {
        "hidden": tokens.x if needs.hidden else None,
        "weights": {name: p[name] for name in needs.weights} if needs.weights else None,
        **at_hand(i, freqs, key),
    }
    if needs == Needs(rows=needs.rows, hidden=needs.hidden, weights=needs.weights, own=True):
        seen = {"rows": look_back(cfg, p, i, tokens, min(needs.rows, tokens.pos.shape[1]), impl, proportional)} if needs.rows else {}
        return Evidence(**seen, **common)
    if needs.change:
        raise ValueError("what a layer's blocks change is known when it has run; a method cannot ask for it ahead of the layer")
    q, k, v = blocks.qkv(cfg, p, tokens.x)
    length = jnp.linalg.norm(blocks.normed(cfg, p, tokens.x).astype(jnp.float32), axis=-1) if needs.unit else None
    turned_q, turned_k = (rotate_by(x, tokens.rope, freqs, blocks.axes(cfg, tokens.rope)) for x in (q, k))
    see = _sight(cfg, i, tokens, proportional)
    lse = attention(turned_q, turned_k, v, impl=impl, diagonal=0, **see)[1]
    seen = observe(needs, turned_q, turned_k, lse, see, 0, length, i, common["key"], tokens) | {
        "keys": k if needs.keys else None,
        "values": v if needs.values else None,
        "queries": moments(q, (tokens.pos >= 0) & (tokens.pos >= needs.queries)) if needs.queries is not None else None,
    }
    return Evidence(**seen, **common)


def _sight(cfg: Config, i: int, tokens: Tokens, proportional: bool) -> dict[str, Any]:
    """Who sees whom among the rows of a prefill of its own, for `attention`."""
    size = jnp.where((tokens.pos >= 0) & (tokens.size > 0), tokens.size, 1.0)
    bias = jnp.broadcast_to(jnp.log(size)[:, None], (size.shape[0], cfg.kv_heads, size.shape[1])) if proportional else None
    pos = {"q_pos": tokens.pos, "k_pos": tokens.pos}
    return pos | {"bias": bias, "window": cfg.layer_window(i), "softcap": cfg.softcap, "scale": cfg.scale}


def attend_frozen(cfg: Config, frozen: Frozen, q: Float[Array, "b h t d"], see: dict[str, Any], impl: Impl) -> tuple[Array, Array]:
    """Attention to slots that no longer change: with some channels of the keys only, or shared by the whole batch."""
    (b, h, t, d), kv, q_pos = q.shape, frozen.kv, see["q_pos"]
    if frozen.channels is not None:
        q = jnp.take_along_axis(q, jnp.repeat(frozen.channels, h // frozen.channels.shape[1], 1)[:, :, None], -1)
    shared = kv.k.shape[0] < b  # one copy for all: its rows are the queries of the batch
    if shared:
        q, q_pos = jnp.swapaxes(q, 0, 1).reshape(1, h, b * t, -1), q_pos.reshape(1, -1)
    rest: dict[str, Any] = {name: see[name] for name in ("window", "softcap")} | {"scale": cfg.scale or d**-0.5}
    out, lse = attention(q, kv.k, kv.v, q_pos=q_pos, k_pos=kv.pos, bias=kv.bias, impl=impl, **rest)
    if shared:
        out, lse = (jnp.swapaxes(x.reshape(h, b, t, *x.shape[3:]), 0, 1) for x in (out, lse))
    return out if frozen.gate is None else out * frozen.gate[:, :, None, None].astype(out.dtype), lse


# --- after a prefill ----------------------------------------------------------------------------------------------------


def settle(
    cfg: Config,
    params,
    i: int,
    found: list[tuple[KV, Evidence]],
    past: tuple[Part, ...] | None,
    recipe: Recipe,
    new: int,
    keep,
    impl: Impl = "auto",
) -> tuple[Part, ...]:
    """The parts of layer i after a prefill: split by head groups, compressed, fitted to the step policy, with room and states begun."""
    sizes = head_groups(cfg, recipe, i)
    olds = [None] * len(found) if past is None else list(past)
    if len(found) == 1 and len(sizes) > 1:
        (kv, evidence), old, edges = found[0], olds[0], [sum(sizes[:j]) for j in range(len(sizes) + 1)]
        cut = [(a, b) for a, b in itertools.pairwise(edges)]
        found = [(_heads(kv, *at), _heads_of_evidence(evidence, *at, cfg.heads // cfg.kv_heads, cfg.kv_heads)) for at in cut]
        olds = [None if old is None else _heads_of_part(old, *at) for at in cut]
    return tuple(
        _settle_group(cfg, params, i, j, *each, old, recipe, new, keep, impl) for j, (each, old) in enumerate(zip(found, olds, strict=True))
    )


def _heads(kv: KV, a: int, b: int) -> KV:
    return kv._replace(k=kv.k[:, a:b], v=kv.v[:, a:b], pos=kv.pos[:, a:b], bias=kv.bias[:, a:b], lost=kv.lost[:, a:b])


def _heads_of_part(part: Part, a: int, b: int) -> Part:
    return Part(_heads(part.kv, a, b), Held(jax.tree.map(lambda x: x[:, a:b], part.policy.slots), part.policy.rest))


def _heads_of_evidence(evidence: Evidence, a: int, b: int, group: int, heads: int) -> Evidence:
    """Evidence about KV heads a to b - 1. `hidden` has no head axis and stays; of `weights` the output projection has one, its rows."""
    per_query = lambda x: None if x is None else x[:, a * group : b * group]
    weights = evidence.weights
    if weights is not None and "o" in weights:
        d = weights["o"].shape[0] // (group * heads)
        weights = weights | {"o": weights["o"][a * group * d : b * group * d]}
    return evidence._replace(
        **{name: per_query(getattr(evidence, name)) for name in ("rows", "received", "peak", "perturbed", "ranked", "cls", "turned")},
        keys=None if evidence.keys is None else evidence.keys[:, a:b],
        queries=None if evidence.queries is None else tuple(map(per_query, evidence.queries)),
        weights=weights,
    )


def _settle_group(cfg, params, i, j, kv: KV, evidence: Evidence, old: Part | None, recipe: Recipe, new: int, keep, impl: Impl) -> Part:
    b, learned, state, frozen = kv.seen.shape[0], params.get("methods", {}), Held(), None if old is None else old.frozen
    if not kv.k.shape[1]:
        return Part(kv, state)
    cache, policy, reader = recipe.cache, recipe.policy, recipe.reader
    cache = None if cache is None else cache.layer(i, cfg.layers).head_group(j)
    policy = None if policy is None else policy.layer(i, cfg.layers).head_group(j)
    if policy is not None:
        own = learned.get("policy", {})
        if old is None:
            state = policy.start(own, kv, evidence)
        else:
            extra = kv.pos.shape[-1] - old.kv.pos.shape[-1]
            state = policy.observe(own, Held(pad_slots(old.policy.slots, extra), old.policy.rest), kv, evidence)
    if cache is not None:
        if policy is None:
            kv, evidence = cache.compress(learned.get("cache", {}), kv, evidence, budget_of(keep, "cache", i, cfg, b))
        elif not cache.whole(kv.pos.shape[-1]) or (keep or {}).get("cache") is not None:
            plan = cache.plan(learned.get("cache", {}), kv, evidence, budget_of(keep, "cache", i, cfg, b))
            kv, state = reduce_kv(plan, kv), Held(move_slots(plan, state.slots), state.rest)
            evidence = move(plan, evidence)
        if frozen is None:
            kv, frozen = cache.freeze(learned.get("cache", {}), kv, evidence)
    if policy is not None:
        kv, state = policy.refit(own, state, kv, evidence, budget_of(keep, "policy", i, cfg, b))
        slots = policy.slots + policy.every
        cursor = policy.capacity if policy.vacates else policy.slots  # the same room before the next fit for a prompt of any length
    else:
        slots, cursor = kv.pos.shape[-1] + new, None
        slots = impl.rows(slots) if isinstance(impl, Shared) else slots
    if reader is not None:
        if reader.needs.segment and kv.segment is None:
            raise ValueError(f"{reader.name} needs the segments of the prompt, which the prefill of {recipe.cache.name} does not keep")  # type: ignore[union-attr]
        slots = -(-slots // reader.block) * reader.block
    full = kv.pos.shape[-1]
    if reader is not None and reader.offload and old is not None:  # where the cursor is depends on what the caches hold
        kv, full = offload.aligned(kv, reader.block), full - reader.block + 1
    extra, gap = slots - kv.pos.shape[-1], 0 if cursor is None else max(cursor - kv.pos.shape[-1], 0)
    kv = grow_kv(kv, slots)
    kv = kv if cursor is None else kv._replace(cursor=jnp.full((), cursor, jnp.int32))
    state = Held(pad_slots(state.slots, extra), state.rest)
    if gap:  # a prompt shorter than the capacity ends where the next token goes, as one that was padded does
        moved = lambda x: jnp.roll(x, gap, 2)
        kv = kv._replace(k=moved(kv.k), v=moved(kv.v), pos=moved(kv.pos), bias=moved(kv.bias))
        kv = kv if kv.segment is None else kv._replace(segment=moved(kv.segment))
        state = Held(jax.tree.map(moved, state.slots), state.rest)
    kv = held(impl, kv) if isinstance(impl, Shared) else kv
    reading = () if reader is None else reader.start(learned.get("reader", {}), i, kv, cfg.heads)
    return Part(stowed(reader, kv._replace(segment=None), reading, full), state, reading, frozen)


def stowed(reader, kv: KV, reading, slots: int) -> KV:
    """The cache as a reader wants it to stand: the first `slots` slots in host memory, unless it reads everything anyway."""
    return offload.stow(kv, max(slots, 0), reader.hosted) if reader is not None and reader.offload and jax.tree.leaves(reading) else kv


def move_slots(plan, slots):
    return jax.tree.map(lambda x: gather(x, representative(plan)), slots)


def pad_slots(slots, extra: int):
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)), slots)


def stow_all(reader, layers, slots: int):
    """`stowed` for the caches of all layers, whose first `slots` slots are written."""
    put = lambda part: part._replace(kv=stowed(reader, part.kv, part.reader, slots))
    return tuple(tuple(map(put, parts)) for parts in layers)
