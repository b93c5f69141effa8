"""The encoders' comparison on a tiny random model: what it counts, chooses, scores and writes."""

import importlib.util
import itertools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxtok import methods as m
from jaxtok.core import registry
from jaxtok.evals import encoders
from jaxtok.models import encoder
from jaxtok.models.config import EncoderConfig

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "vit_pareto.py"
TINY = EncoderConfig(width=16, layers=3, heads=2, hidden=32, image=(16, 16), patch=(4, 4), channels=1, out=3)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("vit_pareto", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["vit_pareto"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["vit_pareto"]


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    params = encoder.init(TINY, jax.random.key(0))
    images = rng.standard_normal((12, 16, 16, 1)).astype(np.float32)
    return encoders.Task(TINY, params, images, rng.integers(0, 3, 12), np.zeros((0, 3)), np.arange(0), np.zeros(12, int))


def test_every_method_has_settings(script, task):
    """Nothing registered is forgotten; every variant makes settings, whose rows fall."""
    known = {*script.FAMILIES, *script.SKIPPED}
    assert {*registry.names("vit"), *registry.names("select")} <= known
    w = script.World("vit_mnist", task)
    for family in script.FAMILIES.values():
        for label, variant in family.items():
            settings = [x for x in (variant(w, s) for s in range(1, 17)) if x is not None]
            costs = [script.estimate(w, x) for x in settings]
            assert settings or "window 3" in label or "row" in label
            assert all(a >= b - 1e-9 for a, b in itertools.pairwise(costs)), label


def test_rows_and_estimate(script, task):
    """Of 17 rows ToMe takes 4 between attention and MLP of layer 0; a selection leaves 8 + 1 behind layer 1."""
    w = script.World("vit_mnist", task)
    assert script.widths(w, script.Setting(((0, m.ToMe(remove=4)),))) == ([(17, 13), (13, 13), (13, 13)], 13)
    setting = script.Setting(select=m.RandomRows(capacity=8), at=1)
    assert script.widths(w, setting) == ([(17, 17), (9, 9), (9, 9)], 9)
    layer = lambda n: n * (8 * 16 * 16 + 4 * 16 * 32) + 4 * n * n * 16
    assert script.estimate(w, setting) == pytest.approx((layer(17) + 2 * layer(9)) / (3 * layer(17)))


def test_points_lost(script):
    """Of 4 images the full model has 3 right, the method 2 of these and one more: d = 0, 1, 0, -1."""
    got = script.paired(np.array([1, 1, 1, 0], bool), np.array([1, 0, 1, 1], bool))
    half = 196 * (2 / 3) ** 0.5 / 2
    assert got == pytest.approx({"lost": 0.0, "low": -half, "high": half})


def test_a_run(script, task, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "vit_mnist", lambda data: task)
    monkeypatch.setitem(script.LEVELS, "vit_mnist", (0.8,))
    o = script.Options(models=("vit_mnist",), methods=("tome.kth", "random_rows"), choose=4, batch=6, threads=1, out=tmp_path)
    document = script.main(o)
    one, two = document["rows"]
    assert (one["method"], two["method"]) == ("tome.kth", "random_rows") and len(two["variants"]) == 2
    w = script.World("vit_mnist", task)
    for row in document["rows"]:
        (level,) = row["levels"]
        setting = script.find(w, row["method"], row["chosen"], level["setting"])
        share = script.trace(w, setting, 6)[1] / script.trace(w, script.Setting(), 6)[1]
        assert level["flops"] <= 0.8 and level["flops"] == pytest.approx(share)
        assert level["images"] == 6 and level["low"] <= level["lost"] <= level["high"]
        assert level["lost"] == pytest.approx(100 * (level["full"] - level["accuracy"]))
        assert max(v["chosen_on"] for v in row["variants"]) == next(v["chosen_on"] for v in row["variants"] if v["label"] == row["chosen"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == document["rows"]
    table = (tmp_path / "README.md").read_text()
    assert "| tome.kth | vit |" in table and "dynamicvit: needs its trained predictor" in table
    assert (tmp_path / "pareto.png").stat().st_size > 0
    again = script.main(o)  # nothing is left to do
    assert again["rows"] == document["rows"]


def test_all_rows_selected_change_nothing(script, task):
    """The layers behind a selection run as in the full model."""
    w = script.World("vit_mnist", task)
    run = lambda setting: jax.jit(lambda p, x: script.classify(w, setting, p, x))(task.params, task.images[:6])
    z, _ = run(script.Setting())
    y, lost = run(script.Setting(select=m.RandomRows(capacity=16), at=1))
    np.testing.assert_allclose(z, y, atol=1e-5)
    assert not lost.any()
