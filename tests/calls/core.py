"""Calls of `jaxtok.core`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxtok.core import (
    budget,
    check,
    compose,
    condense,
    diverse,
    heads,
    layer,
    matching,
    planner,
    plugins,
    protocols,
    pruner,
    reader,
    recipe,
    reduce,
    registry,
    rotary,
    score,
    segments,
    select,
    selector,
    stages,
    types,
)
from jaxtok.core import vacate as steps
from jaxtok.core.types import Needs, Protect
from jaxtok.methods import H2O
from jaxtok.models.config import Config
from tests.calls.cases import ANY, INTS, LEAST, REALS, Case, case, plain, small, usually

NONE_OR_FOUR = st.sampled_from([None, 0, 4])
PLACES = ["nowhere.py", "no.such.module", "", ".", "..", "a b", "json", "/", "a\0b.py"]

plain("core.budget.capacity")(lambda draw: (budget.capacity, (usually(draw, REALS), usually(draw, INTS)), {}))
plain("core.budget.floored")(lambda draw: (budget.floored, (usually(draw, REALS), usually(draw, INTS)), {}))
plain("core.layer.layer_shapes")(lambda draw: (layer.layer_shapes, (draw(st.sampled_from(DECODERS)),), {}))
plain("core.layer.draw")(
    lambda draw: (
        lambda cfg, name: layer.draw(cfg, jax.random.key(0), name, (3, 2)) is None,
        (draw(st.sampled_from(DECODERS)), draw(st.text(max_size=3))),
        {},
    )
)
plain("core.layer.draw_layer")(
    lambda draw: (
        lambda cfg, mlp: sorted(layer.draw_layer(cfg, jax.random.key(0), mlp)),
        (draw(st.sampled_from(DECODERS)), draw(st.booleans())),
        {},
    )
)
plain("core.stages.schedule")(lambda draw: (lambda x: len(stages.schedule(x)), (draw(ANY),), {}))
plain("core.check.at_least")(lambda draw: (check.at_least, ("x", usually(draw, REALS), draw(REALS)), {}))
plain("core.check.between")(lambda draw: (check.between, ("x", usually(draw, REALS), draw(REALS), draw(REALS)), {}))
plain("core.check.budget")(lambda draw: (check.budget, ("x", usually(draw, INTS), draw(INTS)), {}))
plain("core.check.count")(lambda draw: (check.count, ("x", usually(draw, INTS), draw(INTS), draw(INTS)), {}))
plain("core.check.given")(lambda draw: (lambda x: check.given("x", x) and None, (draw(ANY),), {}))
plain("core.check.kind")(lambda draw: (check.kind, ("x", draw(ANY), draw(st.sampled_from([int, str, Protect]))), {}))
plain("core.check.one_of")(lambda draw: (check.one_of, ("x", draw(ANY), ("mean", "max", "sum")), {}))
plain("core.check.real")(lambda draw: (check.real, ("x", draw(ANY)), {}))
plain("core.check.share")(lambda draw: (check.share, ("x", usually(draw, REALS)), {}))
plain("core.plugins.discover")(lambda draw: (lambda _: plugins.discover() and None, (draw(st.integers()),), {}))
plain("core.plugins.load")(lambda draw: (plugins.load, (draw(st.one_of(st.sampled_from(PLACES), st.text(max_size=5))),), {}))
plain("core.registry.get")(lambda draw: (registry.get, (usually(draw, st.sampled_from(registry.names())),), {}))
plain("core.registry.names")(lambda draw: (registry.names, (usually(draw, st.sampled_from(registry.SITES)),), {}))
plain("core.registry.parse_budget")(
    lambda draw: (registry.parse_budget, (draw(st.one_of(st.text(max_size=6), REALS.map(str), REALS.map("{}%".format))),), {})
)
plain("core.types.Needs")(
    lambda draw: (lambda a, b, n: Needs(queries=a) | Needs(queries=b, rows=n), (draw(NONE_OR_FOUR), draw(NONE_OR_FOUR), draw(INTS)), {})
)


def table(draw, dtypes):
    """A small array of one of the dtypes, mostly [l g]."""
    shape = usually(draw, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from([(), (3,), (0, 2), (2, 2, 2)]))
    x = np.random.default_rng(draw(st.integers(0, 9))).normal(size=shape)
    x = np.where(x > 1.5, draw(st.sampled_from([np.nan, np.inf, -np.inf, 9.0])), x)
    return (x > 0).astype(bool) if draw(st.sampled_from(dtypes)) is bool else x


plain("core.heads.split")(lambda draw: (heads.split, (usually(draw, st.just(table(draw, (bool, bool, float)))),), {}))
plain("core.heads.best")(lambda draw: (heads.best, (usually(draw, st.just(table(draw, (float,)))), usually(draw, INTS)), {}))
plain("core.heads.allot")(
    lambda draw: (heads.allot, (*(usually(draw, st.integers(1, 99)) for _ in range(3)), usually(draw, st.floats(0, 1))), {})
)


def schedule(draw):
    """(what enters, places that mostly ascend with counts that mostly fall, layers)."""
    layers = draw(st.integers(1, 12))
    at = sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3)))
    left = sorted((draw(st.integers(0, 600)) for _ in range(len(at) + 1)), reverse=True)
    stages = tuple(zip(at, left[1:], strict=True))
    return usually(draw, st.just(left[0])), usually(draw, st.just(stages)), usually(draw, st.just(layers))


plain("core.planner.counts")(lambda draw: (planner.counts, schedule(draw), {}))
plain("core.planner.conventions")(lambda draw: (planner.conventions, schedule(draw), {}))


def shape(draw):
    entry, stages, layers = schedule(draw)
    at = tuple(s[0] for s in stages) if isinstance(stages, tuple) and all(isinstance(s, tuple) for s in stages) else stages
    return entry, at, layers, usually(draw, st.floats(0, 1)), usually(draw, st.sampled_from(planner.CONVENTIONS))


@plain("core.planner.geometric")
def _(draw):
    entry, at, _, ratio, _ = shape(draw)
    return planner.geometric, (entry, at, ratio), {}


@plain("core.planner.decay")
def _(draw):
    entry, at, layers, _, by = shape(draw)
    return planner.decay, (usually(draw, REALS),), {"entry": entry, "at": at, "layers": layers, "by": by}


@plain("core.planner.fit")
def _(draw):
    entry, at, layers, ratio, by = shape(draw)
    which = {"entry": entry} if draw(st.booleans()) else {"ratio": ratio}
    return planner.fit, (usually(draw, REALS),), {"at": at, "layers": layers, "by": by} | which


plain("core.planner.of_recipe")(
    lambda draw: (planner.of_recipe, (usually(draw, st.just(recipe.Recipe())), CFG, usually(draw, st.integers(1, 600))), {})
)


@plain("core.budget.pyramid")
def _(draw):
    layers = draw(st.integers(1, 40))
    beta = usually(draw, st.one_of(st.integers(1, 30), st.floats(1, 30)))
    args = (usually(draw, INTS), usually(draw, st.integers(0, layers - 1)), layers, beta)
    return budget.pyramid, args, {"most": usually(draw, st.one_of(st.none(), INTS))}


@plain("core.budget.shares")
def _(draw):
    weights = usually(draw, st.lists(REALS, max_size=6).map(tuple))
    return budget.shares, (weights, usually(draw, INTS)), {"least": usually(draw, INTS), "most": usually(draw, st.one_of(st.none(), INTS))}


class Unfrozen:
    """A class that no registration accepts."""


@plain("core.registry.register")
def _(draw):
    name, site, paper = usually(draw, st.sampled_from(registry.names())), usually(draw, st.sampled_from(registry.SITES)), draw(ANY)
    return lambda name, paper, site: registry.register(name, paper=paper, site=site)(Unfrozen), (name, paper, site), {}


OPTIONS = sorted({f.name for n in registry.names() for f in dataclasses.fields(registry.get(n))} | {"sinks", "recent", "nonsense"})
TEXTS = ["max", "none", "true", "1+2+3", "snapkv", "k_norm", "h2o", "ada_kv", "", "paper", "kvpress", "+", "a=b"]


@plain("core.registry.build")
def _(draw):
    if draw(st.integers(0, 9)) == 0:
        return registry.build, (draw(st.text(max_size=20)), draw(ANY)), {}
    pairs = draw(st.lists(st.tuples(st.sampled_from(OPTIONS), st.one_of(REALS.map(str), st.sampled_from(TEXTS))), max_size=4))
    return registry.build, (draw(st.sampled_from(registry.names())) + ":" + ",".join(f"{k}={v}" for k, v in pairs), usually(draw, INTS)), {}


CFG = Config(vocab=8, width=8, layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8, window=4)
DECODERS = [CFG, dataclasses.replace(CFG, qk_norm=True, qkv_bias=True), dataclasses.replace(CFG, sandwich=True)]


@plain("core.recipe.Recipe")
def _(draw):
    sites = draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(recipe.Recipe)]), unique=True, max_size=3))
    capacity = draw(st.integers(LEAST, 20))
    rows = lambda name: registry.get(name).site in ("vit", "select", "layers")  # their `small` leaves so many of 16 rows
    made = [make(min(capacity, 16) if rows(name) else capacity) for name in registry.names() for make in small(name).values()]
    local, given = draw(st.sampled_from([(), (True, False, True)])), {}
    for site in sites:
        value = usually(draw, st.sampled_from([m for m in made if m.site == site] or made))
        given[site] = ((draw(INTS), value),) if site in ("layers", "vit") and draw(st.booleans()) else value

    def call(**given):
        one = recipe.Recipe(**given)
        hash(one.replace())
        one.validate(dataclasses.replace(CFG, local=local))
        jax.eval_shape(lambda key: one.init_params(key, CFG), jax.random.key(0))

    return call, (), given


# --- arrays -----------------------------------------------------------------------------------------------------------

case("core.budget.keep")(
    lambda s: Case(
        lambda live, ratio: budget.keep(ratio, live), lambda v: {"live": v.keep(s.b)}, {"ratio": s.one(0.5, 1.0, 0.001, 0.35, 1)}
    )
)
case("core.budget.per_head")(
    lambda s: Case(budget.per_head, lambda v: {"keep": v.keep(*s.one((), (s.b,), (s.b, 1), (s.b, s.g)))}, {"heads": (s.b, s.g), "cap": s.m})
)
case("core.budget.apportion")(
    lambda s: Case(budget.apportion, lambda v: {"part": v.ints(0, 10**6, *s.batch, s.n), "over": v.ints(-1, 999, *s.batch)})
)
case("core.types.live_count")(lambda s: Case(types.live_count, lambda v: {"pos": v.positions(s.b, s.n)}))
case("core.types.Protect")(
    lambda s: Case(
        lambda pos, seen, sinks, recent: Protect(sinks=sinks, recent=recent).mask(pos, seen),
        lambda v: {"pos": v.kv().pos, "seen": v.ints(0, 2**30, s.b)},
        {"sinks": s.one(0, 2), "recent": s.one(0, 1, 2**31 - 1)},
    )
)


@case("core.reader.attended")
def _(s):
    def fn(kv, h, slots):
        return np.float32(reader.attended(kv, h, slots))

    return Case(fn, lambda v: {"kv": v.kv()}, {"h": s.h, "slots": s.one(None, s.m)})


case("core.compose.dense")(lambda s: Case(compose.dense, lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan)}))
case("core.compose.compose")(
    lambda s: Case(
        compose.compose,
        lambda v: {"first": v.plan(s.batch, s.n, s.m, s.plan), "then": v.plan(s.batch, s.m, s.t, s.one("select", "merge", "dense"))},
    )
)
case("core.compose.gather_index")(
    lambda s: Case(compose.gather_index, lambda v: {"table": v.ints(-1, 9, s.b, s.n), "index": v.ints(-1, s.n - 1, s.b, s.m)})
)
case("core.compose.lift")(
    lambda s: Case(compose.lift, lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan), "y": v.rows(*s.batch, s.m, s.d)})
)
case("core.compose.cost")(
    lambda s: Case(
        lambda **k: list(compose.cost(**k))[:0], lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan)}, {"width": s.d, "itemsize": 2}
    )
)
case("core.reduce.expand")(lambda s: Case(reduce.expand, lambda v: {"a": v.floats(s.b, s.n), "like": v.floats(s.b, s.n, s.d)}))
case("core.reduce.gather")(
    lambda s: Case(reduce.gather, lambda v: {"x": v.rows(*s.batch, s.n, s.d), "index": v.ints(-1, s.n - 1, *s.batch, s.m)})
)
case("core.reduce.segment_sum")(
    lambda s: Case(reduce.segment_sum, lambda v: {"x": v.floats(s.b, s.n, s.d), "assign": v.ints(-1, s.m - 1, s.b, s.n)}, {"m": s.m})
)


def over_plans(fn, *arrays):
    """A case of a function of a plan, and of rows under it."""
    rows = lambda v, s: {name: v.rows(*s.batch, s.n, *s.one((s.d,), ())) for name in arrays}
    return lambda s: Case(fn, lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan)} | rows(v, s))


case("core.reduce.apply")(over_plans(reduce.apply, "x"))
case("core.reduce.total")(over_plans(reduce.total, "x"))
case("core.reduce.representative")(over_plans(reduce.representative))
case("core.reduce.assignment")(over_plans(reduce.assignment))
case("core.reduce.reduce")(
    lambda s: Case(
        reduce.reduce, lambda v: {"plan": v.plan((s.b,), s.n, s.m, s.plan), "tokens": v.tokens()}, {"positions": s.one(*reduce.POSITIONS)}
    )
)
case("core.reduce.reduce_kv")(
    lambda s: Case(
        reduce.reduce_kv, lambda v: {"plan": v.plan((s.b, s.g), s.n, s.m, s.plan), "kv": v.kv()}, {"count": s.one(True, True, False)}
    )
)
case("core.reduce.masked_kv")(lambda s: Case(reduce.masked_kv, lambda v: {"plan": v.plan((s.b, s.g), s.n, s.m, "select"), "kv": v.kv()}))
case("core.reduce.move")(
    lambda s: Case(reduce.move, lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan), "evidence": v.evidence()._replace(key=None)})
)
case("core.reduce.grow_kv")(lambda s: Case(reduce.grow_kv, lambda v: {"kv": v.kv()}, {"slots": s.n + s.one(0, 3)}))
case("core.reduce.ranks")(lambda s: Case(reduce.ranks, lambda v: {"pos": v.kv(packed=False).pos}))
case("core.reduce.oldest_first")(lambda s: Case(reduce.oldest_first, lambda v: {"pos": v.kv(packed=False).pos}))


@case("core.rotary.rotate_by")
def _(s):
    r, a = max(s.d // 2 - s.one(0, 1), 1), s.one(1, 3)
    shape = s.one((s.b, s.n, a), (s.b, s.g, s.n, a))
    arrays = lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "ids": v.ints(-9, 2**30, *shape), "freq": v.angles(r)}
    return Case(rotary.rotate_by, arrays, {"axes": None if a == 1 else tuple(i % a for i in range(r))})


case("core.rotary.turn")(
    lambda s: Case(
        rotary.turn,
        lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "ids": v.ints(-(2**20), 2**20, s.b, s.g, s.n), "freqs": v.angles(s.d // 2)},
    )
)
case("core.check.cache")(lambda s: Case(lambda kv: check.cache(kv) or [], lambda v: {"kv": v.kv()}))
case("core.check.plan")(lambda s: Case(lambda plan: check.plan(plan) or [], lambda v: {"plan": v.plan(s.batch, s.n, s.m, s.plan)}))
case("core.check.reading")(
    lambda s: Case(
        lambda **a: check.reading(**a) or [], lambda v: {"q": v.rows(s.b, s.h, s.t, s.d), "pos": v.positions(s.b, s.t), "kv": v.kv()}
    )
)
case("core.heads.oldest")(lambda s: Case(heads.oldest, lambda v: {"kv": v.kv(packed=False)}, {"sinks": s.one(0, 2)}))
case("core.score.grouped")(lambda s: Case(score.grouped, lambda v: {"x": v.rows(s.b, s.h, s.n)}, {"g": s.g}))
case("core.score.to_kv_heads")(
    lambda s: Case(score.to_kv_heads, lambda v: {"x": v.rows(s.b, s.h, s.n)}, {"g": s.g, "how": s.one("mean", "max", "sum")})
)
case("core.score.pool")(
    lambda s: Case(score.pool, lambda v: {"x": v.floats(s.b, s.g, s.n)}, {"width": s.one(1, 3, 5, 41), "kind": s.one("avg", "max")})
)
case("core.score.window_attention")(
    lambda s: Case(
        score.window_attention,
        lambda v: {"rows": v.floats(s.b, s.h, s.w, s.n), "candidate": v.mask(s.b, s.g, s.n)},
        {"g": s.g, "how": s.one("mean", "max", "sum"), "over": s.one("sum", "mean"), "width": s.one(1, 3, 5), "kind": s.one("avg", "max")},
    )
)
case("core.score.moments")(lambda s: Case(score.moments, lambda v: {"q": v.rows(s.b, s.h, s.n, s.d), "counted": v.mask(s.b, s.n)}))
case("core.score.output_norm")(
    lambda s: Case(
        score.output_norm, lambda v: {"v": v.rows(s.b, s.g, s.n, s.d), "o": v.rows(s.h * s.d, 3)}, {"power": s.one(1, 2)}, infinite=True
    )
)
case("core.score.nearest")(
    lambda s: Case(
        score.nearest,
        lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "y": v.rows(s.b, s.g, s.m, s.d), "there": v.mask(s.b, s.g, s.m)},
        {"block": s.one(256, 4)},
        infinite=True,
    )
)
case("core.segments.chunks")(
    lambda s: Case(segments.chunks, lambda v: {"pos": v.positions(s.b, s.n, packed=False)}, {"size": s.one(1, 3, 100)})
)
case("core.segments.sentences")(
    lambda s: Case(
        segments.sentences, lambda v: {"ids": v.ints(0, 9, s.b, s.n), "live": v.mask(s.b, s.n)}, {"ends": s.one((3,), (), (1, 2, 5))}
    )
)
case("core.segments.mean")(
    lambda s: Case(segments.mean, lambda v: {"x": v.floats(*s.batch, s.n), "segment": v.ints(-1, s.m - 1, *s.batch, s.n)}, {"count": s.m})
)
case("core.segments.rank")(
    lambda s: Case(segments.rank, lambda v: {"score": v.floats(*s.batch, s.n), "segment": v.ints(-1, 4, *s.batch, s.n)})
)
case("core.select.finite")(
    lambda s: Case(select.finite, lambda v: {"score": np.where(v.mask(s.b, s.n), v.floats(s.b, s.n), v.pick(np.nan, np.inf, -np.inf))})
)


@case("core.select.choose")
def _(s):
    keep = s.one("array", s.m, 0, "row")
    traced = {"array": s.batch, "row": s.batch[:1] + (1,) * (len(s.batch) - 1)}.get(keep)

    def arrays(v):
        out = {"score": v.floats(*s.batch, s.n), "live": v.mask(*s.batch, s.n)}
        out |= {"protect": v.mask(*s.batch, s.n)} if s.i % 3 else {}
        return out | ({} if traced is None else {"keep": v.keep(*traced)})

    return Case(select.choose, arrays, {"keep": keep, "most": s.one(None, s.m, 100)} if traced is None else {})


case("core.select.mark")(lambda s: Case(select.mark, lambda v: {"index": v.ints(-3, s.n + 3, *s.batch, s.m)}, {"n": s.n}))
case("core.select.pack")(
    lambda s: Case(
        select.pack,
        lambda v: {"mask": v.mask(*s.batch, s.n)} | ({"score": v.floats(*s.batch, s.n)} if s.i % 2 else {}),
        {"cap": s.one(s.m, None, 1)},
    )
)
case("core.select.from_index")(lambda s: Case(select.from_index, lambda v: {"index": v.plan(s.batch, s.n, s.m, "select")[0]}, {"n": s.n}))
case("core.select.identity")(lambda s: Case(select.identity, lambda v: {}, {"shape": (*s.batch, s.n)}))


@case("core.protocols.top_slots")
def _(s):
    keep = lambda v: {"keep": v.keep(s.b, 1)} if s.i % 2 else {}
    arrays = lambda v: {"kv": v.kv(), "score": v.floats(s.b, s.g, s.n), "safe": v.mask(s.b, s.g, s.n)} | keep(v)
    return Case(protocols.top_slots, arrays, {"capacity": s.m})


@case("core.vacate.vacate")
def _(s):
    policy = H2O(capacity=s.m)
    fn = lambda kv, slots, keep: steps.vacate(policy, {}, protocols.Held(slots), kv, keep)
    return Case(fn, lambda v: {"kv": v.kv(s.m + 1, packed=False), "slots": v.floats(s.b, s.g, s.m + 1), "keep": v.keep(s.b, s.g)})


_square = lambda v, s: {"score": v.floats(s.b, s.n, s.m), "source": v.mask(s.b, s.n), "target": v.mask(s.b, s.m), "remove": v.keep(s.b)}
case("core.matching.unit")(lambda s: Case(matching.unit, lambda v: {"x": v.rows(s.b, s.n, s.d)}))
case("core.matching.cosine")(lambda s: Case(matching.cosine, lambda v: {"a": v.rows(s.b, s.n, s.d), "b": v.rows(s.b, s.m, s.d)}))
case("core.matching.packed_order")(lambda s: Case(matching.packed_order, lambda v: {"live": v.mask(s.b, s.n)}))
case("core.matching.bipartite")(
    lambda s: Case(lambda **x: matching.bipartite(**x)[0], lambda v: _square(v, s), {"most": s.one(0, s.n, s.m)})
)
case("core.matching.scatter")(
    lambda s: Case(matching.scatter, lambda v: {"order": np.argsort(v.bits(s.b, s.n), -1).astype(np.int32), "x": v.rows(s.b, s.n)})
)
case("core.matching.merge_plan")(
    lambda s: Case(
        matching.merge_plan,
        lambda v: {
            "rank": np.where(v.mask(s.b, s.n), np.argsort(v.bits(s.b, s.n), -1), -1).astype(np.int32),
            "into": v.ints(-1, s.n - 1, s.b, s.n),
        },
        {"weight": None, "m": s.m},
    )
)
case("core.matching.mean_keys")(lambda s: Case(lambda evidence: matching.mean_keys(evidence), lambda v: {"evidence": v.evidence()}))
case("core.matching.movable")(lambda s: Case(matching.movable, lambda v: {"tokens": v.tokens()}))
case("core.matching.removal")(
    lambda s: Case(
        matching.removal,
        lambda v: {"live": v.mask(s.b, s.n), "keep": v.keep(s.b)},
        {"remove": 2, "room": s.one(s.m, s.n), "spare": s.one(0, 3)},
    )
)
case("core.matching.by_falling")(lambda s: Case(matching.by_falling, lambda v: {"score": v.floats(s.b, s.n), "among": v.mask(s.b, s.n)}))
case("core.matching.even_odd")(
    lambda s: Case(
        lambda tokens, score, remove: matching.even_odd(tokens, score, remove, s.n, s.m, bool(s.i % 2)),
        lambda v: {"tokens": v.tokens(), "score": v.floats(s.b, -(-s.n // 2), s.n // 2), "remove": v.keep(s.b)},
    )
)
case("core.matching.join")(
    lambda s: Case(
        lambda tokens, score, source, remove: matching.join(
            tokens, score, source, ~source, remove, s.n, s.m, weight=jnp.ones(source.shape)
        ),
        lambda v: {"tokens": v.tokens(), "score": v.floats(s.b, s.n, s.n), "source": v.mask(s.b, s.n), "remove": v.keep(s.b)},
    )
)
case("core.score.drawing_key")(
    lambda s: Case(lambda evidence: jax.random.key_data(score.drawing_key(evidence, 3)), lambda v: {"evidence": v.evidence()})
)
case("core.score.by_order")(
    lambda s: Case(lambda pos: score.by_order(jax.random.key(0), pos), lambda v: {"pos": v.ints(-1, s.n, s.b, s.n)})
)
case("core.score.energy")(
    lambda s: Case(
        score.energy,
        lambda v: {"like": jnp.clip(v.floats(s.b, s.n, s.n), -1, 1), "among": v.mask(s.b, s.n)},
        {"margin": s.one(0.5, -0.2), "kind": s.one("elu", "cut", "gauss"), "alpha": 1.0, "itself": bool(s.i % 2)},
    )
)
case("core.score.pagerank")(
    lambda s: Case(
        score.pagerank,
        lambda v: {"probs": jnp.clip(jnp.abs(v.floats(s.b, s.h, s.n, s.n)), 0, 1), "among": v.mask(s.b, s.n)},
        {"iterations": s.one(0, 3)},
    )
)
case("core.score.change")(lambda s: Case(score.change, lambda v: {"a": v.rows(s.b, s.n, s.d), "b": v.rows(s.b, s.n, s.d)}))
case("core.score.softmax")(lambda s: Case(score.softmax, lambda v: {"x": v.floats(*s.batch, s.n), "among": v.mask(*s.batch, s.n)}))

_grouped = lambda v, s: {"score": v.floats(s.b, s.n), "group": v.ints(-1, 3, s.b, s.n), "candidate": v.mask(s.b, s.n)}
case("core.select.group_ranks")(lambda s: Case(select.group_ranks, lambda v: _grouped(v, s)))
case("core.select.choose_groups")(lambda s: Case(select.choose_groups, lambda v: _grouped(v, s) | {"share": v.keep(s.b, s.one(3, 1, 0))}))
case("core.select.first_picks")(
    lambda s: Case(select.first_picks, lambda v: {"order": v.ints(-1, s.n - 1, s.b, s.m), "keep": v.keep(s.b)}, {"n": s.n})
)
_near = lambda v, s, **more: {"candidate": v.mask(s.b, s.n)} | more
case("core.diverse.max_min")(
    lambda s: Case(diverse.max_min, lambda v: _near(v, s, distance=v.floats(s.b, s.n, s.n), first=v.floats(s.b, s.n)), {"most": s.m})
)
case("core.diverse.max_sum")(
    lambda s: Case(diverse.max_sum, lambda v: _near(v, s, like=v.floats(s.b, s.n, s.n), first=v.floats(s.b, s.n)), {"most": s.m})
)
case("core.diverse.facility")(
    lambda s: Case(diverse.facility, lambda v: _near(v, s, like=v.floats(s.b, s.n, s.n), bonus=v.floats(s.b, s.n)), {"most": s.m})
)
case("core.diverse.first_far")(lambda s: Case(diverse.first_far, lambda v: _near(v, s, distance=v.floats(s.b, s.n, s.n))))
case("core.selector.pictured")(lambda s: Case(selector.pictured, lambda v: {"tokens": v.tokens()}))
case("core.selector.asking")(lambda s: Case(selector.asking, lambda v: {"tokens": v.tokens()}))
case("core.selector.room")(
    lambda s: Case(lambda tokens, keep: selector.room(tokens, keep, s.m), lambda v: {"tokens": v.tokens(), "keep": v.keep(s.b)})
)
case("core.selector.evenly")(lambda s: Case(selector.evenly, lambda v: {"total": v.keep(s.b)}, {"parts": s.m, "most": s.n}))
case("core.selector.part")(lambda s: Case(selector.part, lambda v: {"total": v.keep(s.b)}, {"share": s.one(0.5, 0.33, 1, 0)}))


@case("core.condense.condense")
def _(s):
    def arrays(v):
        free = v.mask(s.b, s.n)
        of_row = {"metric": v.rows(s.b, s.n, s.d), "score": v.floats(s.b, s.n), "free": free, "fixed": v.mask(s.b, s.n) & ~free}
        return {"tokens": v.tokens(), "room": np.clip(v.keep(s.b), 0, s.n).astype(np.int32)} | of_row

    return Case(condense.condense, arrays, {"contextual": s.one(2, 0, 5), "rows": s.m})


@case("core.condense.stand")
def _(s):
    masks = lambda v: {name: v.mask(s.b, s.n) for name in ("stays", "made", "free")}
    return Case(condense.stand, lambda v: {"weight": v.floats(s.b, s.n, s.n)} | masks(v), {"rows": s.m, "inside": s.one(False, True)})


_group = lambda v, s: {"x": v.rows(s.b, s.n, s.d), "live": v.mask(s.b, s.n), "count": v.keep(s.b)}
case("core.condense.density_peaks")(lambda s: Case(condense.density_peaks, lambda v: _group(v, s)))
case("core.pruner.questions")(lambda s: Case(pruner.questions, lambda v: {"tokens": v.tokens(), "evidence": v.evidence()}))
