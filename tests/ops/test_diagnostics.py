"""Entropies of attention: the card's checks, the official code's numbers, and blocks against the dense matrix in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops import _chunked, diagnostics
from jaxtok.ops.attention import attention

SEEN = dict(atol=2e-5, rtol=0)


def reference(p, see):
    """(rows, columns) of the card from a dense matrix [t s] and who sees whom, entry by entry."""
    rows, columns = np.zeros(p.shape[0]), np.zeros(p.shape[1])
    for i in range(p.shape[0]):
        if see[i].sum() > 1:
            rows[i] = -sum(x * np.log(x) for x in p[i] if x > 0) / np.log(see[i].sum())
    for j in range(p.shape[1]):
        if see[:, j].sum() > 1 and p[:, j].sum() > 0:
            columns[j] = -sum(x * np.log(x) for x in p[:, j] / p[:, j].sum() if x > 0) / np.log(see[:, j].sum())
    return rows, columns


def causal(p):
    """Dense attention [n n] -> (entropies, what a head is told)."""
    return whole(jnp.asarray(p, jnp.float32)[None, None])


@jax.jit
def whole(attn):
    found = diagnostics.entropies_of(attn)
    order = jnp.broadcast_to(jnp.arange(attn.shape[-1], dtype=jnp.int32)[None], (attn.shape[0], attn.shape[-1]))
    return found, diagnostics.sinks(found, order, order)


def test_uniform_attention_has_row_entropy_1():
    found, head = causal(np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None])
    np.testing.assert_allclose(found.row[0, 0], [0, 1, 1, 1, 1, 1, 1, 1], **SEEN)  # the first row has log 1 = 0 to divide by: 0
    np.testing.assert_allclose(head.row, 7 / 8, **SEEN)
    np.testing.assert_allclose(head.mass, np.mean(1 / np.arange(1, 9)), **SEEN)
    assert not diagnostics.dormant(head.row, head.column, below=0.2, above=0.8)


def test_all_on_the_first_token_is_dormant():
    found, head = causal(np.eye(1, 8).repeat(8, 0))
    np.testing.assert_array_equal(found.row, 0)
    np.testing.assert_allclose(found.column[0, 0], [1, 0, 0, 0, 0, 0, 0, 0], **SEEN)
    assert head.mass == 1 and diagnostics.dormant(head.row, head.column, below=0.2, above=0.8)


def test_all_on_oneself_is_no_sink():
    found, head = causal(np.eye(8))
    np.testing.assert_array_equal(found.row, 0)
    np.testing.assert_array_equal(found.column, 0)
    assert not diagnostics.dormant(head.row, head.column, below=0.2, above=0.8)
    np.testing.assert_allclose(head.mass, 1 / 8)


def test_zeros_and_the_first_row_are_no_nan():
    p = np.tril(np.random.default_rng(0).random((6, 6)))
    p[3:, :2] = 0
    p[4] = np.eye(6)[4] * 1e-45
    found, head = causal(p)
    assert all(np.isfinite(x).all() for x in (*found, *head))
    assert found.row[0, 0, 0] == 0 and found.column[0, 0, -1] == 0


def test_by_hand():
    """Two rows: P = [1 0; 1/4 3/4]: columns [4/5 1/5], [0 1]."""
    found, head = causal([[1, 0], [0.25, 0.75]])
    h = lambda *p: -sum(x * np.log(x) for x in p) / np.log(2)
    np.testing.assert_allclose(found.row[0, 0], [0, h(0.25, 0.75)], **SEEN)
    np.testing.assert_allclose(found.column[0, 0], [h(0.8, 0.2), 0], **SEEN)
    np.testing.assert_allclose([head.row[0, 0], head.column[0, 0], head.mass[0, 0]], [h(0.25, 0.75) / 2, h(0.8, 0.2), 0.625], **SEEN)


def test_official(data):
    cases = np.load(data / "golden/active_dormant_entropy.npz")
    names = {name.split("_")[0] for name in cases.files}
    assert names
    for c in names:
        attn = cases[f"{c}_attn"]
        found, head = whole(jnp.asarray(attn))
        np.testing.assert_allclose(found.row, cases[f"{c}_row_token"], **SEEN)
        np.testing.assert_allclose(found.column, cases[f"{c}_col_token"], **SEEN)
        np.testing.assert_allclose(head.row, cases[f"{c}_row_head"], **SEEN)
        np.testing.assert_allclose(head.column, cases[f"{c}_col_head"], **SEEN)
        np.testing.assert_allclose(head.mass, attn[..., 0].mean(-1), **SEEN)


def case(name):
    """q, k, positions and options: GQA, padding on either side, a cache with heads of their own, a window, a soft-cap, biases."""
    rng, n, dtype = np.random.default_rng(1), 21, jnp.bfloat16 if name == "bf16" else jnp.float32
    full = np.arange(n, dtype=np.int32)
    pos = np.stack([np.maximum(full - 6, -1), np.where(full < 17, full, -1)])  # left, right
    h, g, t = (4, 2, n) if name != "cache" else (4, 1, 5)
    x = {"q": jnp.asarray(rng.normal(size=(2, h, t, 6)) * 2, dtype), "k": jnp.asarray(rng.normal(size=(2, g, n, 6)) * 2, dtype)}
    x |= {"q_pos": jnp.asarray(pos[:, n - t :] if name != "cache" else full[-t:][None].repeat(2, 0)), "k_pos": jnp.asarray(pos)}
    if name == "cache":
        x["k_pos"] = jnp.asarray(rng.permuted(np.where(rng.random((2, g, n)) < 0.4, -1, pos[:, None]), axis=2), jnp.int32)
        x["bias"] = jnp.asarray(rng.normal(size=(2, g, n)), jnp.float32)
    if name == "window":
        x |= {"window": 7, "softcap": 3.0}
    return x if name == "cache" else x | {"diagonal": 0}


@pytest.mark.parametrize("name", ["plain", "window", "cache", "bf16"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "whole"])
def test_blocks_are_the_dense_matrix(name, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(_chunked, "CHUNK", 8)
        monkeypatch.setattr(_chunked, "LOGITS", 64)
    x = case(name)
    q, k = x.pop("q"), x.pop("k")
    lse = attention(q, k, k, **x)[1]
    found = diagnostics.entropies(q, k, lse, **x)
    head = diagnostics.sinks(found, x["q_pos"], x["k_pos"])
    some = diagnostics.first_of(found.received, x["q_pos"], x["k_pos"], 3)
    b, h, t, d = q.shape
    q_pos, k_pos = np.asarray(x["q_pos"]), np.asarray(x["k_pos"])
    k_pos = k_pos if k_pos.ndim == 3 else k_pos[:, None].repeat(k.shape[1], 1)
    for n, i in np.ndindex(b, h):
        at, of = q_pos[n], k_pos[n, i // (h // k.shape[1])]
        see = (of[None] >= 0) & (of[None] <= at[:, None]) & (at[:, None] - of[None] < x.get("window", 99))
        y = np.asarray(q[n, i], np.float64) @ np.asarray(k[n, i // (h // k.shape[1])], np.float64).T * d**-0.5
        y = 3 * np.tanh(y / 3) if "softcap" in x else y
        y = y + np.asarray(x["bias"])[n, i // (h // k.shape[1])] if "bias" in x else y
        p = np.where(see, np.exp(y), 0)
        p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
        rows, columns = reference(p, see)
        near = dict(atol=2e-2 if name == "bf16" else 2e-5, rtol=0)
        np.testing.assert_allclose(found.row[n, i], rows, **near)
        np.testing.assert_allclose(found.column[n, i], columns, **near)
        live = max((at >= 0).sum(), 1)
        first = min([p for p in of if p >= 0], default=0)
        np.testing.assert_allclose(head.row[n, i], rows[at >= 0].sum() / live, **near)
        np.testing.assert_allclose(head.column[n, i], columns.max(), **near)
        want = [p[:, of == first + m].sum() / live for m in range(3)]
        np.testing.assert_allclose(some[n, i], want, **near)
        np.testing.assert_allclose(head.mass[n, i], want[0], **near)


def test_streaming_needs_no_n_by_n_array():
    n = 4096
    x = jax.ShapeDtypeStruct((1, 2, n, 8), jnp.float32)
    pos, lse = jax.ShapeDtypeStruct((1, n), jnp.int32), jax.ShapeDtypeStruct((1, 2, n), jnp.float32)
    text = str(jax.make_jaxpr(lambda q, k, lse, pos: diagnostics.entropies(q, k, lse, q_pos=pos, k_pos=pos, diagonal=0))(x, x, lse, pos))
    assert f"{n},{n}" not in text


def test_the_first_live_key_is_position_0_and_what_a_method_left_is_counted():
    pos = jnp.asarray([[-1, 5, 6, 9]], jnp.int32)  # 0 to 4 are gone
    got = jnp.asarray([[[9.0, 2.0, 1.0, 0.5]]])
    np.testing.assert_allclose(diagnostics.first_of(got, jnp.asarray([[8, 9]], jnp.int32), pos, 3), [[[1, 0.5, 0]]])
    np.testing.assert_array_equal(diagnostics.sinks_kept(jnp.asarray([[[0, 2, 7, -1], [-1, -1, 9, 8]]], jnp.int32), 4), [[2, 0]])


def test_nothing_live_and_nothing_there():
    dead = jnp.full((1, 3), -1, jnp.int32)
    x, lse = jnp.ones((1, 2, 3, 4)), jnp.full((1, 2, 3), -jnp.inf)
    found = diagnostics.entropies(x, x, lse, q_pos=dead, k_pos=dead)
    assert all(not np.asarray(y).any() for y in (*found, *diagnostics.sinks(found, dead, dead)))
    none = diagnostics.entropies(x[:, :, :0], x, lse[:, :, :0], q_pos=dead[:, :0], k_pos=dead)
    assert none.row.shape == (1, 2, 0) and not none.received.any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: diagnostics.dormant(jnp.ones(2), jnp.ones(2), below=1.5, above=0.5), "below"),
        (lambda: diagnostics.sinks_kept(jnp.zeros((1, 3), jnp.int32), 0), "sinks"),
        (lambda: diagnostics.entropies_of(jnp.ones((1, 1, 2, 3))), "q_pos"),
        (lambda: diagnostics.first_of(jnp.ones((1, 3, 2)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 2), jnp.int32), 1), "agree"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
