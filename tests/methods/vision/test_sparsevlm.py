"""SparseVLM against its formulas and its limits; no official outputs lie here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.condense import density_peaks
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Needs
from jaxtok.methods import SparseVLM
from jaxtok.methods.vision.sparsevlm import KEPT, clusters, sparsevlm
from jaxtok.models import decoder
from jaxtok.testing.rows import AT, TEXT, world
from tests.methods.vision import numpyllama
from tests.methods.vision.test_fastv import pictured
from tests.methods.vision.toyrows import do, reduced

small = {
    "sparsevlm": lambda n: SparseVLM(capacity=n, images=16),
    "sparsevlm:recycle": lambda n: SparseVLM(capacity=n, images=16, made=1),
    "sparsevlm:rank": lambda n: SparseVLM(capacity=n, images=16, scale=None if n == 16 else 2.5, bias=1.0),
    "sparsevlm:paper": lambda n: SparseVLM(capacity=n, images=16, made=2, scale=None if n == 16 else 0.4, variant="paper"),
}


def raters(x, image, text):
    """Which of the text rows rate."""
    logits = x[image] @ x[text].T
    e = np.exp(logits - logits.max(1, keepdims=True))
    r = (e / e.sum(1, keepdims=True)).mean(0)
    return np.flatnonzero(text)[r >= r.mean()]


def peaks(x, count):
    """Density peaks, one row after another -> (centres, the centre of each row)."""
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1) / x.shape[1])
    density = np.array([np.exp(-np.mean(np.sort(row)[:count] ** 2)) for row in d])
    above = lambda i: [
        d[i, j] for j in range(len(x)) if (density[j], -j) > (density[i], -i)
    ]  # mutual nearest rows tie: the older is denser
    delta = np.array([min(above(i), default=d.max()) for i in range(len(x))])
    centres = np.sort(np.argsort(-density * delta, kind="stable")[:count])
    return centres, np.array([i if i in centres else centres[np.argmin(d[i, centres])] for i in range(len(x))])


def clustered(x, count, total=False):
    centres, into = peaks(x, count)
    return [x[into == i].sum(0) if total else x[into == i].mean(0) for i in centres]


def test_raters_by_hand():
    """Two image rows, three text rows behind them; the second text row is the one that is like both."""
    tokens = pictured(6, 2)._replace(x=jnp.asarray([[[9, 9], [1, 0], [1, 0.1], [0, 0], [2, 0], [-1, 0]]], jnp.float32))
    held = do(SparseVLM(capacity=1, images=2), "start", {}, tokens)
    assert held.slots.tolist() == [[0, 0, 0, 0, 1, 0]]


def test_only_raters_are_heard():
    """Rows 3 to 5 ask about 1 and 2; row 4 alone rates and likes 2, the other ones like 1."""
    seen = np.zeros((1, 1, 3, 6), np.float32)
    seen[0, 0, :, 1:3] = [[0.9, 0], [0.1, 0.2], [0.9, 0]]
    state = Held(jnp.asarray([[0, 0, 0, 0, 1.0, 0]]))
    _, plan = do(SparseVLM(capacity=1, images=2), "plan", {}, state, pictured(6, 2), Evidence(rows=jnp.asarray(seen)))
    assert plan.index.tolist() == [[0, 2, 3, 4, 5]]


def test_density_peaks():
    """Against the loops, with dead rows between; two far groups make two centres."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 13, 5)).astype(np.float32)
    live = np.ones((3, 13), bool)
    live[1, [0, 4, 5]] = False
    count = np.array([3, 2, 4], np.int32)
    centre, into = jax.device_get(jax.jit(density_peaks)(jnp.asarray(x), jnp.asarray(live), jnp.asarray(count)))
    for b in range(3):
        where = np.flatnonzero(live[b])
        centres, groups = peaks(x[b][where].astype(np.float64), count[b])
        np.testing.assert_array_equal(np.flatnonzero(centre[b]), where[centres])
        np.testing.assert_array_equal(into[b][where], where[groups])
        assert (into[b][~live[b]] == -1).all()
    two = jnp.asarray(np.r_[0, 0.1, 0.2, 9, 9.1, 9.3, 9.4].astype(np.float32)[None, :, None])
    assert len(set(density_peaks(two, jnp.ones((1, 7), bool), jnp.asarray([2]))[1][0, jnp.asarray([0, 3])].tolist())) == 2


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_the_best_dropped_rows_come_back(variant):
    """Of 52 image rows 6 stay; m = floor(.3 * 46) + 1 = 14 of the other 46 make 2."""
    n, images = 60, 52
    rng = np.random.default_rng(1)
    x, a = rng.normal(size=(n, 4)).astype(np.float32), rng.uniform(size=(1, 2, 5, n)).astype(np.float32)
    tokens = pictured(n, images, 3)._replace(x=jnp.asarray(x)[None])
    method = SparseVLM(capacity=8, images=images, made=2, variant=variant)
    assert clusters(46) == 2
    held = do(method, "start", {}, tokens)
    text = np.arange(n) >= 55
    image = (np.arange(n) >= 3) & ~text
    rate = raters(x.astype(np.float64), image, text)
    np.testing.assert_array_equal(np.flatnonzero(held.slots[0]), rate)
    _, plan = do(method, "plan", {}, held, tokens, Evidence(rows=jnp.asarray(a)))
    out = reduced(plan, tokens, "repack")
    score = a[0].mean(0)[rate - 55].mean(0)
    order = 3 + np.argsort(-score[3:55], kind="stable")
    want = [*x[:3], *x[np.sort(order[:6])], *clustered(x[np.sort(order[6:20])], 2, variant == "paper"), *x[55:]]
    np.testing.assert_allclose(out.x[0], np.array(want), atol=1e-5)


def pruned(kept):
    def choose(x, image, before, own, keys):
        where, text = np.flatnonzero(image), np.arange(len(x)) > np.flatnonzero(image)[-1]
        p = before.mean(0)[raters(choose.first, image, text)]
        top = where[np.argsort(-p.mean(0)[where], kind="stable")[: kept(len(where), np.linalg.matrix_rank(p[:, where].astype(np.float32)))]]
        rows = np.sort(np.concatenate([np.flatnonzero(~image), top]))
        return x[rows], rows

    return choose


@functools.partial(jax.jit, static_argnums=0)
def through(recipe, params, tokens):
    return decoder.prefill(TEXT, params, tokens, recipe, new=0)[0]


@pytest.mark.parametrize(
    "scale, variant, kept",
    [
        (None, "official", lambda n, rank: 7),
        (2.0, "official", lambda n, rank: min(int(2 * rank + 1), n, 7)),
        (0.7, "paper", lambda n, rank: min(n - int(0.7 * (n - rank)), 7)),
    ],
)
def test_reference(scale, variant, kept):
    """Raters from the embeddings (place 0), grouped key heads, a ragged batch with padding, the count by the rank."""
    params, tokens = world("layers")
    method = SparseVLM(capacity=7, images=16, scale=scale, bias=1.0, variant=variant, stages=((AT, 16, 7, 0),))
    out = through(Recipe(layers=((0, method), (AT, method))), params, tokens)
    for b in range(3):
        x, image = numpyllama.rows_of(tokens, b)
        choose = pruned(kept)
        choose.first = x
        want = numpyllama.twice(params, x, image, choose)
        np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)


def test_room_for_all_rows_is_the_identity():
    params, tokens = world("layers")
    method = SparseVLM(capacity=17, images=16, made=3)
    np.testing.assert_array_equal(through(Recipe(layers=((AT, method),)), params, tokens).x, through(Recipe(), params, tokens).x)


def test_the_authors_recipe():
    recipe = sparsevlm()
    (first, method), *_ = recipe.layers
    assert [k for k, _ in recipe.layers] == [0, 3, 7, 16] and all(m is method for _, m in recipe.layers)
    assert first == 0 and method.layer(0, 32).needs == Needs() and method.layer(3, 32).needs == Needs(rows=128)
    assert method.stages == ((3, 576, 309, 9), (7, 309, 204, 4), (16, 204, 113, 3))
    assert method.layer(0, 32).count(640, 576) == 640 and method.layer(7, 32).count(373, 309) == 268
    for name, kept in KEPT.items():
        assert abs((2 * 576 + 4 * kept[0] + 10 * kept[1] + 16 * kept[2]) / 32 - name) < 2
    with pytest.raises(ValueError, match="must ascend from 1"):
        sparsevlm(layers=(0, 3, 7))
    for bad in ({"made": 3}, {"recycle": 2.0}, {"variant": "mean"}, {"scale": 2.0, "variant": "paper"}):
        with pytest.raises(ValueError):
            SparseVLM(capacity=2, images=4, **bad)
