"""Registering and finding methods."""

import dataclasses

import pytest

from jaxtok.core import registry
from jaxtok.core.registry import register


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some:
    capacity: int = 1


def test_register_names_the_class():
    assert register("some", paper="arXiv:1", site="cache")(Some) is Some
    assert (Some.name, Some.paper, Some.site) == ("some", "arXiv:1", "cache")
    assert registry.get("some") is Some and registry.names() == ("some",)
    assert registry.names("cache") == ("some",) and registry.names("policy") == ()
    register("some", paper="arXiv:1", site="cache")(Some)  # the same class again (a module that is loaded twice) is no clash


def test_names_are_sorted_and_unknown_names_are_told_the_known_ones():
    for name, site in (("b", "policy"), ("a", "cache"), ("c", "cache")):
        register(name, paper="-", site=site)(dataclasses.make_dataclass(name, [], frozen=True))
    assert registry.names() == ("a", "b", "c") and registry.names("cache") == ("a", "c")
    with pytest.raises(ValueError, match="unknown method 'd'; known: a, b, c"):
        registry.get("d")


def test_refused():
    register("some", paper="-", site="cache")(Some)
    other = dataclasses.make_dataclass("Other", [], frozen=True)
    with pytest.raises(ValueError, match=r"'some' is registered twice: .*Some and .*Other"):
        register("some", paper="-", site="cache")(other)
    with pytest.raises(ValueError, match=r"site 'kv' must be one of prompt, .*cache"):
        register("other", paper="-", site="kv")(other)
    for loose in (dataclasses.make_dataclass("Loose", []), type("Plain", (), {})):
        with pytest.raises(ValueError, match="'loose' must be a frozen dataclass"):
            register("loose", paper="-", site="cache")(loose)
    assert registry.names() == ("some",), "what was refused is not known"


def test_what_to_cite():
    make = lambda: dataclasses.make_dataclass("Cited", [], frozen=True)
    who = {"title": "50% of R&D: a_b", "authors": "Ada Lovelace and Charles Babbage"}
    assert register("plain", paper="baseline", site="cache")(make()).bibtex == ""
    assert register("new", paper="arXiv:2512.01234", site="cache", **who)(make()).bibtex == (
        "@misc{new,\n  title = {{50\\% of R\\&D: a\\_b}},\n  author = {Ada Lovelace and Charles Babbage},\n  year = {2025},\n"
        "  eprint = {2512.01234},\n  archivePrefix = {arXiv},\n  url = {https://arxiv.org/abs/2512.01234}\n}"
    )
    assert "year = {2024},\n" in register("later", paper="arXiv:2312.01234", site="cache", year=2024, **who)(make()).bibtex
    assert register("one", paper="doi:10.1/a_b", site="cache", year=1843, **who)(make()).bibtex.endswith(
        "year = {1843},\n  doi = {10.1/a_b}\n}"
    )
    assert "  url = {https://x.org/a_b}\n" in register("two", paper="https://x.org/a_b", site="cache", year=1843, **who)(make()).bibtex
    for paper, half in (("arXiv:2512.01234", {"title": "T"}), ("https://x.org", who)):
        with pytest.raises(ValueError, match="method 'half': a title goes with authors and"):
            register("half", paper=paper, site="cache", **half)


def test_sites_are_the_fields_of_a_recipe():
    from jaxtok.core.recipe import Recipe

    assert registry.SITES == tuple(field.name for field in dataclasses.fields(Recipe))
