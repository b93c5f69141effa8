import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.budget import shares
from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill_chunked, replay
from jaxtok.methods import ActQKV
from jaxtok.methods.read.actqkv import apportion
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, LIVE, world
from tests.methods import toys

small = lambda capacity: ActQKV(budget=capacity, block=2, n_init=1, n_local=2)


@functools.cache
def reader(method):
    return jax.jit(lambda state, carry, q, pos, kv: method.read({}, 0, state, carry, q, pos, kv, toys.sight()))


def read(method, q, kv, share=None):
    """(carry, index) of a call whose queries [b h t d] are the newest tokens."""
    state, t = toys.begin(method, 0, kv, q.shape[1]), q.shape[2]
    if share is not None:
        state = state._replace(share=jnp.asarray(share, jnp.int32))
    pos = jnp.maximum(kv.seen[:, None] - t + jnp.arange(t, dtype=jnp.int32)[None], -1)
    _, carry, index = reader(method)(state, None, jnp.asarray(q), pos, kv)
    return carry, None if index is None else np.asarray(index.index)


def probe_of(q):
    """The card in numpy for live queries [h t d]."""
    q = np.asarray(q, np.float64)
    mean, spread = q.mean(1, keepdims=True), q.std(1, keepdims=True)
    bias = (np.where(spread > 1e-9, (q - mean) / np.maximum(spread, 1e-9), 0) ** 2).sum(-1, keepdims=True)
    total = bias.sum(1, keepdims=True)
    weight = np.where(total > 0, bias / np.maximum(total, 1e-30), 1 / q.shape[1])
    return (weight * q).sum(1)


def reference(q, kv, block, n_init, n_local, count):
    """Blocks read by each KV head, and the entropy of each sequence."""
    (b, h, t, d), (g, s) = q.shape, kv.pos.shape[1:]
    sets, entropies = [], []
    for i in range(b):
        probe, heads, mean_entropy = probe_of(q[i]), [], 0
        for e in range(g):
            pos, seen = np.asarray(kv.pos)[i, e], int(kv.seen[i])
            near = lambda p, seen=seen: p >= 0 and (p < n_init or p >= seen - n_local - t + 1)
            forced, keys = set(), {}
            for page in range(s // block):
                live = [j for j in range(page * block, (page + 1) * block) if pos[j] >= 0]
                if any(near(pos[j]) for j in live):
                    forced.add(page)
                elif live:
                    keys[page] = np.asarray(kv.k, np.float64)[i, e, live].mean(0)
            share = np.zeros(len(keys))
            for head in range(e * h // g, (e + 1) * h // g):
                logit = np.array([probe[head] @ k for k in keys.values()]) * d**-0.5
                p = np.exp(logit - logit.max()) if len(keys) else logit
                share += p / max(p.sum(), 1e-30) / (h // g)
            best = sorted(zip(-share, keys, strict=True))[:count]
            heads.append(forced | {page for _, page in best})
            mean_entropy += -(share * np.log(np.maximum(share, 1e-300))).sum() / g
        sets.append(heads)
        entropies.append(mean_entropy)
    return sets, np.array(entropies)


def test_by_hand():
    """Blocks of two; keys of channel 0 by position 5 5 | 1 3 | 4 -2 | 0 0 | 9 9: means 5 2 1 0 9. First and last token: blocks 0 and 4.
    One block of the others for q = 1: block 1, its mean is 2; q = -1: block 3."""
    k = np.array([5, 5, 1, 3, 4, -2, 0, 0, 9, 9], np.float32).reshape(1, 1, 10, 1) * np.eye(1, 2, dtype=np.float32)
    kv, method = toys.cache(k, k), ActQKV(budget=4, block=2, n_init=1, n_local=1, most=1)
    pad = lambda x, value: jnp.pad(x, [(0, 0)] * 2 + [(0, 6)] + [(0, 0)] * (x.ndim - 3), constant_values=value)
    kv = kv._replace(k=pad(kv.k, 0), v=pad(kv.v, 0), pos=pad(kv.pos, -1), bias=pad(kv.bias, 0))
    for q, want in ((1.0, 1), (-1.0, 3)):
        _, index = read(method, np.array([q, 0], np.float32).reshape(1, 1, 1, 2), kv)
        assert set(index[0, 0].tolist()) - {-1} == {0, want, 4}
    np.testing.assert_allclose(method.start({}, 0, kv, 1).mean[0, 0, :5, 0], [5, 2, 1, 0, 9])


@pytest.mark.parametrize("t", [1, 4])
def test_equals_numpy(t):
    """h/g > 1, ragged, junk in dead slots, a window of several queries."""
    q, kv = toys.problem(1, live=(24, 17), junk=1e3, n=24)
    method = ActQKV(budget=5, block=2, n_init=1, n_local=2, most=2)
    carry, index = read(method, q[:, :, -t:], kv)
    want, entropy = reference(q[:, :, -t:], kv, 2, 1, 2, 1)
    assert [[{p for p in head if p >= 0} for head in row] for row in index.tolist()] == want
    np.testing.assert_allclose(carry[0], entropy, atol=1e-5)
    assert all((np.diff(head[head >= 0]) > 0).all() for row in index for head in row)
    if t == 1:
        both, _ = reference(q[:, :, -1:], kv, 2, 1, 2, 2)
        _, index = read(method, q[:, :, -1:], kv, share=[2, 0])
        none, _ = reference(q[:, :, -1:], kv, 2, 1, 2, 0)
        assert [[{p for p in head if p >= 0} for head in row] for row in index.tolist()] == [both[0], none[1]]


def test_a_text_within_the_budget_is_read_whole():
    """Seven tokens, a budget of eight, in a long cache: all their blocks, whatever share the layer has; not those of 24 tokens."""
    q, kv = toys.problem(6, live=(24, 7))
    kv = kv._replace(k=kv.k * 40)  # shares that vanish in float32
    _, index = read(ActQKV(budget=8, block=2, n_init=1, n_local=2), q[:, :, -1:], kv, share=[0, 0])
    assert [[{p for p in head if p >= 0} for head in row] for row in index.tolist()] == [[{0, 11}] * 2, [{8, 9, 10, 11}] * 2]


def test_the_probe():
    """Equal queries: their mean. One far from equal others: near it. Dead queries do not count. In numpy for random ones."""
    rng, method = np.random.default_rng(0), ActQKV()
    q = rng.normal(size=(1, 2, 6, 8)).astype(np.float32)
    pos = jnp.arange(6, dtype=jnp.int32)[None]
    np.testing.assert_allclose(method.probe(jnp.asarray(q), pos)[0], probe_of(q[0]), atol=1e-5)
    same = np.repeat(q[:, :, :1], 6, 2) * 1.7
    np.testing.assert_allclose(method.probe(jnp.asarray(same), pos), same[:, :, 0], rtol=1e-5)
    far = same.copy()
    far[:, :, 3] = 40
    got = method.probe(jnp.asarray(far), pos)
    share = 25 / (25 + 5)  # z^2 of one among n equal: n - 1, of the others 1 / (n - 1) each
    np.testing.assert_allclose(got, share * 40 + (1 - share) * far[:, :, 0], rtol=1e-3)
    dead = jnp.asarray([[-1, -1, 0, 1, 2, 3]], jnp.int32)
    np.testing.assert_allclose(method.probe(jnp.asarray(q), dead)[0], probe_of(q[0, :, 2:]), atol=1e-5)
    assert np.isfinite(method.probe(jnp.asarray(q), jnp.full((1, 6), -1))).all()
    mean, soft = (ActQKV(weighting=w).probe(jnp.asarray(q), pos) for w in ("mean", "softmax"))
    np.testing.assert_allclose(mean, q.mean(2), atol=1e-6)
    z = (((q[0] - q[0].mean(1, keepdims=True)) / q[0].std(1, keepdims=True)) ** 2).sum(-1)
    w = np.exp(z - z.max(-1, keepdims=True))
    np.testing.assert_allclose(soft[0], ((w / w.sum(-1, keepdims=True))[..., None] * q[0]).sum(1), atol=1e-4)


def test_blocks_are_shared_out_by_entropy():
    """Equal weights: alike. Always the exact total, never above the cap, and the same as exact arithmetic says."""
    share = jax.jit(apportion, static_argnums=(1, 2))
    np.testing.assert_array_equal(share(jnp.full((2, 5), 0.3), 35, 14), np.full((2, 5), 7))
    np.testing.assert_array_equal(share(jnp.zeros((1, 3)), 6, 4), [[2, 2, 2]])
    rng = np.random.default_rng(0)
    for total, most in ((40, 16), (8, 5), (64, 8), (17, 40)):
        weight = rng.uniform(0.2, 3, size=(6, 8))
        got = np.asarray(share(jnp.asarray(weight, jnp.float32), total, most))
        assert (got.sum(1) == total).all() and got.max() <= most and got.min() >= 0
        order = np.argsort(weight, axis=1)
        assert (np.diff(np.take_along_axis(got, order, 1), axis=1) >= 0).all(), "a flatter layer gets no less"
    weight = rng.uniform(0.5, 2, size=8)
    assert tuple(np.asarray(share(jnp.asarray(weight[None], jnp.float32), 80, 80))[0].tolist()) == shares(tuple(weight), 80, 0)


def test_the_sum_over_layers_is_fixed_in_decoding():
    """Through the model: the layers' shares sum to the total after every step, and follow the entropies."""
    params, ids, force = world()
    method = ActQKV(budget=11, block=2, n_init=1, n_local=2, most=5)

    @jax.jit
    def run(params):
        recipe = Recipe(reader=method)
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, jnp.asarray(LIVE)), recipe, new=10)
        first = jnp.stack([parts[0].reader.share for parts in layers])
        out, layers = replay(CFG, params, tokens, layers, force[:, :4], recipe)
        return first, jnp.stack([parts[0].reader.share for parts in layers]), out

    first, later, out = run(params)
    assert (first == method.mean).all() and (later.sum(0) == CFG.layers * method.mean).all() and np.isfinite(out).all()
    assert later.max() <= 5 and (np.asarray(later) != method.mean).any()


def test_prefill_in_windows():
    """A budget that covers the cache is the plain prefill; a small one is finite and another."""
    params, ids, force = world()

    @functools.partial(jax.jit, static_argnums=0)
    def run(method):
        tokens, layers = prefill_chunked(CFG, params, ids, jnp.asarray(LIVE), Recipe(reader=method), chunk=4, new=6, read=True)
        return tokens.x[:, -1], replay(CFG, params, tokens, layers, force[:, :4], Recipe(reader=method))[0]

    want = jax.jit(lambda: decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, jnp.asarray(LIVE)), new=0)[0].x[:, -1])()
    np.testing.assert_allclose(run(ActQKV(budget=40, block=2, n_init=1, n_local=2))[0], want, atol=3e-5)
    few = run(ActQKV(budget=5, block=2, n_init=1, n_local=2, most=1))
    assert np.isfinite(few[1]).all() and np.abs(few[0] - want)[0].max() > 1e-3
    np.testing.assert_allclose(few[0][3], want[3], atol=3e-5)  # three tokens: all in the window


def test_means_follow_appends_and_evictions():
    _, kv = toys.problem(4)
    method, rng = ActQKV(budget=5, block=4, n_init=0, n_local=1, most=1), np.random.default_rng(0)
    state = method.start({}, 2, kv, 4)
    for turn in range(6):
        slot = rng.integers(0, 24, (2, 2))
        b, g = np.indices((2, 2))
        kv = kv._replace(k=kv.k.at[b, g, slot].set(5.0 * turn), pos=kv.pos.at[b, g, slot].set(30 + turn if turn % 2 else -1))
        state = method.update({}, state, kv, jnp.asarray(slot, jnp.int32))
        np.testing.assert_allclose(state.mean, toys.begin(method, 2, kv, 4).mean, rtol=1e-6)


def test_bf16_is_scored_in_float32():
    q, kv = toys.problem(5)
    half = kv._replace(k=kv.k.astype(jnp.bfloat16))
    method, one = ActQKV(budget=5, block=2, n_init=1, n_local=2, most=1), jnp.asarray(q[:, :, -1:], jnp.bfloat16)
    state = method.start({}, 0, half, 4)
    assert state.mean.dtype == jnp.bfloat16
    pos = half.seen[:, None] - 1
    low = reader(method)(state, None, one, pos, half)[2].index
    high = reader(method)(state._replace(mean=state.mean.astype(jnp.float32)), None, one.astype(jnp.float32), pos, half)[2].index
    np.testing.assert_array_equal(low, high)


def test_refuses():
    with pytest.raises(ValueError, match="budget=600 has no room for a block of 32"):
        ActQKV(budget=600)
    with pytest.raises(ValueError, match="most=3 blocks a layer is under the mean of 44"):
        ActQKV(most=3)
    with pytest.raises(ValueError, match="weighting must be one of"):
        ActQKV(weighting="max")
    with pytest.raises(ValueError, match="blocks of 32 slots, but the cache has 24"):
        ActQKV().start({}, 0, toys.problem()[1], 4)
