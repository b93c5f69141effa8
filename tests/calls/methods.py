"""Calls of the registered methods: what each does to a cache by itself, and its constructor."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxtok.core import reduce, registry, vacate
from jaxtok.core.attention import Rows
from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.reader import Sight
from jaxtok.core.sparsifier import View
from jaxtok.core.types import Protect
from jaxtok.ops import cache
from jaxtok.ops.attention import attention
from tests.calls.cases import INTS, LEAST, METHODS, PLAIN, REALS, Case, case, small, usually
from tests.calls.core import CFG
from tests.calls.values import Sizes


def made(s: Sizes, make: Callable[[int], Any]) -> Any:
    """The method of this set, as a layer's instance where it has such."""
    method = make(max(s.m, LEAST))
    return method.layer(s.i % 2, 2).head_group(method.groups - 1) if hasattr(method, "layer") else method


def learned(method: Any, s: Sizes) -> Any:
    return method.init_params(jax.random.key(0), dataclasses.replace(CFG, heads=s.h, kv_heads=s.g, head_dim=s.d))


def compress(make):
    def build(s):
        method = made(s, make)
        window = max(method.needs.rows, method.needs.turned, s.w)
        s = s._replace(w=window)

        def fn(kv, evidence, keep=None):
            return method.freeze(learned(method, s), *method.compress(learned(method, s), kv, evidence, keep))

        keep = lambda v: {"keep": v.keep(*s.one((s.b, 1), (s.b, s.g), ()))} if s.i % 3 else {}
        return Case(fn, lambda v: {"kv": resized(v, s).kv(), "evidence": resized(v, s).evidence()} | keep(v))

    return build


def resized(v, s):
    v.s = s
    return v


def fit(make):
    def build(s):
        method = made(s, make)

        def fn(kv, evidence, keep):
            state = method.start(learned(method, s), kv, evidence)
            plan = method.fit(learned(method, s), state, kv, evidence, keep)
            moved = jax.tree.map(lambda x: reduce.gather(x, reduce.representative(plan)), state.slots)
            return reduce.reduce_kv(plan, kv), moved

        return Case(fn, lambda v: {"kv": v.kv(), "evidence": v.evidence(), "keep": v.keep(s.b, 1)})

    return build


def refit(make):
    def build(s):
        method = made(s, make)

        def fn(kv, evidence, keep):
            own = learned(method, s)
            kv = kv._replace(cursor=jnp.full((), kv.pos.shape[-1], jnp.int32))
            return method.refit(own, method.start(own, kv, evidence), kv, evidence, keep)

        return Case(fn, lambda v: {"kv": v.kv(), "evidence": v.evidence(), "keep": v.keep(s.b, 1)})

    return build


def step(make):
    def build(s):
        method = made(s, make)
        slots = method.capacity + method.every

        def fn(kv, evidence, row, bias, pos, keep):
            own = learned(method, s)
            state = method.start(own, kv, evidence)
            kv = cache.append(kv._replace(cursor=jnp.full((), method.capacity, jnp.int32)), row, row, pos, bias)
            kv = kv._replace(seen=jnp.maximum(kv.seen, pos[:, 0] + 1))
            state = method.observe(own, state, kv, evidence)
            if method.every > 1:
                return method.refit(own, state, kv, evidence, keep)
            return vacate.vacate(method, own, state, kv, keep)

        def arrays(v):
            kv = v.kv(slots, packed=False)
            pos = np.where(v.mask(s.b, 1), kv.seen[:, None], -1).astype(np.int32)
            rows = {"row": v.rows(s.b, s.g, 1, s.d), "bias": v.floats(s.b, s.g, 1), "pos": pos}
            return rows | {"kv": kv, "evidence": v.evidence(slots), "keep": v.keep(s.b, s.g)}

        return Case(fn, arrays)

    return build


def read(make):
    def build(s):
        method = make(max(s.m, LEAST))
        slots, t = -(-(s.n + 1) // method.block) * method.block, s.one(1, 1, 2)

        def fn(kv, q, pos, slot, ids, freqs):
            out, states, carry = [], [], None
            for layer in range(3):
                state = method.start({}, layer, kv, s.h)
                bare = kv._replace(segment=None) if hasattr(kv, "segment") else kv
                state = method.update({}, state, bare, slot)
                see = Sight(freqs, s.one(None, 5), s.one(None, 30.0), None, "auto", ids)
                look = method.attend if method.attends else method.read
                state, carry, *rest = look({}, layer, state, carry, q, pos, bare, see)
                states.append(state)
                if method.attends:
                    out.append((rest[0], jnp.where(jnp.isneginf(rest[1]), 0, rest[1])))
                elif rest[0] is not None:
                    bad = (rest[0].index < -1) | (rest[0].index >= slots // method.block)
                    out.append((rest[0], jnp.where(jnp.any(bad), jnp.nan, 0.0)))  # a block that is not there
            return out, method.finish({}, tuple(states), carry)

        def arrays(v):
            kv = v.kv(slots, packed=False)
            if method.needs.segment:
                kv = kv._replace(segment=np.where(kv.pos >= 0, np.maximum(kv.pos // 3, 0) % 7, -1).astype(np.int32))
            rest = {"slot": v.ints(0, slots - 1, s.b, s.g), "ids": v.ints(0, 9, s.b, t), "freqs": v.angles(s.d // 2)}
            return rest | {"kv": kv, "q": v.rows(s.b, s.h, t, s.d), "pos": v.positions(s.b, t, packed=False)}

        return Case(fn, arrays)

    return build


def lists(make):
    def build(s):
        method = make(max(s.m, LEAST))
        cfg = dataclasses.replace(CFG, heads=s.h, kv_heads=s.g, head_dim=s.d)

        def fn(q, k, live):
            pos = jnp.where(
                jnp.arange(s.n, dtype=jnp.int32)[None] < jnp.sum(live, -1, keepdims=True), jnp.arange(s.n, dtype=jnp.int32)[None], -1
            )
            view = View(q, k, pos, s.i % 2, s.one(None, 5), None, s.one(None, 0.3))
            table = method.table(method.init_params(jax.random.key(0), cfg), view)
            bad = (table.index < -1) | (table.index >= view.blocks(method.block_k))
            return table, jnp.where(jnp.any(bad), jnp.nan, 0.0)  # a block that is not there

        return Case(fn, lambda v: {"q": v.rows(s.b, s.h, s.n, s.d), "k": v.rows(s.b, s.g, s.n, s.d), "live": v.mask(s.b, s.n)})

    return build


BASES = ("snapkv", "k_norm", "pyramidkv", "ada_kv", "chunked", "h2o", "full")
WORDS = st.sampled_from(["max", "avg", "mean", "kvpress", "official", "paper"])


def constructor(cls: type):
    """The class with drawn fields."""

    def call(draw):
        given = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name == "base":
                value = st.just(registry.build(draw(st.sampled_from(BASES)), draw(st.integers(64, 99))))
            elif field.name == "methods":
                value = st.just((registry.build("k_norm", draw(st.integers(1, 9))),))
            elif field.name in ("capacities", "weights"):
                value = st.lists(INTS, max_size=4).map(tuple)
            elif field.name == "protect":
                value = st.builds(Protect, sinks=st.integers(0, 3), recent=st.integers(0, 3))
            else:
                value = st.one_of(INTS, REALS, st.booleans(), WORDS)
            drawn, there = usually(draw, value), draw(st.integers(0, 3)) == 0
            if there or field.default is dataclasses.MISSING:
                given[field.name] = drawn

        def make(**given):
            method = cls(**given)
            assert hash(method) == hash(dataclasses.replace(method)) and method.needs is not None
            if hasattr(method, "layer"):
                method = method.layer(0, 2)
            if hasattr(method, "resize"):
                hash((method.slots, method.resize(3)))

        return make, (), given

    return call


def shorten(make):
    def build(s):
        method = make(max(s.m, LEAST))

        def fn(ids, live, table, keep):
            def look(ids, live, rows):
                share = jnp.where(live, jnp.clip(jnp.abs(table[ids % 16]), 0, 1), 0.0)
                shape = (s.b, s.h, rows + getattr(method, "look", 0), ids.shape[1])
                return (jnp.broadcast_to(share[:, None, None], shape),) * (2 if method.drafts else 1)

            return method.run({}, look, ids, live, keep)

        def arrays(v):
            live = np.sort(v.mask(s.b, s.n), 1)
            return {"ids": v.ints(0, 9, s.b, s.n), "live": live, "table": v.floats(16), "keep": v.keep(s.b)}

        return Case(fn, arrays)

    return build


def shrink(make):
    def build(s):
        method = make(min(max(s.m, LEAST), 16)).layer(s.i % 3, 3)
        s = s._replace(h=s.g, n=max(s.n, getattr(method, "images", 0)))  # a pruner is told how many rows of pictures come

        def fn(tokens, evidence, keep=None):
            own = method.init_params(jax.random.key(0), dataclasses.replace(CFG, width=s.d))
            if method.needs.probs:
                square = jnp.broadcast_to(jnp.abs(evidence.cls)[:, :, None], (s.b, s.h, s.n, s.n))
                evidence = evidence._replace(probs=square)
            if method.needs.score:
                tokens = tokens._replace(score=evidence.detail)
            if method.needs.layers:
                evidence = jax.tree.map(lambda x: jnp.stack([x] * len(method.needs.layers)), evidence)
            _, plan = method.plan(own, method.start(own, tokens), tokens, evidence, keep)
            return reduce.reduce(plan, tokens, method.positions)

        def arrays(v):
            v = resized(v, s)  # evidence of an encoder: as many KV heads as heads
            tokens = v.tokens()
            keep = {"keep": v.keep(s.b)} if s.i % 3 else {}
            return {"tokens": tokens._replace(rope=tokens.rope[..., :1]), "evidence": v.evidence()} | keep

        return Case(fn, arrays)

    return build


def edit(make):
    def build(s):
        method = make(max(s.m, LEAST))
        cfg = dataclasses.replace(CFG, heads=s.h, kv_heads=s.g, head_dim=s.d)

        def fn(heads):
            own = {"heads": heads} if s.i % 2 else method.init_params(jax.random.key(0), cfg)
            spared = [method.layer(own, i, cfg) for i in range(cfg.layers)]
            return [(x.read, x.write) for x in spared]

        return Case(fn, lambda v: {"heads": v.mask(cfg.layers, s.h)})

    return build


def attended(make):
    def build(s):
        method = make(max(s.m, LEAST))

        def fn(q, k, v, pos, mark):
            rows = Rows(pos, jnp.sum(pos >= 0, -1, dtype=jnp.int32), mark, Sight(jnp.ones((1,), jnp.float32)))
            last = rows._replace(pos=rows.count[:, None], count=rows.count + 1, mark=mark[..., :1])
            out = []
            for j in range(method.times):
                state = method.start(j, q, k, v, rows, s.n + 2)
                out += [method.attend(j, q, k, v, rows), method.step(j, state, q[:, :, :1], k[:, :, :1], v[:, :, :1], last)]
            return out

        def arrays(v):
            live = -np.sort(-v.mask(s.b, s.n).astype(np.int32), 1)
            pos = np.where(live, np.arange(s.n)[None], -1).astype(np.int32)
            return {
                "q": v.rows(s.b, s.h, s.n, s.d),
                "k": v.rows(s.b, s.g, s.n, s.d),
                "v": v.rows(s.b, s.g, s.n, s.d),
                "pos": pos,
                "mark": v.mask(s.b, s.n),
            }

        return Case(fn, arrays)

    return build


def mix(make):
    """Two layers of an encoder on a grid of 4 x 4; values are clipped: products of activations are what these methods are made of."""

    def build(s):
        method, n = make(16), 16
        cfg = dataclasses.replace(CFG, width=s.h * s.d, heads=s.h, kv_heads=s.h, head_dim=s.d)

        def fn(x, q, k, v, pos, size):
            x, q, k, v = (jnp.clip(a, -10, 10) for a in (x, q, k, v))
            attend = lambda q, k, v: attention(q, k, v, q_pos=pos, k_pos=pos, causal=False)[0]
            out = lambda y: y.transpose(0, 2, 1, 3).reshape(s.b, n, s.h * s.d)
            layer = Layer(x, q, k, v, pos, jnp.clip(size, 1, 50), (4, 4), attend, out)
            learned, state, blocks = method.init_params(jax.random.key(0), cfg), (), []
            for i in range(2):
                block, state = method.layer(i, cfg.layers).mix(learned[i], state, i, layer)
                blocks.append(block)
            return blocks

        def arrays(v):
            heads = {name: v.rows(s.b, s.h, n, s.d) for name in "qkv"}
            return heads | {"x": v.rows(s.b, n, s.h * s.d), "pos": v.positions(s.b, n), "size": v.floats(s.b, n, least=1)}

        return Case(fn, arrays)

    return build


ROWS = {site: {"plan": shrink} for site in ("vit", "select", "layers")}
USES = ROWS | {
    "edits": {"edit": edit},
    "sparsify": {"table": lists},
    "attention": {"attend": attended},
    "prompt": {"run": shorten},
    "cache": {"compress": compress},
    "policy": {"fit": fit, "step": step},
    "reader": {"read": read},
}

for _name in registry.names():
    PLAIN[f"build {_name}"] = constructor(registry.get(_name))
    for _label, _make in small(_name).items():
        for _what, _use in USES.get(registry.get(_name).site, {}).items():
            if _what == "step" and not _make(99).vacates:
                _what, _use = "refit", refit
            if _what == "attend" and isinstance(_make(99), Mixer):
                _what, _use = "mix", mix
            case(f"method {_label} {_what}")(_use(_make))
            METHODS.add(_name)
