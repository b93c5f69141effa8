"""Methods from outside: entry points of installed packages, modules, files; and what is wrong with them in one line."""

import pytest

from jaxtok.core import plugins, registry

METHOD = """
import dataclasses
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register

@register("{name}", paper="https://example.org", site="cache")
@dataclasses.dataclass(frozen=True, kw_only=True)
class {kind}(CacheScorer):
    capacity: int
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on Python's path, in which `install(name, code)` puts a package of one module and its entry point."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def install(name, code, offers=None):
        (folder / f"{name}.py").write_text(code)
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[jaxtok.methods]\n{name} = {offers or name}\n")

    return install


def test_installed_packages_are_found_and_broken_ones_are_a_line_each(site):
    site("outside_good", METHOD.format(name="theirs", kind="Theirs"))
    site("outside_broken", "import jaxtok_nowhere\n")
    site("outside_leaves", "raise SystemExit('no GPU\\nhere')\n")
    site("outside_gone", "", offers="outside_never_there")
    site("outside_clash", METHOD.format(name="theirs", kind="Other"))
    said = {line.split()[5]: line for line in plugins.discover()}
    assert registry.names() == ("theirs",) and registry.get("theirs").__module__ in ("outside_good", "outside_clash")
    clash = "outside_clash" if registry.get("theirs").__module__ == "outside_good" else "outside_good"
    assert sorted(said) == sorted(["outside_broken", "outside_leaves", "outside_never_there", clash])
    whole = "left out the methods of outside_broken (entry point 'outside_broken' of jaxtok.methods): ModuleNotFoundError: "
    assert said["outside_broken"] == whole + "No module named 'jaxtok_nowhere'"
    assert said["outside_leaves"].endswith("SystemExit: no GPU here")
    assert "No module named 'outside_never_there'" in said["outside_never_there"]
    assert "method 'theirs' is registered twice: " in said[clash]


def test_a_file(tmp_path):
    path = tmp_path / "random.py"  # not to be taken for Python's
    path.write_text(METHOD.format(name="mine", kind="Mine"))
    for _ in range(2):  # run anew each time
        plugins.load(str(path))
        import random

        assert registry.names() == ("mine",) and hasattr(random, "shuffle")
    again = tmp_path / "deep" / "random.py"
    again.parent.mkdir()
    again.write_text(METHOD.format(name="mine", kind="Mine"))
    with pytest.raises(ValueError, match=r"cannot import .*deep/random.py: line 6: method 'mine' is registered twice"):
        plugins.load(str(again))


def test_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outside_module.py").write_text(METHOD.format(name="mine", kind="Mine"))
    plugins.load("outside_module")
    assert registry.names() == ("mine",)


@pytest.mark.parametrize(
    "code, message",
    [
        (None, "method.py: no such file$"),
        ("x = 1\ny = z\n", "method.py: line 2: NameError: name 'z' is not defined$"),
        ("x = (\n", r"method.py: SyntaxError: .*line 1\)$"),
        ("def f():\n    raise TypeError\nf()\n", "method.py: line 2: TypeError$"),
        ("raise SystemExit(3)", "method.py: line 1: SystemExit: 3$"),
        (METHOD.format(name="mine", kind="Mine").replace("frozen=True, ", ""), "line 6: .*frozen|TypeError"),
    ],
    ids=["missing", "name", "syntax", "inside", "exit", "refused"],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, code, message):
    path = tmp_path / "method.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(ValueError, match=message) as said:
        plugins.load(str(path))
    assert "\n" not in str(said.value) and str(said.value).startswith(f"cannot import {path}: ")
    assert registry.names() == ()


def test_what_is_wrong_with_a_module_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^cannot import outside.nowhere: .*; give the path of a .py file, or install the package"):
        plugins.load("outside.nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outside_half.py").write_text("import jaxtok_nowhere")
    with pytest.raises(ValueError, match=r"^cannot import outside_half: ModuleNotFoundError: No module named 'jaxtok_nowhere'$"):
        plugins.load("outside_half")
