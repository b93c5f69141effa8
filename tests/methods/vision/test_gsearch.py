"""G-Search and P-Sigmoid: the score by hand, schedules between layers, the searches on losses that are known and on a model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import planner
from jaxtok.core.protocols import Held
from jaxtok.core.types import IMAGE, Evidence
from jaxtok.evals import cost
from jaxtok.methods import FastV, GSearch
from jaxtok.methods.vision.gsearch import gsearch, p_sigmoid, sigmoid_counts
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.testing import rows
from jaxtok.testing.world import near
from jaxtok.train import gsearch as search
from tests.methods.vision.test_fastv import pictured
from tests.methods.vision.toyrows import do

small = {
    "gsearch": lambda n: GSearch(capacity=n, images=16),
}


def test_by_hand():
    """Two heads, column sums over the prompt: .5 .2 .3 .1 and .1 .2 .3 .4 have means .3 .2 .3 .25; rows 1, 3 and 4 stay of four."""
    asked = np.zeros((1, 2, 6), np.float32)
    asked[0, :, 1:5] = [[0.5, 0.2, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]]
    method = GSearch(capacity=1, images=4, schedule=(4, 3, 1))
    place = method.layer(1, 3)
    assert place == GSearch(capacity=3, images=4) and method.layer(2, 3) == GSearch(capacity=1, images=3)
    _, plan = do(place, "plan", {}, Held(), pictured(6, 4), Evidence(asked=jnp.asarray(asked)))
    assert plan.index.tolist() == [[0, 1, 3, 4, 5]]


def turned(z, angle):
    """Channel i against channel i + d / 2, by the angles [n d/2]."""
    low, high, c, s = z[..., : angle.shape[1]], z[..., angle.shape[1] :], np.cos(angle), np.sin(angle)
    return np.concatenate([low * c - high * s, high * c + low * s], -1)


def reference(counts, params, tokens):
    """f64: the last row of the first prompt under a schedule, from whole rows of attention."""
    cfg, get = DEEP, lambda a: np.asarray(a, np.float64)
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * get(w)
    x, at, image, w = get(tokens.x[0]), np.arange(tokens.x.shape[1]), np.asarray(tokens.kind[0]) == IMAGE, None
    for i, p in enumerate(params["layers"]):
        if image.sum() > counts[i]:
            asks = at > at[image].max() if image.any() else at < 0
            score = w[:, asks].sum(1).mean(0)
            best = np.flatnonzero(image)[np.argsort(-score[image], kind="stable")[: counts[i]]]
            stay = ~image
            stay[best] = True
            x, at, image = x[stay], at[stay], image[stay]
        y = rms(x, p["attn_norm"])
        q, k, v = ((y @ get(p[name])).reshape(len(x), -1, cfg.head_dim).transpose(1, 0, 2) for name in "qkv")
        angle = at[:, None] * get(blocks.frequencies(cfg, i))
        w = turned(q, angle) @ np.repeat(turned(k, angle), 2, 0).transpose(0, 2, 1) * cfg.head_dim**-0.5
        w = np.exp(np.where(at[None] <= at[:, None], w, -np.inf))
        w = w / w.sum(-1, keepdims=True)
        x = x + (w @ np.repeat(v, 2, 0)).transpose(1, 0, 2).reshape(len(x), -1) @ get(p["o"])
        y = rms(x, p["mlp_norm"])
        gate = y @ get(p["gate"])
        x = x + (gate / (1 + np.exp(-gate)) * (y @ get(p["up"]))) @ get(p["down"])
    return x[-1]


DEEP = Config(vocab=32, width=16, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=24)


@functools.cache
def world():
    params = blocks.init(DEEP, jax.random.key(5), embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    return params, rows.world("layers")[1]


@functools.cache
def evaluator():
    """The cosine of the last row's logits with the full model's, over two batches, and those of the full model."""
    params, tokens = world()
    other = tokens._replace(x=jnp.flip(tokens.x, 0))
    full = jax.jit(lambda t: decoder.logits(DEEP, params, decoder.prefill(DEEP, params, t, new=0)[0].x[:, -1:])[:, 0])
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    data = [(t, unit(full(t))) for t in (tokens, other)]
    return search.evaluator(DEEP, params, data, lambda logits, want: jnp.mean(jnp.sum(unit(logits) * want, -1)), images=16), data


def test_a_schedule_equals_the_reference():
    """Two places of four layers: the last row of the recipe's prefill, with fewer static rows."""
    params, tokens = world()
    counts = (16, 9, 9, 3)
    recipe = gsearch(counts)
    assert [k for k, _ in recipe.layers] == [1, 3] and planner.of_recipe(recipe, DEEP, 16) == (16, 37 / 4, 3)
    end, layers = jax.jit(lambda t: decoder.prefill(DEEP, params, t, recipe, new=0))(tokens)
    near(end.x[0, -1], reference(counts, params, tokens), 3e-5, "last row")
    assert [part.kv.k.shape[2] for (part,) in layers] == [22, 15, 15, 9]
    # the mask form of the search scores the same schedule alike
    score, data = evaluator()
    got = decoder.logits(DEEP, params, end.x[:, -1:])[:, 0]
    want = jnp.mean(jnp.sum(got / jnp.linalg.norm(got, axis=-1, keepdims=True) * data[0][1], -1))
    alone = score.run(params, *data[0], jnp.asarray(counts, jnp.int32))
    near(alone, want, 2e-5, "mask form")


def test_one_place_is_fastv_with_the_prompts_queries():
    """One text row behind the picture: FastV, whose query is the last row."""
    rng = np.random.default_rng(0)
    seen = rng.random((1, 3, 6)).astype(np.float32)
    evidence = Evidence(asked=jnp.asarray(seen), rows=jnp.asarray(seen)[:, :, None])
    plans = [do(m, "plan", {}, Held(), pictured(6, 4), evidence)[1] for m in (GSearch(capacity=2, images=4), FastV(capacity=2, images=4))]
    np.testing.assert_array_equal(plans[0].index, plans[1].index)


def test_the_whole_search_compiles_once():
    """On a model: the schedule never rises, its score does not fall by more than the tolerance, and one program scored all of them."""
    score, _ = evaluator()
    near(score((16,) * 4), 1.0, 1e-5, "the full model agrees with itself")
    counts = search.greedy(score, 16, 4, tolerance=0.02, candidates=(0, 4, 8, 12))
    assert counts[0] == 16 and sorted(counts, reverse=True) == list(counts) and counts[-1] < 16
    assert score(counts) >= score((16,) * 4) - 0.02
    fitted = search.fit_sigmoid(score, counts, budget=9, rounds=2)
    assert sum(fitted.counts) / 4 <= 9 and fitted.score == score(fitted.counts)
    assert score.run._cache_size() == 1


@pytest.mark.parametrize("bisect", [False, True])
def test_greedy_is_exhaustive_on_a_separable_loss(bisect):
    """score = - sum over layers of what a layer lacks of its need: the schedule of fewest rows that loses nothing, whatever the needs."""
    rng = np.random.default_rng(2)
    tried = range(0, 9)
    for _ in range(20):
        need = rng.integers(0, 9, 4)
        score = lambda counts, need=need: -float(sum(max(n - c, 0) for n, c in zip(need, counts, strict=True)))
        got = search.greedy(score, 8, 4, candidates=tried, bisect=bisect)
        falling = [(8, *c) for c in itertools.product(tried, repeat=3) if list(c) == sorted(c, reverse=True)]
        best = min((c for c in falling if score(c) >= score((8,) * 4)), key=sum)
        assert got == best, (need, got, best)
        assert all(a >= b for a, b in itertools.pairwise(got))


def test_sigmoid_by_hand():
    """Midpoint 2, steepness ln 3: 3/4, 1/2, 1/4 of the rows through layers 1, 2, 3."""
    assert sigmoid_counts(16, 4, middle=2, steep=float(np.log(3))) == (16, 12, 8, 4)
    assert sigmoid_counts(16, 3, middle=0, steep=0) == (16, 8, 8)
    assert p_sigmoid(16, 4, middle=2, steep=float(np.log(3))) == gsearch((16, 12, 8, 4))
    assert search.nearest_sigmoid(sigmoid_counts(1000, 8, middle=3.5, steep=1.0)) == pytest.approx((3.5, 1.0), abs=0.13)


def test_p_sigmoid_finds_the_shape():
    """Where the score is the nearness to a sigmoid schedule of the budget's cost, that schedule is found from a step, within the budget."""
    want = np.array(sigmoid_counts(576, 12, middle=5, steep=1.0))
    score = lambda counts: -float(np.abs(np.array(counts) - want).sum())
    found = search.fit_sigmoid(score, (576,) * 4 + (144,) * 8, budget=float(want.mean()), rounds=12)
    assert found.score > score((576,) * 4 + (144,) * 8) / 5 and sum(found.counts) / 12 <= want.mean()
    assert abs(found.steep - 1) < 0.2 and abs(found.middle - 5) < 0.2 and sorted(found.counts, reverse=True) == list(found.counts)
    with pytest.raises(ValueError, match="a budget of 40 is out of reach: 576 image rows through the first of 12 layers cost 48"):
        search.fit_sigmoid(score, (576,) * 12, budget=40)


def test_flops_are_those_that_are_counted():
    """The formula equals the matrix products of the recipe's prefill, but for the evidence that ranks the rows."""
    counts, text = (24, 12, 12, 12), 8
    params = jax.eval_shape(lambda: blocks.init(DEEP, jax.random.key(0)))

    def products(recipe):
        def fn(params, ids):
            tokens = decoder.embed(DEEP, params, ids)
            tokens = tokens._replace(kind=jnp.where(jnp.arange(32) < 24, IMAGE, 0).astype(jnp.int8)[None])
            return decoder.prefill(DEEP, params, tokens, recipe, new=0)

        return cost.count(fn, params, jax.ShapeDtypeStruct((1, 32), jnp.int32)).by_primitive["dot_general"][0]

    assert products(gsearch((24,) * 4)) == search.flops(DEEP, (24,) * 4, text)
    evidence = 2 * 32 * 32 * DEEP.heads * DEEP.head_dim  # logits once more
    assert products(gsearch(counts)) == search.flops(DEEP, counts, text) + evidence


def test_refused():
    with pytest.raises(ValueError, match=r"schedule \(4, 5\) rises"):
        GSearch(capacity=1, images=4, schedule=(4, 5))
    with pytest.raises(ValueError, match="a schedule of 2 layers has no place before layer 2 of 4"):
        GSearch(capacity=1, images=4, schedule=(4, 2)).layer(2, 4)
    with pytest.raises(ValueError, match="steep must be from 0"):
        sigmoid_counts(16, 4, middle=2, steep=-1)
    with pytest.raises(ValueError, match="data holds no batch"):
        search.evaluator(DEEP, {}, [], lambda a, b: a, images=4)
