"""DyVTE against its formulas, the plain model and its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.types import IMAGE, Evidence
from jaxtok.evals import cost
from jaxtok.methods import DyVTE
from jaxtok.methods.vision.dyvte import dyvte, gate, look
from jaxtok.models import decoder
from tests.methods.vision.places import TINY, model, prompt, spy
from tests.methods.vision.toyrows import normal, rows

small = {
    "dyvte": lambda n: DyVTE(images=16, hidden=8, margin=0.0 if n < 16 else 1e9),
    "dyvte:by": lambda n: DyVTE(images=16, hidden=8, margin=1e9, forced=n < 16),
}
KINDS = "tiiiiitttt"


def toy(seed=0, kinds=KINDS, b=2):
    tokens = rows(normal(seed, b, len(kinds), 3), special=0, live=[c != "." for c in kinds])
    kind = jnp.asarray([IMAGE if c == "i" else 0 for c in kinds], jnp.int8)
    return tokens._replace(kind=jnp.broadcast_to(kind, (b, len(kinds))))


def planned(method, params, tokens, gone=(False, False), keep=None):
    state = Held(rest=jnp.asarray(gone))
    return jax.jit(lambda params, state, tokens, keep: method.plan(params, state, tokens, Evidence(), keep))(params, state, tokens, keep)


def test_the_gate_by_loops():
    """The mean of the text behind the image but the last, then the last; Linear, the exact GELU, Linear."""
    tokens = toy(1, ".tiiittt")
    x, params = np.asarray(tokens.x, np.float64), {"up": normal(2, 6, 4), "down": normal(3, 4, 2), "bias": normal(4, 2)}
    seen = look(tokens)
    said = gate(jax.tree.map(jnp.asarray, params), seen)
    for i in range(2):
        read = np.concatenate([(x[i, 5] + x[i, 6]) / 2, x[i, 7]])
        np.testing.assert_allclose(seen[i], read, rtol=1e-5)
        wide = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in read @ params["up"]]
        np.testing.assert_allclose(said[i], wide @ params["down"] + params["bias"], rtol=1e-4)


def test_each_sequence_decides_once():
    """One sequence leaves, the other stays; who has left stays away, whatever the gate says later."""
    tokens = toy(5)
    tokens = tokens._replace(x=tokens.x.at[:, -1].set(jnp.asarray([[4.0, 0, 0], [-4.0, 0, 0]])))
    up = jnp.zeros((6, 1)).at[3, 0].set(1.0)
    params = {"up": up, "down": jnp.asarray([[0.0, 1.0]]), "bias": jnp.asarray([1.0, 0.0])}  # leaves where GELU(x_last) > 1
    method = DyVTE(images=5, hidden=1)
    state, plan = planned(method, params, tokens)
    assert state.rest.tolist() == [True, False] and plan.index.shape == (2, 10)
    alive = [[j for j in plan.index[i].tolist() if j >= 0] for i in range(2)]
    assert alive == [[0, 6, 7, 8, 9], list(range(10))]
    state, plan = planned(method, params, tokens, gone=(True, True))
    assert state.rest.tolist() == [True, True] and (plan.index >= 0).sum(1).tolist() == [5, 5]
    state, plan = planned(method, params, tokens, keep=jnp.asarray([10, 9]))
    assert state.rest.tolist() == [True, True], "a budget without room for the image"
    state, plan = planned(DyVTE(images=5, by=3).layer(3, 9), {}, tokens)
    assert plan.index.tolist() == [[0, 6, 7, 8, 9]] * 2 and plan.lost.tolist() == [0, 0]


def test_in_a_model():
    """The gate fires before layer 2 for one sequence of two: its rows come out as if the image had been dead from there on, the other's
    as those of the plain model; caches of earlier layers are whole; steps do not read what has left."""
    tokens, recipe = prompt(".tiiiiittt", 2), dyvte(5, layers=4, hidden=4)
    assert [k for k, _ in recipe.layers] == [1, 2, 3]
    learned = [{"up": jnp.zeros((32, 4)), "down": jnp.zeros((4, 2)), "bias": jnp.asarray([1.0, 0.0])} for _ in range(3)]
    plain = jax.jit(lambda t: decoder.prefill(TINY, model(), t, new=2))
    full, _ = plain(tokens)
    seen, before, _, _ = spy(TINY, model() | {"methods": {"layers": tuple(learned)}}, tokens, recipe)
    np.testing.assert_allclose(before.x[:, 1:], full.x[:, 1:], atol=1e-5, err_msg="a gate that never fires")
    x = np.asarray(seen[1]["x"], np.float32)  # rows that enter layer 2
    told = np.concatenate([x[:, 7:9].mean(1), x[:, 9]], -1)
    apart = told[0] - told[1]
    middle = (told[0] + told[1]) @ apart / 2
    fires = {
        "up": jnp.asarray(np.stack([apart, 0 * apart, 0 * apart, 0 * apart], -1), jnp.float32),
        "down": jnp.zeros((4, 2)).at[0, 1].set(1.0),
    }
    learned[1] = fires | {"bias": jnp.asarray([max(middle, 0.0), 0.0], jnp.float32)}
    params = model() | {"methods": {"layers": tuple(learned)}}
    _, end, layers, _ = spy(TINY, params, tokens, recipe)
    left = (end.pos >= 0).sum(1).tolist()
    assert left == [4, 9], left
    np.testing.assert_allclose(end.x[1, 1:], full.x[1, 1:], atol=1e-5)
    assert [(layer[0].kv.pos[0, 0] >= 0).sum() for layer in layers] == [9, 9, 4, 4]
    short = tokens._replace(pos=tokens.pos.at[0].set(jnp.where(tokens.kind[0] == IMAGE, -1, tokens.pos[0])))
    assert not np.allclose(np.asarray(plain(short)[0].x[0, -1]), end.x[0, -1], atol=1e-3), "the first two layers have read the image"


def test_the_saving_is_counted():
    """With `by` the image rows leave the shapes: layers behind it cost what the text costs."""
    params = jax.eval_shape(lambda: model())

    def flops(recipe):
        def run(params, tokens):
            learned = recipe.init_params(jax.random.key(0), TINY)
            return decoder.prefill(TINY, params | {"methods": learned}, tokens, recipe, new=0)

        return cost.count(run, params, prompt("t" + "i" * 60 + "ttt")).flops

    half, late = flops(dyvte(60, layers=4, by=2, hidden=4)), flops(dyvte(60, layers=4, hidden=4))
    assert half < 0.62 * late, half / late


def test_refused():
    for bad, match in (({"images": 0}, "images"), ({"images": 4, "hidden": 0}, "hidden"), ({"images": 4, "positions": "no"}, "positions")):
        with pytest.raises(ValueError, match=match):
            DyVTE(**bad)
    with pytest.raises(ValueError, match="told of images=11 rows, but 10 rows come"):
        DyVTE(images=11, by=1).layer(1, 4).plan({}, Held(rest=jnp.zeros((2,), bool)), toy(), Evidence())
    with pytest.raises(ValueError, match="by must be <= 3"):
        dyvte(5, layers=4, by=4)
