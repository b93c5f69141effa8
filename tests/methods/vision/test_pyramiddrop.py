"""PyramidDrop against its formula, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Needs
from jaxtok.methods import FastV, PyramidDrop
from jaxtok.methods.vision.pyramiddrop import pyramiddrop
from jaxtok.models import decoder
from jaxtok.testing.rows import AT, TEXT, world
from tests.methods.golden import cases
from tests.methods.vision import numpyllama, tinyllama
from tests.methods.vision.test_fastv import pictured
from tests.methods.vision.toyrows import do

small = lambda n: PyramidDrop(capacity=n, images=16)


@functools.partial(jax.jit, static_argnums=0)
def through(recipe, params, tokens):
    return decoder.prefill(TEXT, params, tokens, recipe, new=0)[0]


def test_by_hand():
    """Two heads; the last row looks at rows 1 to 4 with .1 .4 .2 .1 and .3 .0 .2 .1: means .2 .2 .2 .1, the first two of the ties stay."""
    seen = np.zeros((1, 2, 1, 6), np.float32)
    seen[0, :, 0, 1:5] = [[0.1, 0.4, 0.2, 0.1], [0.3, 0.0, 0.2, 0.1]]
    _, plan = do(PyramidDrop(capacity=2, images=4), "plan", {}, Held(), pictured(6, 4), Evidence(rows=jnp.asarray(seen)))
    assert plan.index.tolist() == [[0, 1, 2, 5]]


def reference(capacity):
    def choose(x, image, before, own, keys):
        score = np.where(image, own.mean(0)[-1], np.inf)
        kept = np.sort(np.argsort(-score, kind="stable")[: (~image).sum() + capacity])
        return x[kept], kept

    return choose


def test_reference():
    """Grouped key heads, a ragged batch with padding."""
    params, tokens = world("layers")
    out = through(Recipe(layers=((AT, small(7)),)), params, tokens)
    for b in range(3):
        want = numpyllama.twice(params, *numpyllama.rows_of(tokens, b), reference(7))
        np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)


def test_official_outputs(data):
    """Scores' order, the rows that stay stage by stage, hidden states behind the last layer; ratio 1 is the model itself."""
    for case in cases(data, "pyramiddrop"):
        images, layers = int(case["image_tokens"]), tuple(int(k) for k in case["stages_1based_layer_counts"])
        recipe = pyramiddrop(images, layers, tuple(float(r) for r in case["ratios_of_original"]))
        mine, hidden = tinyllama.run(case, recipe)
        want = case[f"stage{len(layers) - 1}_kept_image_index"]
        for s, (_, method) in enumerate(recipe.layers):
            assert method.capacity == len(case[f"stage{s}_kept_rel_sorted"])
        np.testing.assert_array_equal(mine, want)
        np.testing.assert_allclose(hidden, case["last_hidden_state"][0], atol=2e-5)


def test_one_stage_that_keeps_its_ids_is_fastv_on_the_layers_own_attention():
    params, tokens = world("layers")
    seen = jax.jit(lambda t: decoder.last_rows(TEXT, params, t, 1, layer=AT))(tokens)
    mine = PyramidDrop(capacity=6, images=16, positions="keep")
    fast = FastV(capacity=6, images=16)
    a, b = (do(m, "plan", {}, Held(), tokens, Evidence(rows=seen))[1] for m in (mine, fast))
    np.testing.assert_array_equal(a.index, b.index)
    assert (mine.positions, fast.positions, mine.needs) == ("keep", "keep", fast.needs._replace(own=True))


def test_ratios_of_one_change_nothing():
    params, tokens = world("layers")
    recipe = pyramiddrop(16, (0, 1), (1.0, 1.0))
    np.testing.assert_allclose(through(recipe, params, tokens).x, through(Recipe(), params, tokens).x, atol=1e-6)


def test_the_papers_recipe():
    recipe = pyramiddrop(576)
    assert [(k, m.images, m.capacity) for k, m in recipe.layers] == [(8, 576, 288), (16, 288, 144), (24, 144, 72)]
    equivalent = (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32
    assert equivalent == 270 and recipe.layers[0][1].needs == Needs(rows=1, own=True)


def test_refused():
    for layers, ratios in (((8, 4), (0.5, 0.2)), ((4, 8), (0.2, 0.5)), ((4,), (0.5, 0.2))):
        with pytest.raises(ValueError, match="must ascend"):
            pyramiddrop(576, layers, ratios)
    with pytest.raises(ValueError, match="ratio"):
        pyramiddrop(576, (4,), (1.5,))
