"""The decoder with explicit caches: `prefill` runs whole rows and compresses layer by layer, `step` appends to the caches.

Pure functions of (cfg, params, inputs, state). `params["layers"]` is a tuple and is unrolled; the caches are a tuple of layers, each
a tuple of `Part` (one a head group), so that jit can donate and update them in place. Which method acts where is the recipe's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.protocols import Held, vacate
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, grow_kv, move, reduce, reduce_kv
from jaxtok.core.rotary import rotate_by, turn
from jaxtok.core.score import moments
from jaxtok.core.select import pack
from jaxtok.core.types import KV, Evidence, Needs, Part, Tokens
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.ops.attention import attention
from jaxtok.ops.cache import append, block_slots, place, scatter
from jaxtok.ops.evidence import received, rows

Layers = tuple[tuple[Part, ...], ...]
PLAIN = Recipe()


def embed(cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None) -> Tokens:
    """Tokens of a batch of padded prompts; `live` marks the real ones (None = all). Positions count from 0.

    Padding may stand anywhere: rows are packed dead first, live last, and `source` says where each token went.
    """
    live = jnp.ones(ids.shape, bool) if live is None else live
    if live.shape != ids.shape:
        raise ValueError(f"live {live.shape} must have the shape of ids {ids.shape}")
    packed = pack(live)
    pos = blocks.positions(packed.index >= 0)
    none = jnp.full(ids.shape, -1, jnp.int32)
    return Tokens(
        x=blocks.embed(cfg, params, gather(ids, packed.index)),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=(pos >= 0).astype(jnp.float32),
        kind=jnp.zeros(ids.shape, jnp.int8),
        segment=none,
        cell=jnp.repeat(none[..., None], 2, -1),
        source=packed.assign,
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros(ids.shape[:1], jnp.int32),
        lost=jnp.zeros(ids.shape[:1], jnp.int32),
    )


def empty(cfg: Config, params, b: int, slots: int, recipe: Recipe = PLAIN) -> Layers:
    """Caches of `slots` dead slots for b sequences, in the parameters' dtype, with the step policy's state begun."""
    g, dtype = cfg.kv_heads, params["embed"].dtype
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    out = []
    for i in range(cfg.layers):
        kv = KV(
            k=jnp.zeros((b, g, slots, cfg.head_dim), dtype),
            v=jnp.zeros((b, g, slots, cfg.head_dim), dtype),
            pos=zeros(b, g, slots) - 1,
            bias=jnp.zeros((b, g, slots), jnp.float32),
            seen=zeros(b),
            delta=zeros(b),
            cursor=zeros(),
            lost=zeros(b, g),
        )
        nothing = jnp.zeros((b, cfg.heads, slots), jnp.float32)
        seen = Evidence(received=nothing, rows=nothing[:, :, None], **_always(i, jnp.asarray(blocks.frequencies(cfg, i)), None))
        learned = params.get("methods", {})
        state = recipe.policy.layer(i, cfg.layers).start(learned.get("policy", {}), kv, seen) if recipe.policy else Held()
        reading = recipe.reader.start(learned.get("reader", {}), i, kv) if recipe.reader else ()
        out.append((Part(kv, state, reading),))
    return tuple(out)


def logits(cfg: Config, params, x: Float[Array, "b n c"]) -> Float[Array, "b n vocab"]:
    """Float32 logits of the next token at each row; pass the last row only when generating."""
    return blocks.logits(cfg, params, x)


def prefill(
    cfg: Config,
    params,
    tokens: Tokens,
    recipe: Recipe = PLAIN,
    *,
    new: int,
    layers: Layers | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    impl: str = "auto",
) -> tuple[Tokens, Layers]:
    """Run whole rows through all layers; caches come out compressed by the recipe, with room for `new` more tokens.

    `layers`: continue on these caches (the next chunk, the question after the context was compressed, the next turn): positions
    of `tokens` then count from 0 and are moved behind what the caches have seen; evidence covers this call's queries.
    `keep`: traced budgets by recipe field ("cache", "policy", or "layers": a sequence, one entry a pruner), i32 broadcastable
    to [l b]; absent = the capacity.
    `key`: PRNG for methods that draw. `proportional`: log(size) is added to the attention logits of merged tokens.

    Returns the tokens after the last layer (row -1 is the last token; feed it to `logits`) and the caches.
    """
    recipe.validate(cfg)
    _known(keep)
    if new < 0:
        raise ValueError(f"new must be >= 0, got {new}")
    stacked = isinstance(params["layers"], dict)
    if stacked or len(params["layers"]) != cfg.layers:
        raise ValueError("inference takes params['layers'] as a tuple of one dict a layer; use models.blocks.unstack(params)")
    if layers is not None and any(len(parts) > 1 for parts in layers):
        raise ValueError("continuing a prefill on caches split by heads is not supported; run `step` on the rows instead")
    if layers is not None and recipe.layers:
        raise ValueError("pruning between layers takes a prefill of its own; continue with a recipe without `layers`")
    places = {k: (i, method) for i, (k, method) in enumerate(recipe.layers)}
    evidence, out = Evidence(), []
    for i, p in enumerate(params["layers"]):
        if i in places:
            tokens = _prune(cfg, params, p, i, tokens, evidence, *places[i], keep, proportional, key, impl)
        follower = places[i + 1][1].needs if i + 1 in places else Needs()
        needs = recipe.prefill_needs | (follower if not follower.own else Needs())
        tokens, kv, evidence = _attend_rows(cfg, p, i, tokens, layers, recipe, needs, proportional, key, impl)
        out.append((_settle(cfg, params, i, kv, evidence, None if layers is None else layers[i][0], recipe, new, keep),))
    return tokens, tuple(out)


def _raw(recipe: Recipe) -> bool:
    return (recipe.policy is not None and recipe.policy.raw) or (recipe.reader is not None and recipe.reader.raw)


def whole(site: str, keep) -> Array:
    """A traced budget as i32; TypeError for a share, ValueError for a site that takes none."""
    keep = jnp.asarray(keep)
    if not jnp.issubdtype(keep.dtype, jnp.integer):
        raise TypeError(f"keep[{site!r}] counts slots (integers), got {keep.dtype}; turn a ratio into slots with jaxtok.core.budget.keep(ratio, live)")
    return keep.astype(jnp.int32)


def _known(keep: Mapping[str, Any] | None) -> None:
    unknown = sorted(set(keep or ()) - {"cache", "policy", "layers"})
    if unknown:
        raise ValueError(f"keep has {', '.join(map(repr, unknown))}; budgets go by recipe field: cache, policy, layers")


def _budget(keep, site: str, i: int, cfg: Config, b: int):
    """The traced budget of one site in layer i as [b 1], or None."""
    if keep is None or keep.get(site) is None:
        return None
    return jnp.broadcast_to(whole(site, keep[site]), (cfg.layers, b))[i][:, None]


def _attend_rows(cfg, p, i, tokens, layers, recipe, needs, proportional, key, impl):
    """One layer over the rows of a prefill -> (tokens, cache with these rows, evidence over the cache's slots)."""
    b, n, _ = tokens.x.shape
    g, freqs = cfg.kv_heads, jnp.asarray(blocks.frequencies(cfg, i))
    q, k, v = blocks.qkv(cfg, p, tokens.x)
    raw, live = _raw(recipe), tokens.pos >= 0
    size = jnp.where(live & (tokens.size > 0), tokens.size, 1.0)
    bias = jnp.broadcast_to((jnp.log(size) if proportional else jnp.zeros_like(size))[:, None], (b, g, n))
    if layers is None:
        past, pos = None, tokens.pos
        turned_q, turned_k = (rotate_by(x, tokens.rope, freqs) for x in (q, k))
        kv = KV(
            k=k if raw else turned_k,
            v=v,
            pos=jnp.broadcast_to(pos[:, None], (b, g, n)),
            bias=bias,
            seen=tokens.seen,
            delta=tokens.delta,
            cursor=jnp.full((), n, jnp.int32),
            lost=jnp.broadcast_to(tokens.lost[:, None], (b, g)),
        )
        keys, diagonal = turned_k, 0
    else:
        past = layers[i][0].kv
        pos = jnp.where(live, tokens.pos + past.seen[:, None], -1)
        shift = (past.seen + past.delta)[:, None, None]
        turned_q, turned_k = (rotate_by(x, tokens.rope + shift, freqs) for x in (q, k))
        grown = grow_kv(past, past.k.shape[2] + n)
        kv = append(grown, k if raw else turned_k, v, pos, bias)
        kv = kv._replace(seen=past.seen + tokens.seen, delta=past.delta + tokens.delta)
        keys, diagonal = kv.k, past.k.shape[2]
        if raw:
            turned_q, keys = place(q, kv, past.cursor, freqs)
    see: dict[str, Any] = dict(q_pos=pos, k_pos=kv.pos, bias=kv.bias, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale, diagonal=diagonal)
    out, lse = attention(turned_q, keys, kv.v, impl=impl, **see)
    if past is not None and (needs.keys or needs.hidden):
        raise ValueError("a method needs the unrotated keys or the hidden rows of the whole cache; they are not kept after a prefill")
    evidence = _observe(needs, turned_q, keys, lse, see) | {
        "keys": k if needs.keys else None,
        "queries": moments(q, live & (pos >= needs.queries)) if needs.queries is not None else None,
        "hidden": tokens.x if needs.hidden else None,
        "weights": {name: p[name] for name in needs.weights} if needs.weights else None,
    }
    evidence = Evidence(**evidence, **_always(i, freqs, key))
    x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, tokens.x, out))
    return tokens._replace(x=x), kv, evidence


def _always(i: int, freqs: Array, key: Array | None) -> dict[str, Any]:
    return {"freqs": freqs, "layer": jnp.full((), i, jnp.int32), "key": None if key is None else jax.random.fold_in(key, i)}


def _observe(needs: Needs, q, k, lse, see) -> dict[str, Any]:
    """Attention evidence from queries, keys and the saved logsumexp; no [n n] array exists."""
    out: dict[str, Any] = {}
    plain = {name: x for name, x in see.items() if name not in ("q_pos", "diagonal")}
    if needs.rows:
        w = min(needs.rows, q.shape[2])
        out["rows"] = rows(q[:, :, -w:], k, lse[:, :, -w:], q_pos=see["q_pos"][:, -w:], **plain)
    if needs.received:
        out["received"] = received(q, k, lse, **see)
    if needs.cls:
        out["cls"] = rows(q[:, :, :1], k, lse[:, :, :1], q_pos=see["q_pos"][:, :1], **plain)[:, :, 0]
    return out


def _prune(cfg, params, p, i, tokens, evidence, index, method, keep, proportional, key, impl) -> Tokens:
    """Site 3: reduce the rows before layer i."""
    if method.needs.own:
        _, _, evidence = _attend_rows(cfg, p, i, tokens, None, PLAIN, method.needs, proportional, key, impl)
    table = None if keep is None else keep.get("layers")
    budget = None if table is None or table[index] is None else jnp.broadcast_to(whole("layers", table[index]), tokens.seen.shape)
    learned = params.get("methods", {}).get("layers", {})
    own = learned[index] if learned else {}
    _, plan = method.plan(own, method.start(own, tokens), tokens, evidence, budget)
    return reduce(plan, tokens, method.positions)


def _settle(cfg, params, i, kv, evidence, old: Part | None, recipe: Recipe, new: int, keep) -> Part:
    """Compress, fit to the step policy, leave room, and begin the states of a layer's cache after a prefill."""
    b, learned = kv.seen.shape[0], params.get("methods", {})
    state = Held()
    cache, policy, reader = recipe.cache, recipe.policy, recipe.reader
    if policy is not None:
        policy, own = policy.layer(i, cfg.layers), learned.get("policy", {})
        if old is None:
            state = policy.start(own, kv, evidence)
        else:
            extra = kv.pos.shape[-1] - old.kv.pos.shape[-1]
            slots = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)), old.policy.slots)
            state = policy.observe(own, Held(slots, old.policy.rest), kv, evidence)
    if cache is not None:
        cache = cache.layer(i, cfg.layers)
        if policy is None:
            kv, evidence = cache.compress(learned.get("cache", {}), kv, evidence, _budget(keep, "cache", i, cfg, b))
        elif not cache.whole(kv.pos.shape[-1]) or (keep or {}).get("cache") is not None:
            plan = cache.plan(learned.get("cache", {}), kv, evidence, _budget(keep, "cache", i, cfg, b))
            kv, state = reduce_kv(plan, kv), Held(_move_slots(plan, state.slots), state.rest)
            evidence = move(plan, evidence)
    if policy is not None:
        plan = policy.fit(own, state, kv, evidence, _budget(keep, "policy", i, cfg, b))
        kv, state = reduce_kv(plan, kv), Held(_move_slots(plan, state.slots), state.rest)
        slots = policy.capacity + policy.every
        cursor = policy.capacity if policy.every == 1 else plan.index.shape[-1]
    else:
        slots, cursor = kv.pos.shape[-1] + new, None
    if reader is not None:
        slots = -(-slots // reader.block) * reader.block
    extra = slots - kv.pos.shape[-1]
    kv = grow_kv(kv, slots)
    kv = kv if cursor is None else kv._replace(cursor=jnp.full((), cursor, jnp.int32))
    state = Held(jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)), state.slots), state.rest)
    return Part(kv, state, () if reader is None else reader.start(learned.get("reader", {}), i, kv))


def _move_slots(plan, slots):
    return jax.tree.map(lambda x: gather(x, plan.index), slots)


def step(
    cfg: Config,
    params,
    x: Float[Array, "b t c"],
    live: Bool[Array, "b t"],
    layers: Layers,
    recipe: Recipe = PLAIN,
    *,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    evict: bool = True,
    impl: str = "auto",
) -> tuple[Float[Array, "b t c"], Layers]:
    """Append t rows to the caches: embed -> append -> read -> attend -> evict, in place when jit donates `layers`.

    `x` are embeddings (`blocks.embed`); rows that are not `live` (finished sequences) leave no trace. With a step policy t > 1 rows
    run one after another, unless `evict` is False: then rows are appended and observed, and nothing is vacated (chunked prefill).
    A row that finds no slot is counted in `kv.lost`. A policy's `keep` must be that of the prefill: each step vacates one slot for the one
    it fills. Returns the rows after the last layer and the caches.
    """
    _known(keep)
    if recipe.policy is not None and evict and x.shape[1] > 1:

        def one(state, row):
            y, state = step(cfg, params, row[0][:, None], row[1][:, None], state, recipe, keep=keep, key=key, impl=impl)
            return state, y[:, 0]

        layers, rows_out = jax.lax.scan(one, layers, (jnp.swapaxes(x, 0, 1), live.T))
        return jnp.swapaxes(rows_out, 0, 1), layers
    out, carries = [], [None] * max(len(parts) for parts in layers)
    for i, (p, parts) in enumerate(zip(params["layers"], layers, strict=True)):
        q, k, v = blocks.qkv(cfg, p, x)
        attended, kept, g = [], [], 0
        for j, part in enumerate(parts):
            heads, group = part.kv.k.shape[1], cfg.heads // cfg.kv_heads
            mine = q[:, g * group : (g + heads) * group], k[:, g : g + heads], v[:, g : g + heads]
            o, part, carries[j] = _step_part(cfg, params, p, i, part, mine, live, recipe, carries[j], keep, key, evict, impl)
            attended.append(o)
            kept.append(part)
            g += heads
        o = attended[0] if len(attended) == 1 else jnp.concatenate(attended, 1)
        x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, o))
        out.append(tuple(kept))
    return x, tuple(out)


def _step_part(cfg, params, p, i, part: Part, qkv, live, recipe: Recipe, carry, keep, key, evict, impl):
    """One head group of one layer of a step -> (attended values, part, the reader's carry)."""
    (q, k, v), (kv, state, reading) = qkv, part
    learned, freqs = params.get("methods", {}), jnp.asarray(blocks.frequencies(cfg, i))
    policy, reader = recipe.policy, recipe.reader
    count = jnp.cumsum(live, 1, dtype=jnp.int32)
    pos = jnp.where(live, kv.seen[:, None] + count - 1, -1)
    at, raw = kv.cursor, _raw(recipe)
    ids = jnp.maximum(pos, 0) + kv.delta[:, None]
    stored = k if raw else rotate_by(k, ids, freqs)
    kv = append(kv, stored, v, pos, jnp.zeros(k.shape[:3], jnp.float32))
    kv = kv._replace(seen=kv.seen + count[:, -1])
    turned, keys = place(q, kv, jnp.minimum(at, kv.k.shape[2] - q.shape[2]), freqs) if raw else (rotate_by(q, ids, freqs), kv.k)
    see: dict[str, Any] = dict(q_pos=pos, k_pos=kv.pos, bias=kv.bias, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
    values, slots = kv.v, None
    if reader is not None:
        own = learned.get("reader", {})
        for r in range(k.shape[2]):
            reading = reader.update(own, reading, kv, jnp.broadcast_to(jnp.minimum(at + r, kv.k.shape[2] - 1), kv.pos.shape[:2]))
        window = cfg.layer_window(i)
        # what no query of this step can see is dead to the reader
        edge = kv.seen - count[:, -1] - (window or 0)
        near = kv if window is None else kv._replace(pos=jnp.where(kv.pos > edge[:, None, None], kv.pos, -1))
        reading, carry, index = reader.read(own, i, reading, carry, q if reader.raw else turned, near)
        if index is not None:
            slots = block_slots(index.index, reader.block)
            keys, values = gather(kv.k if index.rope is not None else keys, slots), gather(values, slots)
            if index.rope is not None:
                keys = turn(keys, index.rope, freqs)
            extra = 0.0 if index.bias is None else index.bias
            see |= {"k_pos": jnp.where(slots < 0, -1, gather(kv.pos, slots)), "bias": gather(kv.bias, slots) + extra}
    out, lse = attention(turned, keys, values, impl=impl, **see)
    if policy is not None:
        policy, own = policy.layer(i, cfg.layers), learned.get("policy", {})
        seen: dict[str, Any] = _observe(policy.step_needs, turned, keys, lse, see)
        if slots is not None:
            seen = {name: scatter(x, slots, kv.pos.shape[-1]) for name, x in seen.items()}
        evidence = Evidence(**seen, **_always(i, freqs, key))
        state = policy.observe(own, state, kv, evidence)
        budget = _budget(keep, "policy", i, cfg, kv.seen.shape[0])
        if not evict:
            pass
        elif policy.every == 1:
            kv, state, victim = vacate(policy, own, state, kv, budget)
            if reader is not None:
                for slot in (victim, jnp.broadcast_to(at, victim.shape)):
                    reading = reader.update(learned.get("reader", {}), reading, kv, slot)
        else:
            kv, state, reading = _refit(policy, own, reader, learned.get("reader", {}), i, kv, state, reading, evidence, budget)
    return out, Part(kv, state, reading), carry


def _refit(policy, own, reader, reader_params, i, kv, state, reading, evidence, budget):
    """Every `policy.every` appends: one plan for the whole cache."""
    slots = kv.k.shape[2]

    def fit(kv, state, reading):
        plan = policy.fit(own, state, kv, evidence, budget)
        extra = slots - plan.index.shape[-1]
        moved = Held(
            jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)), _move_slots(plan, state.slots)),
            state.rest,
        )
        kv = grow_kv(reduce_kv(plan, kv), slots)
        return kv, moved, reading if reader is None else reader.start(reader_params, i, kv)

    return jax.lax.cond(kv.cursor >= policy.capacity + policy.every, fit, lambda *same: same, kv, state, reading)
