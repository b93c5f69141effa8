import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import heads
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce_kv
from jaxtok.core.types import Evidence
from jaxtok.decode import prefill_chunked
from jaxtok.methods import RazorAttention
from jaxtok.methods.policy.razor_attention import full_heads, reaching_heads
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LIVE, near, tokens_of, world
from tests.methods import toys

small = {"razor_attention": lambda capacity: RazorAttention(capacity=capacity, sinks=1)}
NOTHING = Evidence()


@functools.cache
def _fitted(policy):
    def fit(kv, keep):
        state = policy.start({}, kv, NOTHING)
        return state, reduce_kv(policy.fit({}, state, kv, NOTHING, keep), kv)

    return jax.jit(fit)


def fitted(policy, kv, keep=None):
    """(state, cache) after a prefill."""
    return _fitted(policy)(kv, None if keep is None else jnp.asarray(keep, jnp.int32))


def attend(q, k, v, kv=None, weight=None):
    """f64 [h d] of one query [h d] over keys [g m d] of `weight` tokens each."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, out = q.shape[0] // k.shape[0], np.zeros((q.shape[0], v.shape[-1]))
    for i in range(q.shape[0]):
        logit = k[i // group] @ q[i] / q.shape[-1] ** 0.5 + (0 if weight is None else np.log(weight[i // group]))
        p = np.exp(logit - logit.max())
        out[i] = p @ v[i // group] / p.sum()
    return out


def reference(q, k, v, prefill, capacity, sinks):
    """For one sequence from the card, step after step: (positions but the mean's, N_d, mean key and value [g d], outputs [h d])."""
    n, g = q.shape[1], k.shape[0]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    local = capacity - sinks - 1
    for t in range(prefill, n + 1):
        out = None
        if t > prefill:  # the new query reads the cache as it was, and its own key
            held = [*range(min(sinks, t - 1)), *range(max(sinks, t - 1 - local), t)]
            gone = range(min(sinks, t - 1), max(sinks, t - 1 - local))
            keys, values = k[:, held], v[:, held]
            weight = np.ones((g, len(held)))
            if len(gone):
                keys, values = (np.concatenate([x, y[:, gone].mean(1, keepdims=True)], 1) for x, y in ((keys, k), (values, v)))
                weight = np.concatenate([weight, np.full((g, 1), len(gone))], 1)
            out = attend(q[:, t - 1], keys, values, weight=weight)
        gone = list(range(min(sinks, t), max(sinks, t - local)))
        means = [x[:, gone].mean(1) if gone else None for x in (k, v)]
        yield {*range(min(sinks, t)), *range(max(sinks, t - local), t)}, len(gone), means, out


def test_by_hand():
    """Sink 0, window of 2, so of 0 1 2 3 4 5 the mean of 1 2 3 stays at position 3 with weight 3; the next step takes 4 in."""
    x = np.arange(6.0)[None, None, :, None] * np.array([1.0, -1.0])
    policy = RazorAttention(capacity=4, sinks=1)
    state, out = fitted(policy, toys.cache(x, 2 * x))
    np.testing.assert_array_equal(out.pos[0, 0], [0, 3, 4, 5])
    np.testing.assert_allclose(out.k[0, 0, :, 0], [0, 2, 4, 5])
    np.testing.assert_allclose(out.v[0, 0, :, 1], [0, -4, -8, -10])
    np.testing.assert_allclose(out.bias[0, 0], [0, np.log(3), 0, 0], rtol=1e-6)
    fold = jax.jit(lambda state, kv, slot: policy.depart({}, state, kv, slot, Evidence()))
    kv, state = fold(state, out, jnp.asarray([[1]], jnp.int32))
    np.testing.assert_allclose(kv.k[0, 0, :, 0], [0, 2, 2.5, 5])  # 2 + (4 - 2) / 4, in the slot of 4, which now is the mean
    np.testing.assert_allclose(kv.bias[0, 0, 2], np.log(4), rtol=1e-6)
    assert kv.pos.tolist() == out.pos.tolist() and state.rest.pos.tolist() == [[4]]
    same, _ = fold(state, out, jnp.asarray([[-1]], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, same, out)


@pytest.mark.parametrize("prefill, capacity, sinks", [(4, 7, 2), (14, 2, 0)])
def test_equals_numpy(prefill, capacity, sinks):
    """Sets, N_d, the mean and outputs of every step; a prompt under the capacity, and one over a window of a single token without sinks."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, e, 30, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    want = reference(q[0], k[0], v[0], prefill, capacity, sinks)
    got = toys.drive(RazorAttention(capacity=capacity, sinks=sinks), q, k, v, (prefill,), prefill)
    for (stay, count, means, outs), (kv, _, out, _) in zip(want, got, strict=True):
        newest = max(p for p in range(-1, 30) if p not in stay and (p < 0 or (p < min(stay - set(range(sinks)), default=99) and count)))
        for e in range(2):
            held = {int(p): j for j, p in enumerate(np.asarray(kv.pos[0, e])) if p >= 0}
            assert set(held) == stay | ({newest} if count else set())
            bias = np.asarray(kv.bias[0, e])
            assert all(bias[held[p]] == 0 for p in stay)
            if count:
                np.testing.assert_allclose(np.exp(bias[held[newest]]), count, rtol=1e-5)
                np.testing.assert_allclose(kv.k[0, e, held[newest]], means[0][e], atol=2e-6)  # running mean = mean at once
                np.testing.assert_allclose(kv.v[0, e, held[newest]], means[1][e], atol=2e-6)
        if out is not None:
            np.testing.assert_allclose(out[0, :, 0], outs, atol=1e-5)


def test_checks_of_a_policy():
    toys.check_policy(lambda capacity: RazorAttention(capacity=capacity, sinks=2), protected=lambda p, seen: p < 2 or p >= seen - 5)


# --- the card's checks --------------------------------------------------------------------------------------------------


def compressed(q, k, v, capacity, sinks=2):
    """(the last query's output over the compressed cache, mass and count of its compensation token, the true mass), one head each."""
    kv = toys.cache(k, v)
    out = jax.tree.map(np.asarray, fitted(RazorAttention(capacity=capacity, sinks=sinks), kv)[1])
    weight = np.exp(out.bias[0].astype(np.float64))
    got = attend(q[0, :, -1], out.k[0], out.v[0], weight=weight)
    gone = [j for j in range(k.shape[2]) if j not in set(out.pos[0, 0].tolist())] + [int(out.pos[0, 0, sinks])]
    exp = lambda key: np.exp(key.astype(np.float64) @ q[0, 0, -1].astype(np.float64) / q.shape[-1] ** 0.5)
    return got, weight[0, sinks] * exp(out.k[0, 0, sinks]), weight[0, sinks], exp(k[0, 0, gone]).sum()


def test_equal_dropped_keys_are_exact():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(1, 1, 64, 16)).astype(np.float32) for _ in range(3))
    k[:, :, 2:57] = k[:, :, 2:3]  # what goes into the mean
    got, mass, count, true = compressed(q, k, v, 10)
    np.testing.assert_allclose(got, attend(q[0, :, -1], k[0], v[0]), atol=1e-6)
    np.testing.assert_allclose(mass, true, rtol=1e-5)
    assert round(count) == 55


def test_mass_is_never_overestimated():
    """Jensen: N_d exp(q . mean) <= sum exp(q . k), here 0.01 to 0.5 of it for random keys."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        q, k, v = (rng.normal(size=(1, 1, 64, 16)).astype(np.float32) * s for s in (3.0, 2.0, 1.0))
        _, mass, count, true = compressed(q, k, v, 10)
        assert round(count) == 55 and 0 < mass <= true * (1 + 1e-6) and mass < 0.5 * true


def test_nothing_dropped_is_a_streaming_head_and_one_dropped_is_itself():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 2, 9, 4)).astype(np.float32)
    kv = toys.cache(x, x, [5, 8])  # 8: one token too many for sinks + window, but not for the slot of the mean
    _, out = fitted(RazorAttention(capacity=8, sinks=3), kv, [[8], [8]])
    for row, n in enumerate((5, 8)):
        jax.tree.map(np.testing.assert_array_equal, (out.k[row, :, -n:], out.pos[row, :, -n:]), (kv.k[row, :, -n:], kv.pos[row, :, -n:]))
    assert not out.bias.any() and not out.lost.any()
    # where the budget holds the sinks only, there is nobody to take the rest in
    _, out = fitted(RazorAttention(capacity=8, sinks=3), kv, [[3], [3]])
    assert toys.kept(out) == [[{0, 1, 2}] * 2] * 2 and not out.bias.any()


def test_the_mean_of_a_bf16_cache_goes_on_moving():
    """After 600 steps the compensation token is the mean of what was dropped, though (k - mean) / 600 is below half a unit of bf16."""
    rng = np.random.default_rng(5)
    x = (2.0 + rng.normal(size=(1, 1, 604, 4)) + np.arange(604)[None, None, :, None] / 200).astype(np.float32)
    policy = RazorAttention(capacity=4, sinks=1)
    kv, state = toys._start(policy)(toys.cache(x[:, :, :4], x[:, :, :4], None, jnp.bfloat16), NOTHING, None)
    step = toys._step(policy)

    def one(carry, row):
        kv, state, *_ = step(*carry, row, row, row, None)
        return (kv, state), None

    rows = jnp.asarray(np.moveaxis(x[:, :, 4:], 2, 0), jnp.bfloat16)
    kv, state = jax.jit(lambda carry: jax.lax.scan(one, carry, rows)[0])((kv, state))
    gone = np.asarray(jnp.asarray(x[0, 0, 1:602], jnp.bfloat16), np.float64).mean(0)
    at = int(np.argmin(np.where(np.asarray(kv.pos[0, 0]) >= 1, kv.pos[0, 0], 9999)))
    assert int(kv.pos[0, 0, at]) == 601 and round(float(np.exp(kv.bias[0, 0, at]))) == 601
    np.testing.assert_allclose(np.asarray(kv.k[0, 0, at], np.float64) + state.rest.k[0, 0], gone, atol=2e-4)
    np.testing.assert_allclose(np.asarray(kv.k[0, 0, at], np.float64), gone, atol=2e-2)


# --- in the model -------------------------------------------------------------------------------------------------------

STEPS = 6


def run(recipe, params, keep=None, chunk=None):
    """(prompt logits, logits of forced steps, final layers)."""
    _, ids, force = world()

    def go(params, force):
        if chunk is None:
            tokens, layers = decoder.prefill(CFG, params, tokens_of(params, ids), recipe, new=STEPS, keep=keep)
        else:
            tokens, layers = prefill_chunked(CFG, params, ids, jnp.asarray(LIVE), recipe, chunk=chunk, new=STEPS)

        def one(layers, i):
            live = jnp.ones(i.shape, bool)[:, None]
            x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, i[:, None]), live, layers, recipe, keep=keep)
            return layers, decoder.logits(CFG, params, x)[:, 0]

        first = decoder.logits(CFG, params, tokens.x[:, -1:])
        layers, out = jax.lax.scan(one, layers, force[:, :STEPS].T)
        return first, out, layers

    return jax.jit(go)(params, force)


def test_in_a_model_any_heads_can_be_the_retrieval_heads():
    """Head 1 of layer 0 and none of layer 1 whole: real arrays of two sizes, and nothing else differs from the law of one group."""
    params = world()[0]
    full = np.array([[False, True], [False, False]])
    found = heads.split(full)
    assert found == heads.HeadSplit(((1, 1), (0, 2)), ((1, 0), (0, 1)))
    moved = blocks.reorder_heads(CFG, params, found.order)
    recipe = Recipe(policy=RazorAttention(capacity=5, sinks=1), heads=found.sizes)
    n = LIVE.shape[1]
    first, out, layers = run(recipe, moved)
    assert [[part.kv.k.shape[1:3] for part in layer] for layer in layers] == [[(1, n + STEPS), (1, 6)], [(0, n), (2, 6)]]
    seen = LIVE.sum(1) + STEPS
    assert all(part.kv.seen.tolist() == seen.tolist() for layer in layers for part in layer)
    # ratio 1 = full attention; the streaming group forgets
    whole = run(Recipe(policy=RazorAttention(capacity=5, sinks=1), heads=((2, 0), (2, 0))), params)
    plain = run(Recipe(), params)
    near(whole[1], plain[1], 2e-5, "all heads full")
    near(first, plain[0], 1e-5, "a prefill attends to everything")
    assert np.abs(np.asarray(out) - plain[1]).max() > 1e-3
    # the bias sums to the tokens of the text: nothing is lost
    part = layers[1][1].kv
    tokens = np.where(np.asarray(part.pos) >= 0, np.exp(np.asarray(part.bias)), 0).sum(-1)
    np.testing.assert_allclose(tokens, np.repeat(seen[:, None], 2, 1), rtol=1e-5)
    # in chunks: the same caches
    pieces = run(recipe, moved, chunk=4)
    near(pieces[1], out, 2e-5, "prefilled in chunks")


# --- which heads --------------------------------------------------------------------------------------------------------


def test_the_best_of_all_layers_by_either_score():
    rng = np.random.default_rng(6)
    echo, induction = rng.random((5, 20)), rng.random((5, 20))
    got = full_heads(echo, induction)
    want = set(np.argsort(-induction.ravel())[:14]) | set(np.argsort(-echo.ravel())[:1])
    assert set(np.flatnonzero(got)) == want
    # the echo head counts in every layer, ties take no more than the ratio, and all ratios between nothing and everything work
    last = np.zeros((5, 20))
    last[4, 3] = 1
    assert full_heads(last, np.zeros((5, 20)), induction_ratio=0.0).nonzero() == (np.array([4]), np.array([3]))
    assert full_heads(np.zeros((5, 20)), np.ones((5, 20))).sum() == 14
    assert full_heads(echo, induction, induction_ratio=1.0).all() and not full_heads(echo, induction, echo_ratio=0, induction_ratio=0).any()
    assert full_heads(echo[:, :1], induction[:, :1]).sum() == len({int(echo[:, 0].argmax()), int(induction[:, 0].argmax())})


def test_heads_of_alibi_models_by_their_reach():
    """Reaches 8, 40 | 16, 80 of two query heads for two KV heads: a window of 20. No key beyond its reach gets epsilon of the own key's weight."""
    bound, slopes = np.array([[2.0, 10, 1, 1], [4, 1, 0, 20]]), np.array([0.5, 0.5, 0.125, 0.5])
    assert full(bound, slopes, 20).tolist() == [[True, False], [False, True]] and full(bound, slopes, 15).tolist() == [[True, True]] * 2
    assert full(bound, slopes, 100).sum() == 0 and full(bound[:, :1], slopes[:1], 8, kv_heads=1).tolist() == [[False], [True]]
    assert full(bound[:, :1], slopes[:1], 8, kv_heads=1, epsilon=0.5).all()
    rng = np.random.default_rng(7)
    q, k, slope = rng.normal(size=8) * 2, rng.normal(size=(200, 8)), 0.25
    logit = k @ q / 8**0.5
    limit, back = np.linalg.norm(q) * np.linalg.norm(k, axis=-1).max() / 8**0.5, np.arange(200)[::-1]
    weight = np.exp(logit - slope * back)
    for epsilon in (1.0, 1e-3):
        reach = (2 * limit - np.log(epsilon)) / slope
        assert (weight[back > reach] < epsilon * weight[-1]).all() and 0 < (back > reach).sum() < 200
        for window in (int(reach), int(reach) + 1):
            assert full([[limit]], [slope], window, kv_heads=1, epsilon=epsilon).item() == (reach > window)
    with pytest.raises(ValueError, match="h a multiple of 3 KV heads"):
        full(bound, slopes, 8, kv_heads=3)


def full(bound, slopes, window, kv_heads=2, **options):
    return reaching_heads(np.asarray(bound), np.asarray(slopes), window, kv_heads, **options)


def test_sizes_of_the_paper():
    assert RazorAttention.at(10_000).capacity == 4 + 1 + 4000 and RazorAttention.at(32_768).capacity == 5 + 6553
    assert RazorAttention.at(100, sinks=0, least=0, share=4).capacity == 26


def test_refuses():
    for match, make in {
        "capacity=4 has no room for the 5 protected rows": lambda: RazorAttention(capacity=4),
        "sinks must be >= 0": lambda: RazorAttention(capacity=4, sinks=-1),
        "share must be >= 1": lambda: RazorAttention.at(10, share=0),
        "echo_ratio must be from 0 to 1": lambda: full_heads(np.zeros((2, 2)), np.zeros((2, 2)), echo_ratio=1.5),
        "razor_attention tells 2 head groups apart; Recipe.heads says 1": lambda: Recipe(policy=RazorAttention(capacity=9)).validate(CFG),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
    assert RazorAttention(capacity=9).head_group(0) is None and isinstance(Held(), Held)
