"""VisionDrop's stages against their formulas, the official outputs and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import FasterVLM, VisionDropLayers, VisionDropSelect
from jaxtok.methods.vision.visiondrop import visiondrop
from jaxtok.models import decoder
from jaxtok.testing.rows import AT, TEXT, world
from tests.methods.golden import cases
from tests.methods.vision import numpyllama, tinyllama
from tests.methods.vision.select import best, images, kept, left
from tests.methods.vision.test_fastv import pictured
from tests.methods.vision.toyrows import do, reduced

small = {
    "visiondrop.select": lambda n: VisionDropSelect(capacity=n, contextual=3),
    "visiondrop.layers": lambda n: VisionDropLayers(capacity=n, images=16, contextual=3),
    "visiondrop.layers:dominant": lambda n: VisionDropLayers(capacity=n, images=16, contextual=0),
}


@functools.partial(jax.jit, static_argnums=0)
def through(recipe, params, tokens):
    return decoder.prefill(TEXT, params, tokens, recipe, new=0)[0]


def reference(x, cls, metric, dominant, contextual):
    """Rows of x [1+n c]: class row and dominant ones in raster order, then the merged targets."""
    return merged(x, [0] + [1 + j for j in best(cls.sum(0)[1:], dominant)], metric, contextual)


def merged(x, top, metric, contextual):
    """The rows of `top`, then every floor(n / c)-th of the n others with the mean of those like it."""
    rest = np.array([j for j in range(len(x)) if j not in top])
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    targets = rest[np.arange(contextual) * max(len(rest) // contextual, 1)]
    others = np.setdiff1d(rest, targets)
    to = np.argmax(unit[others] @ unit[targets].T, 1)
    made = [x[t] + (x[others[to == i]].mean(0) if (to == i).any() else 0) for i, t in enumerate(targets)]
    return np.array([*x[top], *made])


@pytest.mark.parametrize("dominant, contextual", [(5, 3), (2, 6)])
def test_reference(dominant, contextual):
    rng = np.random.default_rng(dominant)
    x, cls = rng.normal(size=(1, 18, 4)).astype(np.float32), rng.uniform(size=(1, 2, 18)).astype(np.float32)
    keys = rng.normal(size=(1, 2, 18, 3)).astype(np.float32)
    out = left(VisionDropSelect(capacity=dominant + contextual, contextual=contextual), images(x), Evidence(cls=cls, keys=keys))
    np.testing.assert_allclose(out.x[0], reference(x[0], cls[0], keys[0].mean(0), dominant, contextual), atol=1e-5)


def test_no_contextual_rows_leave_the_dominant_ones():
    rng = np.random.default_rng(1)
    x, cls = rng.normal(size=(1, 18, 4)).astype(np.float32), rng.uniform(size=(1, 2, 18)).astype(np.float32)
    want = kept(FasterVLM(capacity=5), images(x), Evidence(cls=cls))
    out = left(VisionDropSelect(capacity=5, contextual=0), images(x), Evidence(cls=cls, keys=cls[..., None]))
    np.testing.assert_allclose(out.x[0], x[0, want])


def test_room_for_all_rows_is_the_identity():
    rng = np.random.default_rng(2)
    x, cls = rng.normal(size=(1, 12, 4)).astype(np.float32), rng.uniform(size=(1, 2, 12)).astype(np.float32)
    out = left(VisionDropSelect(capacity=17, contextual=4), images(x), Evidence(cls=cls, keys=cls[..., None]))
    np.testing.assert_allclose(out.x[0], x[0])


def test_official_outputs(data):
    for case in cases(data, "visiondrop_vit"):
        d, c, x = int(case["dominant_patches"]), int(case["contextual"]), case["hidden_layer_minus2"]
        if not c:
            continue  # divides by zero
        evidence = Evidence(cls=case["cls_attn_layer22"], keys=case["key_metric_layer22_head_mean"][:, None])
        out = left(VisionDropSelect(capacity=d + c, contextual=c), images(x), evidence)
        np.testing.assert_allclose(out.x, case["out_tokens"], atol=1e-5)


# --- between the layers of the decoder -------------------------------------------------------------------------------------


def test_a_stage_by_hand():
    """Image rows 1 to 5; 2 and 4 are looked at most; of the others 1 and 5 are targets (every third), and 3 goes to the one whose key it has."""
    tokens = pictured(7, 5)._replace(x=jnp.arange(7.0)[None, :, None])
    looked = jnp.asarray([[[9, 0.1, 0.6, 0.2, 0.5, 0.3, 9]]])
    keys = jnp.asarray([[0, 0], [1, 0], [0, 0], [0, 1], [0, 0], [0, 1], [0, 0]], jnp.float32)[None, None]
    method = VisionDropLayers(capacity=4, images=5, contextual=2)
    _, plan = do(method, "plan", {}, Held(), tokens, Evidence(looked=looked, keys=keys))
    assert plan.index.tolist() == [[0, 2, 4, 1, 3, 6]]  # step = 3 // 2 = 1: targets 1 and 3
    assert reduced(plan, tokens).x[0, :, 0].tolist() == [0, 2, 4, 1, 3 + 5, 6]
    one = VisionDropLayers(capacity=3, images=5, contextual=1, positions="keep")
    _, plan = do(one, "plan", {}, Held(), tokens, Evidence(looked=looked, keys=keys))
    assert plan.index.tolist() == [[0, 1, 2, 4, 6]]  # the target stays in its place
    assert reduced(plan, tokens).x[0, :, 0].tolist() == [0, 1 + (3 + 5) / 2, 2, 4, 6]


def test_more_text_than_there_is_room_for_takes_the_place_of_image_rows_and_is_counted():
    """Told of 4 image rows, given 2 and more text: of the 7 rows 5 are left, the text and no image."""
    tokens, method = pictured(7, 2), VisionDropLayers(capacity=2, images=4, contextual=1)
    evidence = Evidence(looked=jnp.ones((1, 1, 7)), keys=jnp.ones((1, 1, 7, 2)))
    out = reduced(do(method, "plan", {}, Held(), tokens, evidence)[1], tokens)
    assert out.source.tolist() == [[0, -1, -1, 1, 2, 3, 4]] and out.lost.tolist() == [2]


def stage(dominant, contextual):
    def choose(x, image, before, own, keys):
        where = np.flatnonzero(image)
        top = best(own.mean(0)[where].mean(0)[where], dominant) if len(where) > dominant + contextual else list(range(len(where)))
        c = contextual if len(where) > dominant + contextual else 0
        rows = merged(x[where], top, keys.mean(0)[where], c) if c else x[where][top]
        out = np.concatenate([x[: where[0]], rows, x[where[-1] + 1 :]])
        return out, np.arange(len(out))

    return choose


def test_a_stage_against_the_reference():
    """Grouped key heads, a ragged batch with padding; one sequence (11 image rows) finds room for all of its rows."""
    params, tokens = world("layers")
    for dominant, contextual in ((5, 3), (10, 2)):
        method = VisionDropLayers(capacity=dominant + contextual, images=16, contextual=contextual)
        out = through(Recipe(layers=((AT, method),)), params, tokens)
        for b in range(3):
            want = numpyllama.twice(params, *numpyllama.rows_of(tokens, b), stage(dominant, contextual))
            np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)


def test_no_contextual_rows_leave_what_image_rows_look_at():
    params, tokens = world("layers")
    out = through(Recipe(layers=((AT, VisionDropLayers(capacity=5, images=16, contextual=0)),)), params, tokens)
    for b in range(3):
        want = numpyllama.twice(params, *numpyllama.rows_of(tokens, b), stage(5, 0))
        np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)


def test_official_outputs_of_the_decoder(data):
    """Three stages, rows merged by rotated keys: hidden states behind the last layer."""
    for case in cases(data, "visiondrop_llm"):
        pairs = [tuple(map(int, pair)) for pair in case["dominant_contextual_list"]]
        if not all(c for _, c in pairs):
            continue  # divides by zero
        recipe = visiondrop(pairs[0], tuple(pairs[1:]), tuple(int(k) for k in case["stages_1based_layer_counts"]))
        _, hidden = tinyllama.run(case, recipe.replace(select=None), sum(pairs[0]))
        np.testing.assert_allclose(hidden, case["last_hidden_state"][0], atol=5e-5)


def test_the_papers_recipe():
    recipe = visiondrop()
    assert recipe.select == VisionDropSelect(capacity=47, contextual=6)
    assert [(k, m.images, m.capacity, m.contextual) for k, m in recipe.layers] == [(8, 48, 35, 5), (16, 35, 26, 4), (24, 26, 19, 3)]
    assert (8 * 48 + 8 * 35 + 8 * 26 + 8 * 19) / 32 == 32
    with pytest.raises(ValueError, match="must ascend"):
        visiondrop(layers=(8, 24, 16))
    with pytest.raises(ValueError, match="contextual must be <= 4"):
        VisionDropLayers(capacity=4, images=9, contextual=5)
