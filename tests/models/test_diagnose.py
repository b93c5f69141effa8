"""Sinks of a decoder: against a dense numpy pass over the same weights, wherever the padding stands; interventions on heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import heads
from jaxtok.models import blocks, diagnose
from jaxtok.models.config import Config

CFG = Config(vocab=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=20)
PARAMS = blocks.init(CFG, jax.random.key(0))
IDS = jax.random.randint(jax.random.key(1), (3, 10), 0, 24, jnp.int32)
FULL = jnp.ones(IDS.shape, bool)
NEAR = dict(atol=3e-5, rtol=1e-5)
ALL = jax.jit(functools.partial(diagnose.diagnose, CFG, first=4))
LOSS = jax.jit(functools.partial(diagnose.losses, CFG))
EFFECTS = jax.jit(functools.partial(diagnose.effects, CFG))
NONE = np.zeros((2, 4), bool)


def one(layer, head):
    mask = NONE.copy()
    mask[layer, head] = True
    return jnp.asarray(mask)


def numpy_pass(ids, zero=NONE, first=NONE):
    """One sequence in float64: (attention [l h n n], values [l g n d], residuals [l + 1 n c], loss)."""
    P = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.norm_eps) * w
    x, n = P["embed"][ids], len(ids)
    attn, values, rows = [], [], [x]
    for i, p in enumerate(P["layers"]):
        y = rms(x, p["attn_norm"])
        q, k, v = (np.moveaxis((y @ p[m]).reshape(n, -1, 4), 1, 0) for m in "qkv")
        turn = np.outer(np.arange(n), np.asarray(blocks.frequencies(CFG, i), np.float64))
        c, s = np.cos(turn), np.sin(turn)
        q, k = (np.concatenate([a[..., :2] * c - a[..., 2:] * s, a[..., 2:] * c + a[..., :2] * s], -1) for a in (q, k))
        out = np.zeros((4, n, 4))
        attn.append(np.zeros((4, n, n)))
        for h in range(4):
            z = np.exp(np.where(np.tril(np.ones((n, n))), q[h] @ k[h // 2].T / 2, -np.inf))
            attn[-1][h] = z / z.sum(-1, keepdims=True)
            out[h] = v[h // 2][:1] if first[i, h] else attn[-1][h] @ v[h // 2]
            out[h] *= not zero[i, h]
        x = x + np.moveaxis(out, 0, 1).reshape(n, -1) @ p["o"]
        y = rms(x, p["mlp_norm"])
        gate = y @ p["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["up"])) @ p["down"]
        values.append(v)
        rows.append(x)
    z = rms(x, P["norm"]) @ (P["embed"].T if CFG.tied else P["head"])
    log = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return np.stack(attn), np.stack(values), np.stack(rows), -log[np.arange(n - 1), np.asarray(ids)[1:]].mean()


def check(got, b, ids):
    attn, values, rows, loss = numpy_pass(ids)
    n = len(ids)
    length = lambda x: np.linalg.norm(x, axis=-1)
    spread = lambda p: -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    row = spread(attn).sum(-1)[..., 1:] / np.log(np.arange(2, n + 1))
    np.testing.assert_allclose(got.row[:, b], row.sum(-1) / n, **NEAR)
    column = spread(attn / attn.sum(2, keepdims=True)).sum(2)[..., :-1] / np.log(np.arange(n, 1, -1))
    np.testing.assert_allclose(got.column[:, b], column.max(-1), **NEAR)
    np.testing.assert_allclose(got.mass[:, b], attn[..., 0].mean(-1), **NEAR)
    np.testing.assert_allclose(got.share[:, b], attn[..., :4].mean(2), **NEAR)
    np.testing.assert_allclose(got.drain[:, b], length(values)[..., 0] / length(values).mean(-1), **NEAR)
    np.testing.assert_allclose(got.peak[:, b], length(rows)[:, 0] / length(rows).mean(-1), **NEAR)
    np.testing.assert_allclose(got.loss[b], loss, **NEAR)


def test_every_number_against_numpy_with_padding_anywhere():
    live = FULL.at[1, :4].set(False).at[2, 7:].set(False)
    got = ALL(PARAMS, IDS, live)
    for b in range(3):
        check(got, b, np.asarray(IDS)[b][np.asarray(live)[b]])
    holes = FULL.at[0, 3].set(False).at[0, 0].set(False)
    check(ALL(PARAMS, IDS, holes), 0, np.asarray(IDS)[0][np.asarray(holes)[0]])


def test_nothing_live_is_zero_and_bf16_is_near():
    got = ALL(PARAMS, IDS, FULL.at[0].set(False))
    assert not any(np.asarray(x)[:, 0].any() for x in got[:6]) and got.loss[0] == 0
    assert all(np.isfinite(x).all() for x in got)
    half = ALL(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS), IDS, FULL)
    assert all(x.dtype == jnp.float32 for x in half)
    np.testing.assert_allclose(half.mass, ALL(PARAMS, IDS, FULL).mass, atol=0.03)


def test_interventions_against_numpy():
    zero, first = one(0, 1) | one(1, 3), one(1, 0)
    got = LOSS(PARAMS, IDS, FULL.at[1, :4].set(False), zero=zero, first=first)
    for b, at in ((0, slice(None)), (1, slice(4, None))):
        np.testing.assert_allclose(got[b], numpy_pass(np.asarray(IDS)[b, at], np.asarray(zero), np.asarray(first))[3], **NEAR)


def test_effects_are_each_head_in_turn():
    got, base = EFFECTS(PARAMS, IDS, FULL), ALL(PARAMS, IDS, FULL).loss
    assert got.zero.shape == got.first.shape == (2, 4, 3)
    np.testing.assert_allclose(got.zero[1, 2], LOSS(PARAMS, IDS, FULL, zero=one(1, 2), first=NONE) - base, atol=1e-5)
    np.testing.assert_allclose(got.first[0, 3], LOSS(PARAMS, IDS, FULL, zero=NONE, first=one(0, 3)) - base, atol=1e-5)


def dormant_model():
    """Head 0 and 1 of layer 1 (KV head 0) attend to the first token alone: their keys there are long and met by every query."""
    layer = dict(PARAMS["layers"][1])
    cfg = Config(**{**CFG.__dict__, "rope_theta": 1e30})  # all but the first channel pair stand still
    embed = PARAMS["embed"].at[:, 0].set(0.5).at[23, 1].set(8.0)  # channel 0: a constant; channel 1: the first token's mark
    layer["q"] = layer["q"].at[:, :8].set(0).at[0, jnp.asarray([1, 5])].set(60.0)
    layer["k"] = layer["k"].at[:, :4].set(0).at[1, 1].set(60.0)
    return cfg, PARAMS | {"embed": embed, "layers": (PARAMS["layers"][0], layer)}


def test_a_head_made_to_sink_is_found_and_streams():
    cfg, params = dormant_model()
    ids = IDS % 23
    ids = ids.at[:, 0].set(23)
    got = jax.jit(functools.partial(diagnose.diagnose, cfg, first=4))(params, ids)
    loss = jax.jit(functools.partial(diagnose.losses, cfg))
    asleep = np.asarray(diagnose.dormant(got, below=0.05, above=0.9))
    assert (np.asarray(got.mass)[1, :, :2] > 0.98).all() and asleep[1, :, :2].all() and not asleep[0].any() and not asleep[1, :, 2:].any()
    full = diagnose.full_heads(got, below=0.05, above=0.9)
    np.testing.assert_array_equal(full, [[True, True], [False, True]])
    assert heads.split(full) == (((2, 0), (1, 1)), ((0, 1), (1, 0)))
    # where a head is dormant, its attention may as well be on the first token alone
    moved = loss(params, ids, first=one(1, 0) | one(1, 1))
    np.testing.assert_allclose(moved, got.loss, atol=2e-2)
    assert (np.abs(loss(params, ids, first=one(0, 0)) - got.loss) > 1e-3).any()
    assert diagnose.sinks_needed(got, 0.9) == 1 and diagnose.sinks_needed(got, 0.0) == 4


def test_full_heads_are_grouped_as_queries_read_them():
    of = lambda row: diagnose.Diagnosis(
        jnp.asarray(row), jnp.ones((1, 1, 4)), *[jnp.zeros(())] * 2, jnp.zeros((1, 1, 2)), *[jnp.zeros(())] * 2
    )
    np.testing.assert_array_equal(diagnose.full_heads(of([[[0.0, 0.0, 0.0, 0.9]]]), below=0.5, above=0.5), [[False, True]])
    np.testing.assert_array_equal(diagnose.full_heads(of([[[0.0, 0.0, 0.0, 0.9]]]), below=0.5, above=0.5, least=0.1), [[True, True]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: diagnose.diagnose(CFG, PARAMS, IDS, FULL[:, :3]), "live"),
        (lambda: diagnose.diagnose(CFG, PARAMS, IDS, first=0), "first"),
        (lambda: diagnose.losses(CFG, PARAMS, IDS, zero=jnp.zeros((2, 2), bool)), "zero"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
