"""EViT against its formulas and its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import EViT
from jaxtok.methods.vision.evit import schedule
from tests.methods.vision.toyrows import normal, rows

small = {"evit": lambda n: EViT(capacity=n), "evit:drop": lambda n: EViT(capacity=n, fuse=False)}


@functools.partial(jax.jit, static_argnums=0)
def reduced(method, tokens, seen, keep=None):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence(cls=seen), keep)
    return reduce(plan, tokens)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("ratio, special", [(0.7, 1), (0.5, 0), (0.3, 2)])
def test_reference(ratio, special):
    n = 14
    x, seen, size = normal(1, 2, n, 4), softmax(normal(2, 2, 3, n)), np.random.default_rng(3).integers(1, 4, (2, n))
    out = reduced(EViT(ratio=ratio, special=special), rows(x, special, size=size), jnp.asarray(seen))
    stay = math.ceil(ratio * (n - special))
    assert out.x.shape[1] == special + stay + 1
    for i in range(2):
        a = seen[i].mean(0)
        kept = sorted(sorted(range(special, n), key=lambda j: -a[j])[:stay])
        gone = [j for j in range(special, n) if j not in kept]
        want = np.concatenate([x[i, :special], x[i, kept], (a[gone, None] * x[i, gone]).sum(0, keepdims=True)])
        np.testing.assert_allclose(out.x[i], want, atol=1e-6)
        np.testing.assert_allclose(out.size[i], [*size[i, :special], *size[i, kept], size[i, gone].sum()])
        assert (np.asarray(out.source[i])[gone] == special + stay).all() and np.asarray(out.source[i])[kept].tolist() == list(
            range(special, special + stay)
        )


def test_by_hand():
    seen = jnp.asarray([[[0.1, 0.4, 0.2, 0.25, 0.05]]])
    tokens = rows(np.array([9.0, 1, 2, 3, 4]).reshape(1, 5, 1))
    np.testing.assert_allclose(reduced(EViT(capacity=2), tokens, seen).x[0, :, 0], [9, 1, 3, 0.4 + 0.2], rtol=1e-6)
    assert reduced(EViT(capacity=2, fuse=False), tokens, seen).x[0, :, 0].tolist() == [9, 1, 3]
    assert reduced(EViT(ratio=1.0), tokens, seen).x[0, :, 0].tolist() == [9, 1, 2, 3, 4]


def test_short_sequences_and_budgets():
    """Seven live rows of ten: they fit and stay; under a traced budget one of the rows left is the fused one, and it is the last."""
    x, seen = normal(4, 2, 10, 3), softmax(normal(5, 2, 1, 10))
    tokens = rows(x, live=np.array([[True] * 10, [False] * 3 + [True] * 7]))
    out = reduced(EViT(capacity=6), tokens, jnp.asarray(seen))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [8, 7] and (np.asarray(out.pos[1])[:1] == -1).all()
    np.testing.assert_array_equal(out.x[1, 1:], x[1, 3:])
    out = reduced(EViT(capacity=6), tokens, jnp.asarray(seen), jnp.asarray([5, 6]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [5, 6] and (np.asarray(out.pos)[:, -1] > 0).all()
    a = seen[0, 0]
    gone = sorted(range(1, 10), key=lambda j: -a[j])[3:]
    np.testing.assert_allclose(out.x[0, -1], (a[gone, None] * x[0, gone]).sum(0), atol=1e-6)


def test_schedule():
    assert [(k, m.ratio, m.count(197, 196)) for k, m in schedule()] == [(k, 0.7, 1 + 138 + 1) for k in (3, 6, 9)]


def test_bad_input():
    for bad in ({"ratio": 0.0}, {"ratio": 1.2}, {"capacity": 0}):
        with pytest.raises(ValueError):
            EViT(**bad)
