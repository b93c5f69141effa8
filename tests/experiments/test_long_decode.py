"""The pieces of the long decode, on the laws' small model."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.methods import H2O, StreamingLLM
from jaxtok.models import blocks
from jaxtok.testing import world

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "long_decode.py"
CFG, IDS = world.CFG, np.random.default_rng(0).integers(0, world.CFG.vocab, 42).astype(np.int32)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("long_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_decode"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["long_decode"]


@pytest.fixture(scope="module")
def dense():
    """NLL of ids[1:] given all before, in one pass."""
    z = np.asarray(jax.jit(lambda params, ids: blocks.forward(CFG, params, ids))(world.world()[0], jnp.asarray(IDS[None])))[0].astype(
        np.float64
    )
    return np.log(np.exp(z[:-1]).sum(-1)) - z[np.arange(len(IDS) - 1), IDS[1:]]


def test_a_cache_over_the_text_gives_the_full_model(script, dense):
    """40 steps in calls of 16 and 8: NLL of ids[2:], `seen` after each call, live slots."""
    found = script.stream(CFG, world.world()[0], Recipe(policy=StreamingLLM(capacity=48)), IDS, every=16)
    np.testing.assert_allclose(found["nll"], dense[1:], atol=2e-5)
    assert found["seen"] == [[17], [33], [41]] and found["live"] == [17, 33, 41] and len(found["bytes"]) == 3


def test_memory_is_flat_and_a_small_cache_stays_small(script):
    found = script.stream(CFG, world.world()[0], Recipe(policy=H2O(capacity=8, compact=True)), IDS, every=8)
    assert found["live"] == [8] * 5 and found["seen"] == [[9 + 8 * i] for i in range(5)] and np.isfinite(found["nll"]).all()
    assert len(set(found["bytes"])) == 1


def test_recomputation_runs_the_model_afresh_on_each_window(script, dense):
    steps = np.arange(20, 41)
    got = script.recompute(CFG, world.world()[0], IDS, steps, 9, batch=8)
    for i, nll in zip(steps, got, strict=True):
        z = np.asarray(blocks_of(IDS[i - 8 : i + 1]))[0, -1].astype(np.float64)
        assert nll == pytest.approx(np.log(np.exp(z).sum()) - z[IDS[i + 1]], abs=2e-5)
    first = script.recompute(CFG, world.world()[0], IDS, np.arange(8, 9), 9, batch=8)
    assert first[0] == pytest.approx(dense[8], abs=2e-5)  # the window that is the whole text so far


blocks_of = jax.jit(lambda ids: blocks.forward(CFG, world.world()[0], ids[None]))


def test_the_verdict(script):
    o = script.Options(steps=40, score=20, every=16)
    found = {"nll": np.full(40, 1.02), "seen": [[17], [33], [41]], "live": [8, 8, 8], "bytes": [5, 5, 5], "resident": [1, 1, 1],
             "seconds": [1.0, 0.1, 0.1], "old": 0.0}  # fmt: skip
    row = script.verdict(found, np.ones(20), o, True)
    assert row["against recomputation"] == pytest.approx(0.02) and row["holds"] and row["seen is right"] and row["memory is flat"]
    worse = script.verdict(found | {"nll": np.full(40, 1.04), "seen": [[17], [33], [40]], "bytes": [5, 5, 6]}, np.ones(20), o, True)
    assert not worse["holds"] and not worse["seen is right"] and not worse["memory is flat"]
    assert script.verdict(found | {"nll": np.full(40, np.nan)}, np.ones(20), o, True)["nan"]
    assert {name for name, (_, claimed) in script.policies(256).items() if claimed} == {"streaming_llm, compact", "h2o, compact"}
