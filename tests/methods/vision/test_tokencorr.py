"""Correlation-guided compression against its formulas (our reading) and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.types import Evidence
from jaxtok.methods import TokenCorr
from tests.methods.vision.select import best, images, kept

small = lambda n: TokenCorr(capacity=n, layers=(0, 1), threshold=1.0)


def told(cls, keys):
    return Evidence(cls=jnp.asarray(cls, jnp.float32), keys=jnp.asarray(np.stack([keys, keys]), jnp.float32))


def world(seed, parts=3, n=10):
    """Crops of 10 rows of which some repeat."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(1, 2, parts * n, 5))
    for p in range(1, parts):
        keys[:, :, n * p + 3 : n * p + 3 + 2 * p] = keys[:, :, n * p : n * p + 1]
    cls = rng.uniform(0.1, 1, size=(2, 1, 3, parts * n))
    return images(rng.normal(size=(1, parts * n, 2)), 0, segment=np.repeat(np.arange(parts), n)), cls, keys


def reference(cls, keys, parts, n, threshold):
    """Kept rows without noise and without a limit."""
    metric = keys[0].transpose(1, 0, 2).reshape(parts * n, -1)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    p = cls[:, 0].mean((0, 1))
    out = list(range(n)) if parts > 1 else []
    for crop in range(parts > 1, parts):
        rows = range(crop * n, crop * n + n)
        k = sum(all(unit[i] @ unit[j] <= threshold for i in rows if i < j) for j in rows)
        out += [crop * n + j for j in best(p[rows], k)]
    return out


def test_reference():
    tokens, cls, keys = world(0)
    method = TokenCorr(capacity=30, special=0, crops=3, sample=False)
    want = reference(cls, keys, 3, 10, 0.9)
    assert np.bincount(np.array(want) // 10).tolist() == [10, 8, 6]
    assert kept(method, tokens, told(cls, keys)) == want
    one, cls, keys = world(1, 1)
    assert kept(TokenCorr(capacity=10, special=0, sample=False), one, told(cls, keys)) == reference(cls, keys, 1, 10, 0.9)


def test_density_of_equal_and_of_orthogonal_rows():
    free, group = jnp.ones((1, 8), bool), jnp.zeros((1, 8), jnp.int32)
    method = TokenCorr(capacity=8)
    assert method.different(jnp.ones((1, 1, 8, 4)), free, group)[0].tolist() == [[1]]
    assert method.different(jnp.eye(8)[None, None], free, group)[0].tolist() == [[8]]


def test_a_smaller_budget_shrinks_the_crops_in_proportion():
    tokens, cls, keys = world(0)
    found = kept(TokenCorr(capacity=30, special=0, crops=3, sample=False), tokens, told(cls, keys), jnp.asarray([17]))
    assert np.bincount(np.array(found) // 10).tolist() == [10, 4, 3]  # 7 of 14: half of 8 and of 6


def test_rows_are_sampled_in_proportion():
    """One row of four by p = .4, .3, .2, .1."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    tokens, method = images(np.zeros((1, 4, 1)), 0), TokenCorr(capacity=4, special=0)
    evidence = told(np.broadcast_to(p, (2, 1, 1, 4)), np.ones((1, 1, 4, 3)))  # equal keys: one row stays

    @functools.partial(jax.vmap, in_axes=0)
    def drawn(key):
        return method.plan({}, (), tokens, evidence._replace(key=jnp.stack([key, key])))[1].assign[0] >= 0

    often = np.asarray(jax.jit(drawn)(jax.random.split(jax.random.key(0), 2000)))
    assert (often.sum(1) == 1).all() and np.abs(often.mean(0) - p).max() < 0.05
