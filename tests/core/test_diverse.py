"""Greedy choices against loops that look at the whole objective each time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import diverse

N = 9


def world(seed):
    rng = np.random.default_rng(seed)
    like = rng.uniform(size=(2, N, N)).astype(np.float32)
    like = (like + like.swapaxes(1, 2)) / 2
    free = np.ones((2, N), bool)
    free[0, [1, 5]] = False
    return like, free, rng.uniform(size=(2, N)).astype(np.float32)


def greedy(free, most, value):
    picked = []
    while len(picked) < most:
        left = [j for j in range(N) if free[j] and j not in picked]
        if not left:
            return picked + [-1] * (most - len(picked))
        picked.append(max(left, key=lambda j: (value(picked, j), -j)))
    return picked


@pytest.mark.parametrize("most", [4, N, 12])
def test_each_pick_is_the_best_one(most):
    like, free, first = world(most)
    arrays = jnp.asarray(like), jnp.asarray(free)
    found = [f(*arrays, most, jnp.asarray(first)) for f in (diverse.max_min, diverse.max_sum, diverse.facility)]
    rows = min(most, N)
    for b in range(2):
        s = like[b].astype(np.float64)
        far = lambda p, j, s=s, b=b: min(s[p, j]) if p else first[b, j]
        alone = lambda p, j, s=s, b=b: -sum(s[p, j]) if p else first[b, j]
        cover = lambda p, j, s=s, b=b: s[[*p, j]][:, free[b]].max(0).sum() + first[b, [*p, j]].sum()
        for order, value in zip(found, (far, alone, cover), strict=True):
            assert order[b].tolist() == greedy(free[b], rows, value)


def test_no_candidates_and_no_picks():
    like, free, first = world(0)
    none = jnp.zeros_like(jnp.asarray(free))
    assert (diverse.max_min(jnp.asarray(like), none, 3, jnp.asarray(first)) == -1).all()
    assert diverse.max_sum(jnp.asarray(like), jnp.asarray(free), 0, jnp.asarray(first)).shape == (2, 0)


def test_the_nearest_other_candidate():
    like, free, _ = world(1)
    found = diverse.first_far(jnp.asarray(like), jnp.asarray(free))
    for b in range(2):
        for i in np.flatnonzero(free[b]):
            assert found[b, i] == min(like[b, i, j] for j in range(N) if j != i and free[b, j])
