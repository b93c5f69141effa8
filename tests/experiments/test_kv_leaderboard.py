"""The leaderboard on a tiny random model: its rows, what it does when started again, its tables."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import pytest

from jaxtok.core import registry
from jaxtok.evals import measure
from tests.evals import tiny

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "kv_leaderboard.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kv_leaderboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_leaderboard"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kv_leaderboard"]


@pytest.fixture(scope="module")
def options(script, tmp_path_factory):
    return script.Options(
        budgets=("50%",), tasks=("needle",), length=64, count=2, methods=("full", "k_norm", "cam"), protocols=(True,),
        out=tmp_path_factory.mktemp("leaderboard"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def document(script, options):
    def run(work, g, reference, spec, budgets):
        if spec.startswith("cam"):
            raise ValueError("no room | at all")
        return script.run_one(work, g, reference, spec, budgets)

    return script.main(options, run, tiny.make())


def test_rows_and_what_was_refused(document, options):
    assert [(r["method"], r["budget"], r["cases"], r["query_aware"]) for r in document["rows"]] == [
        ("full", "100%", 2, True), ("k_norm", "50%", 2, True),
    ]  # fmt: skip
    full, half = document["rows"]
    assert full["kl"] < 1e-6 and full["oracle"] == pytest.approx(1) and 0 < half["oracle"] < 1
    assert half["kept"] == pytest.approx(full["kept"] / 2, abs=0.5) and half["cache_bytes"] < 0.7 * full["cache_bytes"]
    assert document["failed"] == [{"method": "cam", "query_aware": True, "reason": "no room | at all"}]


def test_started_again_it_runs_only_what_is_missing(script, document, options, monkeypatch):
    ran = []
    monkeypatch.setattr(script.measure.Work, "reference", lambda self, g: None)

    def run(work, g, reference, spec, budgets):
        ran.append(spec)
        return [document["rows"][1] | {"method": spec}]

    again = script.main(options, run, tiny.make())
    assert ran == ["cam:base=snapkv,window=16,window=16"] and again["failed"] == [] and len(again["rows"]) == 3
    assert json.loads((options.out / "results.json").read_text())["rows"][:2] == document["rows"]
    with pytest.raises(ValueError, match="holds results of other settings"):
        script.main(dataclasses.replace(options, count=3), run, tiny.make())


def test_tables_and_figures(script, document, options):
    text = (options.out / "query_aware.md").read_text()
    assert "| **full** | references |" in text and "| k_norm | compressors |" in text and "## Tasks at 50%" in text
    assert "no room \\| at all" in script.table(document, [r for r in document["rows"]], True)
    for stem in ("pareto", "grid"):
        assert (options.out / f"query_aware_{stem}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_method_of_the_family_takes_part(script):
    cfg, params, tokenizer = tiny.make()
    o = script.Options(tasks=("needle",))
    specs, left = script.specs_of(o, cfg, tokenizer, (cfg, params))
    names = {script.registry_name(s) for s in specs} | set(left)
    assert names == {"oracle", *(n for n in registry.names() if registry.get(n).site in measure.SITES)}
    assert left == {} and set(script.SETTINGS) <= names and set(script.REMARKS) <= names
    assert {script.family(n) for n in names} == {"references", "compressors", "step policies", "readers", "prompt", "wrappers"}
