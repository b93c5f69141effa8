"""CATP's two stages against its formulas, brute force and its limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.diverse import facility
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, SPECIAL, Evidence, Needs
from jaxtok.methods import CATPLayers, CATPSelect
from jaxtok.methods.vision.catp import catp, query_sample
from jaxtok.models import vit
from jaxtok.models.config import Config
from tests.methods.vision.places import TINY, model, planned, prompt, spy
from tests.methods.vision.select import best, images, kept
from tests.methods.vision.toyrows import normal, rows

small = {
    "catp.select": lambda n: CATPSelect(capacity=n),
    "catp.layers": lambda n: CATPLayers(capacity=n, images=16),
    "catp.layers:query": lambda n: CATPLayers(capacity=n, images=16, part="query"),
}


def parts(x, text):
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    return (1 + unit(x) @ unit(x).T) / 2, (1 + unit(x) @ unit(text)) / 2


def value(like, fits, rows, weight):
    rows = list(rows)
    return like[rows].max(0).sum() + weight * fits[rows].sum()


def reference(x, text, k, weight):
    """Picks in order; the whole objective anew for each candidate."""
    like, fits = parts(x.astype(np.float64), text.astype(np.float64))
    picked = []
    while len(picked) < k:
        left = [j for j in range(len(x)) if j not in picked]
        picked.append(max(left, key=lambda j: (round(value(like, fits, [*picked, j], weight), 9), -j)))
    return picked


def world(seed, n=14):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, n, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)


def test_by_hand():
    """Rows at 0, 0, 90, 200 degrees. Alone, one of the pair covers most; text at 200 degrees draws the last with a large weight."""
    angle = np.deg2rad([0, 5, 90, 200])
    x = np.stack([np.cos(angle), np.sin(angle)], -1)[None].astype(np.float32)
    assert kept(CATPSelect(capacity=1, special=0, weight=0.0), images(x, 0), Evidence(text=jnp.asarray(x[:, 3]))) == [1]
    assert kept(CATPSelect(capacity=1, special=0, weight=9.0), images(x, 0), Evidence(text=jnp.asarray(x[:, 3]))) == [3]


@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_reference(weight):
    x, text = world(3)
    for i in range(2):
        want = reference(x[i], text[i], 6, weight)
        assert kept(CATPSelect(capacity=6, special=0, weight=weight), images(x, 0), Evidence(text=text), row=i) == sorted(want)
        few = kept(CATPSelect(capacity=6, special=0, weight=weight), images(x, 0), Evidence(text=text), jnp.asarray([3, 2]), i)
        assert few == sorted(want[: (3, 2)[i]])


def test_gains_never_grow_and_greedy_is_near_the_best():
    x, text = world(5, 10)
    like, fits = parts(x[0].astype(np.float64), text[0].astype(np.float64))
    order = facility(jnp.asarray(like[None], jnp.float32), jnp.ones((1, 10), bool), 10, jnp.zeros((1, 10)))[0].tolist()
    assert sorted(order) == list(range(10))
    gains = np.diff([0] + [value(like, fits, order[: k + 1], 0) for k in range(10)])
    assert (np.diff(gains) <= 1e-6).all()
    top = max(value(like, fits, rows, 0) for rows in itertools.combinations(range(10), 3))
    assert value(like, fits, order[:3], 0) >= (1 - 1 / np.e) * top


def test_all_rows_is_the_identity():
    x, text = world(6)
    assert kept(CATPSelect(capacity=14, special=0), images(x, 0), Evidence(text=text)) == list(range(14))


def test_a_missing_text_is_refused():
    x, _ = world(7)
    found = vit.Encoded(images(x, 0), Evidence())
    with pytest.raises(ValueError, match="text="):
        vit.select({}, found, Recipe(select=CATPSelect(capacity=4, special=0)))


# --- between the decoder's layers -----------------------------------------------------------------------------------------

SHOTS = "tiiittiiittsiiistt"  # two demonstrations, a query whose image has a newline row; text behind each


def cosines(h, mean):
    return (h @ mean) / np.linalg.norm(h, axis=-1) / np.linalg.norm(mean)


def rows_of(kinds, seed, b=1):
    tokens = rows(normal(seed, b, len(kinds), 4), special=0, live=[c != "." for c in kinds])
    kind = [{"t": 0, "i": IMAGE, "s": SPECIAL, ".": 0}[c] for c in kinds]
    return tokens._replace(kind=jnp.broadcast_to(jnp.asarray(kind, jnp.int8), (b, len(kinds))))


def test_which_rows_are_the_querys():
    for kinds, first in ((SHOTS, 11), ("tiit", 1), ("iit", 0), ("..iitiitt", 5), ("tt", 0)):
        assert np.flatnonzero(query_sample(rows_of(kinds, 0))[0]).tolist() == list(range(first, len(kinds)))


def test_context_by_hand():
    """Attention to the demonstration's three rows goes from .1 .3 .2 to .4 .2 .2: rises .3, 0, 0; cosines to the question 0, 1, .6."""
    tokens = rows_of("iiitit", 0)._replace(x=jnp.asarray([[[0, 1], [2, 0], [3, 4], [1, 1], [1, 0], [1, 0]]], jnp.float32))
    row = jnp.asarray([[[[0.4, 0.2, 0.2, 0, 0.1, 0.1]]]], jnp.float32)
    before = Held(slots=jnp.asarray([[0.1, 0.3, 0.2, 0, 0.1, 0.1]]))
    method = CATPLayers(capacity=3, images=4)
    score, plan = planned(method, tokens, Evidence(rows=row), before)
    np.testing.assert_allclose(score[0, :3], [0.3, 0.6, 0.36], atol=1e-6)
    assert plan.index.tolist() == [[1, 2, 3, 4, 5]]


def test_reference_of_both_parts():
    tokens, row, before = rows_of(SHOTS, 3, 2), np.abs(normal(4, 2, 3, 1, 18)), np.abs(normal(5, 2, 18))
    x, kind = np.asarray(tokens.x, np.float64), np.asarray(tokens.kind[0])
    demo, query = [j for j in range(11) if kind[j] == IMAGE], [j for j in range(11, 18) if kind[j] == IMAGE]
    a, b = (CATPLayers(capacity=k, images=9, part=part) for k, part in ((5, "context"), (7, "query")))
    evidence = Evidence(rows=jnp.asarray(row))
    found = [planned(m, tokens, evidence, Held(slots=jnp.asarray(before)))[1].index for m in (a, b)]
    for i in range(2):
        told = x[i, [j for j in range(11, 18) if kind[j] != SPECIAL]].mean(0)
        score = np.maximum(row[i, :, 0].mean(0) - before[i], 0) + 0.6 * cosines(x[i], told)
        index = found[0][i].tolist()
        want = sorted([*query, *(demo[j] for j in best(score[demo], 2))])
        assert [j for j in index if kind[j] == IMAGE] == want
        told = x[i, :11].mean(0)
        index = found[1][i].tolist()
        want = sorted([*demo, *(query[j] for j in best(cosines(x[i], told)[query], 1))])
        assert [j for j in index if kind[j] == IMAGE] == want


def test_a_capacity_below_the_other_part():
    """Where the demonstrations have too few rows, the question's image gives the rest: nothing is lost."""
    tokens = rows_of("ititiiitt", 7)
    plan = planned(CATPLayers(capacity=2, images=5), tokens, Evidence(rows=jnp.ones((1, 1, 1, 9))))[1]
    assert plan.lost.tolist() == [0] and [j for j in plan.index[0].tolist() if j < 4] == [1, 3], "both demonstrations' rows go"


def test_stages_in_a_model():
    """Attention is noted before layer 1, the demonstrations' rows go before layer 2, the question's before layer 3."""
    tokens = prompt("." + SHOTS, 2)
    method = catp(3, 2, ratio=0.4, layer=2).layers[0][1]
    assert method.stages == ((2, 4), (3, 3)) and method.images == 6
    method = CATPLayers(capacity=5, images=9, stages=((2, 7), (3, 5)), watch=(1,))
    recipe = Recipe(layers=tuple((k, method) for k in (1, 2, 3)))
    seen, end, layers, _ = spy(TINY, model(), tokens, recipe)
    assert [layer[0].kv.pos.shape[2] - 2 for layer in layers] == [19, 19, 17, 15]
    left = [np.asarray(told["pos"])[i][told["index"][i]] for told in seen for i in range(2)]
    for i in range(2):
        assert (left[i] >= 0).sum() == 18, "nothing goes where it only looks"
        assert len(set(range(11, 18)) - set(left[2 + i])) == 0 and len(set(range(18)) - set(left[2 + i])) == 2
        assert len(set(range(11)) & (set(left[2 + i]) - set(left[4 + i]))) == 0, "then the question's own"
    assert (end.pos >= 0).sum(1).tolist() == [14, 14]


def test_the_papers_recipe():
    """Four demonstrations at 22.2% kept: 351 of 576 rows each go in; 511 of the demonstrations' and 127 of the query's stay."""
    recipe = catp()
    assert recipe.select.capacity == 351 and recipe.select.weight == 0.7
    at = {k: m.layer(k, 32) for k, m in recipe.layers}
    assert list(at) == [5, 6, 7] and at[5].passive and at[5].needs == at[6].needs == Needs(rows=1) and at[7].needs == Needs()
    assert [(at[k].part, at[k].images, at[k].capacity, at[k].weight) for k in (6, 7)] == [
        ("context", 5 * 351, 511 + 351, 0.6),
        ("query", 511 + 351, 511 + 127, 0.6),
    ]
    whole = catp(8, 2, ratio=1.0)
    assert whole.select.capacity == 8 and all(m.layer(k, 32).capacity == 24 for k, m in whole.layers)
    with pytest.raises(ValueError, match="the query's at a second"):
        CATPLayers(capacity=1, images=4, stages=((1, 3), (2, 2), (3, 1)))
    with pytest.raises(ValueError, match="places 1 to 3"):
        recipe.validate(Config(**TINY.__dict__))
