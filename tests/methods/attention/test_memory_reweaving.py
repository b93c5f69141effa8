"""Memory reweaving (our reading) against loops, and its limits: a closed gate, no slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import MemoryReweaving
from jaxtok.methods.attention.memory_reweaving import capture, reweave
from tests.methods.attention.layers import config, full, gradients, layer, normal, softmax

small = lambda n: MemoryReweaving(layers=(0,), slots=4)


def remembered(x, live, slots):
    """Indices of the rows that a layer remembers, best first."""
    rows = np.flatnonzero(live)
    score = x[rows] @ x[rows].mean(0) if len(rows) else np.zeros(0)
    return rows[np.argsort(-score, kind="stable")][:slots]


def reference(xs, live, slots, read, gate):
    """One sequence: xs [l n c] the rows of the layers remembered, then those of the layer that reads -> what is added [n c]."""
    memory = [x[remembered(x, live, slots)] for x in xs[:-1]]
    keys, values = np.concatenate(memory), np.concatenate([m @ w for m, w in zip(memory, read, strict=True)])
    if not len(keys):
        return np.zeros_like(xs[-1])
    share = softmax(xs[-1] @ keys.T / np.sqrt(xs[-1].shape[1]))
    return np.where(live[:, None], np.tanh(gate) * (share @ values), 0)


@functools.partial(jax.jit, static_argnums=0)
def blocks(method, params, xs, live, q, k, v):
    state, out = (), []
    for i, x in enumerate(xs):
        block, state = method.mix(params[i], state, i, layer(q, k, v, x=x, live=live))
        out.append(block)
    return out, state


def mixed(method, params, xs, live):
    """What each layer adds beside its own attention, layers 0, 1, ... reading xs."""
    q, k, v = (normal(i, len(live), 2, xs.shape[2], 3) for i in range(3))
    out, state = blocks(method, params, xs, live, q, k, v)
    return [np.asarray(block) - full(q, k, v, live) for block in out], state


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_reference(slots):
    b, n, c = 3, 7, 6
    xs, live = normal(9, 4, b, n, c), np.arange(n) >= np.array([0, 4, 7])[:, None]
    method = MemoryReweaving(layers=(0, 2), slots=slots)
    params = [
        {name: p + 0.7 if name == "gate" else p for name, p in one.items()}
        for one in method.init_params(jax.random.key(0), config(2, 3, 4))
    ]
    assert [sorted(p) for p in params] == [[], ["gate", "read0"], ["gate", "read0"], ["gate", "read0", "read2"]]
    out, state = mixed(method, params, xs, live)
    assert len(state) == 2 and state[0].rows.shape == (b, min(slots, n), c)
    assert np.abs(out[0]).max() < 1e-5
    for i, behind in ((1, [0]), (2, [0]), (3, [0, 2])):
        for j in range(b):
            read = [np.asarray(params[i][f"read{l}"], np.float64) for l in behind]
            want = reference([xs[l, j].astype(np.float64) for l in behind] + [xs[i, j].astype(np.float64)], live[j], slots, read, 0.7)
            np.testing.assert_allclose(out[i][j], want, atol=2e-5)


@pytest.mark.parametrize("method", [MemoryReweaving(layers=(0, 1)), MemoryReweaving(layers=(0, 1), slots=0), MemoryReweaving(layers=())])
def test_a_closed_gate_and_no_slots_are_the_base_model(method):
    """The gate begins closed."""
    live = np.ones((2, 5), bool)
    params = method.init_params(jax.random.key(0), config(2, 3, 3))
    out, _ = mixed(method, params, normal(3, 3, 2, 5, 6), live)
    assert max(np.abs(x).max() for x in out) < 1e-5
    assert (method.layers and method.slots) or params == ({}, {}, {})


def test_dead_rows_are_not_remembered():
    x, live = normal(0, 1, 6, 4), np.array([[False, False, False, True, True, True]])
    memory = capture(jnp.asarray(np.where(live[..., None], x, 1e30).astype(np.float32)), jnp.asarray(live), 4)
    assert memory.there.tolist() == [[True, True, True, False]] and not np.asarray(memory.rows)[0, 3].any()
    none = capture(jnp.asarray(x), jnp.zeros((1, 6), bool), 4)
    assert not np.asarray(reweave(jnp.asarray(x), [none], [jnp.eye(4)])).any()


def test_gradients():
    x, w = normal(0, 2, 6, 4), normal(1, 4, 4)
    memory = capture(jnp.asarray(normal(2, 2, 6, 4)), jnp.ones((2, 6), bool), 3)
    assert all(np.any(g) for g in gradients(lambda x, w: reweave(x, [memory], [w]), x, w))


@pytest.mark.parametrize("given", [dict(layers=(1, 0)), dict(layers=(-1,)), dict(layers=(1, 1)), dict(slots=-1)])
def test_refuses(given):
    with pytest.raises(ValueError):
        MemoryReweaving(**given)
