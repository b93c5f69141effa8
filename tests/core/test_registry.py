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


def test_sites_are_the_fields_of_a_recipe():
    from jaxtok.core.recipe import Recipe

    assert registry.SITES == tuple(field.name for field in dataclasses.fields(Recipe))
