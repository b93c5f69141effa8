"""What a recipe refuses, by name and with the cure; what it asks a model for."""

import dataclasses

import jax
import pytest

from jaxtok.core import protocols
from jaxtok.core.edit import LayerEdit
from jaxtok.core.reader import Reader
from jaxtok.core.recipe import Recipe
from jaxtok.core.reducer import Reducer
from jaxtok.core.types import Needs


class Cfg:
    """As much of a model's configuration as a recipe looks at."""

    def __init__(self, layers=4, window=None):
        self.layers, self.window, self.mrope = layers, window, ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Reducer):
    name = "prune"
    positions: str = "keep"
    where: str = "block"
    own: bool = False

    @property
    def at(self):
        return self.where

    @property
    def needs(self):
        return Needs(rows=1, own=self.own)

    def init_params(self, key, cfg):
        return {"w": jax.random.normal(key, (cfg.layers,))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(protocols.CacheCompressor):
    name = "compress"
    capacity: int = 4
    rotates: bool = False
    wide: int = 0

    @property
    def slots(self):
        return self.capacity + self.wide

    @property
    def needs(self):
        return Needs(rows=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(protocols.CachePolicy):
    name = "step"
    capacity: int = 4
    raw: bool = False
    aligned: bool = False

    @property
    def needs(self):
        return Needs(received=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read(Reader):
    name = "read"
    raw: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(LayerEdit):
    name = "edit"
    images: int = 4


def refused(match, cfg=None, **sites):
    with pytest.raises(ValueError, match=match):
        Recipe(**sites).validate(cfg or Cfg())


def test_accepted():
    Recipe().validate(Cfg())
    Recipe(
        layers=((1, Prune()), (3, Prune(positions="repack"))), cache=Compress(capacity=6), policy=Step(capacity=6), reader=Read()
    ).validate(Cfg())
    Recipe(layers=((0, Prune(own=True)), (3, Prune(own=True)))).validate(Cfg())
    Recipe(policy=Step(raw=True), reader=Read(raw=True)).validate(Cfg())
    Recipe(cache=Compress(rotates=True)).validate(Cfg())


def test_places_of_a_pruner():
    for k in (0, 4, -1):
        refused(f"prune acts before layer {k}; a decoder of 4 layers has places", layers=((k, Prune()),))
    refused("before layer 4", layers=((4, Prune(own=True)),))
    refused(r"before the same layer: \[2, 2\]; chain them or move one", layers=((2, Prune()), (2, Prune())))
    refused("acts at 'attn'; a decoder takes methods that act at 'block'", layers=((1, Prune(where="attn")),))


def test_an_edit_stands_alone():
    Recipe(edits=(Edit(),)).validate(Cfg())
    refused("edit keeps the keys of image rows apart .* without cache and reader", edits=(Edit(),), cache=Compress(), reader=Read())
    refused("one edit at a time: edit, edit", edits=(Edit(), Edit(images=3)))


def test_keys_stored_unrotated_and_who_cannot_live_with_them():
    refused("compress works on rotated keys, but they are stored unrotated", cache=Compress(rotates=True), policy=Step(raw=True))
    refused("a pruner that repacks positions would be undone", layers=((1, Prune(positions="repack")),), policy=Step(raw=True))
    refused("read reads rotated keys, but step stores them unrotated", policy=Step(raw=True), reader=Read())
    refused("sliding window contradict", Cfg(window=8), policy=Step(raw=True))


def test_a_reader_that_attends_takes_no_policy():
    refused("attends by itself", reader=type("Own", (Read,), {"attends": True})(), policy=Step())


def test_a_policy_must_hold_what_the_cache_method_keeps():
    refused("compressed to 5 slots and then cut to the policy's 4; give step at least 5", cache=Compress(capacity=5), policy=Step())
    refused("compressed to 6 slots", cache=Compress(capacity=4, wide=2), policy=Step())
    refused("step keeps one set for all heads", cache=Compress(), policy=Step(aligned=True))
    refused("compress turns keys and step takes a plan", cache=Compress(rotates=True), policy=Step())


def test_wrong_kind_of_object():
    for site, value in {"cache": Step(), "policy": Compress(), "reader": Prune(), "edits": (Prune(),), "layers": ((1, Step()),)}.items():
        bare = object.__new__(Recipe)  # past the type checks of the test run
        for field in dataclasses.fields(Recipe):
            object.__setattr__(bare, field.name, value if field.name == site else field.default)
        with pytest.raises(TypeError, match=rf"{site} takes a \w+, got "):
            bare.__post_init__()


def test_a_recipe_hashes_and_is_replaced():
    a = Recipe(cache=Compress(), layers=((1, Prune()),))
    assert hash(a) == hash(Recipe(cache=Compress(), layers=((1, Prune()),))) and a.replace(cache=None) == Recipe(layers=((1, Prune()),))
    assert a != a.replace(cache=Compress(capacity=5))


def test_needs_of_the_cache_sites():
    assert Recipe(cache=Compress(), policy=Step()).prefill_needs == Needs(rows=2, received=True)
    assert Recipe(layers=((1, Prune(own=True)),)).prefill_needs == Needs()


def test_learned_weights_one_entry_an_entry():
    recipe = Recipe(layers=((1, Prune()), (2, Prune())), cache=Compress())
    params = recipe.init_params(jax.random.key(0), Cfg())
    assert params["cache"] == {} and len(params["layers"]) == 2 and params["vit"] == () and "policy" not in params
    assert params["layers"][0]["w"].shape == (4,)
    assert (params["layers"][0]["w"] != params["layers"][1]["w"]).all(), "every method draws from a key of its own"
