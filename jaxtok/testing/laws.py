"""The laws that every method obeys, as functions of a maker `make(capacity) -> method`. A law raises AssertionError."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.models import blocks, decoder
from jaxtok.testing import world as setting
from jaxtok.testing.world import (
    CAP,
    CFG,
    LENGTHS,
    LIVE,
    B,
    N,
    T,
    budgets,
    call,
    jitted,
    layer_state,
    masked_replay,
    near,
    once,
    plain,
    program,
    recipe_of,
    result,
    run,
    tokens_of,
    usual,
    weights,
    world,
)  # fmt: skip


class Unable(RuntimeError):
    """A law cannot be looked at on this machine."""


def jit_equals_eager(make):
    """One layer's cache: jit equals eager, and two calls trace once."""
    method = make(CAP)
    if not once(method):
        return
    kv, evidence = layer_state()
    fn, before = jitted(method), jitted(method)._cache_size()
    keep = jnp.full((B, 1), CAP, jnp.int32)
    a, b = fn(kv, evidence, keep), call(method, kv, evidence, keep)
    fn(kv, evidence, keep)
    assert fn._cache_size() <= before + 1, "two calls compiled twice"
    assert np.array_equal(a[0], b[0]), "jit and eager keep different tokens"
    for x, y in zip(a[1:], b[1:], strict=True):
        near(x, y, 1e-6, "jit against eager")


def rows_are_independent(make):
    """A row depends on itself only: changing all others changes nothing (that a batch of one equals the batch is in `transforms_compose`)."""
    method = make(CAP)
    _, ids, _ = world()
    base = usual(method)
    other = jax.random.randint(jax.random.key(9), ids.shape, 0, CFG.vocab).at[0].set(ids[0])
    changed = result(method, ids=other)
    for name in ("first", "logits"):
        axis = 0 if name == "first" else 1
        near(np.take(base[name], 0, axis), np.take(changed[name], 0, axis), 2e-5, f"row 0 read its neighbours: {name}")
    assert np.array_equal(base["sets"][:, :, 0], changed["sets"][:, :, 0]), "row 0's cache depends on its neighbours"


def full_budget_is_identity(make):
    """A budget that covers everything changes no logit, through decoding past the prompt."""
    method = make(N + T + 1)
    params, ids, force = world()
    a = result(method, keep=N + T + 1)
    b = jax.device_get(plain()(params, tokens_of(params, ids), force))
    near(a["first"], b["first"], 1e-5, "first logits at full budget")
    near(a["logits"], b["logits"], 2e-5, "logits at full budget")


def dropped_equals_masked(make):
    """Dropping slots gives the logits of the full cache with the dropped positions dead, step by step."""
    method = make(CAP)
    params, ids, force = world()
    out = usual(method)
    expected = masked_replay()(params, tokens_of(params, ids), force, jnp.asarray(out["sets"]))
    near(out["logits"], expected, 2e-5, "dropped against masked")


def shapes_are_static(make):
    """Slots follow from the shapes alone, and a small budget makes small arrays."""
    method = make(CAP)
    params, ids, force = world()
    tokens = tokens_of(params, ids)
    own, recipe, key = weights(method, params), recipe_of(method), jax.random.key(4)
    fn = lambda tokens: decoder.prefill(CFG, own, tokens, recipe, new=T, key=key, impl=setting.IMPL)[1]
    layers = jax.eval_shape(fn, tokens)
    kv = [parts[-1].kv for parts in layers]
    out = usual(method)
    assert [a.k.shape for a in kv] == [a.k.shape for a in out["filled"]], "shapes depend on values"
    for a in kv:
        assert a.k.shape[:3] == a.pos.shape == a.bias.shape and a.k.shape == a.v.shape
    if once(method) and method.capacity < N:
        room = T if method.site == "cache" else method.every
        mean = np.mean([a.k.shape[2] for a in kv])
        assert mean <= method.capacity * 1.6 + room, f"{mean} slots for a capacity of {method.capacity} and {room} spare"


def dead_rows_do_not_matter(make):
    """Finite junk in dead rows changes nothing."""
    method = make(CAP)
    out = usual(method)
    junk = lambda t: t._replace(x=jnp.where((t.pos < 0)[..., None], 3e4, t.x), rope=jnp.where((t.pos < 0)[..., None], 77, t.rope))
    ids = jnp.where(jnp.asarray(LIVE), world()[1], 5)
    other = result(method, ids=ids, change=junk)
    near(out["first"], other["first"], 1e-6, "junk in dead rows: first logits")
    near(out["logits"], other["logits"], 1e-6, "junk in dead rows: logits")


def budget_is_spent(make):
    """Each row keeps min(its length, the budget) tokens a layer and head on average: dead rows never take the place of live ones."""
    method = make(CAP)
    if not once(method):
        return
    out = usual(method)
    kept = np.mean([(kv.pos >= 0).sum((1, 2)) / CFG.kv_heads for kv in out["filled"]], axis=0)
    want = np.minimum(LENGTHS, method.capacity)
    assert np.allclose(kept, want, atol=0.51), f"kept {kept} of {LENGTHS}, want {want}"


def positions_are_sound(make):
    """Live positions are unique and < seen, also after twice the capacity in steps; after a selection they ascend."""
    method = make(CAP)
    out = usual(method)
    for name, steps in (("filled", 0), ("final", T)):
        for kv in out[name]:
            assert (kv.seen == LENGTHS + steps).all(), f"{name}: seen {kv.seen}, want {LENGTHS + steps}"
            for b in range(B):
                for g in range(CFG.kv_heads):
                    live = kv.pos[b, g][kv.pos[b, g] >= 0]
                    assert len(set(live.tolist())) == len(live), f"{name}: a position is there twice: {live}"
                    assert (live < kv.seen[b]).all() and len(live), f"{name}: {live} against seen {kv.seen[b]}"
                    assert name == "final" or (np.diff(live) > 0).all(), f"{name}: out of order: {live}"
            assert np.isfinite(kv.bias).all()
    if method.site == "policy":
        most = max((kv.pos >= 0).sum(-1).max() for kv in out["final"])
        room = method.capacity + method.every - 1
        assert most <= room, f"{most} live slots after {T} steps, capacity {method.capacity}, {method.every - 1} spare"


def bf16(make):
    """bf16 in, bf16 out, and the choice is the one that float32 scores of the same numbers make."""
    method = make(CAP)
    if not once(method):
        return
    kv, evidence = layer_state("bfloat16")
    keep = jnp.full((B, 1), CAP, jnp.int32)
    low = jitted(method)(kv, evidence, keep)
    wide = lambda a: a.astype(jnp.float32) if a is not None and a.dtype == jnp.bfloat16 else a
    high = jitted(method)(jax.tree.map(wide, kv), jax.tree.map(wide, evidence), keep)
    assert low[1].dtype == low[2].dtype == jnp.bfloat16, f"keys came out as {low[1].dtype}"
    chosen = [i for i, a in enumerate(low) if jnp.issubdtype(a.dtype, jnp.integer)]
    same = all(np.array_equal(low[i], high[i]) for i in chosen)
    assert same, "scores are not float32: bf16 keys make another choice than the same keys widened"


def bf16_model(make):
    """A bf16 model keeps bf16 caches and gives float32 logits."""
    method = make(CAP)
    params, ids, force = world("bfloat16")
    keep, key = jnp.full((B,), CAP, jnp.int32), jax.random.key(4)
    out = jax.eval_shape(
        lambda tokens: run(recipe_of(method), weights(method, params), tokens, force, budgets(method, keep), key), tokens_of(params, ids)
    )
    assert all(kv.k.dtype == kv.v.dtype == jnp.bfloat16 for kv in (*out["filled"], *out["final"])), "the cache left bf16"
    assert out["logits"].dtype == out["first"].dtype == jnp.float32


def heads_are_interchangeable(make):
    """Permuting KV heads, each with its group of query heads, permutes the result: query head i belongs to KV head i // (h/g)."""
    method = make(CAP)
    if not once(method):
        return
    kv, evidence = layer_state()
    g, group = CFG.kv_heads, CFG.heads // CFG.kv_heads
    swap = np.arange(g)[::-1]
    query = np.arange(CFG.heads).reshape(g, group)[swap].reshape(-1)
    side = kv._replace(k=kv.k[:, swap], v=kv.v[:, swap], pos=kv.pos[:, swap], bias=kv.bias[:, swap], lost=kv.lost[:, swap])
    moments = tuple(a[:, query] for a in evidence.queries)
    seen = evidence._replace(
        rows=evidence.rows[:, query],
        received=evidence.received[:, query],
        peak=evidence.peak[:, query],
        perturbed=evidence.perturbed[:, query],
        cls=evidence.cls[:, query],
        keys=evidence.keys[:, swap],
        queries=moments,
        turned=evidence.turned[:, query],
    )
    d = CFG.head_dim
    seen = seen._replace(weights={"o": evidence.weights["o"].reshape(CFG.heads, d, -1)[query].reshape(CFG.heads * d, -1)})
    keep = jnp.full((B, 1), CAP, jnp.int32)
    a, b = jitted(method)(kv, evidence, keep), jitted(method)(side, seen, keep)
    assert np.array_equal(np.asarray(a[0])[:, swap], b[0]), "the wrong query heads vote for a KV head"
    for x, y in zip(a[4:], b[4:], strict=True):
        near(np.asarray(x)[:, swap], y, 1e-6, "the wrong query heads decide what is frozen")


def transforms_compose(make):
    """jit of vmap over rows, each a batch of one, of grad, with checkpointed steps inside a scan, gives row by row what the batch of
    very different lengths gives; a row with nothing live gives no NaN, in logits or gradients.
    """
    method = make(CAP)
    params, ids, force = world()
    live = LIVE & (np.arange(B) != 1)[:, None]
    out = result(method, live=live)
    assert np.isfinite(out["logits"]).all(), "NaN from an empty row"
    tokens = tokens_of(params, ids, live, recipe_of(method).ends)
    own, keep = weights(method, params), jnp.full((B,), CAP, jnp.int32)

    def loss(x, row, ids, keep):
        one = jax.tree.map(lambda a: a[None], row._replace(x=x))
        limit = budgets(method, keep[None])
        _, layers = decoder.prefill(CFG, own, one, recipe_of(method), new=2, keep=limit, key=jax.random.key(4))

        def more(layers, i):
            y, layers = decoder.step(
                CFG,
                own,
                blocks.embed(CFG, own, i[None, None]),
                jnp.ones((1, 1), bool),
                layers,
                recipe_of(method),
                keep=limit,
                key=jax.random.key(4),
            )
            return layers, y

        _, y = jax.lax.scan(jax.checkpoint(more), layers, ids)
        logits = decoder.logits(CFG, own, y[:, 0])
        return jnp.sum(logits**2), logits[:, 0]

    (value, logits), grad = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(tokens.x, tokens, force[:, :2], keep)
    assert np.isfinite(value).all() and np.isfinite(grad).all(), "NaN in a gradient"
    near(
        logits, np.swapaxes(out["logits"][:2], 0, 1), 2e-5, "a batch of one, under jit, vmap, grad, checkpoint and scan, against the batch"
    )


def one_compile(make):
    """Prompts of several lengths and any budget under the capacity run in one compiled program, and the budget is obeyed."""
    method = make(CAP)
    _, traces = program(method, "float32")
    usual(method)
    seen = traces[0]
    kept = []
    for keep, cut in ((CAP, 0), (CAP - 1, 2), (CAP - 3, 1)):
        out = result(method, keep=keep, live=LIVE & (np.arange(N) >= cut)[None])
        assert np.isfinite(out["logits"]).all()
        kept.append(np.mean([(kv.pos[0] >= 0).sum(-1).mean() + kv.lost[0].mean() for kv in out["filled"]]))
    assert traces[0] == seen == 1, f"traced {traces[0]} times"
    if once(method):
        want = [min(method.capacity - less, LENGTHS[0] - cut) for less, cut in ((0, 0), (1, 2), (3, 1))]
        assert np.allclose(kept, want, atol=0.51), f"budgets {CAP}, {CAP - 1}, {CAP - 3} keep {kept}, want {want}"


def sharded(make):
    """One layer's cache sharded over the batch or over the KV heads gives the one-device result."""
    method = make(CAP)
    if not once(method):
        return
    if len(jax.devices()) < 2:
        raise Unable("it needs two devices; on a CPU: jax.config.update('jax_num_cpu_devices', 2) before JAX runs anything")
    kv, evidence = layer_state()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    keep = jnp.full((B, 1), CAP, jnp.int32)
    base = jitted(method)(kv, evidence, keep)
    for axis in (0, 1):

        def put(a, axis=axis):
            if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                return jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.P()))
            whole = a.ndim <= axis or a.shape[axis] % 2 or (axis == 1 and a.ndim < 3) or a.shape[0] != B
            spec: list[str | None] = [None] * a.ndim
            if not whole:
                spec[axis] = "x"
            return jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

        out = jitted(method)(*jax.tree.map(put, (kv, evidence)), keep)
        assert np.array_equal(out[0], base[0]), f"sharded over axis {axis} keeps other tokens"
        near(out[1], base[1], 1e-6, f"sharded over axis {axis}")


LAWS = {
    law.__name__: law
    for law in (
        jit_equals_eager,
        rows_are_independent,
        full_budget_is_identity,
        dropped_equals_masked,
        shapes_are_static,
        dead_rows_do_not_matter,
        budget_is_spent,
        positions_are_sound,
        bf16,
        bf16_model,
        heads_are_interchangeable,
        transforms_compose,
        one_compile,
        sharded,
    )
}
