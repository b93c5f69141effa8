"""jit, vmap, grad, checkpoint and scan around each kind of function equal the plain call.

`tests/methods/test_laws.py` (transforms_compose) asks it of every method through the decoder; here are a method of each protocol by
itself, the loops of `decode`, the operations, and the loss of a training step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.core import compose, reduce, score, select
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import DensePlan, Plan
from jaxtok.core.vacate import vacate
from jaxtok.decode import Sampler, generate, prefill_chunked, replay
from jaxtok.methods import H2O, AdaKV, Chunked, ExpectedAttention, KeyDiff, KeyRerotation, Quest, SnapKV, StreamingLLM
from jaxtok.models import blocks, decoder
from jaxtok.ops import cache
from jaxtok.ops.attention import attention, merge
from jaxtok.ops.evidence import peak, received, rows
from jaxtok.testing.world import CAP, CFG, LENGTHS, LIVE, B, N, layer_state, tokens_of, world
from jaxtok.train import loop


def in_pairs(fn, *rows):
    """fn of each row, two at a time under vmap, the pairs in a scan."""
    pairs = jax.tree.map(lambda a: a.reshape((-1, 2, *a.shape[1:])), rows)
    out = jax.lax.scan(lambda c, pair: (c, jax.vmap(fn)(*pair)), 0, pairs)[1]
    return jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), out)


def alike(fn, x, *rest, tol=2e-5):
    """fn(x, *rest) -> f32 [b], batch first everywhere: the plain batch equals jit of scan of vmap of grad of checkpoint of rows."""
    one = lambda *a: fn(*jax.tree.map(lambda a: a[None], a))[0]

    def summed(*a):
        each = fn(*a)
        return jnp.sum(each), each

    total = jax.jit(jax.value_and_grad(summed, has_aux=True))
    (_, want), slope = total(x, *rest)
    row = jax.value_and_grad(jax.checkpoint(one))
    got = jax.jit(lambda *a: in_pairs(row, *a))(x, *rest)
    assert np.isfinite(want).all() and all(np.isfinite(a).all() for a in jax.tree.leaves(slope))
    assert any(np.any(np.asarray(a) != 0) for a in jax.tree.leaves(slope)), "nothing to compare: the gradient is zero"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((want, slope)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def spread(*arrays):
    """f32 [b]: a number that every element moves, each in its own way."""
    weigh = lambda a: jnp.cos(jnp.arange(a.size // a.shape[0], dtype=jnp.float32)).reshape((1, *a.shape[1:]))
    return sum(jnp.sum((a.astype(jnp.float32) + a.astype(jnp.float32) ** 2) * weigh(a), tuple(range(1, a.ndim))) for a in arrays)


def tables(params):
    """An embedding table for each sequence, so that gradients in it tell sequences apart."""
    return jnp.broadcast_to(params["embed"][None], (B, *params["embed"].shape))


def own_rows(ids):
    """Ids into the tables of all sequences laid end to end."""
    return ids + CFG.vocab * jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def state():
    """(differentiable leaves, the rest, a function that puts them together again), batch first."""
    kv, evidence = layer_state()
    x = {"k": kv.k, "v": kv.v, "rows": evidence.rows, "received": evidence.received, "keys": evidence.keys, "queries": evidence.queries}
    rest = {"pos": kv.pos, "bias": kv.bias, "seen": kv.seen, "delta": kv.delta, "lost": kv.lost}

    def put(x, rest):
        seen = {name: x[name] for name in ("rows", "received", "keys", "queries")}
        return (
            kv._replace(k=x["k"], v=x["v"], **rest),
            evidence._replace(**seen, cls=None, hidden=None, weights=None),
        )

    return x, rest, put


@pytest.mark.parametrize(
    "method",
    [
        SnapKV(capacity=CAP, window=2, pool=3),
        ExpectedAttention(capacity=CAP, sinks=1, future=8),
        AdaKV(base=KeyDiff(capacity=CAP)),
        Chunked(base=SnapKV(capacity=CAP, window=2, pool=3), chunk=5),
        KeyRerotation(base=KeyDiff(capacity=CAP)),
    ],
    ids=lambda m: m.name,
)
def test_compressors(method):
    x, rest, put = state()

    def fn(x, rest, keep):
        out, _ = method.compress({}, *put(x, rest), keep[:, None])
        return spread(out.k, out.v)

    alike(fn, x, rest, jnp.asarray([CAP, CAP - 1, 3, CAP], jnp.int32))


@pytest.mark.parametrize("method", [H2O(capacity=CAP), StreamingLLM(capacity=CAP, sinks=2)], ids=lambda m: m.name)
def test_policies(method):
    """Fit to the capacity, then three steps inside a scan: append, observe, vacate."""
    x, rest, put = state()

    def fn(x, rest, new):
        kv, evidence = put(x, rest)
        held = method.start({}, kv, evidence)
        plan = method.fit({}, held, kv, evidence)
        spare = lambda a: jnp.pad(reduce.gather(a, plan.index), ((0, 0), (0, 0), (0, 1)))
        held = held._replace(slots=jax.tree.map(spare, held.slots))
        kv = reduce.grow_kv(reduce.reduce_kv(plan, kv), CAP + 1)._replace(cursor=jnp.full((), CAP, jnp.int32))
        look = evidence._replace(rows=evidence.rows[..., -1:, : CAP + 1], received=evidence.received[..., : CAP + 1], keys=None)

        def step(carry, row):
            kv, held = carry
            kv = cache.append(kv, row, row, kv.seen[:, None], jnp.zeros(row.shape[:3], jnp.float32))
            kv = kv._replace(seen=kv.seen + 1)
            kv, held, _ = vacate(method, {}, method.observe({}, held, kv, look), kv)
            return (kv, held), None

        (kv, held), _ = jax.lax.scan(step, (kv, held), jnp.moveaxis(new, 1, 0))
        return spread(kv.k, kv.v, *jax.tree.leaves(held.slots))

    new = jax.random.normal(jax.random.key(5), (B, 3, CFG.kv_heads, 1, CFG.head_dim))
    alike(lambda x, rest: fn({k: v for k, v in x.items() if k != "new"}, rest, x["new"]), x | {"new": new}, rest)


# --- the decoder and its loops ----------------------------------------------------------------------------------------

RECIPES = {
    "cache": Recipe(cache=SnapKV(capacity=CAP, window=2, pool=3)),
    "policy": Recipe(policy=H2O(capacity=CAP)),
    "reader": Recipe(reader=Quest(pages=2, block=2, dense_layers=1)),
}


@pytest.mark.parametrize(
    "recipe", [RECIPES["cache"].replace(policy=RECIPES["policy"].policy), RECIPES["reader"]], ids=["cache, policy", "reader"]
)
def test_prefill_and_steps(recipe):
    params, ids, force = world()

    def fn(x, live, force):
        tokens = tokens_of(params, jnp.zeros(live.shape, jnp.int32), live)
        tokens, layers = decoder.prefill(CFG, params, tokens._replace(x=x), recipe, new=3)
        seen, layers = replay(CFG, params, tokens, layers, force[:, :2], recipe)  # steps inside a scan
        return spread(tokens.x[:, -1:], jnp.swapaxes(seen, 0, 1), *(part.kv.v for parts in layers for part in parts))

    alike(fn, tokens_of(params, ids).x, jnp.asarray(LIVE), force, tol=2e-4)


@pytest.mark.parametrize("site", ("policy", "reader"))
def test_generation(site):
    """Sampled ids under jit of scan of vmap of checkpoint are those of each prompt alone."""
    params, ids, _ = world()
    sampler, keys = Sampler(temperature=0.7), jax.random.split(jax.random.key(6), B)

    def one(ids, live, key):
        tokens = decoder.embed(CFG, params, ids[None], live[None])
        tokens, layers = decoder.prefill(CFG, params, tokens, RECIPES[site], new=4)
        out = generate(CFG, params, tokens, layers, RECIPES[site], new=4, sampler=sampler, key=key, eos=(3,))
        return out.ids[0], out.count[0]

    live = jnp.asarray(LIVE)
    plain = jax.jit(one)
    want = [jax.device_get(plain(*row)) for row in zip(ids, live, keys, strict=True)]
    got = jax.jit(lambda *a: in_pairs(jax.checkpoint(one), *a))(ids, live, keys)
    for i, (text, count) in enumerate(want):
        np.testing.assert_array_equal(got[0][i], text)
        assert got[1][i] == count


def test_chunked_prefill():
    params, ids, _ = world()
    recipe = Recipe(cache=SnapKV(capacity=CAP, window=2, pool=3))

    def fn(tables, ids, live):
        tokens, layers = prefill_chunked(
            CFG, params | {"embed": tables.reshape(-1, CFG.width)}, own_rows(ids), live, recipe, chunk=4, new=1
        )
        return spread(tokens.x[:, -1:], *(part.kv.v for parts in layers for part in parts))

    alike(fn, tables(params), ids, jnp.asarray(LIVE), tol=2e-4)


# --- operations and parts of methods ------------------------------------------------------------------------------------


def problem(t=5):
    """Operands of an attention call, batch first: floats, positions."""
    key = iter(jax.random.split(jax.random.key(7), 5))
    draw = lambda *shape: jax.random.normal(next(key), shape)
    x = {"q": draw(B, 4, t, 6), "k": draw(B, 2, N, 6), "v": draw(B, 2, N, 6), "bias": 0.3 * draw(B, 2, N)}
    k_pos = jnp.maximum(jnp.arange(N, dtype=jnp.int32)[None] - (N - jnp.asarray(LENGTHS, jnp.int32))[:, None], -1)
    return x, {"q_pos": k_pos[:, -t:], "k_pos": k_pos}


HOW = {"window": 7, "softcap": 2.0}


def test_attention_and_merge():
    """Two halves merged; both outputs count. Rows that see nothing give 0."""
    x, pos = problem()
    alive = lambda lse: jnp.where(lse > -jnp.inf, lse, 0)

    def fn(x, pos):
        parts = []
        for half in (slice(None, N // 2), slice(N // 2, None)):
            cut = {name: a if name == "q" else a[:, :, half] for name, a in x.items()}
            parts += attention(**cut, q_pos=pos["q_pos"], k_pos=pos["k_pos"][:, half], **HOW)
        out, lse = merge(*parts)
        return spread(out, alive(lse))

    alike(fn, x, pos)
    whole, lse = attention(**x, **pos, **HOW)
    np.testing.assert_allclose(fn(x, pos), spread(whole, alive(lse)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("look", [received, peak, rows], ids=lambda f: f.__name__)
def test_evidence(look):
    x, pos = problem()

    def fn(x, pos):
        _, lse = attention(**x, **pos, **HOW)
        return spread(look(x["q"], x["k"], lse, bias=x["bias"], **pos, **HOW))

    alike(fn, x, pos)


def merging(n=N, m=5):
    """A merge plan with an empty group and dropped rows, and its weights."""
    assign = jax.random.randint(jax.random.key(8), (B, n), -1, m - 1)
    member = assign[:, None] == jnp.arange(m)[None, :, None]
    index = jnp.where(jnp.any(member, -1), jnp.argmax(member, -1), -1).astype(jnp.int32)
    return Plan(index, assign, None, jnp.zeros((B,), jnp.int32)), jax.random.uniform(jax.random.key(9), (B, n), minval=0.5)


def test_plans():
    """A merge, then a selection, then the way back; as one dense plan too."""
    plan, weight = merging()
    x = {"x": jax.random.normal(jax.random.key(10), (B, N, 3)), "weight": weight}

    def fn(x, plan):
        first = plan._replace(weight=x["weight"])
        then = select.pack(plan.index >= 0, 3, score=jnp.cos(plan.index.astype(jnp.float32)))
        both = compose.compose(first, then)
        small = reduce.apply(both, x["x"])
        return spread(small, compose.lift(both, small), reduce.apply(compose.dense(both), x["x"]))

    alike(fn, x, plan)
    assert isinstance(compose.dense(plan._replace(weight=weight)), DensePlan)


def test_scores():
    kv, evidence = layer_state()
    x = {"q": jax.random.normal(jax.random.key(11), (B, 4, N, 6)), "rows": evidence.rows}

    def fn(x, live):
        seen = jnp.broadcast_to(live[:, None], (live.shape[0], 2, N))
        return spread(*score.moments(x["q"], live), score.window_attention(x["rows"], seen, 2, how="max", width=3))

    alike(fn, x, jnp.asarray(LIVE))


# --- training -----------------------------------------------------------------------------------------------------------


def test_the_training_loss():
    """Gradients of single sequences under vmap and checkpoint are those of the batch, with scanned and with unrolled layers."""
    params, ids, _ = world()

    def fn(tables, ids, live, stacked=True):
        tree = blocks.stack(params) if stacked else params
        x = tree | {"embed": tables.reshape(-1, CFG.width), "head": params["head"]}
        z = jax.nn.log_softmax(blocks.forward(CFG, x, own_rows(ids), live)[:, :-1])
        return -jnp.sum(jnp.where(live[:, 1:], jnp.take_along_axis(z, ids[:, 1:, None], 2)[..., 0], 0), -1)

    given = tables(params), ids, jnp.asarray(LIVE)
    alike(fn, *given, tol=2e-4)
    np.testing.assert_allclose(jax.jit(fn)(*given), jax.jit(lambda *a: fn(*a, stacked=False))(*given), rtol=1e-5)


def test_a_training_step_inside_a_scan():
    """`fit`'s own step, scanned, makes the parameters that `fit` makes."""
    optimizer, data = optax.adam(0.1), jax.random.normal(jax.random.key(12), (4, 6, 3))
    loss = lambda params, batch, key: (jnp.mean((batch @ params["w"] - 1) ** 2), {})
    start = {"w": jnp.zeros((3,))}
    want = loop.fit(loss, start, lambda step: data[step], optimizer=optimizer, steps=4, progress=False)
    first = loop._begin(optimizer, start, None, 0)
    step = lambda state, batch: (
        loop._step(state, {"w": None}, batch, loss_fn=loss, optimizer=optimizer, accumulate=1, compute_dtype=None)[0],
        None,
    )
    got, _ = jax.jit(lambda state: jax.lax.scan(step, state, data))(first)
    np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=1e-6)
    assert int(got.step) == 4
