"""TransPrune against its formulas, the official outputs and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.types import IMAGE, Evidence, Needs
from jaxtok.methods import TransPrune
from jaxtok.methods.vision.transprune import transprune
from tests.methods.golden import cases
from tests.methods.vision import tinyllama
from tests.methods.vision.places import TINY, model, prompt, spy
from tests.methods.vision.toyrows import do, normal, rows

small = {
    "transprune": lambda n: TransPrune(capacity=n, images=16),
    "transprune:ttv": lambda n: TransPrune(capacity=n, images=16, guide=False),
}


def world(seed, live=None):
    """Two text rows, six image rows, two of text, of a batch of two; what a layer changes and what the text asks for."""
    tokens = rows(normal(seed, 2, 10, 3), special=0, live=live)
    kind = np.zeros((2, 10), np.int8)
    kind[:, 2:8] = IMAGE
    change = np.stack([np.abs(normal(seed + 1, 2, 10, 2)), np.tanh(normal(seed + 2, 2, 10, 2))], -1)
    return tokens._replace(kind=jnp.asarray(kind)), change, np.abs(normal(seed + 3, 2, 4, 10))


def transition(change, live):
    """TTV of one sequence and one layer, by loops; change [n 2 2]."""
    out = np.zeros(len(change))
    for block in range(2):
        total = sum(np.exp(1 - change[i, block, 1]) for i in range(len(change)) if live[i])
        for j in range(len(change)):
            out[j] += change[j, block, 0] * np.exp(1 - change[j, block, 1]) / total if live[j] else 0
    return out


def planned(method, tokens, evidence, state=None):
    run = jax.jit(lambda state, tokens, evidence: method.plan({}, state, tokens, evidence))
    return run(do(method, "start", {}, tokens) if state is None else state, tokens, evidence)


def test_by_hand():
    """Three rows, the middle two of the image. All turn alike, so a third of |out| / |in| counts: TTV 1/3 (2 + 1) = 1 and 1/3 (4 + 5) = 3;
    the text asks for them 3 to 1: scores 1/4 + 3/4 = 3/4 + 1/4; the tie goes to the older one. Without the text the second stays."""
    tokens = rows(np.ones((1, 4, 2)), special=0, live=[[True, True, True, False]])
    tokens = tokens._replace(kind=jnp.asarray([[0, IMAGE, IMAGE, 0]], jnp.int8))
    change = np.zeros((1, 4, 2, 2), np.float32)
    change[0, :3, :, 0] = [[9, 9], [2, 1], [4, 5]]
    change[0, 3] = 7  # dead
    asked = jnp.asarray([[[5, 0.3, 0.1, 0]]], jnp.float32)
    for guide, stays in ((True, 1), (False, 2)):
        state, plan = planned(TransPrune(capacity=1, images=2, guide=guide), tokens, Evidence(change=jnp.asarray(change), asked=asked))
        np.testing.assert_allclose(state.slots[0], [6, 1, 3, 0], rtol=1e-6)
        assert [i for i in plan.index[0].tolist() if i >= 0] == [0, stays]


def test_reference():
    """Two places: TTV of both layers is summed, the second one's rows have moved; dead rows count for nothing."""
    live = np.ones((2, 10), bool)
    live[1, [0, 4]] = False
    tokens, change, asked = world(3, live)
    method = TransPrune(capacity=3, images=6)
    before = np.abs(normal(9, 2, 10))
    state, plan = planned(method, tokens, Evidence(change=jnp.asarray(change), asked=jnp.asarray(asked)), Held(slots=jnp.asarray(before)))
    for i in range(2):
        ttv = before[i] + transition(change[i].astype(np.float64), live[i])
        np.testing.assert_allclose(np.asarray(state.slots[i])[live[i]], ttv[live[i]], rtol=1e-5)
        image = [j for j in range(2, 8) if live[i, j]]
        iga = asked[i].mean(0)
        score = ttv / ttv[image].sum() + iga / iga[image].sum()
        want = [j for j in range(10) if live[i, j] and (j not in image or j in sorted(image, key=lambda j: -score[j])[:3])]
        assert [j for j in plan.index[i].tolist() if j >= 0] == want


def test_the_scale_of_a_block_cancels():
    """A block's output c times as long: TTV is c times as large, the scores are what they were."""
    tokens, change, asked = world(5)
    method, louder = TransPrune(capacity=3, images=6), change * np.array([3, 1], np.float32)
    both = [Evidence(change=jnp.asarray(c), asked=jnp.asarray(asked)) for c in (change, louder)]
    one, three = (do(method, "observe", {}, do(method, "start", {}, tokens), tokens, e) for e in both)
    np.testing.assert_allclose(3 * one.slots, three.slots, rtol=1e-5)
    np.testing.assert_allclose(do(method, "score", {}, one, tokens, both[0]), do(method, "score", {}, three, tokens, both[1]), rtol=1e-5)


def test_official_outputs(data):
    """At each stage the scores, the rows that stay and their hidden states; the last hidden states."""
    for case in cases(data, "transprune"):
        images, places = int(case["image_tokens"]), [int(k) for k in case["stages_1based_layer_counts"]]
        first = int(case["accumulating_layers_1based"].min())
        assert case["accumulating_layers_1based"].tolist() == list(range(first, places[-1] + 1))
        stay = tuple((k, len(case[f"stage{j}_kept_rel_sorted"])) for j, k in enumerate(places))
        watch = tuple(k for k in range(first, places[-1]) if k not in places)
        method = TransPrune(capacity=stay[-1][1], images=images, stages=stay, watch=watch)
        cfg, params = tinyllama.model(case)
        recipe = transprune(images, first=first, places=tuple(places), ratios=tuple(round(float(r), 6) for r in case["ratios_of_original"]))
        recipe = recipe.replace(layers=tuple((k, method) for k, _ in recipe.layers))
        seen, _, _, hidden = spy(cfg, params, tinyllama.rows(cfg, params, case), recipe)
        for j, told in enumerate(t for t in seen if "score" in t):
            image = told["kind"][0] == IMAGE
            np.testing.assert_allclose(told["score"][0][image], case[f"stage{j}_score"], atol=2e-5)
            kept = told["index"][0]
            rel = np.cumsum(image)[kept[image[kept]]] - 1
            np.testing.assert_array_equal(rel, case[f"stage{j}_kept_rel_sorted"])
            np.testing.assert_allclose(told["x"], case[f"stage{j}_hidden_after_drop"], atol=2e-5)
        np.testing.assert_allclose(hidden, case["last_hidden_state"], atol=5e-5)


def test_the_papers_recipe():
    """576 rows: 504, 360 and 72 stay; 236.25 a layer of 32 on average. Before the first place nothing is asked of a layer."""
    recipe = transprune()
    assert [k for k, _ in recipe.layers] == [7, 8, 9, 10, 11, 12]
    at = {k: m.layer(k, 32) for k, m in recipe.layers}
    assert [(at[k].images, at[k].capacity) for k in (7, 9, 12)] == [(576, 504), (504, 360), (360, 72)]
    assert at[8].passive and at[8].needs == Needs(change=True) and at[7].needs == Needs(change=True, asked=True, own=True)
    enters = [576 - sum((a.images - a.capacity) * (k <= i) for k, a in at.items() if not a.passive) for i in range(32)]
    assert np.mean(enters) == 236.25
    ttv = transprune(guide=False).layers[0][1].layer(7, 32)
    assert ttv.needs == Needs(change=True), "no attention weights"


def test_stages_in_a_model():
    """GQA, a padded batch, bf16, a traced budget for one stage: what is left, and that rows are numbered anew."""
    tokens = prompt("..tiiiiiiiitt", 2)
    recipe = transprune(8, ratios=(0.75, 0.25), places=(2, 3), first=1)
    half = tokens._replace(x=tokens.x.astype(jnp.bfloat16))
    for budgets, left in ((([99, 99], [99, 99]), [5, 5]), (([6, 99], [99, 99]), [5, 5]), (([4, 99], [99, 4]), [4, 4])):
        keep = {"layers": (None, *map(jnp.asarray, budgets))}
        _, end, layers, hidden = spy(TINY, model(TINY, "bfloat16"), half, recipe, keep)
        assert [layer[0].kv.pos.shape[2] - 2 for layer in layers] == [13, 13, 11, 7]
        assert (end.pos >= 0).sum(1).tolist() == left and hidden.dtype == jnp.bfloat16 and end.lost.tolist() == [0, 0]
        assert end.rope[0, -left[0] :, 0].tolist() == list(range(left[0]))


def test_refused():
    for bad, match in (
        ({"stages": ((3, 2), (3, 1))}, "stages must be >= 4"),
        ({"stages": ((3, 2), (4, 3))}, "stages must be <= 2"),
        ({"stages": ((3, 2),)}, "what the last of"),
        ({"stages": ((3, 0), (4, 0))}, "end there"),
    ):
        with pytest.raises(ValueError, match=match):
            TransPrune(capacity=1, images=4, **bad)
    with pytest.raises(ValueError, match="equally many"):
        transprune(8, ratios=(0.5,))
    with pytest.raises(ValueError, match="places 1 to 3"):
        transprune(8, places=(7, 9, 12)).validate(TINY)
