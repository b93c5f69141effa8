"""DynamicViT's inference against its formulas and its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import DynamicViT
from jaxtok.methods.vision.dynamicvit import schedule
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.vision.toyrows import normal, rows

small = lambda n: DynamicViT(capacity=n)
CFG = EncoderConfig(width=8, layers=2, heads=2, hidden=8, image=(8, 8), patch=(2, 2), channels=3)


@functools.partial(jax.jit, static_argnums=0)
def reduced(method, params, tokens, keep=None):
    _, plan = method.plan(params, method.start(params, tokens), tokens, Evidence(), keep)
    return reduce(plan, tokens)


def weights(seed, c=8):
    sizes = {"in": (c, c), "mid1": (c, c // 2), "mid2": (c // 2, c // 4), "out": (c // 4, 2)}
    p = {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(sizes.items())}
    return (
        p
        | {name + "_bias": normal(seed + 9, shape[1]) for name, shape in sizes.items()}
        | {"norm": 1 + 0.1 * normal(3, c), "norm_bias": normal(4, c)}
    )


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference(p, x):
    """log P(keep) of rows x [n c]."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm"] + p["norm_bias"]
    z = gelu(x @ p["in"] + p["in_bias"])
    c = z.shape[1]
    z = np.concatenate([z[:, : c // 2], np.broadcast_to(z[:, c // 2 :].mean(0), (len(z), c - c // 2))], 1)
    for name in ("mid1", "mid2"):
        z = gelu(z @ p[name] + p[name + "_bias"])
    z = z @ p["out"] + p["out_bias"]
    return z[:, 0] - np.log(np.exp(z).sum(1))


@pytest.mark.parametrize("special, capacity", [(1, 5), (0, 3)])
def test_reference(special, capacity):
    x, p = normal(1, 2, 12, 8), weights(2)
    method, params, tokens = DynamicViT(capacity=capacity, special=special), jax.tree.map(jnp.asarray, p), rows(x, special)
    out = reduced(method, params, tokens)
    for i in range(2):
        score = reference(p, x[i, special:].astype(np.float64))
        np.testing.assert_allclose(method.score(params, tokens.x, tokens.pos >= special)[i, special:, 0], score, atol=1e-4)
        kept = sorted(np.argsort(-score)[:capacity] + special)
        assert np.asarray(out.pos[i]).tolist() == [*range(special), *kept]
        np.testing.assert_array_equal(out.x[i], x[i, [*range(special), *kept]])


def test_padding_and_budgets():
    x, params = normal(5, 2, 12, 8), jax.tree.map(jnp.asarray, weights(6))
    want = reduced(DynamicViT(capacity=4), params, rows(x))
    padded = np.concatenate([normal(7, 2, 3, 8), x], 1)
    out = reduced(DynamicViT(capacity=4), params, rows(padded, live=np.arange(15)[None] >= 3))
    np.testing.assert_allclose(out.x, want.x, atol=1e-6)
    out = reduced(DynamicViT(capacity=4), params, rows(x), jnp.asarray([3, 99]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [3, 5]


def test_in_an_encoder():
    """All rows kept: the plain encoder; the learned weights come from the recipe."""
    recipe = Recipe(vit=((1, DynamicViT(capacity=16)),))
    params = encoder.init(CFG, jax.random.key(0))
    params["methods"] = recipe.init_params(jax.random.key(1), CFG)
    assert {name: a.shape for name, a in params["methods"]["vit"][0].items() if "bias" not in name} == {
        "in": (8, 8), "mid1": (8, 4), "mid2": (4, 2), "out": (2, 2), "norm": (8,)
    }  # fmt: skip
    image = jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    np.testing.assert_allclose(*(jax.jit(lambda x, r=r: vit.forward(CFG, params, x, r))(image) for r in (recipe, Recipe())), atol=1e-5)


def test_schedule():
    assert [(k, m.capacity) for k, m in schedule()] == [(3, 137), (6, 96), (9, 67)]


def test_bad_input():
    with pytest.raises(ValueError):
        DynamicViT(capacity=0)
