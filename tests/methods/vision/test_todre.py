"""ToDRE's stages against their formulas and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import ToDRELayers, ToDRESelect
from jaxtok.methods.vision.todre import todre
from jaxtok.models import decoder
from jaxtok.testing.rows import AT, TEXT, world
from tests.methods.vision import numpyllama
from tests.methods.vision.select import images, kept
from tests.methods.vision.test_fastv import pictured

small = {
    "todre.select": lambda n: ToDRESelect(capacity=n),
    "todre.select:random": lambda n: ToDRESelect(capacity=n, pivot="random"),
    "todre.layers": lambda n: ToDRELayers(images=16, tau=0.0 if n == 16 else 2.0),
    "todre.layers:always": lambda n: ToDRELayers(images=16, tau=0.0 if n == 16 else None),
}


def cosines(x):
    u = x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
    return u @ u.T


def reference(x, cls, k):
    """Picks in order, the sum taken anew at each pick."""
    like, picked = cosines(x), [int(np.argmax(cls))]
    while len(picked) < k:
        left = [v for v in range(len(x)) if v not in picked]
        picked.append(min(left, key=lambda v: sum(like[v, c] for c in picked)))
    return picked


def drawn(seed, n=14):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, n, 5)), rng.uniform(size=(2, 3, n)).astype(np.float32)


def test_by_hand():
    """Pivot 0 degrees; the least like it is 180; of 90 (sum 0) and 20 (sum 0) the older."""
    angle = np.deg2rad([0, 20, 90, 180])
    x = np.stack([np.cos(angle), np.sin(angle)], -1)[None].round(6)
    cls = np.array([[[0.7, 0.1, 0.1, 0.1]]], np.float32)
    assert kept(ToDRESelect(capacity=2, special=0), images(x, 0), Evidence(cls=cls)) == [0, 3]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_sum_against_brute_force(seed):
    x, cls = drawn(seed)
    for i in range(2):
        want = reference(x[i], cls[i].mean(0), 6)
        assert kept(ToDRESelect(capacity=6, special=0), images(x, 0), Evidence(cls=cls), row=i) == sorted(want)
        found = kept(ToDRESelect(capacity=6, special=0), images(x, 0), Evidence(cls=cls), jnp.asarray([4, 1]), i)
        assert found == sorted(want[: (4, 1)[i]])


def test_the_pivot_is_the_thumbnails():
    x, cls = drawn(4)
    cls[0, :, 10] = 9.0  # a crop's row
    segment = np.repeat([0, 1], 7)
    tokens = images(x, 0, segment=segment)
    found = kept(ToDRESelect(capacity=1, special=0, crops=2), tokens, Evidence(cls=cls))
    assert found == [int(np.argmax(cls[0].mean(0)[:7]))]
    assert kept(ToDRESelect(capacity=1, special=0), tokens, Evidence(cls=cls)) == [10]


def test_without_a_class_row_the_pivot_is_drawn():
    x, _ = drawn(5)
    assert len(kept(ToDRESelect(capacity=4, special=0, pivot="random"), images(x, 0), Evidence())) == 4


# --- between the layers of the decoder -------------------------------------------------------------------------------------


def alphas(a, image):
    """(text to image, image to text) of attention a [h n n]."""
    a = a.mean(0)
    return [a[f][:, t].sum() / a[f].sum() for f, t in ((~image, image), (image, ~image))]


def test_both_shares_by_hand():
    """Text 0, image 1 2, text 3. From the text .3 of 2 rows goes to the image; from the image .8 and .4 of 2 rows go to the text before it."""
    a = np.array([[1, 0, 0, 0], [0.8, 0.2, 0, 0], [0.4, 0.1, 0.5, 0], [0.6, 0.1, 0.2, 0.1]], np.float32)
    np.testing.assert_allclose(alphas(a[None], np.array([False, True, True, False])), [0.15, 0.6])
    told = Evidence(received=jnp.asarray(a.sum(0))[None, None], looked=jnp.asarray(a[1:3].sum(0))[None, None])
    for tau, stays in ((0.61, 2), (0.59, 4), (0.14, 4)):
        _, plan = ToDRELayers(images=2, tau=tau).plan({}, Held(), pictured(4, 2), told)
        assert (np.asarray(plan.index) >= 0).sum() == stays


@functools.partial(jax.jit, static_argnums=0)
def through(recipe, params, tokens):
    return decoder.prefill(TEXT, params, tokens, recipe, new=0)[0]


def test_reference():
    """Grouped key heads, a ragged batch: with tau between what its sequences have, some lose their image rows and some do not."""
    params, tokens = world("layers")
    found = []
    for b in range(3):
        x, image = numpyllama.rows_of(tokens, b)
        found.append(max(alphas(numpyllama.layer(TEXT, params["layers"][0], x, np.arange(len(x)))[1], image)))
    tau = float(np.mean(sorted(found)[:2]))
    out = through(Recipe(layers=((AT, ToDRELayers(images=16, tau=tau)),)), params, tokens)
    gone = []
    for b in range(3):
        go = found[b] < tau
        keep = lambda x, image, *_: (x[~image], np.flatnonzero(~image)) if go else (x, np.arange(len(x)))  # noqa: B023
        want = numpyllama.twice(params, *numpyllama.rows_of(tokens, b), keep, repack=False)
        np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)
        gone.append(go)
    assert sorted(gone) == [False, False, True]


def test_without_a_threshold_the_rows_and_their_cost_are_gone():
    params, tokens = world("layers")
    always = through(Recipe(layers=((AT, ToDRELayers(images=16, tau=None)),)), params, tokens)
    masked = through(Recipe(layers=((AT, ToDRELayers(images=16, tau=9.0)),)), params, tokens)
    assert (always.x.shape[1], masked.x.shape[1]) == (6, 22)
    np.testing.assert_allclose(always.x, masked.x[:, -6:], atol=1e-6)


def test_tau_of_zero_is_stage_one():
    params, tokens = world("layers")
    out = through(Recipe(layers=((AT, ToDRELayers(images=16, tau=0.0)),)), params, tokens)
    np.testing.assert_array_equal(out.x, through(Recipe(), params, tokens).x)


def test_the_papers_recipe():
    recipe = todre(2880, 288, by=30)
    assert recipe.select == ToDRESelect(capacity=288)
    assert recipe.layers == ((28, ToDRELayers(images=288, tau=0.1)), (30, ToDRELayers(images=288, tau=None)))
    with pytest.raises(ValueError, match="by=28"):
        todre(2880, 288, by=28)
    with pytest.raises(ValueError, match="is told of images=9 rows, but 6 rows"):
        ToDRELayers(images=9, tau=None).count(6, 6)
