"""AIM's merging and pruning against its formulas, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import IMAGE, Evidence, Needs, Rank
from jaxtok.methods import AIMLayers, AIMSelect
from jaxtok.methods.vision.aim import aim
from jaxtok.models import decoder
from jaxtok.models.config import Config
from jaxtok.ops.evidence import ranked
from tests.methods.golden import cases
from tests.methods.vision.places import TINY, model, planned, prompt, spy
from tests.methods.vision.select import best, images, left
from tests.methods.vision.toyrows import rows

small = {"aim.select": lambda n: AIMSelect(capacity=n), "aim.layers": lambda n: AIMLayers(capacity=n, images=16)}


def one_round(x, remove):
    """Rows after a round, in the official order."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max((unit[i] @ unit[j], -j) for j in b) for i in a}
    order = sorted(a, key=lambda i: (-best[i][0], i))
    gone = order[:remove]
    groups = {j: [j] + [i for i in gone if -best[i][1] == j] for j in b}
    return np.array([x[i] for i in order[remove:]] + [x[groups[j]].mean(0) for j in b])


def reference(x, capacity):
    while len(x) > capacity:
        x = one_round(x, min(len(x) - capacity, len(x) // 2))
    return x


def test_by_hand():
    """Rows 0 and 3 are alike: they become their mean; row 2 stands before what row 1 is."""
    x = np.array([[[1, 0], [0, 2], [-1, -0.5], [3, 0]]], np.float32)
    out = left(AIMSelect(capacity=3, special=0), images(x, 0), Evidence())
    np.testing.assert_allclose(out.x[0], [[-1, -0.5], [0, 2], [2, 0]])
    assert out.size[0].tolist() == [1, 1, 2] and out.source[0].tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("n, capacity", [(16, 12), (16, 4), (17, 5), (20, 3)])
def test_reference(n, capacity):
    rng = np.random.default_rng(n + capacity)
    x = rng.normal(size=(2, n, 6)).astype(np.float32)
    out = left(AIMSelect(capacity=capacity, special=0), images(x, 0), Evidence())
    traced = left(AIMSelect(capacity=n, special=0), images(x, 0), Evidence(), jnp.asarray([capacity, n]))
    np.testing.assert_allclose(out.x[0], reference(x[0].astype(np.float64), capacity), atol=1e-5)
    np.testing.assert_allclose(out.x[1], reference(x[1].astype(np.float64), capacity), atol=1e-5)
    np.testing.assert_allclose(traced.x[0, -capacity:], out.x[0], atol=1e-6)
    assert np.asarray(out.size).sum(1).tolist() == [n, n]


def test_official_outputs(data):
    for case in cases(data, "aim_merge"):
        x = case["features"]
        n = x.shape[1]
        one, two = n - n // 2, n - n // 2 - min(n // 4, (n - n // 2) // 2)
        for name, capacity in (("after_round1_r_N_div_2", one), ("after_round2_r_N_div_4", two), ("single_round_r_N_div_5", n - n // 5)):
            out = left(AIMSelect(capacity=capacity, special=0), images(x, 0), Evidence())
            assert out.x.shape == case[name].shape
            np.testing.assert_allclose(out.x, case[name], atol=1e-5)


# --- pruning between the decoder's layers ---------------------------------------------------------------------------------


def pagerank(logits, see, tau, rounds):
    """Ranks [h n] of logits [h n n] under the mask `see`, entry by entry; a row that sees nothing gives nothing."""
    h, n = logits.shape[:2]
    rank = np.full((h, n), 1 / n)
    for _ in range(rounds):
        new = np.zeros((h, n))
        for k in range(h):
            for i in range(n):
                there = np.flatnonzero(see[i])
                e = np.exp((logits[k, i, there] - logits[k, i, there].max(initial=-np.inf)) / tau) if len(there) else np.zeros(0)
                new[k, there] += rank[k, i] * e / max(e.sum(), 1e-300)
        rank = new
    return rank


def test_pruning_by_hand():
    """Two heads: ranks .3 .4 and .4 .0 of rows 1 and 2: sqrt(.125) and sqrt(.08)."""
    tokens = rows(np.ones((1, 4, 2)), special=0)._replace(kind=jnp.asarray([[0, IMAGE, IMAGE, 0]], jnp.int8))
    rank = jnp.asarray([[[0.2, 0.3, 0.4, 0.1], [0.4, 0.4, 0.0, 0.2]]])
    method = AIMLayers(capacity=1, images=2)
    score, plan = planned(method, tokens, Evidence(ranked=rank))
    np.testing.assert_allclose(score[0, 1:3], np.sqrt([0.125, 0.08]), rtol=1e-6)
    assert plan.index.tolist() == [[0, 1, 3]]


def test_official_pruning(data):
    """The scores of each layer and the rows alive behind it. There, dropped rows go on asking; here they ask in the first round alone."""
    for case in cases(data, "aim_prune"):
        logits, alive = case["raw_logits_layers12to22"], case["mask_after_layer"]
        (many, b, h, n, _), rates = logits.shape, case["retain_rate"]
        first, last = int(case["visual_start"]), int(case["visual_end"])
        assert not case["damping"]
        rank = jax.jit(functools.partial(ranked, rounds=int(case["iters"]), scale=1.0, diagonal=0))
        pos = np.broadcast_to(np.arange(n, dtype=np.int32), (b, n))
        one_hot = jnp.broadcast_to(jnp.eye(n), (b, h, n, n))
        kind = np.where((np.arange(n) >= first) & (np.arange(n) < last), IMAGE, 0)
        free, tokens = kind == IMAGE, rows(np.ones((b, n, 2)), special=0)
        method = AIMLayers(capacity=last - first, images=last - first)
        for layer in range(many):
            here = alive[max(layer - 1, 0)]
            seen = rank(jnp.asarray(logits[layer]), one_hot, tau=jnp.float32(case["tau"]), q_pos=pos, k_pos=np.where(here, pos, -1))
            now = tokens._replace(pos=jnp.where(here, pos, -1), kind=jnp.broadcast_to(jnp.asarray(kind, jnp.int8), (b, n)))
            keep = int((last - first) * float(rates[12 + layer])) + (here & ~free).sum(1)
            score, plan = planned(method, now, Evidence(ranked=seen), keep=jnp.asarray(keep, jnp.int32))
            both = here & free
            np.testing.assert_allclose(score[both], case["importance_pagerank"][layer][both], atol=2e-6)
            np.testing.assert_array_equal(plan.assign >= 0, alive[layer])


def test_ranks_in_a_model():
    """GQA and a padded batch: scores from the layer's attention matrix, raised to 1 / tau and normed anew, and the rows that stay."""
    tokens, cfg = prompt(".ttiiiiiittt", 2), Config(**TINY.__dict__ | {"layers": 3})
    params = model(cfg)
    method = AIMLayers(capacity=2, images=6, stages=((1, 4), (2, 2)))
    recipe = aim(6, first=0, last=2, ratio=1.0, layers=3)
    recipe = recipe.replace(select=None, layers=tuple((k, method) for k, _ in recipe.layers))
    seen, end, layers, _ = spy(cfg, params, tokens, recipe)
    _, _, told = jax.jit(lambda t: decoder.survey(cfg, params, t, Needs(probs=True)))(tokens)
    for i in range(2):
        probs = np.asarray(told[0][0].probs[i, :, 1:, 1:], np.float64)
        rank = pagerank(np.log(np.maximum(probs, 1e-300)), np.tri(11, dtype=bool), 0.1, 5)
        score = np.sqrt((rank**2).mean(0))
        np.testing.assert_allclose(seen[0]["score"][i, 1:], score, atol=1e-4)
        image = np.flatnonzero(np.asarray(tokens.kind[i]) == IMAGE)
        assert seen[0]["index"][i].tolist()[-9:] == sorted([1, 2, 9, 10, 11, *(image[j] for j in best(score[image - 1], 4))])
    assert [layer[0].kv.pos.shape[2] - 2 for layer in layers] == [12, 10, 8]
    assert (np.asarray(end.rope[:, :, 0]) == np.maximum(end.pos, 0)).all(), "rows keep their rotary ids"


def test_the_papers_recipe():
    """32 frames of 196 rows: 49 each are left, then an eighth of them goes behind each layer from 14 to 21; none before layer 22."""
    recipe = aim(196, 32)
    assert recipe.select.capacity == 49
    assert [(k, m.layer(k, 28).images, m.layer(k, 28).capacity) for k, m in recipe.layers][:2] == [(15, 1568, 1372), (16, 1372, 1176)]
    assert [m.layer(k, 28).capacity for k, m in recipe.layers] == [1568 * j // 8 for j in range(7, -1, -1)]
    assert recipe.layers[0][1].layer(15, 28).needs == Needs(ranked=Rank(0.1, 5))
    few = aim(4, ratio=1.0).layers  # nothing more goes where nothing is left: 3, 3, 2, 2, 1, 1, 0
    assert [m.layer(k, 28).capacity for k, m in few] == [3, 3, 2, 2, 1, 1, 0] and few[-1][0] == 21
    with pytest.raises(ValueError, match="last must be"):
        aim(last=28)
