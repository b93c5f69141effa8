"""SALE's thresholds against a search head by head, and what they leave of the output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.methods import SALE, AShape
from jaxtok.models import blocks, cached, decoder, sparsify
from jaxtok.models.config import Config
from jaxtok.train.sale import calibrate, tighter

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
METHOD = SALE(local=4, segment=4, least=0, block_q=4, block_k=2, tile=2)
THETA, FIRST, LEAST = 0.3, 0.64, 0.05


@functools.cache
def world():
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    ids = jax.random.randint(jax.random.key(1), (2, 32), 0, CFG.vocab)
    return params, ids, jnp.arange(32)[None] >= jnp.asarray([[0], [9]])


@functools.cache
def found(theta=THETA):
    run = functools.partial(calibrate, CFG, method=METHOD, theta=theta, first=FIRST, least=LEAST)
    return np.asarray(jax.jit(lambda params, ids, live: run(params, ids, live))(*world()))


def test_equals_a_search_head_by_head():
    params, ids, live = world()
    tokens = decoder.embed(CFG, params, ids, live)
    pos = np.asarray(tokens.pos)
    for i, p in enumerate(params["layers"]):
        _, ((kv, seen),) = cached.attend_rows(CFG, p, i, tokens, None, Recipe(), Needs(turned=32), False, None, "auto")
        attend = functools.partial(sparsify.attend, q=seen.turned, k=kv.k, v=kv.v, pos=tokens.pos)
        dense, _ = attend(None, {}, i)
        want = np.zeros(4)
        for head in range(4):
            tau = FIRST
            while tau > 0:
                out, _ = attend(METHOD, {"tau": jnp.full((2, 4), tau, jnp.float32)}, i)
                change = np.abs(np.asarray(out - dense, np.float64))[:, head].sum(-1)
                if np.mean([change[row][pos[row] >= 0].sum() / (pos[row] >= 0).sum() for row in range(2)]) < THETA:
                    break
                tau = tau / 2 if tau / 2 > LEAST else 0.0
            want[head] = tau
        np.testing.assert_allclose(found()[i], want, rtol=1e-6)
        tokens, _ = cached.attend_rows(CFG, p, i, tokens, None, Recipe(), Needs(), False, None, "auto")


def test_limits():
    assert (found(1e9) == np.float32(FIRST)).all(), "any error will do"
    assert (found(0.0) == 0).all(), "no error will do: dense heads"
    a, b = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.0, 3.0]])
    assert tighter(a, b).tolist() == [[0.0, 2.0]]


def test_refuses():
    params, ids, live = world()
    with pytest.raises(ValueError, match="whole; calibrate it on longer ones"):
        calibrate(CFG, params, ids, live, SALE())
    with pytest.raises(ValueError, match="0 < least < first"):
        calibrate(CFG, params, ids, live, METHOD, first=1e-5)
    with pytest.raises(ValueError, match="whole"):
        calibrate(CFG, params, ids, live, AShape(local=32))
