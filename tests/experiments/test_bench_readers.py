"""The benchmark of readers and the ranks behind InfiniRetri's settings, at small settings."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_readers(tmp_path, capsys):
    """Every side runs, full attention agrees with jax.nn; ratios are of the medians."""
    bench = script("bench_readers")
    o = bench.Options(sizes=(1024,), batches=(2,), narrow=(), heads=2, kv_heads=1, width=8, share=0.25, steps=2, repeats=2, only=("quest",), out=tmp_path / "r" / "x.json")  # fmt: skip
    (row,) = bench.main(o)["rows"]
    assert row["differs"] < 1e-4 and set(row["cpu_ms"]) == {"append", "full, ours", "quest", "full, jax.nn"}
    full = min(row["clock_ms"][name][1] for name in bench.FULL)
    assert row["clock_ratio"]["quest"] == pytest.approx(full / row["clock_ms"]["quest"][1], abs=0.01)
    assert json.loads(o.out.read_text())["goal"] == 3.0
    assert "clock, ms a step of one layer" in capsys.readouterr().out


def test_the_readers_read_their_share():
    """5% of the slots, but for ActQKV's gather, whose static size is larger."""
    bench = script("bench_readers")
    for s in bench.Options().sizes:
        made = bench.readers(bench.Options(), s)
        slots = {"quest": made["quest"].pages * 16, "sentencekv": made["sentencekv"].budget, "landmark": made["landmark"].top_k * 51}
        slots["actqkv"] = made["actqkv"].budget
        assert all(0.045 * s <= n <= 0.05 * s for n in slots.values()), slots


def test_above():
    """The answer's sentence is the second: three tokens and one sentence of four characters rank above it."""
    ranks = script("infini_retri_ranks")
    context = "abc.=12.xyz\n"
    score = np.array([5, 6, 7, 0, 1, 2, 4, 0, 3, 3, 3, 3.0])
    assert ranks.above(score, context, "12") == (3, 8)
