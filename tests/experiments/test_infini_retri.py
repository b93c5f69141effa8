"""The script of 65,536 characters through a window, at small settings."""

import importlib.util
import json
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "infini_retri.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("infini_retri", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["infini_retri"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["infini_retri"]


@pytest.mark.slow
def test_small(script, tmp_path, monkeypatch, capsys):
    """Four windows of text: found at both depths; one program, whose bytes do not depend on the length."""
    o = script.Options(
        length=1024, shorter=512, window=384, capacity=160, topk=30, depths=2, seeds=1, batch=2, out=tmp_path / "r" / "x.json"
    )
    monkeypatch.setattr(script, "child", lambda o, n: script.memory(script.dataclasses.replace(o, measure=n)))
    document = script.main(o)
    assert document["cases"] == 2 and document["own_score"] == document["score"] == document["retained"] == 1
    assert all(r["length"] > 900 and r["kept"] <= 160 for r in document["rows"])
    assert document["memory"]["512"]["program"] == document["memory"]["1024"]["program"] > 0
    assert json.loads(o.out.read_text())["options"]["window"] == 384
    assert "1024 characters through 384: 1.000 of 2" in capsys.readouterr().out


def test_cases(script):
    """Five seeds at ten depths, all different, each with its answer where it was asked for."""
    encode = type("T", (), {"encode": staticmethod(lambda s, special=False: list(map(ord, s)))})
    cases = script.cases_of(script.Options(), encode, 2048)
    assert len(cases) == 50 and len({c.context for c in cases}) == 50
    assert all(abs(c.depth - (i % 10 + 0.5) / 10) < 0.05 for i, c in enumerate(cases))
    assert all(c.context.count(c.answers[0]) == 1 and 2000 < c.length <= 2048 for c in cases)
