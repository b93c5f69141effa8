"""The tutorial runs, at small settings, and says what it claims."""

import importlib.util
import pathlib
import sys

import pytest

from jaxtok.core import registry
from jaxtok.testing import LAWS

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "write_a_method.py"


@pytest.mark.slow
def test_the_tutorial(monkeypatch, capsys):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    spec = importlib.util.spec_from_file_location("write_a_method", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "write_a_method", module)
    spec.loader.exec_module(module)
    assert "outlying_values" in registry.names()
    summary = {(line["method"], line["budget"]): line["score"] for line in module.main(count=3, length=128)}
    assert summary["full", "100%"] == 1
    for budget in ("50%", "25%"):
        assert summary["outlying_values", budget] >= summary["key_diff", budget] >= summary["random", budget]
    text = capsys.readouterr().out
    assert text.count(": holds\n") == len(LAWS) and "outlying_values" in text
