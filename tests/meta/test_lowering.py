"""Prefill and generation lower for TPU and CUDA on a machine that has neither."""

import jax
import jax.numpy as jnp
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import build
from jaxtok.decode import generate
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config

pytestmark = pytest.mark.py312
CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
RECIPES = {
    "plain": Recipe(),
    "compress": Recipe(cache=build("snapkv:window=4,pool=3", 16)),
    "evict": Recipe(policy=build("h2o", 16)),
    "read": Recipe(cache=build("ada_kv:base=k_norm", 16), reader=build("quest:block=4", 4)),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", RECIPES)
def test_lowers(name, platform):
    recipe = RECIPES[name]

    def answer(params, ids, live):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=4)
        return generate(CFG, params, tokens, layers, recipe, new=4).ids

    params = jax.eval_shape(lambda: blocks.init(CFG, jax.random.key(0), jnp.bfloat16))
    ids, live = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2, 32), jnp.bool)
    exported = jax.export.export(jax.jit(answer), platforms=[platform])(params, ids, live)
    assert exported.platforms == (platform,) and exported.out_avals[0].shape == (2, 4)
