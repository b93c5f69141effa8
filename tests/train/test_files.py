"""Checkpoints, the metrics file, its curves, the progress bar, and what importing costs."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok import train
from jaxtok.train.metrics import Bar, Log


def loss(params, batch, key):
    return jnp.square(params["a"] - 1).sum() + jnp.square(params["b"][0]).sum(), {}


def params():
    return {"a": jnp.zeros(3), "b": (jnp.ones((2, 2)), jnp.arange(2))}


def run(directory, **options):
    given = dict(params=params(), data=lambda step: 0, optimizer=optax.adam(0.1), steps=4, save_every=2)
    return train.fit(loss, directory=directory, **{**given, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, run(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(params={**params(), "a": jnp.zeros(4)}), r"params/a: saved \(\(3,\), 'float32'\), wanted \(\(4,\), 'float32'\)"),
        (dict(params={**params(), "a": jnp.zeros(3, jnp.bfloat16)}), r"params/a: saved .*wanted \(\(3,\), 'bfloat16'\)"),
        (dict(params={"a": jnp.zeros(3), "b": (jnp.ones((2, 2)),), "c": jnp.ones(1)}), "params/c: saved nothing"),
        (dict(optimizer=optax.sgd(0.1)), "rest/opt_state/0/count: saved .*wanted nothing"),
        (dict(trainable=lambda path: path == "a"), "params/b/0: saved .*wanted nothing"),
        (dict(seed=1), "made with another seed"),
        (dict(resume=False), "resume=False, but there is the checkpoint of step 4"),
    ],
)
def test_a_checkpoint_that_does_not_fit(finished, options, message):
    with pytest.raises(ValueError, match=message):
        run(finished[0], steps=6, **options)
    assert json.loads((finished[0] / "metrics.jsonl").read_text())["step"] == 4  # nothing was touched


def test_load(finished):
    directory, end = finished
    for like in (params(), {**jax.eval_shape(params), "b": params()["b"]}):
        found = train.load(directory, like)
        assert jax.tree.structure(found) == jax.tree.structure(end.params)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(end.params), strict=True))
    assert not np.array_equal(train.load(directory, params(), step=2)["a"], end.params["a"])
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 .*holds steps \[2, 4\]"):
        train.load(directory, params(), step=3)
    with pytest.raises(ValueError, match=r"params/a: saved \(\(3,\), 'float32'\), wanted nothing"):
        train.load(directory, {"b": params()["b"]})
    with pytest.raises(ValueError, match="is no directory"):
        train.load(directory / "nowhere", params())


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "file" / "below")


def test_checkpoints_older_than_the_state(tmp_path, finished):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"older than the given state \(step 4\)"):
        run(tmp_path, params=None, state=finished[1], steps=6)


def test_log_drops_what_was_not_saved(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall": 0.5}\n{"step": 2, "wall": 1.0}\n{"step": 3, "wall": 1.5}\n{"step": 4, "wa')
    with Log(path, step=2) as log:
        assert log.wall == 1.0
        log.write({"step": 3, "wall": 1.25})
    assert [line["step"] for line in train.read(path)] == [1, 2, 3] and train.read(path)[-1]["wall"] == 1.25
    path.write_text('{"step": 1, "wa\n{"step": 2, "wall": 1.0}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        train.read(path)


def test_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "wall": i, "loss": float("nan") if i == 3 else 1 / i, **({"late": 1.0} if i > 4 else {})} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = train.curves(path, tmp_path / "a.png", ["loss", "late"], smooth=3, log_y=True)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "matplotlib.pyplot" not in sys.modules
    with pytest.raises(ValueError, match=r"has 'acc'; it has \['late', 'loss', 'wall'\]"):
        train.curves(path, tmp_path / "b.png", ["acc"])
    with pytest.raises(ValueError, match="smooth=0"):
        train.curves(path, tmp_path / "b.png", smooth=0)


def test_the_bar_comes_after_two_seconds(capsys):
    for enabled in (True, False):
        with Bar(10, enabled=enabled) as bar:
            bar.update(1)
            assert bar.bar is None
            bar.start -= 3
            bar.update(10)
            assert (bar.bar is not None) == enabled
        assert ("10/10" in capsys.readouterr().err) == enabled


def test_imports_are_lazy():
    code = (
        "import sys, jaxtok; early = {'optax', 'orbax', 'flax', 'matplotlib', 'rich'} & set(sys.modules); assert not early, early; "
        "import jaxtok.train; late = {'orbax', 'flax', 'matplotlib', 'rich'} & set(sys.modules); assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
