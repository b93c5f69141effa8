"""FastV against its formula, the official outputs and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, Evidence
from jaxtok.evals import cost
from jaxtok.methods import FastV
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from tests.methods.golden import cases
from tests.methods.vision import tinyllama
from tests.methods.vision.toyrows import do, rows

small = {
    "fastv": lambda n: FastV(capacity=n, images=16),
    "fastv:all": lambda n: FastV(capacity=n, images=16, query="all"),
}


def pictured(n, images, special=1):
    """Rows of text, `images` image rows, one of text."""
    tokens = rows(np.ones((1, n, 2)), special=0)
    kind = np.zeros((1, n), np.int8)
    kind[0, special : special + images] = IMAGE
    return tokens._replace(kind=jnp.asarray(kind))


def test_by_hand():
    """Two heads; the last row looks at rows 1 to 4 with .1 .4 .2 .1 and .3 .0 .2 .1: means .2 .2 .2 .1, the first two of the ties stay."""
    seen = np.zeros((1, 2, 1, 6), np.float32)
    seen[0, :, 0, 1:5] = [[0.1, 0.4, 0.2, 0.1], [0.3, 0.0, 0.2, 0.1]]
    _, plan = do(FastV(capacity=2, images=4), "plan", {}, Held(), pictured(6, 4), Evidence(rows=jnp.asarray(seen)))
    assert plan.index.tolist() == [[0, 1, 2, 5]] and plan.lost.tolist() == [0]


def test_every_query_or_the_last():
    """What all look at and what the last looks at differ."""
    tokens, last, all_ = pictured(6, 4), np.zeros((1, 1, 1, 6), np.float32), np.zeros((1, 1, 6), np.float32)
    last[0, 0, 0, 4], all_[0, 0, 1] = 1, 3
    evidence = Evidence(rows=jnp.asarray(last), received=jnp.asarray(all_))
    one = do(FastV(capacity=1, images=4), "plan", {}, Held(), tokens, evidence)[1]
    every = do(FastV(capacity=1, images=4, query="all"), "plan", {}, Held(), tokens, evidence)[1]
    assert one.index.tolist() == [[0, 4, 5]] and every.index.tolist() == [[0, 1, 5]]


def test_official_outputs(data):
    """The scores, the rows that stay and the hidden states behind the last layer."""
    for case in cases(data, "fastv"):
        images, place = int(case["image_tokens"]), int(case["fastv_k"])
        kept = case["kept_image_index_sorted"]
        recipe = Recipe(layers=((place, FastV(capacity=len(kept), images=images)),))
        mine, hidden = tinyllama.run(case, recipe)
        np.testing.assert_array_equal(mine, kept - kept.min() if kept.max() >= images else kept)
        np.testing.assert_allclose(hidden, case["last_hidden_state"][0], atol=2e-5)
        full, hidden = tinyllama.run(case, Recipe(layers=((place, FastV(capacity=images, images=images)),)))
        assert len(full) == images
        np.testing.assert_allclose(hidden, case["full_model_last_hidden"][0], atol=2e-5)


def test_the_saving_is_counted():
    """Behind the place a quarter of the rows goes through the layers: FLOPs fall by what these rows cost."""
    cfg = Config(vocab=8, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=64)
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def flops(recipe):
        def run(params, ids):
            tokens = decoder.embed(cfg, params, ids)
            tokens = tokens._replace(kind=jnp.where(jnp.arange(128) < 124, IMAGE, 0).astype(jnp.int8)[None])
            return decoder.prefill(cfg, params, tokens, recipe, new=0)

        return cost.count(run, params, ids).flops

    full = flops(Recipe())
    pruned = flops(Recipe(layers=((1, FastV(capacity=28, images=124)),)))
    assert pruned < full * (0.25 + 0.75 * 0.25 + 0.06), pruned / full


def test_refused():
    with pytest.raises(ValueError, match="query must be one of last, all, got 'first'"):
        FastV(capacity=2, images=4, query="first")
    with pytest.raises(ValueError, match=r"fastv is told of images=9 rows, but 6 rows come to it"):
        FastV(capacity=2, images=9).plan({}, Held(), pictured(6, 4), Evidence(rows=jnp.zeros((1, 1, 1, 6))))
    with pytest.raises(ValueError, match="places 1 to 3"):
        Recipe(layers=((0, FastV(capacity=2, images=4)),)).validate(
            Config(vocab=8, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=64)
        )
