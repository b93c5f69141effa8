"""The decoder with a trained attention: what it refuses, chunks and turns, room."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate
from jaxtok.methods import CCA, KNorm, MetaTokens
from jaxtok.models import blocks, decoder
from jaxtok.testing import world
from tests.methods.attention import run

METHOD = CCA(group=2, window=4)
RECIPE = Recipe(attention=METHOD)
CFG = run.CFG


def test_a_prompt_in_two_parts_is_the_prompt():
    params, ids = run.model(METHOD)

    @jax.jit
    def both(params, ids):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids[:, :9]), RECIPE, new=5)
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids[:, 9:14]), RECIPE, new=0, layers=layers)
        return decoder.logits(CFG, params, tokens.x), layers

    out, layers = both(params, ids)
    whole = np.asarray(run.program(METHOD)(params, ids[:, :14], None))
    np.testing.assert_allclose(np.asarray(out), whole[:, 9:], atol=2e-5)
    assert layers[0][0].kv.k.shape == (world.B, CFG.kv_heads, 14, 0) and not np.asarray(layers[0][0].kv.lost).any()


def test_generate_is_greedy_decoding_of_the_parallel_pass():
    params, ids = run.model(METHOD)

    @jax.jit
    def answer(params, ids):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids), RECIPE, new=3)
        return generate(CFG, params, tokens, layers, RECIPE, new=3, eos=()).ids

    got, text = np.asarray(answer(params, ids[:, :12])), np.asarray(ids[:, :12])
    for _ in range(3):
        z = np.asarray(jax.jit(lambda p, i: blocks.forward(CFG, p, i, method=METHOD))(params, jnp.asarray(text)))
        text = np.concatenate([text, z[:, -1].argmax(-1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(got, text[:, 12:])


def test_rows_without_room_are_counted():
    params, ids = run.model(METHOD)

    @jax.jit
    def full(params, ids):
        layers = decoder.empty(CFG, params, world.B, 4, RECIPE)
        return decoder.step(CFG, params, blocks.embed(CFG, params, ids), jnp.ones(ids.shape, bool), layers, RECIPE)

    x, layers = full(params, ids[:, :6])
    kv = layers[1][0].kv
    assert (np.asarray(kv.lost) == 2).all() and (np.asarray(kv.seen) == 6).all() and np.isfinite(np.asarray(x)).all()


def test_a_batch_row_is_itself_alone():
    params, ids = run.model(METHOD)
    live = jnp.asarray(world.LIVE)
    whole = np.asarray(run.program(METHOD)(params, ids[:, :12], live))
    for i, count in enumerate(world.LENGTHS):
        alone = np.asarray(run.program(METHOD)(params, ids[i : i + 1, 12 - count : 12], None))
        np.testing.assert_allclose(whole[i, 12 - count :], alone[0], atol=2e-5)


@pytest.mark.parametrize(
    "recipe, cfg, what",
    [
        (Recipe(attention=METHOD, cache=KNorm(capacity=8)), CFG, "without cache"),
        (RECIPE, dataclasses.replace(CFG, window=4, local=(True, False)), "global"),
        (Recipe(attention=MetaTokens(token=32)), CFG, "vocabulary"),
    ],
)
def test_refusals(recipe, cfg, what):
    with pytest.raises(ValueError, match=what):
        recipe.validate(cfg)


def test_missing_weights_and_ids():
    params, ids = world.world()[:2]
    with pytest.raises(ValueError, match="init_params"):
        blocks.forward(CFG, params, ids, method=METHOD)
    meta = MetaTokens(token=31)
    params = params | {"methods": Recipe(attention=meta).init_params(jax.random.key(0), CFG)}
    layers = decoder.empty(CFG, params, 1, 4, Recipe(attention=meta))
    with pytest.raises(ValueError, match="ids="):
        decoder.step(CFG, params, blocks.embed(CFG, params, ids[:1, :1]), jnp.ones((1, 1), bool), layers, Recipe(attention=meta))
