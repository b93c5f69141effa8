"""The sinks script on the model of the package: every number for every layer and head, and the figure."""

import importlib.util
import json
import pathlib
import sys

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments/sinks.py"


def test_small_run(tmp_path):
    spec = importlib.util.spec_from_file_location("sinks_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("What say you to that? Remember mako=528. " * 40)
    module.main(module.Options(models=("embedded",), texts=(str(text),), length=24, count=2, out=tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["results"]["embedded"][str(text)]
    assert [len(found[name]) for name in ("mass", "rise_zero", "rise_first", "drain", "peak")] == [3, 3, 3, 3, 4]
    assert all(0 <= x <= 1 for row in found["mass"] for x in row) and found["heads"] == [[2, 0]] * 3
    assert (tmp_path / "embedded.png").stat().st_size > 5_000
