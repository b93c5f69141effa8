"""The gates of DuoAttention: what a gated model computes, what it is trained on, the guess without training (tests/methods has the rest)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.models import blocks
from jaxtok.testing.world import CFG, LIVE, near, world
from jaxtok.train import duo_attention

SINKS, RECENT = 1, 3


def test_a_gate_mixes_the_attended_values():
    """In one layer without an MLP the rows are linear in the gate, the gradient is their difference, and gates are clipped."""
    cfg = dataclasses.replace(CFG, layers=1)
    params = world()[0]
    layer = params["layers"][0]
    params = params | {"layers": (layer | {"down": jnp.zeros_like(layer["down"])},)}
    run = lambda gates: duo_attention.gated(cfg, params, gates, world()[1][:1], sinks=1, recent=2, remat=False)
    row = lambda *gates: jnp.asarray([gates], jnp.float32)
    one = jax.jit(jax.vmap(run))
    mixed, full, first, second, beyond, same = one(
        jnp.stack([row(0.3, 0.8), row(1.0, 1.0), row(0.0, 1.0), row(1.0, 0.0), row(1.7, -0.4), row(1.0, 0.0)])
    )
    near(mixed, full + 0.7 * (first - full) + 0.2 * (second - full), 2e-6, "linear in each gate")
    near(beyond, same, 0, "clipped")
    assert float(jnp.abs(full - first)[0, :2].max()) == 0, "the first two queries see all keys either way"


# --- learning -----------------------------------------------------------------------------------------------------------


def batch(step=0):
    ids = world()[1]
    return {"ids": ids, "live": jnp.asarray(LIVE), "label": jnp.asarray(LIVE & (np.arange(ids.shape[1]) >= 9)[None])}


@functools.cache
def loss():
    return duo_attention.make_loss(CFG, sinks=SINKS, recent=RECENT, weight=0.05)


def test_the_loss_and_its_gradient():
    """Gates of one: no distance, the penalty is their mean. Else by hand from the rows; the gradient is that of a finite difference."""
    params, key = world()[0], jax.random.key(0)
    whole = lambda gates: {"gates": gates, "model": params}
    value = jax.jit(lambda gates: loss()(whole(gates), batch(), key))
    total, parts = value(jnp.ones((2, 2)))
    assert float(parts["distill"]) < 1e-9 and abs(float(total) - 0.05) < 1e-6
    gates = jnp.asarray([[0.2, 0.9], [0.5, 0.7]])
    normed = jax.jit(
        lambda g: blocks.norm(
            duo_attention.gated(CFG, params, g, world()[1], jnp.asarray(LIVE), sinks=SINKS, recent=RECENT), params["norm"], CFG.norm_eps
        )
    )
    apart = np.mean((np.asarray(normed(gates)) - np.asarray(normed(jnp.ones((2, 2))))) ** 2, -1)
    total, parts = value(gates)
    np.testing.assert_allclose(parts["distill"], apart[np.asarray(batch()["label"])].mean(), rtol=1e-4)
    np.testing.assert_allclose(total, float(parts["distill"]) + 0.05 * 2.3 / 4, rtol=1e-5)
    grad = jax.jit(jax.grad(lambda gates: loss()(whole(gates), batch(), key)[0]))(gates)
    for at in ((0, 0), (1, 1)):
        step = jnp.zeros((2, 2)).at[at].set(0.02)
        slope = (value(gates + step)[0] - value(gates - step)[0]) / 0.04
        np.testing.assert_allclose(grad[at], slope, rtol=0.05, atol=2e-4)


def test_learning_closes_the_gates_that_cost_nothing():
    """Head 1 of layer 1 writes nothing: its gate falls to 0 at the rate of the schedule; gates stay in 0 to 1, the model as it was."""
    params = world()[0]
    layer = params["layers"][1]
    silent = layer | {"o": layer["o"].at[16:].set(0)}  # query heads 2 and 3
    params = params | {"layers": (params["layers"][0], silent)}
    lines = []
    gates, state = duo_attention.learn(
        CFG, params, batch, steps=40, lr=0.05, sinks=SINKS, recent=RECENT, progress=False, log_every=20, on_log=lines.append
    )
    assert gates.min() >= 0 and gates.max() <= 1 and gates[1, 1] == 0 < np.delete(gates.ravel(), 3).max()
    assert state.params["model"]["layers"][1]["o"] is silent["o"]
    assert {"distill", "size", "loss"} <= lines[-1].keys() and lines[-1]["size"] < 1


def test_the_rate_climbs_and_falls_back():
    at = duo_attention.rate(2000, 0.02)
    got = [float(at(step)) for step in (0, 39, 99, 399, 400, 1600, 1601, 1900, 1999)]
    np.testing.assert_allclose(got, [0.002, 0.002, 0.005, 0.02, 0.02, 0.02, 0.02 * 399 / 400, 0.005, 0.002], rtol=1e-5)
    assert [float(duo_attention.rate(1)(0)), float(duo_attention.rate(3)(2))] == pytest.approx([0.02, 0.02])


def test_a_gate_of_one_goes_no_further():
    tx, gates = duo_attention.optimizer(1), {"gates": jnp.ones((2,))}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update({"gates": jnp.array([-1.0, 1.0])}, tx.init(gates), gates)
    np.testing.assert_allclose(updates["gates"], [0, -0.02], atol=1e-6)


# --- the proxy ----------------------------------------------------------------------------------------------------------


def test_a_flat_head_scores_a_half():
    params = world()[0]
    flat = params | {"layers": tuple(p | {"k": jnp.zeros_like(p["k"])} for p in params["layers"])}
    near(duo_attention.proxy(CFG, flat, world()[1], length=20), np.full((2, 2), 21 / 40), 1e-6, "uniform attention")


def test_refuses():
    for match, make in {
        r"gates \[1, 2\] must be one for each layer": lambda: duo_attention.gated(CFG, world()[0], jnp.ones((1, 2)), world()[1]),
        "recent must be >= 1": lambda: duo_attention.gated(CFG, world()[0], jnp.ones((2, 2)), world()[1], recent=0),
        "weight must be >= 0": lambda: duo_attention.make_loss(CFG, weight=-1),
        "start must be from 0 to 1": lambda: duo_attention.learn(CFG, world()[0], batch, start=2),
        "steps must be >= 1": lambda: duo_attention.rate(0),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
