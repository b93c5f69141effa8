"""The decoder with a trained attention: what it refuses, chunks and turns, room."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate, replay
from jaxtok.methods import CCA, SCOUT, AShape, KNorm, LandmarkAttention, MetaTokens
from jaxtok.models import blocks, decoder, sparsify
from jaxtok.models.config import Config
from jaxtok.parallel import Spread, make_mesh
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


def test_the_models_soft_cap_and_scale():
    """Groups of one are plain attention: in the parallel pass, in prefill and in steps, also in a model with both."""
    cfg, method = dataclasses.replace(CFG, softcap=2.0, scale=0.6), CCA(group=1, window=4)
    params, ids = run.model(method)
    recipe, ids = Recipe(attention=method), ids[:, :16]
    plain = np.asarray(jax.jit(lambda p, i: blocks.forward(cfg, p, i))(params, ids))
    other = np.asarray(jax.jit(lambda p, i: blocks.forward(CFG, p, i))(params, ids))
    assert np.abs(plain - other).max() > 0.1
    np.testing.assert_allclose(np.asarray(jax.jit(lambda p, i: blocks.forward(cfg, p, i, method=method))(params, ids)), plain, atol=2e-5)

    @jax.jit
    def both(params, ids):
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids[:, :10]), recipe, new=6)
        return decoder.logits(cfg, params, tokens.x), replay(cfg, params, tokens, layers, ids[:, 10:], recipe)[0]

    first, out = both(params, ids)
    np.testing.assert_allclose(np.asarray(first), plain[:, :10], atol=2e-5)
    np.testing.assert_allclose(np.moveaxis(np.asarray(out), 0, 1), plain[:, 9:-1], atol=2e-5)


def test_steps_go_on_from_the_rotary_ids_of_the_prompt():
    """A prompt whose rotary ids begin at 3 (delta 3): only differences count, so steps that go on from there change nothing."""
    params, ids = run.model(METHOD)

    @jax.jit
    def moved(params, ids, by):
        tokens = decoder.embed(CFG, params, ids[:, :9])
        tokens = tokens._replace(rope=tokens.rope + by, delta=tokens.delta + by)
        tokens, layers = decoder.prefill(CFG, params, tokens, RECIPE, new=6)
        return replay(CFG, params, tokens, layers, ids[:, 9:15], RECIPE)[0]

    np.testing.assert_allclose(np.asarray(moved(params, ids, 3)), np.asarray(moved(params, ids, 0)), atol=2e-5)


def test_rows_without_room_are_counted():
    params, ids = run.model(METHOD)

    @jax.jit
    def full(params, ids):
        layers = decoder.empty(CFG, params, world.B, 4, RECIPE)
        return decoder.step(CFG, params, blocks.embed(CFG, params, ids), jnp.ones(ids.shape, bool), layers, RECIPE)

    x, layers = full(params, ids[:, :6])
    for a, b in zip(jax.tree.leaves(layers), jax.tree.leaves(full(params, ids[:, :4])[1]), strict=True):
        assert a.shape != b.shape or a.ndim < 3 or np.array_equal(a, b)  # keys, values and cores stay those of the first four
    kv = layers[1][0].kv
    assert (np.asarray(kv.lost) == 2).all() and (np.asarray(kv.seen) == 6).all() and np.isfinite(np.asarray(x)).all()


def test_a_batch_row_is_itself_alone():
    params, ids = run.model(METHOD)
    live = jnp.asarray(world.LIVE)
    whole = np.asarray(run.program(METHOD)(params, ids[:, :12], live))
    for i, count in enumerate(world.LENGTHS):
        alone = np.asarray(run.program(METHOD)(params, ids[i : i + 1, 12 - count : 12], None))
        np.testing.assert_allclose(whole[i, 12 - count :], alone[0], atol=2e-5)


METHODS = {
    "cca": CCA(),
    "scout": SCOUT(),
    "scout:retention": SCOUT(mixer="retention"),
    "landmark_attention": LandmarkAttention(),
    "meta_tokens": MetaTokens(token=9),
}


@pytest.mark.parametrize("name", METHODS)
def test_published_sizes(name):
    """Llama-3.1-8B's heads and widths, two layers, the methods' defaults, 4,096 tokens: shapes, and what a step keeps."""
    method, slots = METHODS[name], 4096 + 16
    cfg = Config(
        vocab=128256, width=4096, layers=2, heads=32, kv_heads=8, head_dim=128, hidden=14336, rope_theta=5e5, norm_eps=1e-5, tied=False
    )
    recipe = Recipe(attention=method)
    recipe.validate(cfg)

    def run(params, own, ids):
        params = params | {"methods": own}
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), recipe, new=16)
        x, after = decoder.step(cfg, params, tokens.x[:, -1:], jnp.ones((1, 1), bool), layers, recipe, ids=ids[:, :1])
        return x, layers, after

    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0), jnp.bfloat16))
    own = jax.eval_shape(lambda: recipe.init_params(jax.random.key(0), cfg))
    x, layers, after = jax.eval_shape(run, params, own, jax.ShapeDtypeStruct((1, 4096), jnp.int32))
    assert (x.shape, x.dtype) == ((1, 1, 4096), jnp.bfloat16)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), layers, after))
    shapes = [x.shape for x in jax.tree.leaves(layers[0][0].attention)]
    ring = lambda heads, slots: [(1, heads, slots, 128)] * 2 + [(1, slots)]
    want = {
        "cca": ring(8, 1024 + 16) + ring(32, slots // 16),
        "scout": ring(8, 1024) + ring(8, slots // 10),
        "scout:retention": [(1, 8, 128, 128), *ring(8, slots // 10)],
        "landmark_attention": ring(8, -(-slots // 51) * 51),
        "meta_tokens": [*ring(8, slots), *ring(8, -(-slots // 10)), (1,)],
    }
    assert shapes == want[name]


@pytest.mark.parametrize("name", METHODS)
def test_lowers_for_accelerators(name):
    recipe = Recipe(attention=METHODS[name])

    def answer(params, own, ids, live):
        params = params | {"methods": own}
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=4)
        return generate(CFG, params, tokens, layers, recipe, new=4).ids

    params = jax.eval_shape(lambda: blocks.init(CFG, jax.random.key(0), jnp.bfloat16))
    own = jax.eval_shape(lambda: recipe.init_params(jax.random.key(0), CFG))
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    exported = jax.export.export(jax.jit(answer), platforms=["tpu", "cuda"])(params, own, ids, ids.update(dtype=jnp.bool))
    assert exported.out_avals[0].shape == (2, 4)


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


def test_one_device():
    """Refused over several devices at every way in, before anything runs."""
    spread = Spread(mesh=make_mesh(sequence=2, devices=jax.devices()[:2]))
    params, ids = run.model(METHOD)
    tokens = decoder.embed(CFG, params, ids)
    x, live, layers = blocks.embed(CFG, params, ids[:, :1]), jnp.ones((world.B, 1), bool), decoder.empty(CFG, params, world.B, 4, RECIPE)
    for call in (
        lambda: blocks.forward(CFG, params, ids, method=METHOD, impl=spread),
        lambda: decoder.prefill(CFG, params, tokens, RECIPE, new=1, impl=spread),
        lambda: decoder.step(CFG, params, x, live, layers, RECIPE, impl=spread),
    ):
        with pytest.raises(ValueError, match="cca runs on one device"):
            call()
    with pytest.raises(ValueError, match="over several devices a recipe takes no `layers`, `edits` and `sparsify`"):
        decoder.prefill(CFG, params, tokens, Recipe(sparsify=AShape(local=3)), new=1, impl=spread)
    q, pos = jnp.zeros((1, 2, 8, 4)), jnp.arange(8, dtype=jnp.int32)[None]
    with pytest.raises(ValueError, match="a_shape lists the keys of whole sequences"):
        sparsify.attend(AShape(local=1, sinks=1, block_q=1, block_k=1), {}, 0, q, q, q, pos, impl=spread)
