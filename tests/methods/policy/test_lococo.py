import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import decode
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce_kv
from jaxtok.core.types import Evidence
from jaxtok.methods import LoCoCo
from jaxtok.models import blocks, decoder
from jaxtok.testing import world
from tests.methods import toys

small = {"lococo": lambda capacity: LoCoCo(capacity=capacity, kernel=5, slack=1)}


class Widths:
    """As much of a model's configuration as the weights need."""

    layers, head_dim = 2, 8


def weights(method, seed=0, alpha=None, cfg=Widths):
    """Weights several times larger than at the start, so that the convolution decides something."""
    own = method.init_params(jax.random.key(seed), cfg)
    own = {name: x * 8 if name != "alpha" else x for name, x in own.items()}
    return own if alpha is None else own | {"alpha": jnp.full_like(own["alpha"], alpha)}


@functools.cache
def program(method):
    def run(own, kv, received, keep):
        plan = method.fit(own, Held(received), kv, Evidence(layer=jnp.int32(1)), keep)
        return plan, reduce_kv(plan, kv, False)

    return jax.jit(run)


def fit(method, own, kv, received, keep=None):
    return program(method)(own, kv, jnp.asarray(received, jnp.float32), None if keep is None else jnp.asarray(keep, jnp.int32))


def reference(own, k, v, received, m, heavy, local=0, act=True):
    """One head of n live tokens in numpy float64, from the card -> {position: (k, v)} of the heavy hitters and of the merged slots."""
    n = len(k)
    older = sorted(range(n - local), key=lambda j: (-received[j], j))
    hitters = sorted(older[: heavy - local]) + list(range(n - local, n))
    rest = [j for j in range(n) if j not in hitters]
    after = sorted(sorted(rest, key=lambda j: (-received[j], j))[: m - heavy])
    conv, bias, alpha = (np.asarray(own[name][1], np.float64) for name in ("conv", "bias", "alpha"))
    x, half = np.concatenate([k, v], 1)[rest], conv.shape[2] // 2
    merged = {}
    for i, j in enumerate(after):
        y = np.zeros(len(rest))
        for s in range(len(rest)):
            for u in range(conv.shape[2]):
                if 0 <= s + u - half < len(rest):
                    y[s] += conv[i, :, u] @ x[s + u - half]
        y = y + bias[i]
        y = np.maximum(y, 0) if act else y
        w = np.exp(y - y.max()) / np.exp(y - y.max()).sum() * alpha
        w[rest.index(j)] += 1 - alpha
        merged[j] = (w @ k[rest], w @ v[rest])
    return {j: (k[j], v[j]) for j in hitters}, merged


def test_by_hand():
    """Budget 4, two of it heavy hitters. A = 5 1 4 2 9 3: 4 and 0 stay, 2 and 5 are followed by half the mean of 1, 2, 3, 5."""
    k = np.arange(12.0).reshape(1, 1, 6, 2)
    method = LoCoCo(capacity=4, kernel=3)
    own = {"conv": jnp.zeros((1, 2, 4, 3)), "bias": jnp.zeros((1, 2)), "alpha": jnp.full((1,), 0.5)}
    plan, out = fit(method, own, toys.cache(k, -k), [[[5, 1, 4, 2, 9, 3]]])
    np.testing.assert_array_equal(out.pos[0, 0], [0, 2, 4, 5])
    mean = (k[0, 0, [1, 2, 3, 5]]).mean(0)
    want = [k[0, 0, 0], (k[0, 0, 2] + mean) / 2, k[0, 0, 4], (k[0, 0, 5] + mean) / 2]
    np.testing.assert_allclose(out.k[0, 0], want, rtol=1e-6)
    np.testing.assert_allclose(out.v, -out.k, rtol=1e-6)
    assert (np.asarray(out.bias) == 0).all() and plan.w.shape == (1, 1, 4, 6)


@pytest.mark.parametrize("options", [{}, {"local": 2, "heavy": 0.3, "variant": "official"}, {"heavy": 0.0, "act": None}])
def test_equals_numpy(options):
    """Two sequences of 24 and 17 tokens, two KV heads with their own tokens and one convolution; layer 1 of 2."""
    _, kv = toys.problem()
    received = np.random.default_rng(1).random((2, 2, 24)) * 9
    method = LoCoCo(capacity=10, kernel=5, **options)
    own, heavy = weights(method), {0.5: 5, 0.3: 3, 0.0: 0}[options.get("heavy", 0.5)]
    _, out = fit(method, own, kv, received)
    for i, n in enumerate(toys.LIVE):
        for e in range(2):
            k, v = (np.asarray(x, np.float64)[i, e, -n:] for x in (kv.k, kv.v))
            hitters, merged = reference(
                own, k, v, received[i, e, -n:], 10, heavy, options.get("local", 0), options.get("act", "relu") == "relu"
            )
            want = [*hitters.items(), *merged.items()] if "variant" in options else sorted((hitters | merged).items())
            np.testing.assert_array_equal(out.pos[i, e], [j for j, _ in want])
            np.testing.assert_allclose(out.k[i, e], [k for _, (k, _) in want], atol=2e-5)
            np.testing.assert_allclose(out.v[i, e], [v for _, (_, v) in want], atol=2e-5)


def test_alpha_zero_drops_all_but_the_best():
    _, kv = toys.problem(junk=1e4)
    received = np.random.default_rng(2).random((2, 2, 24))
    method = LoCoCo(capacity=10, kernel=5)
    _, out = fit(method, weights(method, alpha=0.0), kv, received)
    assert toys.kept(out) == toys.top(received, kv.pos, 10)
    at = np.asarray(out.pos) + (24 - np.asarray(toys.LIVE))[:, None, None]
    np.testing.assert_array_equal(out.k, np.take_along_axis(np.asarray(kv.k), at[..., None], 2))


@pytest.mark.parametrize("keep", [None, 7, 10, 24])
def test_rows_sum_to_one(keep):
    """So values that are all the same stay; a budget under the capacity leaves so many, one over the text leaves it as it is."""
    _, kv = toys.problem()
    kv = kv._replace(v=jnp.full_like(kv.v, 3.0))
    method = LoCoCo(capacity=24 if keep == 24 else 10, kernel=5)
    plan, out = fit(method, weights(method), kv, np.random.default_rng(3).random((2, 2, 24)), None if keep is None else [keep] * 2)
    live = np.asarray(out.pos) >= 0
    np.testing.assert_allclose(np.asarray(plan.w).sum(-1), live, atol=1e-6)
    np.testing.assert_allclose(np.asarray(out.v)[live], 3, rtol=1e-6)
    assert live.sum(-1).tolist() == [[min(keep or 10, n)] * 2 for n in toys.LIVE]
    if keep == 24:
        assert toys.kept(out) == toys.kept(kv)


def test_no_convolution_is_the_average():
    _, kv = toys.problem()
    method = LoCoCo(capacity=10, kernel=5)
    own = {name: jnp.zeros_like(x) for name, x in weights(method).items()} | {"alpha": jnp.ones((2,))}
    received = np.random.default_rng(4).random((2, 2, 24))
    plan, out = fit(method, own, kv, received)
    best = toys.top(received, kv.pos, 5)
    for i, n in enumerate(toys.LIVE):
        for e in range(2):
            rest = [j + 24 - n for j in range(n) if j not in best[i][e]]
            merged = [r for r, p in enumerate(np.asarray(out.pos)[i, e]) if p not in best[i][e]]
            assert len(merged) == 5
            for r in merged:
                np.testing.assert_allclose(out.k[i, e, r], np.asarray(kv.k)[i, e, rest].mean(0), atol=1e-5)


CFG, M = world.CFG, 5
METHOD = LoCoCo(capacity=M, kernel=5, slack=2)
RECIPE = Recipe(policy=METHOD)


def model():
    params, ids, force = world.world()
    return params | {"methods": {"policy": weights(METHOD, cfg=CFG)}}, jnp.concatenate([ids, force], 1)


@functools.cache
def chunked():
    return jax.jit(lambda params, ids, live: decode.prefill_chunked(CFG, params, ids, live, RECIPE, chunk=4, new=0))


@functools.cache
def block():
    def run(params, ids, live, layers):
        return decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), RECIPE, new=0, layers=layers)

    return jax.jit(run)


def test_the_cache_has_one_size_whatever_the_prompt():
    """Blocks of 4 through M + slack + 1 slots, some of them padding; as block after block by hand."""
    params, ids = model()
    ids, live = ids[:, :24], jnp.asarray(np.arange(24)[None] >= np.asarray([[0], [3], [9], [20]]))
    tokens, layers = chunked()(params, ids, live)
    by_hand, shapes = decoder.empty(CFG, params, 4, M + 3, RECIPE), set()
    for at in range(0, 24, 4):
        x, by_hand = block()(params, ids[:, at : at + 4], live[:, at : at + 4], by_hand)
        shapes.add(str(jax.tree.map(jnp.shape, by_hand)))
    assert len(shapes) == 1 and str(jax.tree.map(jnp.shape, layers)) in shapes
    assert layers[0][0].kv.k.shape == (4, 2, M + 3, 8) and int(layers[0][0].kv.cursor) == M
    for a, b in zip(jax.tree.leaves((x.x[:, -1], by_hand)), jax.tree.leaves((tokens.x[:, -1], layers)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    kv = layers[1][0].kv
    assert np.asarray(kv.seen).tolist() == [24, 21, 15, 4] and np.asarray(kv.pos >= 0).sum(-1).tolist() == [[5, 5]] * 3 + [[4, 4]]
    assert all(len(head) == len(row[0]) for row in toys.kept(kv) for head in row) and np.isfinite(np.asarray(tokens.x)).all()


def test_decoding_compresses_each_time_the_slack_is_full():
    """M live slots after a prefill, then one more a step up to M + slack, then M again; scores begin anew; positions are the text's."""
    params, ids = model()
    layers = decoder.empty(CFG, params, 4, M + 3, RECIPE)
    for at in (0, 4):
        _, layers = block()(params, ids[:, at : at + 4], jnp.ones((4, 4), bool), layers)
    step = jax.jit(
        lambda params, ids, layers: decoder.step(
            CFG, params, blocks.embed(CFG, params, ids[:, None]), jnp.ones((4, 1), bool), layers, RECIPE
        )
    )
    live, sums = [], []
    for t in range(8, 15):
        x, layers = step(params, ids[:, t], layers)
        kv = layers[1][0].kv
        live.append(int((np.asarray(kv.pos) >= 0).sum(-1).max()))
        sums.append(float(layers[1][0].policy.slots.sum(-1).max()))
        assert kv.k.shape[2] == M + 3 and (np.asarray(kv.seen) == t + 1).all() and np.isfinite(np.asarray(x)).all()
        for head in toys.kept(kv):
            assert all(max(h) < t + 1 for h in head) and all(len(h) == live[-1] for h in head)
    assert live == [6, 7, 5, 6, 7, 5, 6]
    np.testing.assert_allclose(sums, [1, 2, 0, 1, 2, 0, 1], atol=1e-5)


def test_checks_of_its_settings():
    for match, options in {
        "capacity must be >= 1": dict(capacity=0),
        "heavy must be from 0": dict(capacity=8, heavy=1.5),
        "leaves none to merge into": dict(capacity=8, heavy=1.0),
        "local=5 must fit into the 4": dict(capacity=8, local=5),
        "kernel must be odd": dict(capacity=8, kernel=4),
        "slack must be >= 1": dict(capacity=8, slack=0),
        "act must be one of": dict(capacity=8, act="gelu"),
        "variant must be one of": dict(capacity=8, variant="kvpress"),
    }.items():
        with pytest.raises(ValueError, match=match):
            LoCoCo(**options)
    method = LoCoCo(capacity=512)
    assert (method.every, method.channels) == (17, 256) and jax.tree.map(jnp.shape, method.init_params(jax.random.key(0), Widths)) == {
        "conv": (2, 256, 16, 21), "bias": (2, 256), "alpha": (2,),
    }  # fmt: skip
    _, kv = toys.problem(d=6)
    with pytest.raises(ValueError, match="12 channels, the convolution takes 16"):
        fit(LoCoCo(capacity=10), weights(LoCoCo(capacity=10)), kv, np.zeros((2, 2, 24)))


def test_official(data):
    """VITA-Group/LoCoCo with its weights: heavy hitters and the newest four first, then twelve merged slots; and its plain dropping."""
    z = np.load(data / "golden" / "lococo.npz")
    k, v, received = z["c1_k"], z["c1_v"], z["c1_hh_scores"]
    m, local = int(z["c1_mem_size"]), int(z["c1_local_len"])
    options = dict(capacity=m, heavy=float(z["c1_hh_keep_rate"]), local=local, kernel=int(z["c1_kernel_size"]), variant="official")
    own = {"conv": z["c1_w.layers.0.weight"], "bias": z["c1_w.layers.0.bias"], "alpha": z["c1_w.normalizer"][0]}
    own = {name: jnp.asarray(np.stack([x, x])) for name, x in own.items()}
    _, out = fit(LoCoCo(**options), own, toys.cache(k, v), received)
    np.testing.assert_allclose(out.k, z["c1_out_k"], atol=2e-5)
    np.testing.assert_allclose(out.v, z["c1_out_v"], atol=2e-5)
    _, dropped = fit(LoCoCo(**options), own | {"alpha": jnp.zeros((2,))}, toys.cache(k, v), received)
    assert toys.kept(dropped)[0] == [set(head) for head in z["c1_drop_kept"][0].tolist()]
