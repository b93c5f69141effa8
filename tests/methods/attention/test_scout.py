import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import SCOUT
from jaxtok.methods.attention.scout import CHECKPOINTS, MIXER
from jaxtok.models import blocks
from tests.methods import golden
from tests.methods.attention import run

small = {
    "scout": lambda capacity: SCOUT(segment=2, window=max(capacity // 2, 1)),
    "scout:retention": lambda capacity: SCOUT(segment=2, mixer="retention"),
}
METHOD, LINEAR = SCOUT(segment=3, window=5), SCOUT(segment=3, mixer="retention")


def checkpoints(n, s):
    """Which rows each row sees: itself, and earlier last tokens of segments."""
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    return (i == j) | ((j < i) & (j % s == s - 1))


def near(n, window):
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    return (j <= i) & (i - j < window)


def normed(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def gates(b=2, g=2, n=23, seed=4):
    return np.log(1 / (1 + np.exp(-np.random.default_rng(seed).normal(size=(b, g, n))))) / 4


def kept(q, k, v, fade):
    """Gated retention row by row in float64."""
    out, wide = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for a in np.ndindex(q.shape[:2]):
        state = np.zeros((k.shape[3], v.shape[3]))
        for i in range(q.shape[2]):
            at = (a[0], a[1] // wide, i)
            state = np.exp(fade[at]) * state + np.outer(k[at], v[at])
            out[(*a, i)] = q[(*a, i)] @ state / math.sqrt(q.shape[3])
    return out


@pytest.mark.parametrize("segment, n, g", [(3, 23, 2), (5, 23, 4), (4, 3, 1), (7, 14, 2)])
def test_the_reference(segment, n, g):
    q, k, v = run.arrays(n=n, g=g)
    m = SCOUT(segment=segment, window=5)
    np.testing.assert_allclose(run.attend(m, q, k, v, CHECKPOINTS), run.dense(q, k, v, checkpoints(n, segment)), atol=2e-5)
    np.testing.assert_allclose(run.attend(m, q, k, v, MIXER), run.dense(q, k, v, near(n, 5)), atol=2e-5)


@pytest.mark.parametrize("j", [MIXER, CHECKPOINTS])
def test_weights_of_a_row_sum_to_one(j):
    """A checkpoint counts once in its own row, and nothing else is seen."""
    q, k, _ = run.arrays()
    w = run.weights(METHOD, q, k, j)
    np.testing.assert_allclose(w.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_array_equal((w > 0).all((0, 1)), near(23, 5) if j == MIXER else checkpoints(23, 3))


def test_by_hand():
    """Segments of 2, all logits 0, values 1, 2, 4, ...: token 5 sees itself and tokens 2 and 4; token 4, a checkpoint, counts once."""
    zero, v = np.zeros((1, 1, 5, 4)), np.broadcast_to(2.0 ** np.arange(5)[:, None], (1, 1, 5, 4))
    out = run.attend(SCOUT(segment=2), zero, zero, v, CHECKPOINTS)[0, 0, :, 0]
    np.testing.assert_allclose(out, [1, 2, (2 + 4) / 2, (2 + 8) / 2, (2 + 8 + 16) / 3], rtol=1e-6)


def test_segments_of_one_and_wide_windows_are_plain_attention():
    q, k, v = run.arrays()
    want = run.dense(q, k, v, run.causal(q.shape[2]))
    np.testing.assert_allclose(run.attend(SCOUT(segment=1), q, k, v, CHECKPOINTS), want, atol=2e-5)
    np.testing.assert_allclose(run.attend(SCOUT(window=23), q, k, v, MIXER), want, atol=2e-5)


def test_the_order_of_a_layer():
    """Mixer, MLP, checkpoint attention, MLP: each with its own norm and residual, by the model's own parts with two sets of weights."""
    params, ids = run.model(METHOD)
    cfg, n = run.CFG, ids.shape[1]
    pos = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], ids.shape)
    x = blocks.embed(cfg, params, ids)
    for p, own in zip(params["layers"], params["methods"]["attention"], strict=True):
        for w, see in ((p, near(n, 5)), (own, checkpoints(n, 3))):
            q, k, v = blocks.qkv(cfg, w, x)
            q, k = blocks.rotate(cfg, 0, q, pos), blocks.rotate(cfg, 0, k, pos)
            out = run.dense(*(np.asarray(a, np.float64) for a in (q, k, v)), see)
            x = blocks.mlp(cfg, w, blocks.out_proj(cfg, w, x, jnp.asarray(out, jnp.float32)))
    want = np.asarray(blocks.logits(cfg, params, x))
    np.testing.assert_allclose(np.asarray(run.program(METHOD)(params, ids, None)), want, atol=5e-5)


@pytest.mark.parametrize("n", [23, 70, 1])
def test_retention_is_its_recurrence(n):
    """In chunks of 64, and a step at a time from the state of a prefill."""
    q, k, v = run.arrays(n=n)
    fade = gates(n=n)
    want = kept(q, k, v, fade)
    np.testing.assert_allclose(run.attend(LINEAR, q, k, v, MIXER, more=[fade]), want, atol=3e-5)
    if n == 23:
        out, state = run.stepwise(LINEAR, q, k, v, 9, MIXER, more=[fade])
        np.testing.assert_allclose(out, want[:, :, 9:], atol=3e-5)
        np.testing.assert_allclose(np.asarray(state.s), np.asarray(run.stepwise(LINEAR, q, k, v, 23, MIXER, more=[fade])[1].s), atol=3e-5)


def test_the_linear_mixer():
    """The first half of a layer from the formula: gates of the normed rows, one a KV head, retention normed by head, a swish gate."""
    (params, ids), cfg = run.model(LINEAR), run.CFG
    p, own = params["layers"][0], params["methods"]["attention"][0]
    x, pos = blocks.embed(cfg, params, ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    turn = lambda y: blocks.rotate(cfg, 0, y, pos)
    seen = []

    def attend(j, q, k, v, *more):
        out = LINEAR.attend(j, q, k, v, run.rows(*ids.shape), *more)
        seen.append((j, out))
        return out

    half = blocks.halves(cfg, p, turn)
    mixed = np.asarray(jax.jit(lambda: LINEAR._mixed(own, half, x, attend))())
    q, k, v = (np.asarray(a, np.float64) for a in half.qkv(x))
    y = np.asarray(blocks.normed(cfg, p, x), np.float64)
    fade = np.moveaxis(-np.log1p(np.exp(-y @ np.asarray(own["fade"]))) / 16, 1, 2)
    z = (y @ np.asarray(own["swish"])).reshape(*ids.shape, cfg.heads, cfg.head_dim).swapaxes(1, 2)
    np.testing.assert_allclose(mixed, normed(kept(q, k, v, fade)) * z / (1 + np.exp(-z)), atol=1e-4)
    assert [j for j, _ in seen] == [MIXER]


def test_the_official_outputs(data):
    for c in golden.cases(data, "scout_checkpoint_attention"):
        q = c["q"] * float(c["scale"]) * math.sqrt(c["q"].shape[-1])
        out = np.moveaxis(run.attend(SCOUT(segment=int(c["segment"])), q, c["k"], c["v"], CHECKPOINTS), 1, 2)
        np.testing.assert_allclose(out, c["out"], atol=3e-5)
        if "out_decode" in c:
            np.testing.assert_allclose(out, c["out_decode"].reshape(out.shape), atol=3e-5)
        w, s = run.weights(SCOUT(segment=int(c["segment"])), q, c["k"], CHECKPOINTS), int(c["segment"])
        official = np.asarray(c["weights_self_then_checkpoints"])
        np.testing.assert_allclose(np.diagonal(w, axis1=2, axis2=3), official[..., 0], atol=3e-5)
        others = np.where(np.eye(w.shape[2], dtype=bool), 0.0, w)
        np.testing.assert_allclose(others[..., s - 1 :: s], official[..., 1:], atol=3e-5)


@pytest.mark.parametrize("method", [METHOD, SCOUT(segment=1, window=2), LINEAR])
def test_decode_is_the_parallel_pass(method):
    run.decode_is_parallel(method)


@pytest.mark.parametrize("method", [METHOD, LINEAR])
def test_later_tokens_do_not_matter(method):
    run.later_tokens_do_not_matter(method)


@pytest.mark.parametrize("method", [METHOD, LINEAR])
def test_dead_steps_leave_the_states(method):
    run.dead_steps_leave_the_states(method)


@pytest.mark.parametrize("method", [METHOD, LINEAR])
def test_padding_does_not_matter(method):
    run.padding_does_not_matter(method)


@pytest.mark.parametrize("method", [METHOD, LINEAR])
def test_gradients_reach_all_weights(method):
    grad = run.gradients_are_right(method)
    assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(grad["methods"]["attention"]))


@pytest.mark.parametrize("j", [MIXER, CHECKPOINTS])
def test_gradients_are_those_of_whole_matrices(j):
    run.same_gradients(METHOD, run.masked(near(23, 5) if j == MIXER else checkpoints(23, 3)), j)


@pytest.mark.parametrize("j", [MIXER, CHECKPOINTS])
def test_soft_cap_and_scale(j):
    run.capped(METHOD, lambda *x: run.dense(*x, near(23, 5) if j == MIXER else checkpoints(23, 3), run.CAPPED), j)


def test_retention_knows_the_scale():
    """Without gates nothing fades; a soft-cap does not count."""
    run.capped(LINEAR, lambda q, k, v: kept(q, k, v, np.zeros(k.shape[:3])) * 0.7 * math.sqrt(q.shape[-1]), MIXER)


def test_bfloat16():
    run.in_bfloat16(METHOD, lambda *x: run.dense(*x, near(23, 5)), MIXER)
    run.in_bfloat16(METHOD, lambda *x: run.dense(*x, checkpoints(23, 3)), CHECKPOINTS)
    run.decodes_in_bfloat16(METHOD)
    run.decodes_in_bfloat16(LINEAR)


def test_defaults():
    assert (SCOUT().segment, SCOUT().window, SCOUT().mixer) == (10, 1024, "window")


def test_bad_sizes():
    with pytest.raises(ValueError, match="segment"):
        SCOUT(segment=0)
    with pytest.raises(ValueError, match="mixer"):
        SCOUT(mixer="mamba")
