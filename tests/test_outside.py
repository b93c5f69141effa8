"""A method in a file outside the package: listed, compared and held to the laws, with no other edit anywhere."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import jaxtok as jt
from jaxtok import cli, testing
from jaxtok.core import plugins, registry
from jaxtok.models import load
from tests.evals import tiny

ROOT = pathlib.Path(__file__).parents[1]
METHOD = '''
"""Value norms."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register


@register("outside_norm", paper="https://example.org/v", site="cache", title="Loud Values", authors="A. Author", year=2026)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueNorm(CacheScorer):
    """Keep the largest values.  score_j = |v_j|^power"""

    capacity: int
    power: float = 1.0

    def score(self, params, kv, evidence):
        return jnp.linalg.norm(kv.v.astype(jnp.float32), axis=-1) ** self.power
'''


@pytest.fixture
def method(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    path = tmp_path / "value_norm.py"
    path.write_text(METHOD)
    return str(path)


def test_it_is_listed(method, capsys):
    assert cli.main(["list"]) == 0
    assert "outside_norm" not in capsys.readouterr().out
    assert cli.main(["list", "--import", method]) == 0
    assert "outside_norm" in capsys.readouterr().out
    assert cli.main(["list", "outside_norm", "--import", method]) == 0
    text = capsys.readouterr().out
    assert "score_j = |v_j|^power" in text and "options: power=1.0" in text and "title = {{Loud Values}}" in text


def test_it_is_compared(method, tmp_path, capsys):
    load.save(tmp_path / "model", *tiny.make())
    options = "--methods full outside_norm:power=2 --budgets 25% --tasks needle --lengths 80 --count 2 --batch 2 --new 2 --json"
    argv = ["compare", "--model", str(tmp_path / "model"), *options.split(), "--out", str(tmp_path / "out"), "--import", method]
    assert cli.main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["options"]["import"] == [method]
    full, mine = document["summary"]
    assert (mine["method"], mine["budget"]) == ("outside_norm:power=2", "25%") and 0 < mine["kept"] < full["kept"] / 3 and mine["kl"] > 0


def test_it_obeys_the_laws(method):
    plugins.load(method)
    found = testing.check(lambda capacity: jt.build("outside_norm", capacity))
    assert set(found) == set(testing.LAWS) and set(found.values()) == {"holds"}


def test_an_installed_package_offers_methods_and_a_broken_one_is_a_line(tmp_path):
    for name, code in (("outside_good", METHOD), ("outside_broken", "import jaxtok_nowhere")):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[jaxtok.methods]\n{name} = {name}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels", tmp_path]))}
    done = subprocess.run([sys.executable, "-m", "jaxtok", "list"], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "outside_norm" in done.stdout and "snapkv" in done.stdout
    assert done.stderr.startswith("jaxtok: left out the methods of outside_broken") and done.stderr.count("\n") == 1


def test_a_file_that_fails_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("import jaxtok\n\nx = jaxtok.nothing\n")
    for argv, message in (
        (["--import", str(tmp_path / "broken.py")], "broken.py: line 3: AttributeError: module 'jaxtok' has no attribute 'nothing'"),
        (["--import", "none.py"], "cannot import none.py: no such file"),
    ):
        assert cli.main(["list", *argv]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("jaxtok: cannot import") and said.err.count("\n") == 1 and message in said.err
