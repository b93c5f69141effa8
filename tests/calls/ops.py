"""Calls of `jaxtok.ops`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.reader import Sight
from jaxtok.ops import attention, banded, cache, diagnostics, evidence, landmark, near, noise, offload, read, retention, store
from tests.calls.cases import Case, case
from tests.calls.values import Sizes, Values


def operands(s: Sizes, v: Values) -> dict[str, Any]:
    """Queries anywhere among keys in any order, whose positions have a head axis or none."""
    out = {
        "q": v.rows(s.b, s.h, s.t, s.d),
        "k": v.rows(s.b, s.g, s.n, s.d),
        "q_pos": v.positions(s.b, s.t, packed=False),
        "k_pos": v.positions(s.b, s.n, packed=False) if s.i % 2 else v.kv(packed=False).pos,
    }
    return out | ({"bias": v.kv().bias} if s.i % 3 else {})


def how(s: Sizes) -> dict[str, Any]:
    return {
        "causal": s.i % 5 != 1,
        "window": s.one(None, 3, 1, 2**31 - 1),
        "softcap": s.one(None, None, 30.0),
        "scale": s.one(None, 1.0, 1e-3),
        "diagonal": None if s.t != s.n or s.i % 4 else s.n,
    }


case("ops.attention.attention")(
    lambda s: Case(
        attention.attention,
        lambda v: operands(s, v) | {"v": v.rows(s.b, s.g, s.n, s.d)},
        how(s) | {"out_dtype": s.one(None, jnp.float32), "impl": s.one("auto", "xla")},
        infinite=True,
    )
)


def gradients(q, k, v, dout, dlse, **see):
    """With the values of the same call; numbers that are multiplied are of a size that their products have."""
    q, k, v, dout, dlse = (jnp.clip(x, -8, 8) for x in (q, k, v, dout, dlse))
    out, lse = attention.attention(q, k, v, **see)
    return attention.gradients(q, k, v, out, lse, dout, dlse, **see)


@case("ops.attention.gradients")
def _(s):
    more = lambda v: {"v": v.rows(s.b, s.g, s.n, s.d), "dout": v.rows(s.b, s.h, s.t, s.d), "dlse": v.floats(s.b, s.h, s.t)}
    return Case(gradients, lambda v: operands(s, v) | more(v), how(s), infinite=True)


@case("ops.attention.merge")
def _(s):
    lse = lambda v: np.where(v.mask(s.b, s.h, s.t), v.floats(s.b, s.h, s.t), -np.inf).astype(np.float32)
    out = lambda v: v.rows(s.b, s.h, s.t, s.d)
    return Case(attention.merge, lambda v: {"out_a": out(v), "lse_a": lse(v), "out_b": out(v), "lse_b": lse(v)}, infinite=True)


def look_back(look, q, k, **see):
    """Evidence with the logsumexp of the same call."""
    _, lse = attention.attention(q, k, k, **see)
    if look is evidence.rows:
        del see["diagonal"]
    return look(q, k, lse, **see)


for _look in (evidence.received, evidence.peak, evidence.rows, diagnostics.entropies):
    case(f"ops.{_look.__module__.rsplit('.', 1)[1]}.{_look.__name__}")(
        lambda s, look=_look: Case(functools.partial(look_back, look), functools.partial(operands, s), how(s))
    )


@case("ops.diagnostics.entropies_of")
def _(s):
    places = lambda v: {"q_pos": v.positions(s.b, s.t, packed=False), "k_pos": v.positions(s.b, s.n, packed=False)}
    arrays = lambda v: {"attn": v.floats(s.b, s.h, s.t, s.n, least=0)} | (places(v) if s.t != s.n or s.i % 2 else {})
    return Case(diagnostics.entropies_of, arrays)


def received(s: Sizes, v: Values) -> dict[str, Any]:
    places = {name: x for name, x in operands(s, v).items() if name.endswith("_pos")}
    return {"received": v.floats(s.b, s.h, s.n, least=0)} | places


case("ops.diagnostics.first_of")(lambda s: Case(diagnostics.first_of, lambda v: received(s, v), {"count": s.m}))


@case("ops.diagnostics.sinks")
def _(s):
    fn = lambda received, row, column, q_pos, k_pos: diagnostics.sinks(diagnostics.Entropies(row, column, received), q_pos, k_pos)
    share = lambda v, n: v.floats(s.b, s.h, n, least=0) % 1
    return Case(fn, lambda v: received(s, v) | {"row": share(v, s.t), "column": share(v, s.n)})


@case("ops.diagnostics.dormant")
def _(s):
    return Case(diagnostics.dormant, lambda v: {"row": v.floats(s.b, s.h), "column": v.floats(s.b, s.h)}, {"below": 0.2, "above": 0.8})


case("ops.diagnostics.sinks_kept")(lambda s: Case(diagnostics.sinks_kept, lambda v: {"pos": v.kv(packed=False).pos}, {"sinks": s.m}))


def bits(v: Values, *shape: int) -> np.ndarray:
    return v.ints(-(2**31), 2**31 - 1, *shape).astype(np.uint32)


@case("ops.evidence.perturbed")
def _(s):
    fn = lambda q, k, tau, words=None, **see: evidence.perturbed(q, k, words=words, tau=tau, **see)
    drawn = lambda v: {} if s.i % 3 == 1 else {"words": bits(v, *s.one((2,), (s.b, 2)))}
    return Case(fn, lambda v: operands(s, v) | drawn(v) | {"tau": v.floats(least=1e-3)}, how(s))


@case("ops.evidence.ranked")
def _(s):
    fn = lambda q, k, tau, **see: evidence.ranked(q, k, tau=tau, rounds=s.one(0, 1, 5), **see)
    square = lambda v: operands(s, v) | {"q": v.rows(s.b, s.h, s.n, s.d), "q_pos": v.positions(s.b, s.n, packed=False)}
    return Case(fn, lambda v: square(v) | {"tau": v.floats(least=1e-3)}, how(s) | {"diagonal": None})


@case("ops.noise.gumbel")
def _(s):
    def arrays(v):
        places = {"q_pos": v.positions(s.b, s.t, packed=False), "k_pos": v.positions(s.b * s.one(1, s.g), s.n, packed=False)}
        return {"words": bits(v, *s.one((2,), (s.b, 2)))} | places | {"k_pos": places["k_pos"].reshape(s.b, -1, s.n)}

    return Case(noise.gumbel, arrays, {"heads": s.h})


case("ops.noise.words")(
    lambda s: Case(
        lambda layer, key=None: noise.words(key, 3, layer),
        lambda v: {"layer": v.ints(0, 99)} | ({"key": jax.random.key(int(v.raw[0]))} if s.i % 2 else {}),
    )
)


@case("ops.cache.append")
def _(s):
    def arrays(v):
        rows = {"k": v.rows(s.b, s.g, s.t, s.d), "v": v.rows(s.b, s.g, s.t, s.d)}
        return rows | {"kv": v.kv(s.n + s.t), "pos": v.positions(s.b, s.t, packed=False), "bias": v.floats(s.b, s.g, s.t)}

    return Case(cache.append, arrays)


@case("ops.cache.place")
def _(s):
    slots = s.n + s.t
    arrays = lambda v: {
        "q": v.rows(s.b, s.h, s.t, s.d),
        "kv": v.kv(slots, packed=False),
        "first": v.ints(0, slots),
        "freqs": v.angles(s.d // 2),
    }
    return Case(cache.place, arrays)


case("ops.cache.block_slots")(lambda s: Case(cache.block_slots, lambda v: {"index": v.ints(-1, 9, s.b, s.g, s.m)}, {"block": s.one(1, 4)}))
case("ops.cache.scatter")(
    lambda s: Case(
        cache.scatter, lambda v: {"x": v.floats(s.b, s.h, *s.one((), (s.w,)), s.m), "slots": v.ints(-1, s.n - 1, s.b, s.g, s.m)}, {"s": s.n}
    )
)


@case("ops.landmark.grouped_softmax")
def _(s):
    shape = (*s.batch, s.n, s.one(2, 5))
    arrays = lambda v: {"logit": v.floats(*shape), "seen": v.mask(*shape), "own": v.mask(*shape[:-1])}
    return Case(landmark.grouped_softmax, arrays, infinite=True)


@case("ops.banded.banded")
def _(s):
    arrays = lambda v: {"q": v.rows(s.b, s.h, s.n, s.d), "k": v.rows(s.b, s.g, s.n, s.d), "v": v.rows(s.b, s.g, s.n, s.d)}
    first = np.maximum(0, np.arange(s.n) - s.m)
    fn = lambda q, k, v, softcap, chunk: banded.banded(q, k, v, first, softcap=softcap, chunk=chunk)
    return Case(fn, arrays, {"softcap": s.one(None, 30.0), "chunk": s.one(128, 4)}, infinite=True)


def begun(s, v):
    return store.Store(v.rows(s.b, s.g, s.n, s.d), v.rows(s.b, s.g, s.n, s.d), v.positions(s.b, s.n, packed=False))


@case("ops.store.begin")
def _(s):
    arrays = lambda v: {"k": v.rows(s.b, s.g, s.n, s.d), "v": v.rows(s.b, s.g, s.n, s.d), "count": v.ints(0, s.n, s.b)}
    return Case(store.begin, arrays, {"slots": s.m})


@case("ops.store.write")
def _(s):
    more = lambda v: {
        "k": v.rows(s.b, s.g, 1, s.d),
        "v": v.rows(s.b, s.g, 1, s.d),
        "slot": v.ints(-1, s.n, s.b),
        "pos": v.ints(-1, 99, s.b),
    }
    return Case(store.write, lambda v: {"store": begun(s, v)} | more(v))


@case("ops.store.extend")
def _(s):
    more = lambda v: {"k": v.rows(s.b, s.g, 1, s.d), "v": v.rows(s.b, s.g, 1, s.d), "pos": v.ints(-1, 99, s.b)}
    return Case(store.extend, lambda v: {"store": begun(s, v)} | more(v))


def faded(s, v, n):
    """Queries, keys, values and gates of n rows."""
    x = {"q": v.rows(s.b, s.h, n, s.d), "k": v.rows(s.b, s.g, n, s.d), "v": v.rows(s.b, s.g, n, s.d)}
    return x | {"fade": -v.floats(s.b, s.g, n, least=0)}


case("ops.retention.retention")(lambda s: Case(retention.retention, lambda v: faded(s, v, s.n), {"chunk": s.one(64, 4)}))
case("ops.retention.retained")(lambda s: Case(retention.retained, lambda v: {k: x for k, x in faded(s, v, s.n).items() if k != "q"}))
case("ops.retention.retain")(
    lambda s: Case(retention.retain, lambda v: {"state": v.floats(s.b, s.g, s.d, s.d)} | faded(s, v, 1), {"scale": s.one(None, 0.5)})
)
case("ops.offload.to_host")(lambda s: Case(offload.to_host, lambda v: {"x": v.rows(s.b, s.g, s.n, s.d)}))


@case("ops.offload.stow")
def _(s):
    what = s.one(("k", "v"), ("v",), ())
    fn = lambda kv, slots, what: tuple(offload.stow(kv, slots, what))
    return Case(fn, lambda v: {"kv": v.kv(packed=False)}, {"slots": s.n // 2, "what": what})


def cut(x, n):
    return offload.Halves(offload.to_host(x[:, :, :n]), x[:, :, n:])


case("ops.offload.whole")(lambda s: Case(lambda x: offload.whole(cut(x, s.m)), lambda v: {"x": v.rows(s.b, s.g, s.n, s.d)}))
case("ops.offload.together")(lambda s: Case(lambda kv: offload.together(offload.stow(kv, s.n // 2)), lambda v: {"kv": v.kv()}))
case("ops.offload.aligned")(lambda s: Case(offload.aligned, lambda v: {"kv": v.kv(packed=False)}, {"block": s.one(1, 2, 3)}))
case("ops.offload.newest")(lambda s: Case(offload.newest, lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "slot": v.ints(0, s.n - 1)}))
case("ops.offload.nbytes")(
    lambda s: Case(lambda kv: jnp.asarray(sum(offload.nbytes(kv)), jnp.float32), lambda v: {"kv": v.kv(packed=False)})
)


@case("ops.offload.rows")
def _(s):
    fn = lambda x, slots: offload.rows(cut(x, s.n // 2) if s.i % 2 else x, slots)
    slots = lambda v: v.ints(-1, s.n - 1, s.b, s.g, s.m)
    return Case(fn, lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "slots": slots(v)})


case("ops.offload.fetch_rows")(
    lambda s: Case(
        lambda x, slots: offload.fetch_rows(offload.to_host(x), slots),
        lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "slots": v.ints(-1, s.n - 1, s.b, s.g, s.m)},
    )
)


# --- reading a cache --------------------------------------------------------------------------------------------------


def sight(s: Sizes) -> dict[str, Any]:
    return {"window": s.one(None, 3), "softcap": s.one(None, None, 30.0), "scale": s.one(None, 1.0)}


def seen(fn, q, pos, kv, freqs, *rest, window, softcap, scale):
    return fn(q, pos, kv, *rest, Sight(freqs, window, softcap, scale))


def queries(s: Sizes, v: Values, t: int) -> dict[str, Any]:
    return {
        "q": v.rows(s.b, s.h, t, s.d),
        "pos": v.positions(s.b, t, packed=False),
        "kv": v.kv(packed=False),
        "freqs": v.angles(s.d // 2),
    }


for _read in (read.attend_all, read.attend_scores):
    case(f"ops.read.{_read.__name__}")(
        lambda s, fn=_read: Case(functools.partial(seen, fn), lambda v: queries(s, v, min(s.t, 9)), sight(s), infinite=True)
    )


def slots(s: Sizes, v: Values) -> np.ndarray:
    """Different slots, -1 = none, of KV heads or of query heads."""
    e = s.one(s.g, s.h)
    order = np.argsort(v.bits(s.b, e, s.n), -1)[..., : s.m].astype(np.int32)
    return np.where(v.mask(*order.shape), order, -1)


@case("ops.read.attend_slots")
def _(s):
    fn = lambda slots, q, pos, kv, freqs, **how: seen(
        lambda q, pos, kv, see: read.attend_slots(q, pos, kv, slots, see), q, pos, kv, freqs, **how
    )
    return Case(fn, lambda v: queries(s, v, min(s.t, 9)) | {"slots": slots(s, v)}, sight(s), infinite=True)


case("ops.read.in_place")(
    lambda s: Case(lambda freqs: -freqs if read.in_place(Sight(freqs)) else freqs, lambda v: {"freqs": v.angles(s.d // 2)})
)
case("ops.read.take")(lambda s: Case(read.take, lambda v: {"x": v.rows(s.b, s.g, s.n, s.d), "slots": slots(s, v)}))


@case("ops.read.attend_blocks")
def _(s):
    fn = lambda index, q, pos, kv, freqs, **how: seen(
        lambda q, pos, kv, see: read.attend_blocks(q, pos, kv, index, see, 1), q, pos, kv, freqs, **how
    )
    return Case(fn, lambda v: queries(s, v, min(s.t, 9)) | {"index": slots(s, v)}, sight(s), infinite=True)


case("ops.read.take_kv")(lambda s: Case(read.take_kv, lambda v: {"kv": v.kv(packed=False), "slots": slots(s, v)}))


def cells(s: Sizes, v: Values) -> dict[str, Any]:
    return {"cell": v.ints(-1, 6, s.b, s.n, 2)}


case("ops.near.pictures")(lambda s: Case(near.pictures, lambda v: cells(s, v) | {"apart": v.ints(0, 2, s.b, s.n, s.one(0, 1, 2))}))
case("ops.near.neighbours")(
    lambda s: Case(
        near.neighbours,
        lambda v: cells(s, v) | {"picture": v.ints(0, 3, s.b, s.n), "live": v.mask(s.b, s.n)},
        {"reach": s.one(0, 1, 2, 40), "causal": s.i % 3 != 1},
    )
)


@case("ops.near.attend_near")
def _(s):
    def fn(q, k, v, mask, index, bias=None, **how):
        table = near.Near(index=index) if s.i % 2 else near.Near(mask=mask)
        return near.attend_near(q, k, v, table, bias=bias, **how)

    def arrays(v):
        out = {"q": v.rows(s.b, s.h, s.n, s.d), "k": v.rows(s.b, s.g, s.n, s.d), "v": v.rows(s.b, s.g, s.n, s.d)}
        out |= {"mask": v.mask(s.b, s.n, s.n), "index": v.ints(-1, s.n - 1, s.b, s.n, s.one(1, 3))}
        return out | ({"bias": v.floats(s.b, s.n)} if s.i % 3 else {})

    return Case(fn, arrays, {"softcap": s.one(None, 30.0), "scale": s.one(None, 1.0)}, infinite=True)
