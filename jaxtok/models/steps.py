"""One layer of the decoder in a step: a head group appends its rows, reads its cache, makes room."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.reader import Sight
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import grow_kv
from jaxtok.core.rotary import rotate_by, turn
from jaxtok.core.score import moments
from jaxtok.core.types import KV, Evidence, Needs, Part
from jaxtok.core.vacate import vacate
from jaxtok.models import blocks
from jaxtok.models.cached import at_hand, attend_frozen, budget_of, pad_slots, raw
from jaxtok.models.config import Config
from jaxtok.models.observe import observe
from jaxtok.ops.attention import Impl, attention, merge
from jaxtok.ops.cache import append, block_slots, place, scatter
from jaxtok.ops.offload import whole
from jaxtok.ops.read import attend_blocks, take_kv


def step_part(
    cfg: Config, params, i: int, j: int, part: Part, qkv, live, recipe: Recipe, carry, keep, key, evict: bool, impl: Impl, ids=None
):
    """Head group j of layer i in a step -> (attended values, part, the reader's carry)."""
    (q, k, v), (kv, state, reading, frozen, _) = qkv, part
    learned, freqs = params.get("methods", {}), jnp.asarray(blocks.frequencies(cfg, i))
    policy = None if recipe.policy is None else recipe.policy.layer(i, cfg.layers).head_group(j)
    reader = recipe.reader
    count = jnp.cumsum(live, 1, dtype=jnp.int32)
    pos = jnp.where(live, kv.seen[:, None] + count - 1, -1)
    if not k.shape[1]:
        return q, part._replace(kv=kv._replace(seen=kv.seen + count[:, -1])), carry
    at, unturned = kv.cursor, raw(recipe)
    rope = jnp.maximum(pos, 0) + kv.delta[:, None]
    stored = k if unturned else rotate_by(k, rope, freqs)
    kv = append(kv, stored, v, pos, jnp.zeros(k.shape[:3], jnp.float32))
    kv = kv._replace(seen=kv.seen + count[:, -1])
    see: dict[str, Any] = dict(q_pos=pos, k_pos=kv.pos, bias=kv.bias, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
    turned: Any = q if unturned else rotate_by(q, rope, freqs)
    looks = Needs() if policy is None else policy.step_needs if evict else policy.needs  # rows of a chunk are a prefill's
    keys, values, slots, out = kv.k, kv.v, None, None
    if reader is not None:
        own, sight = learned.get("reader", {}), Sight(freqs, see["window"], cfg.softcap, cfg.scale, impl, ids)
        reading, known = _written(reader, own, reading, kv, at, k.shape[2], see["window"], count[:, -1])
        if reader.attends:
            reading, carry, out, lse = reader.attend(own, i, reading, carry, turned, pos, known, sight)
            if frozen is not None:
                out, _ = merge(out, lse, *attend_frozen(cfg, frozen, turned, see, impl))
            return out, Part(kv, state, reading, frozen), carry
        reading, carry, index = reader.read(own, i, reading, carry, turned, pos, known, sight)
        if index is not None:
            if unturned:
                if index.rope is None or index.query is None:
                    raise ValueError(f"{reader.name} reads raw keys and must say where they and the queries stand (KeyIndex.rope, .query)")
                turned = turn(q, jnp.repeat(index.query, q.shape[1] // index.index.shape[1], 1), freqs)
            if looks == Needs():
                out, lse = attend_blocks(turned, pos, known, index.index, sight, reader.block, index.rope if unturned else None)
            else:  # a policy that looks at the attention to the slots that are read
                slots = block_slots(index.index, reader.block)
                keys, values, k_pos, bias = take_kv(kv, slots)
                keys = turn(keys, index.rope, freqs) if unturned and index.rope is not None else keys
                see |= {"k_pos": k_pos, "bias": bias}
    if unturned and slots is None and out is None:
        turned, keys = place(q, kv, jnp.minimum(at, kv.k.shape[2] - k.shape[2]), freqs)
    if out is None:
        out, lse = attention(turned, whole(keys), whole(values), impl=impl, **see)
    if policy is not None:
        own = learned.get("policy", {})
        here = at_hand(i, freqs, key)
        seen: dict[str, Any] = observe(looks, turned, keys, lse, see, layer=i, key=here["key"])
        if slots is not None:
            seen = {name: x if name == "turned" else scatter(x, slots, kv.pos.shape[-1]) for name, x in seen.items()}
        evidence = Evidence(**seen, **here)
        state = policy.observe(own, state, kv, evidence)
        budget = budget_of(keep, "policy", i, cfg, kv.seen.shape[0])
        if not evict:
            pass
        elif policy.vacates:
            kv, state, victim = vacate(policy, own, state, kv, budget, evidence)
            if reader is not None:
                for slot in (victim, jnp.broadcast_to(at, victim.shape)):
                    reading = reader.update(learned.get("reader", {}), reading, kv, slot)
        else:
            kv, state, reading = _refit(cfg, policy, own, reader, learned.get("reader", {}), i, kv, state, reading, evidence, budget, impl)
    if frozen is not None:
        out, _ = merge(out, lse, *attend_frozen(cfg, frozen, turned, see, impl))
    return out, Part(kv, state, reading, frozen), carry


def _written(reader, own, reading, kv: KV, at, t: int, window: int | None, added) -> tuple[Any, KV]:
    """(the reader's state once t rows were written from slot `at` on, the cache as it may look at it)."""
    last = kv.k.shape[2] - 1
    written = lambda r, reading: reader.update(own, reading, kv, jnp.broadcast_to(jnp.minimum(at + r, last), kv.pos.shape[:2]))
    reading = written(0, reading) if t == 1 else jax.lax.fori_loop(0, t, written, reading)
    if window is not None:  # what no query of this step can see is dead to the reader
        edge = kv.seen - added - window
        kv = kv._replace(pos=jnp.where(kv.pos > edge[:, None, None], kv.pos, -1))
    return reading, kv


def finish(params, layers: list[tuple[Part, ...]], carry, recipe: Recipe) -> tuple[tuple[Part, ...], ...]:
    """The layers after a step: their reader's states as they leave it."""
    if recipe.reader is None:
        return tuple(layers)
    states = recipe.reader.finish(params.get("methods", {}).get("reader", {}), tuple(parts[0].reader for parts in layers), carry)
    return tuple((parts[0]._replace(reader=state), *parts[1:]) for parts, state in zip(layers, states, strict=True))


def _refit(cfg, policy: CachePolicy, own, reader, reader_params, i, kv, state, reading, evidence, budget, impl):
    """Every `policy.every` appends: the whole cache is brought down to its slots."""
    slots = kv.k.shape[2]

    def fit(kv, state, reading):
        seen = _recalled(cfg, i, kv, evidence, policy.recall(own, state), impl)
        kv, state = policy.refit(own, state, kv, seen, budget)
        moved = Held(pad_slots(state.slots, slots - kv.pos.shape[-1]), state.rest)
        kv = grow_kv(kv, slots)._replace(cursor=jnp.full_like(kv.cursor, policy.slots))
        return kv, moved, reading if reader is None else reader.start(reader_params, i, kv, cfg.heads)

    return jax.lax.cond(kv.cursor >= policy.slots + policy.every, fit, lambda *same: same, kv, state, reading)


def _recalled(cfg: Config, i: int, kv: KV, evidence: Evidence, found, impl: Impl) -> Evidence:
    """The evidence with what past queries make of the cache as it is now."""
    if found is None:
        return evidence
    needs, q, pos = found
    see: dict[str, Any] = dict(q_pos=pos, k_pos=kv.pos, bias=kv.bias, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
    lse = attention(q, kv.k, kv.v, impl=impl, **see)[1] if needs.rows or needs.received or needs.peak else None
    seen = observe(needs, q, kv.k, lse, see)
    if needs.queries is not None:
        before = rotate_by(q, -(pos + kv.delta[:, None]), evidence.freqs)  # type: ignore[arg-type]
        seen["queries"] = moments(before, (pos >= 0) & (pos >= needs.queries))
    return evidence._replace(**seen)
