"""Imports go one way, files stay short, every method has its paper, its site, what it needs and a test of its own."""

import ast
import inspect
import pathlib
import re

import pytest

import jaxtok.methods
from jaxtok.core import registry
from jaxtok.core.types import Needs

pytestmark = pytest.mark.py312
ROOT = pathlib.Path(__file__).parents[2]
MAY_IMPORT = {
    "jaxtok_kernels": set(),
    "jaxtok.core": set(),
    "jaxtok.ops": {"jaxtok.core", "jaxtok_kernels"},
    "jaxtok.methods": {"jaxtok.core", "jaxtok.ops"},
    "jaxtok.parallel": {"jaxtok.core", "jaxtok.ops"},
    "jaxtok.models": {"jaxtok.core", "jaxtok.ops", "jaxtok.parallel"},
    "jaxtok.decode": {"jaxtok.core", "jaxtok.ops", "jaxtok.parallel", "jaxtok.models"},
    "jaxtok.flax": {"jaxtok.core", "jaxtok.ops", "jaxtok.parallel", "jaxtok.models"},
}
MAY_IMPORT["jaxtok.train"] = {*MAY_IMPORT, "jaxtok.decode"}
MAY_IMPORT["jaxtok.evals"] = {*MAY_IMPORT, "jaxtok.train"}
MAY_IMPORT["jaxtok.cli"] = {*MAY_IMPORT, "jaxtok.evals"}
MAY_IMPORT["jaxtok.testing"] = {"jaxtok.core", "jaxtok.ops", "jaxtok.models"}
LONGEST = {"jaxtok.methods": 200, "jaxtok.core": 250, "jaxtok_kernels": 350}  # lines; 400 elsewhere


def owner(module: str) -> str | None:
    hits = [name for name in MAY_IMPORT if module == name or module.startswith(name + ".")]
    return max(hits, key=len) if hits else None


def sources():
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("jaxtok*/**/*.py")):
            module = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            yield pytest.param(path, module, id=str(path.relative_to(ROOT)))


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path, module", list(sources()))
def test_imports_go_one_way(path, module):
    me = owner(module)
    for target in imports(path):
        assert target.split(".")[0] != "kernels", f"{module}: import jaxtok_kernels, never `kernels`"
        assert target.split(".")[0] != "flax" or me == "jaxtok.flax", f"{module}: nothing but the Flax layer imports flax"
        other = owner(target)
        assert other != "jaxtok.flax" or me == other, f"{module}: the Flax layer is optional, nothing imports it"
        if me and other and other != me:
            assert other in MAY_IMPORT[me], f"{module} must not import {target}"
        if me == other == "jaxtok.methods" and not path.name.startswith("__init__"):
            raise AssertionError(f"{module} imports the method {target}; move the shared part to core")


@pytest.mark.parametrize("path, module", list(sources()))
def test_files_stay_short(path, module):
    most = LONGEST.get(owner(module), 400)
    lines = len(path.read_text().splitlines())
    assert lines <= (30 if module == "jaxtok" else most), f"{path} has {lines} lines, {most} at most"


@pytest.mark.parametrize("path", sorted((ROOT / "jaxtok/methods").rglob("*.py")), ids=lambda p: p.stem)
def test_a_method_file_has_its_test(path):
    if path.name != "__init__.py":
        folder = path.parent.relative_to(ROOT / "jaxtok/methods")
        assert (ROOT / "tests/methods" / folder / f"test_{path.name}").exists(), f"{path.name} has no test of its own"


@pytest.mark.parametrize("name", registry.names())
def test_a_method_says_what_it_is(name):
    cls = registry.get(name)
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:\S+|https://\S+|baseline", cls.paper), f"{name}: paper is {cls.paper!r}"
    if cls.paper != "baseline":
        assert cls.bibtex, f"{name}: register(..., title=, authors=) says what to cite"
    assert cls.site in registry.SITES
    assert cls.__module__.rsplit(".", 1)[1] == name.split(".")[0], f"{name} lives in {cls.__module__}"
    assert inspect.getdoc(cls) and len(inspect.getdoc(cls).splitlines()) >= 3, f"{name}: the docstring is the specification"
    needs = inspect.getattr_static(cls, "needs")
    assert isinstance(needs, property), f"{name}: needs is a property of the instance"
    assert Needs() == Needs() | Needs()


def test_the_package_names_no_workplace():
    """No tool, session or machine path stands in a tracked source file."""
    bad = re.compile("/" + r"(work|root)/|\.pyenv/versions/\d")
    for path in [*ROOT.glob("jaxtok/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("experiments/**/*.py"), ROOT / "README.md"]:
        if path.exists() and path != pathlib.Path(__file__):
            assert not bad.search(path.read_text()), f"{path} names a path of a machine"


assert jaxtok.methods  # importing the package fills the registry
