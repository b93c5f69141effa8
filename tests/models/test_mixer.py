"""Attention of other kinds in an encoder's layers: one that does what the layer does changes nothing; parameters, evidence, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.mixer import Mixer
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.methods import MAELRE, BiFormer, FasterVLM, MemoryReweaving, PoNet, ToMe
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig

CFG = EncoderConfig(width=16, layers=3, heads=4, hidden=24, image=(8, 8), patch=(2, 2), channels=1, cls=False, pool="mean", out=5)
TEXT = EncoderConfig(width=16, layers=3, heads=4, hidden=24, image=None, vocab=32, context=12, cls=False, pool="mean", out=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Same(Mixer):
    """The layer's own attention, in every layer or in some."""

    only: tuple[int, ...] = (0, 1, 2)
    name = "same"

    def layer(self, i, layers):
        return self if i in self.only else None

    def weights(self, key, cfg, i):
        return {"unused": jnp.full((1,), float(i))}

    def mix(self, params, state, i, layer):
        assert params["unused"].shape == (1,) and state == tuple(j for j in self.only if j < i)
        return layer.out(layer.attend(layer.q, layer.k, layer.v)), (*state, i)


def weights(cfg, recipe, dtype=jnp.float32):
    return encoder.init(cfg, jax.random.key(0), dtype) | {"methods": recipe.init_params(jax.random.key(1), cfg)}


def images():
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 8, 1)).astype(np.float32))


def forward(cfg, recipe, tokens_of, **options):
    params = weights(cfg, recipe)
    return jax.jit(lambda p: vit.head(cfg, p, vit.encode(cfg, p, tokens_of(cfg, p), recipe, **options).tokens))(params)


def pictures(cfg, params):
    return vit.embed(cfg, params, images())


@pytest.mark.parametrize("only", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("merge", [(), ((1, ToMe(remove=3, special=0)),)])
def test_its_own_attention_changes_nothing(only, merge):
    plain = forward(CFG, Recipe(vit=merge), pictures, proportional=True)
    np.testing.assert_allclose(forward(CFG, Recipe(vit=merge, attention=Same(only=only)), pictures, proportional=True), plain, atol=1e-5)


def test_parameters_are_a_dict_a_layer():
    own = Recipe(attention=Same(only=(0, 2))).init_params(jax.random.key(0), CFG)["attention"]
    assert [sorted(p) for p in own] == [["unused"], [], ["unused"]] and float(own[2]["unused"][0]) == 2


APPROXIMATE = [MAELRE(switch=4, landmarks=3, kind=kind) for kind in ("linear", "nystrom", "pooled")]


@pytest.mark.parametrize("method", [PoNet(segments=3), MemoryReweaving(layers=(0, 1), slots=3), *APPROXIMATE])
def test_padding_of_a_text(method):
    """What stands in padding does not matter; a batch of one gives what the row gives in a batch."""
    ids = jax.random.randint(jax.random.key(3), (2, 12), 0, 32)
    live = jnp.arange(12)[None] < jnp.asarray([[12], [7]])
    recipe = Recipe(attention=method)
    of = lambda ids, live: lambda cfg, p: vit.embed_text(cfg, p, ids, live)
    out = forward(TEXT, recipe, of(ids, live))
    np.testing.assert_allclose(forward(TEXT, recipe, of(jnp.where(live, ids, 5), live)), out, atol=1e-5)
    np.testing.assert_allclose(forward(TEXT, recipe, of(ids[1:], live[1:])), out[1:], atol=1e-5)


@pytest.mark.parametrize("method", [PoNet(segments=3), BiFormer(side=2, topk=(2, -2)), MemoryReweaving(layers=(0,), slots=3)])
def test_every_learned_weight_has_a_gradient(method):
    recipe = Recipe(attention=method)
    params = weights(CFG, recipe)
    tuned = lambda p: {name: x + 0.3 if name == "gate" else x for name, x in p.items()}
    params["methods"]["attention"] = tuple(map(tuned, params["methods"]["attention"]))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(vit.forward(CFG, p, images(), recipe) ** 2)))(params)
    for one in grad["methods"]["attention"]:
        assert all(np.isfinite(g).all() and np.any(g) for g in one.values())


@pytest.mark.parametrize(
    "method", [PoNet(segments=3), BiFormer(side=2, topk=(4, -2)), MemoryReweaving(layers=(0,), slots=99), *APPROXIMATE]
)
def test_bfloat16(method):
    """Close to float32 (nothing is chosen here, which rounding could change)."""
    recipe = Recipe(attention=method)
    run = jax.jit(lambda p: vit.forward(CFG, p, images(), recipe))
    want, got = run(weights(CFG, recipe)), run(weights(CFG, recipe, jnp.bfloat16))
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_refuses():
    params = weights(CFG, Recipe(attention=Same()))
    run = lambda recipe, cfg=CFG: jax.eval_shape(lambda: vit.encode(cfg, params, vit.embed(cfg, params, images()), recipe))
    with pytest.raises(ValueError, match="attention matrix"):  # it would be of an attention that is not there
        run(Recipe(attention=Same(), select=FasterVLM(capacity=4)))
    assert FasterVLM(capacity=4).needs != Needs()
    with pytest.raises(ValueError, match="no class token"):
        cfg = dataclasses.replace(CFG, cls=True)
        own = weights(cfg, Recipe())
        jax.eval_shape(lambda: vit.encode(cfg, own, vit.embed(cfg, own, images()), Recipe(attention=BiFormer(side=2, topk=(1,)))))
    with pytest.raises(ValueError, match="causal"):
        run(Recipe(attention=Same()), dataclasses.replace(CFG, causal=True))
