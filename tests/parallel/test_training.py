"""Parameters cut over a mesh, and training over a shared sequence: the curve of one device, also from a checkpoint on another mesh."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.models import blocks, load
from jaxtok.models.config import Config
from jaxtok.parallel import Spread, by_path, make_mesh, shardings
from jaxtok.train.loop import fit

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=16)
T = 24
ROOT = pathlib.Path(__file__).parents[2]


def batch(step):
    return {"ids": np.random.default_rng(step % 3).integers(0, CFG.vocab, (2, T)).astype(np.int32)}


@functools.cache
def loss_of(spread):
    def loss(params, batch, key):
        z = blocks.forward(CFG, params, batch["ids"], impl=spread)
        nll = optax.softmax_cross_entropy_with_integer_labels(z[:, :-1], batch["ids"][:, 1:])
        return nll.mean(), {}

    return loss


OPTIMIZER = optax.adam(1e-2)


def curve(spread, steps, directory=None):
    params, lines = blocks.stack(blocks.init(CFG, jax.random.key(0))), []
    if not isinstance(spread, str):
        params = jax.device_put(params, shardings(params, spread.mesh))
    state = fit(
        loss_of(spread), params, batch, optimizer=OPTIMIZER, steps=steps, log_every=1, on_log=lines.append, progress=False,
        directory=directory, save_every=2,
    )  # fmt: skip
    return {int(line["step"]): float(line["loss"]) for line in lines}, state


def test_the_curve_of_one_device_killed_and_resumed_on_another_mesh(tmp_path):
    want, _ = curve("auto", 8)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    script = pathlib.Path(__file__).with_name("killed.py")
    killed = subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    more, state = curve(Spread(mesh=make_mesh(data=2, sequence=2), layout="contiguous"), 8, tmp_path)
    found = {line["step"]: line["loss"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert sorted(found) == sorted(want) and sorted(more) == [5, 6, 7, 8]  # from the checkpoint of step 4
    np.testing.assert_allclose([found[i] for i in sorted(want)], [want[i] for i in sorted(want)], rtol=2e-5)
    assert want[8] < want[1] and len(state.params["layers"]["q"].sharding.device_set) == 4


def test_where_parameters_stand(tmp_path):
    mesh = make_mesh(tensor=2)
    params = blocks.init(CFG, jax.random.key(0))
    load.save(tmp_path, CFG, params, None)
    _, found, _ = load.load(tmp_path, sharding=by_path(shardings(params, mesh)))
    shard = lambda name: found["layers"][0][name].sharding.shard_shape(found["layers"][0][name].shape)
    assert (shard("q"), shard("o"), shard("up"), shard("attn_norm")) == ((16, 16), (16, 16), (16, 8), (16,))
    assert found["embed"].sharding.shard_shape((32, 16)) == (16, 16)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    few = shardings(params, make_mesh(tensor=2), whole=("(^|/)[kv]$",))
    assert few["layers"][0]["k"].is_fully_replicated and not few["layers"][0]["q"].is_fully_replicated
    odd = shardings({"q": jnp.zeros((3, 5))}, mesh)
    assert odd["q"].is_fully_replicated
    with pytest.raises(ValueError, match="none is called 'model'"):
        shardings(params, mesh, tensor="model")
