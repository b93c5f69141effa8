"""What the tuning of block sizes chooses, and its table, for kernels that take no time."""

import importlib
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture
def tune():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("tune_kernels")
    sys.path.remove(str(FOLDER))


def test_chosen(tune):
    """The fastest of those that are right; nothing where a case is wrong or XLA is faster."""
    of = lambda sizes, **found: {json.dumps({"kernel": "flash", "sizes": sizes}): found}
    ran = lambda ms: {"run_ms": [ms, ms, ms]}
    right = {"check flash: one key": {"right": True}, "check flash: bf16": {"refused": "no"}}
    sizes = of({}, **ran(3.0)) | of({"block_k": 64}, **ran(1.0), error="gradients: wrong") | of({"block_k": 128}, **ran(2.0))
    assert tune.chosen("flash", right | sizes)[0] == {"block_k": 128}
    assert tune.chosen("flash", right | sizes | of("xla", **ran(2.5)))[0] == {"block_k": 128}
    assert tune.chosen("flash", right | sizes | of("xla", **ran(1.5))) == (None, "2 ms, and XLA takes 1.5")
    assert tune.chosen("flash", right | of({}, refused="16 bits")) == (None, "16 bits")
    wrong = {"check flash: one key": {"right": False, "error": "wrong: by 3"}}
    assert tune.chosen("flash", wrong | sizes) == (None, "1 cases not right, such as check flash: one key: wrong: by 3")
    assert tune.chosen("merge", right) == ({}, "right; its sizes are the caller's")
    assert tune.candidates("tpu", "flash")[:2] == [{}, {"block_q": 128, "block_k": 256}] and tune.candidates("gpu", "read") == [{}]


def test_table(tune, tmp_path, monkeypatch, capsys):
    """Entries of other devices and kernels stay; a kernel that fails loses its own."""
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"other": {"flash": {"block_k": 64}}, "mine": {"flash": {}, "read": {}}}))
    fast = {"block_q": 16, "block_k": 32}

    def one(name, o):
        if not name.startswith("{"):
            return {"error": "wrong"} if name.startswith("check read") else {"right": True}
        sizes = json.loads(name)["sizes"]
        return {"run_ms": [1.0 if sizes == fast else 2.0] * 3}

    monkeypatch.setattr(tune, "one", one)
    tune.main(tune.Options(impl="interpret", quick=True, here=True, kind="mine", table=path, kernels=("flash", "read", "merge")))
    assert json.loads(path.read_text()) == {"mine": {"flash": fast, "merge": {}}, "other": {"flash": {"block_k": 64}}}
    assert "1 cases not right" in capsys.readouterr().out
