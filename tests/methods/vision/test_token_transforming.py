"""Token Transforming against its formulas and its limits: pruning and merging are special cases of its matrix."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import compose
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.types import DensePlan, Evidence
from jaxtok.methods import TokenTransforming, ToMe
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.vision.toyrows import normal, rows, unit

small = {
    "token_transforming": lambda n: TokenTransforming(capacity=n),
    "token_transforming:received": lambda n: TokenTransforming(capacity=n, score="received", restore=3),
}


@functools.partial(jax.jit, static_argnums=0)
def transformed(method, tokens, seen, keep=None):
    evidence = Evidence(cls=seen, received=seen)
    _, plan = method.plan({}, method.start({}, tokens), tokens, evidence, keep)
    return plan, reduce(plan, tokens)


def reference(x, seen, special, capacity, tau):
    n = len(x)
    free = list(range(special, n))
    chosen = sorted(free, key=lambda i: -seen[:, i].mean())[:capacity]
    order, u = list(range(special)) + sorted(chosen), unit(x)
    w = np.zeros((len(order), n))
    for i, row in enumerate(order):
        if row < special:
            w[i, row] = 1
            continue
        e = np.exp(tau * np.array([u[row] @ u[j] for j in free]))
        w[i, special:] = e / e.sum()
    return w, w @ x


@pytest.mark.parametrize("special, capacity, tau", [(1, 4, 10.0), (0, 7, 1.0), (2, 3, 0.0)])
def test_reference(special, capacity, tau):
    x, seen = normal(1, 2, 12, 5), np.abs(normal(2, 2, 3, 12))
    plan, out = transformed(TokenTransforming(capacity=capacity, tau=tau, special=special), rows(x, special), jnp.asarray(seen))
    for i in range(2):
        w, want = reference(x[i], seen[i], special, capacity, tau)
        np.testing.assert_allclose(plan.w[i], w, atol=1e-5)
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(plan.w, -1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(out.size).sum(1), 12, atol=1e-4)


def test_sharp_is_pruning_and_flat_is_the_mean():
    x, seen = normal(3, 1, 10, 5), np.abs(normal(4, 1, 2, 10))
    best = sorted(sorted(range(10), key=lambda i: -seen[0, :, i].mean())[:4])
    _, out = transformed(TokenTransforming(capacity=4, tau=1e6, special=0), rows(x, 0), jnp.asarray(seen))
    np.testing.assert_allclose(out.x[0], x[0, best], atol=1e-6)
    assert np.asarray(out.pos)[0].tolist() == best
    _, out = transformed(TokenTransforming(capacity=4, tau=0.0, special=0), rows(x, 0), jnp.asarray(seen))
    np.testing.assert_allclose(out.x[0], np.broadcast_to(x[0].mean(0), (4, 5)), atol=1e-6)


def test_constants_stay_constant():
    _, out = transformed(TokenTransforming(capacity=3), rows(np.full((1, 9, 4), 2.5)), jnp.ones((1, 1, 9)))
    np.testing.assert_allclose(out.x, 2.5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def tome(method, tokens, metric):
    """(plan, rows, the plan as a matrix)."""
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence(keys=metric[:, None]))
    return plan, reduce(plan, tokens), compose.dense(plan).w


def test_blocks_of_equal_rows_are_merged_as_tome_does():
    """Rows alike within a block and orthogonal to the others: sharp mixing is the mean of the block, which is ToMe's row."""
    base = np.eye(4, dtype=np.float32)
    x = np.concatenate([base, base])[None, [0, 4, 1, 5, 2, 6, 3, 7]]
    seen = np.tile(np.array([0, 1], np.float32), 4)[None, None]
    plan, out = transformed(TokenTransforming(capacity=4, tau=1e5, special=0), rows(x, 0), jnp.asarray(seen))
    _, want, matrix = tome(ToMe(remove=4, special=0), rows(x, 0), jnp.asarray(x))
    np.testing.assert_allclose(out.x, want.x, atol=1e-6)
    np.testing.assert_allclose(plan.w, matrix, atol=1e-6)
    np.testing.assert_allclose(out.size, want.size, atol=1e-5)


def test_a_plan_of_tome_is_such_a_matrix():
    x = normal(5, 2, 13, 4)
    tokens = rows(x, size=np.random.default_rng(0).integers(1, 4, (2, 13)))
    plan, want, matrix = tome(ToMe(remove=5), tokens, jnp.asarray(normal(6, 2, 13, 5)))
    found = jax.jit(lambda w, index: reduce(DensePlan(w, index), tokens))(matrix, plan.index)
    chex.assert_trees_all_close(found, want, atol=1e-5)


def test_rows_come_back():
    """Undone at the end by the transposed matrix, its columns' sums 1; a layer that does nothing between them."""
    cfg = EncoderConfig(width=8, layers=2, heads=2, hidden=8, image=(8, 8), patch=(2, 2), channels=3, final_norm=False)
    params = encoder.init(cfg, jax.random.key(0))
    still = {k: jnp.zeros_like(v) if k in ("o", "down") else v for k, v in params["layers"][1].items()}
    params["layers"] = (params["layers"][0], still)
    tokens, method = (
        vit.embed(cfg, params, jax.random.normal(jax.random.key(1), (2, 8, 8, 3))),
        TokenTransforming(capacity=5, tau=3.0, restore=2),
    )
    run = jax.jit(
        lambda t: (
            vit.encode(cfg, params, t, Recipe(vit=((1, method),))).tokens,
            vit.encode(cfg, params, t, Recipe(select=TokenTransforming(capacity=99)), until=1),
        )
    )
    found, first = run(tokens)
    plan, out = transformed(method, first.tokens, first.evidence.cls)
    w = np.asarray(plan.w)
    want = np.einsum("bmn,bmc->bnc", w / w.sum(1, keepdims=True), out.x)
    np.testing.assert_allclose(found.x, want, atol=1e-5)


def test_another_weight():
    x, seen = normal(7, 1, 6, 3), np.abs(normal(8, 1, 1, 6))
    first = TokenTransforming(capacity=2, special=0, weight_fn=lambda like, pair, tau: jax.nn.one_hot(jnp.argmin(like, -1), like.shape[-1]))
    _, out = transformed(first, rows(x, 0), jnp.asarray(seen))
    best = sorted(np.argsort(-seen[0, 0])[:2])
    np.testing.assert_allclose(out.x[0], x[0][np.argmin((unit(x[0]) @ unit(x[0]).T)[best], 1)], atol=1e-6)


def test_bad_input():
    for bad in ({"capacity": 0}, {"capacity": 2, "tau": -1.0}, {"capacity": 2, "score": "peak"}):
        with pytest.raises(ValueError):
            TokenTransforming(**bad)
