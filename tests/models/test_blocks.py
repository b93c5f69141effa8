"""The decoder's parts by hand and by their identities; the parallel pass against itself (parity proper: test_parity.py)."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.models import blocks
from jaxtok.models.config import Config, RopeScaling

# every feature at once: local and global layers with their own bases, scaling, partial rotary, soft-caps, biases, all norms
CFG = Config(
    vocab=40, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=48, window=4, local=(True, False, True), rope_theta_local=100.0,
    rope_scaling=RopeScaling(kind="linear", factor=2.0), rotary_dim=6, softcap=5.0, logit_softcap=9.0, qk_norm=True, qkv_bias=True,
    sandwich=True, norm_offset=1.0, embed_scale=32**0.5, act="gelu_tanh", scale=0.4, tied=True,
)  # fmt: skip
PLAIN = Config(vocab=40, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=24)


turn = jax.jit(blocks.rotate_by, static_argnums=3)


@functools.cache
def params(cfg=CFG):
    """Every parameter random, norms and biases too; numpy draws, because compiling `init` costs seconds."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s) * (s[0] ** -0.5 if len(s) == 2 else 0.3), jnp.float32)
    return blocks.stack(jax.tree.map(draw, blocks.shapes(cfg), is_leaf=blocks.is_shape))


@functools.cache
def program(cfg=CFG, remat=False):
    return jax.jit(functools.partial(blocks.forward, cfg, remat=remat))


def test_norm_by_hand():
    x = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(blocks.norm(x, jnp.array([1.0, 2.0]), 0.0), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(blocks.norm(x, jnp.array([0.0, 1.0]), 0.0, 1.0), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)
    assert blocks.norm(x.astype(jnp.bfloat16), jnp.ones(2, jnp.bfloat16), 1e-5).dtype == jnp.bfloat16


# --- rotary -----------------------------------------------------------------------------------------------------------


def test_rotate_by_hand():
    """d = 4, theta = 100: channel 0 turns against 2 by the id, channel 1 against 3 by id / 10; the dead row is finite."""
    cfg = Config(vocab=4, width=4, layers=1, heads=1, kv_heads=1, head_dim=4, hidden=4, rope_theta=100.0)
    x = jnp.tile(jnp.array([1.0, 0.0, 0.0, 2.0]), (1, 1, 3, 1))
    got = blocks.rotate(cfg, 0, x, jnp.array([[0, 5, -1]], jnp.int32))[0, 0]
    np.testing.assert_allclose(got[0], [1, 0, 0, 2], atol=1e-6)
    np.testing.assert_allclose(got[1], [math.cos(5), -2 * math.sin(0.5), math.sin(5), 2 * math.cos(0.5)], rtol=1e-6)
    assert np.isfinite(got[2]).all()


def test_rotations_add_and_undo():
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 8))
    freq = blocks.frequencies(CFG, 1)
    a, b = (jax.random.randint(jax.random.key(i), (2, 5), 0, 50) for i in (2, 3))
    twice = turn(turn(x, a, freq), b, freq)
    np.testing.assert_allclose(twice, turn(x, a + b, freq), atol=1e-5)
    np.testing.assert_allclose(turn(turn(x, a, freq), -a, freq), x, atol=1e-5)
    np.testing.assert_array_equal(turn(x, a, freq)[..., 6:], x[..., 6:])  # rotary_dim=6 of 8


def test_scores_depend_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (1, 2))
    place = lambda x, i: blocks.rotate(PLAIN, 0, x, jnp.full((1, 1), i, jnp.int32))[0, 0, 0]
    np.testing.assert_allclose(place(q, 9) @ place(k, 4), place(q, 25) @ place(k, 20), rtol=1e-5)


def test_ids_per_head_and_per_axis():
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 8))
    freq = blocks.frequencies(PLAIN, 0)
    ids = jax.random.randint(jax.random.key(2), (2, 3, 5, 1), 0, 50)
    got = turn(x, ids, freq)
    for e in range(3):
        np.testing.assert_array_equal(got[:, e : e + 1], turn(x[:, e : e + 1], ids[:, e, :, 0], freq))
    same = jnp.broadcast_to(ids[:, :1, :, 0], (2, 1, 5))[:, 0]
    np.testing.assert_array_equal(turn(x, same[..., None], freq), turn(x, same, freq))
    # three axes: frequencies 0 and 1 follow axis 0, 2 axis 1, 3 axis 2; with equal ids on all axes it is plain RoPE
    axes = (0, 0, 1, 2)
    three = jnp.stack([same, same, same], -1)
    np.testing.assert_array_equal(turn(x, three, freq, axes), turn(x, same, freq))
    moved = turn(x, three.at[..., 2].add(7), freq, axes) != turn(x, same, freq)
    assert set(np.unique(np.where(moved)[-1])) == {3, 7}
    with pytest.raises(ValueError, match="3 rotary axes"):
        turn(x, three, freq)
    with pytest.raises(ValueError, match=r"axes has 4 entries in 0\.\.3"):
        turn(x, three, freq, (0, 1, 2, 3))


def test_llama3_frequencies():
    """The published piecewise rule, wavelength by wavelength."""
    s = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    cfg = Config(vocab=4, width=128, layers=1, heads=1, kv_heads=1, head_dim=128, hidden=4, rope_theta=500000.0, rope_scaling=s)
    want = []
    for i in range(64):
        f = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            want.append(f)
        elif wavelength > 8192 / 1:
            want.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(blocks.frequencies(cfg, 0), want, rtol=1e-6)


def test_local_layers_have_their_own_unscaled_base():
    full = 10000.0 ** (-np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(blocks.frequencies(CFG, 1), full / 2, rtol=1e-6)
    np.testing.assert_allclose(blocks.frequencies(CFG, 0), 100.0 ** (-np.arange(0, 6, 2) / 6), rtol=1e-6)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_init():
    """Shapes, dtype, neutral norms and biases, and tied logits of order one."""
    cfg = dataclasses.replace(CFG, layers=1, local=(False,), window=None, qk_norm=False, vocab=64, logit_softcap=None)
    p = blocks.init(cfg, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda a: a.shape, p) == blocks.shapes(cfg)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(p))
    layer = p["layers"][0]
    for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_bias", "k_bias", "v_bias"):
        np.testing.assert_array_equal(layer[name], 0)  # norm_offset=1 stores w - 1
    np.testing.assert_allclose(np.std(np.float32(layer["q"])), 32**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(np.float32(layer["down"])), (48 * 2) ** -0.5, rtol=0.1)
    z = blocks.logits(cfg, p, blocks.embed(cfg, p, jnp.arange(64, dtype=jnp.int32)[None]))
    off = np.asarray(z[0])[~np.eye(64, dtype=bool)]  # a token's own logit stands out
    assert 0.5 < off.std() < 2


def test_stack_and_unstack():
    p = blocks.unstack(params())
    assert jax.tree.map(lambda a: a.shape, p) == blocks.shapes(CFG) and "head" not in p and "head" in blocks.shapes(PLAIN)
    jax.tree.map(np.testing.assert_array_equal, blocks.stack(p), params())
    assert blocks.stack(params()) is params() and blocks.unstack(p) is p


# --- the parallel pass ------------------------------------------------------------------------------------------------


def case(n=14):
    ids = jax.random.randint(jax.random.key(5), (2, n), 0, CFG.vocab)
    live = jnp.arange(n)[None] >= jnp.array([0, 5])[:, None]
    return ids, live


def test_positions():
    live = jnp.array([[True, True, True], [False, True, True], [True, True, False], [True, False, True], [False] * 3])
    np.testing.assert_array_equal(blocks.positions(live), [[0, 1, 2], [-1, 0, 1], [0, 1, -1], [0, -1, 1], [-1, -1, -1]])


def test_padding_side_and_junk_do_not_matter():
    ids, live = case()
    left = program()(params(), ids, live)
    right = program()(params(), jnp.roll(ids, -5, 1), jnp.roll(live, -5, 1))
    np.testing.assert_allclose(left[1, 5:], right[1, :9], atol=2e-5)
    junk = program()(params(), jnp.where(live, ids, 7), live)
    np.testing.assert_array_equal(jnp.where(live[..., None], junk, 0), jnp.where(live[..., None], left, 0))


def test_causal():
    ids, live = case()
    a = program()(params(), ids, live)
    b = program()(params(), ids.at[:, 10:].add(1) % CFG.vocab, live)
    np.testing.assert_array_equal(a[0, :10], b[0, :10])
    assert float(jnp.abs(a[0, 10:] - b[0, 10:]).max()) > 1e-2


def test_scanned_equals_unrolled():
    """The unrolled pass sees the padded row alone and without a mask."""
    ids, live = case()
    alone = program()(blocks.unstack(params()), ids[1:, 5:])
    np.testing.assert_allclose(alone[0], program()(params(), ids, live)[1, 5:], atol=2e-5)


def test_gradients():
    """Through the remat'd scan, with a row that is all dead: finite, and equal to a finite difference of the plain pass."""
    ids, live = case()
    live = live.at[1].set(False)

    def loss(z):
        return -jnp.sum(jnp.where(live[..., None], jax.nn.log_softmax(z), 0.0)[:, :, 3]) / 10

    g = jax.jit(jax.grad(lambda p: loss(blocks.forward(CFG, p, ids, live))))(params())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(g))
    # along the gradient itself: the difference is |g|^2 times the step
    square = sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(g))
    step = 1e-2 / math.sqrt(square)
    moved = lambda by: loss(program()(jax.tree.map(lambda p, d: p + by * d, params(), g), ids, live))
    np.testing.assert_allclose(float(moved(step) - moved(-step)) / (2 * step), square, rtol=2e-2)


def test_bfloat16():
    ids, live = case()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
    z = program()(half, ids, live)
    assert z.dtype == jnp.float32
    assert blocks.embed(CFG, half, ids).dtype == jnp.bfloat16
    full = program()(jax.tree.map(lambda a: a.astype(jnp.float32), half), ids, live)
    assert float(jnp.abs(jnp.where(live[..., None], z - full, 0)).max()) < 0.25
    assert np.isfinite(z).all()


def test_errors():
    ids, live = case()
    with pytest.raises(ValueError, match=r"params have 1 layers, cfg says 3"):
        blocks.forward(CFG, params() | {"layers": blocks.unstack(params())["layers"][:1]}, ids)
    with pytest.raises(ValueError, match=r"live \(2, 13\) must have the shape of ids \(2, 14\)"):
        inspect.unwrap(blocks.hidden)(CFG, params(), ids, live[:, 1:])  # past the shape checker of the test run


@pytest.mark.parametrize("form", [blocks.stack, blocks.unstack])
def test_heads_in_another_order_are_the_same_model(form):
    """Biases, q/k norms, h/g = 2, another order in each layer: every logit stays; what the caches hold follows the order."""
    whole, order = form(params()), ((1, 0), (0, 1), (1, 0))
    moved = blocks.reorder_heads(CFG, whole, order)
    assert jax.tree.structure(moved) == jax.tree.structure(whole)
    ids = jax.random.randint(jax.random.key(3), (2, 7), 0, CFG.vocab)
    np.testing.assert_allclose(program()(blocks.stack(moved), ids), program()(blocks.stack(whole), ids), atol=2e-5)
    old, new = (blocks.unstack(p)["layers"][2] for p in (whole, moved))
    x = jax.random.normal(jax.random.key(4), (1, 3, CFG.width))
    for a, b, at in zip(blocks.qkv(CFG, old, x), blocks.qkv(CFG, new, x), ([2, 3, 0, 1], [1, 0], [1, 0]), strict=True):
        np.testing.assert_allclose(b, np.asarray(a)[:, at], atol=1e-6)
    assert blocks.reorder_heads(CFG, whole, ((0, 1),) * 3) is whole
    for wrong in (((1, 0),) * 2, ((1, 1),) * 3, ((0, 2),) * 3):
        with pytest.raises(ValueError, match="order must have for each of 3 layers the numbers 0 to 1 once"):
            blocks.reorder_heads(CFG, whole, wrong)
