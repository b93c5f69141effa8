import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import decode
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import grow_kv, reduce_kv
from jaxtok.core.types import Evidence, Needs, Noise
from jaxtok.methods import H2O, Keyformer
from jaxtok.methods.policy import keyformer
from jaxtok.methods.policy.keyformer import Clock
from jaxtok.models import decoder
from jaxtok.ops.noise import gumbel, words
from jaxtok.testing import world
from tests.methods import toys

small = {
    "keyformer": lambda capacity: Keyformer(capacity=capacity, steps=5),
    "keyformer:official": lambda capacity: Keyformer(capacity=capacity, variant="official", noise=None, recent=0.5),
}
FIXED = {"noise": None, "tau_init": 1.0, "tau_end": 1.0}
draw = jax.jit(gumbel, static_argnames="heads")


def clock(b, begun, seed=0):
    return Clock(jnp.broadcast_to(words(None, seed, 0), (b, 2)), jnp.full((b,), begun, jnp.int32))


def reference(q, k, z, prefill, capacity, newest, group, tau, official=False):
    """Keyformer for one sequence from the card, numpy float64: a dict position -> A for each KV head, one step after another.

    z [h T T] noise of each query and key, tau(step) the temperature.
    """
    (h, n, d), g = q.shape, k.shape[0]
    q, k = (x.astype(np.float64) for x in (q, k))
    scores = [dict[int, float]() for _ in range(g)]
    for t in range(prefill, n + 1):
        for e in range(g):
            mine = range(e * (h // g), (e + 1) * (h // g))
            see, queries = (range(t), range(t)) if t == prefill else ([*scores[e], t - 1], [t - 1])
            add = {p: np.zeros(len(mine)) for p in see}
            for i in queries:
                ok = [p for p in see if p <= i]
                for x, head in enumerate(mine):
                    y = (k[e][ok] @ q[head, i] / d**0.5 + z[head, i, ok]) / tau(t - prefill)
                    w = np.exp(y - y.max())
                    for p, share in zip(ok, w / w.sum(), strict=True):
                        add[p][x] += share
            now = {p: scores[e].get(p, 0) + {"mean": np.mean, "max": np.max}[group](a) for p, a in add.items()}
            if len(now) > capacity:
                gone = t - newest - 1 if official else None
                old = sorted((p for p in now if p < t - newest), key=lambda p: (p == gone, -now[p], p))
                now = {p: a for p, a in now.items() if p >= t - newest or p in old[: capacity - newest]}
            scores[e] = now
        yield scores


def test_by_hand():
    """tau = 2 and no noise: attention 1/2, 1/4, 1/4 counts as its roots, 0.7071, 0.5, 0.5 over 1.7071. Two of four stay for their A."""
    policy = Keyformer(capacity=4, recent=0.5, noise=None, tau_init=1.0, tau_end=3.0, steps=2)
    kv = toys.cache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2)))
    state = Held(jnp.asarray([[[5.0, 1, 4, 2, 0]]]), clock(1, 4))  # one step since the prefill
    state = policy.observe({}, state, kv, Evidence(rows=jnp.asarray([[[[0.0, 0.5, 0.25, 0.25, 0]]]])))
    np.testing.assert_allclose(state.slots[0, 0], [5, 1 + 0.7071 / 1.7071, 4 + 0.5 / 1.7071, 2 + 0.5 / 1.7071, 0], rtol=1e-4)
    safe, score = policy.victim({}, state, kv, jnp.full((1, 1), 4, jnp.int32))
    np.testing.assert_array_equal(safe[0, 0], [False, False, False, True, True])
    assert int(jnp.argmin(jnp.where(safe, jnp.inf, score)[0, 0])) == 1
    official = Keyformer(capacity=4, recent=0.5, variant="official")
    score = official.victim({}, state, kv, jnp.full((1, 1), 4, jnp.int32))[1]
    assert int(jnp.argmin(score[0, 0])) == 2  # the token that leaves the window, whatever it has received


def test_the_temperature_rises_and_stays():
    policy = Keyformer(capacity=4, tau_init=1.0, tau_end=2.0, steps=100)
    np.testing.assert_allclose(policy._tau(jnp.asarray([0, 1, 50, 100, 10**6], jnp.int32)), [1, 1.01, 1.5, 2, 2], rtol=1e-6)
    assert policy.needs == Needs(perturbed=Noise(1.0, 0)) and policy.step_needs == Needs(rows=1)
    assert Keyformer(capacity=4, noise=None).needs.perturbed == Noise(1.0, None)


@pytest.mark.parametrize("prefill, options", [(14, {}), (5, {"group": "max", "seed": 3, "recent": 0.5, "variant": "official"})])
def test_equals_numpy(prefill, options):
    """Kept sets and scores at every step, over twice the capacity; a prompt over and one under it."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, e, 32, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    pos = jnp.arange(32, dtype=jnp.int32)[None]
    z = np.asarray(draw(words(None, options.get("seed", 0), 0), pos, pos[:, None], heads=4), np.float64)[0]
    newest = {0.3: 2, 0.5: 4}[options.get("recent", 0.3)]
    tau = lambda step: 1 + min(step, 10) / 10
    want = reference(q[0], k[0], z, prefill, 8, newest, options.get("group", "mean"), tau, "variant" in options)
    got = toys.drive(Keyformer(capacity=8, steps=10, **options), q, k, v, (prefill,), prefill)
    for scores, (kv, state, *_) in zip(want, got, strict=True):
        assert toys.kept(kv)[0] == [set(head) for head in scores]
        for head, slots, expect in zip(kv.pos[0], state.slots[0], scores, strict=True):
            held = {int(p): a for p, a in zip(head, slots, strict=True) if p >= 0}
            np.testing.assert_allclose([held[p] for p in expect], list(expect.values()), rtol=1e-4, atol=1e-6)


def test_without_noise_and_temperature_it_is_h2o():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, e, 34, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    ours, theirs = (
        list(toys.drive(policy, q, k, v, (14, 9), 14)) for policy in (Keyformer(capacity=8, recent=0.5, **FIXED), H2O(capacity=8))
    )
    for (kv, state, *_), (other, held, *_) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(kv.pos, other.pos)
        np.testing.assert_allclose(state.slots, held.slots, atol=2e-5)


def test_a_temperature_without_end_keeps_the_oldest():
    """Every increment is 1 / (number of live keys)."""
    x = np.random.default_rng(3).normal(size=(1, 1, 30, 4)).astype(np.float32)
    policy = Keyformer(capacity=8, recent=0.25, noise=None, tau_init=1e30, tau_end=1e30)
    for t, (kv, state, *_) in enumerate(toys.drive(policy, x, x, x, (12,), 12)):
        assert toys.kept(kv)[0][0] == {*range(6), 10 + t, 11 + t}
        first = float(state.slots[0, 0][int(np.argmax(np.asarray(kv.pos[0, 0]) == 0))])
        assert first == pytest.approx(sum(1 / i for i in range(1, 13)) + t / 9, rel=1e-5)


def test_the_same_key_keeps_the_same_set():
    """Whatever the padding beside it; another seed keeps another."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(1, e, 30, 8)).astype(np.float32) for e in (4, 2, 2))
    run = lambda policy, pad: [
        toys.kept(kv) for kv, *_ in toys.drive(policy, *(np.pad(x, ((0, 0), (0, 0), (pad, 0), (0, 0))) for x in (q, k, v)), (14,), 14 + pad)
    ]
    one = run(Keyformer(capacity=8), 0)
    assert one == run(Keyformer(capacity=8), 0) == run(Keyformer(capacity=8), 3)
    assert one != run(Keyformer(capacity=8, seed=1), 0)


def test_keys_that_attract_more_are_kept_more_often():
    """4,000 draws of one step over keys of rising x: the share of draws that keep a key rises with x; the best of a draw is key j with
    probability softmax(x)_j, whatever the temperature (the Gumbel-max identity)."""
    x, n = np.linspace(-2, 2, 9), 4000
    p = np.exp(x) / np.exp(x).sum()
    kv = toys.cache(np.zeros((n, 1, 9, 2)), np.zeros((n, 1, 9, 2)))
    seeds = jax.random.bits(jax.random.key(0), (n, 2), jnp.uint32)
    state = Held(jnp.zeros((n, 1, 9)), Clock(seeds, jnp.zeros((n,), jnp.int32)))
    rows = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (n, 1, 1, 9))
    received = np.asarray(jax.jit(lambda state: Keyformer(capacity=4).observe({}, state, kv, Evidence(rows=rows)).slots)(state))[:, 0]
    np.testing.assert_allclose(received.sum(-1), 1, rtol=1e-5)
    order = np.argsort(-received, -1)
    often = np.array([(order[:, :4] == j).any(-1).mean() for j in range(9)])
    assert (np.diff(often) > -3 * (0.5 / n**0.5)).all() and often[-1] > 2 * often[0]
    assert all(a < b for a, b in itertools.pairwise(often[::2]))
    np.testing.assert_allclose([(order[:, 0] == j).mean() for j in range(9)], p, atol=4 * 0.5 / n**0.5)


def test_checks_of_a_policy():
    toys.check_policy(lambda capacity: Keyformer(capacity=capacity, recent=0.5), protected=lambda p, seen: p >= seen - 4)


def test_chunks_give_what_one_prefill_gives():
    """The model's column sums of all chunks add up to those of the prompt at once, with the same noise."""
    params, ids, _ = world.world()
    recipe, key = Recipe(policy=Keyformer(capacity=24)), jax.random.key(5)
    live = jnp.asarray(world.LIVE)
    once = jax.jit(lambda ids: decoder.prefill(world.CFG, params, decoder.embed(world.CFG, params, ids, live), recipe, new=1, key=key)[1])(
        ids
    )
    cut = jax.jit(lambda ids: decode.prefill_chunked(world.CFG, params, ids, live, recipe, chunk=4, new=1, key=key)[1])(ids)
    for (a,), (b,) in zip(once, cut, strict=True):
        np.testing.assert_array_equal(a.kv.pos, b.kv.pos)
        np.testing.assert_allclose(a.policy.slots, b.policy.slots, atol=2e-5)
        for x, y in zip(a.policy.rest, b.policy.rest, strict=True):
            np.testing.assert_array_equal(x, y)
    sums = np.asarray(once[0][0].policy.slots).sum(-1)
    np.testing.assert_allclose(sums, np.repeat(world.LENGTHS[:, None], 2, 1), rtol=1e-5)  # each query gives 1


def test_refuses():
    for match, options in {
        "capacity must be >= 1": dict(capacity=0),
        "recent must be from 0": dict(capacity=4, recent=1.5),
        "tau_init must be from": dict(capacity=4, tau_init=0.0),
        "tau_end must be from": dict(capacity=4, tau_end=float("inf")),
        "steps must be >= 1": dict(capacity=4, steps=0),
        "noise must be one of": dict(capacity=4, noise="normal"),
        "seed must be >= 0": dict(capacity=4, seed=-1),
        "variant must be one of": dict(capacity=4, variant="kvpress"),
    }.items():
        with pytest.raises(ValueError, match=match):
            Keyformer(**options)
    assert Keyformer(capacity=4, compact=True).raw
    with pytest.raises(ValueError, match=r"evidence\.perturbed is missing"):
        Keyformer(capacity=4).start({}, toys.cache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2))), Evidence())
    with pytest.raises(ValueError, match="one recipe asks for attention under"):
        Keyformer(capacity=4).needs | Keyformer(capacity=4, seed=1).needs


def test_official(data, monkeypatch):
    """d-matrix-ai/keyformer-llm with its recorded noise: who is alive and the scores at every step, with the mask as released.

    Its ALiBi bias rides along as a channel of the keys.
    """
    z = np.load(data / "golden" / "keyformer.npz")
    h, n = int(z["c1_num_heads"]), int(z["c1_n_prefill"])
    budget, newest = int(n * float(z["c1_kv_cache"]) / 100), int(z["c1_recent_tokens"]) - 1  # the coming token is the third
    heads = lambda name: z[f"c1_{name}"].reshape(1, -1, h, z["c1_q"].shape[-1] // h).swapaxes(1, 2)
    q, k, v = heads("q"), heads("k"), heads("v")
    d, T = q.shape[-1], q.shape[2]
    alibi = np.repeat(z["c1_attn_bias"][:, :, 0, -T:, None], 1, -1)  # a row's shift does not matter to its softmax
    stretch = ((d + 1) / d) ** 0.5
    q = np.concatenate([q * stretch, np.full_like(q[..., :1], (d + 1) ** 0.5)], -1)
    k = np.concatenate([k, alibi], -1)
    table = np.zeros((h, T, T), np.float32)
    table[:, :n, :n] = z["c1_s0_gumbel"][0]
    for t in range(1, int(z["c1_n_decode"]) + 1):
        table[:, n + t - 1, : n + t] = z[f"c1_s{t}_gumbel"][0, :, 0]
    table = jnp.asarray(table)

    def recorded(words, q_pos, k_pos, heads):
        return table[jnp.arange(heads)[None, :, None, None], q_pos[:, None, :, None], jnp.maximum(k_pos, 0)[:, :, None]]

    monkeypatch.setattr(keyformer, "gumbel", recorded)
    capacity = budget - 1
    policy = Keyformer(capacity=capacity, recent=newest / capacity, tau_end=1 + 20 * float(z["c1_tau_delta"]), steps=20, variant="official")
    tau = [float(policy._tau(jnp.asarray([t], jnp.int32))[0]) for t in range(16)]
    np.testing.assert_allclose(tau, [float(z[f"c1_s{t}_tau"]) for t in range(16)], rtol=1e-6)
    # the prefill in numpy
    y = np.einsum("bhid,bhjd->bhij", q[:, :, :n].astype(np.float64), k[:, :, :n].astype(np.float64)) / (d + 1) ** 0.5
    y = np.where(np.tri(n, dtype=bool), y + z["c1_s0_gumbel"], -np.inf)
    e = np.exp(y - y.max(-1, keepdims=True))
    columns = (e / e.sum(-1, keepdims=True)).sum(2)
    alive = lambda t: [set(np.flatnonzero(row[:-1]).tolist()) for row in z[f"c1_s{t}_mask_next"]]
    kv = toys.cache(k[:, :, :n], v[:, :, :n])
    state, plan = toys.fit(policy, kv, Evidence(perturbed=jnp.asarray(columns, jnp.float32)))
    kv = grow_kv(reduce_kv(plan, kv), capacity + 1)._replace(cursor=jnp.full((), capacity, jnp.int32))
    slots = jnp.pad(jnp.take_along_axis(state.slots, plan.index, 2), ((0, 0), (0, 0), (0, 1)))
    state, step = Held(slots, state.rest), toys._step(policy)
    for t in range(int(z["c1_n_decode"]) + 1):
        if t:
            at = n + t - 1
            kv, state, out, _ = step(kv, state, *(jnp.asarray(x[:, :, at], jnp.float32) for x in (q, k, v)), None)
            np.testing.assert_allclose(np.asarray(out)[0].reshape(-1), z[f"c1_s{t}_out"].reshape(-1), atol=1e-5)
        assert toys.kept(kv)[0] == alive(t)
        assert all(max(p for p in head if p < n + t - newest) < n - newest - 1 for head in toys.kept(kv)[0]), "a late token is a key token"
        for e in range(h):
            for p, a in zip(np.asarray(kv.pos)[0, e], np.asarray(state.slots)[0, e], strict=True):
                if p >= 0:
                    assert a == pytest.approx(z[f"c1_s{t}_score_fn"][e, p], rel=1e-4, abs=1e-5)
