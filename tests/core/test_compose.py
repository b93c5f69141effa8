"""Plans as an algebra: every pair of kinds against applying one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import compose as algebra
from jaxtok.core import reduce as red
from jaxtok.core import select
from jaxtok.core.types import DensePlan, Plan

KINDS = ("selection", "merge", "dense")
compose, apply, lift = jax.jit(algebra.compose), jax.jit(red.apply), jax.jit(algebra.lift)


def make(kind, live, m, rng):
    """A random plan [b m] over rows of which `live` [b n] are live: m - 1 groups at most, the first rows empty."""
    b, n = live.shape
    if kind == "selection":
        mask = live & (rng.random(live.shape) < 0.7)
        return select.pack(jnp.asarray(mask), m)
    index, assign, w = np.full((b, m), -1), np.full((b, n), -1), np.zeros((b, m, n), np.float32)
    for i in range(b):
        rows = np.flatnonzero(live[i])
        groups = np.arange(m - min(m - 1, len(rows)), m)
        index[i, groups] = rng.permutation(rows)[: len(groups)]
        for j in rows:
            assign[i, j] = rng.choice([-1, *groups])
        for g in groups:
            assign[i, index[i, g]] = g
            w[i, g, rows] = rng.random(len(rows))
    if kind == "dense":
        return DensePlan(jnp.asarray(w / np.maximum(w.sum(-1, keepdims=True), 1e-9)))
    weight = np.where(assign < 0, rng.random((b, n)), rng.random((b, n)) + 0.1)  # what a dropped row weighs must not matter
    return Plan(jnp.asarray(index, jnp.int32), jnp.asarray(assign, jnp.int32), jnp.asarray(weight, jnp.float32), jnp.ones((b,), jnp.int32))


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
def test_composed_is_one_after_the_other(kinds):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        live = np.ones((2, 8), bool)
        live[1, :3] = False
        first = make(kinds[0], live, 6, rng)
        then = make(kinds[1], np.asarray(red.representative(first)) >= 0, 4, rng)
        x = jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32)
        both = compose(first, then)
        np.testing.assert_allclose(apply(both, x), apply(then, apply(first, x)), atol=2e-6)
        assert isinstance(both, DensePlan) == ("dense" in kinds)
        if isinstance(both, Plan):
            assert (both.weight is None) == (kinds == ("selection", "selection")), "two selections stay a gather"
            np.testing.assert_array_equal(both.lost, first.lost + then.lost)
            size = jnp.asarray(live, jnp.float32)
            np.testing.assert_allclose(red.total(both, size), red.total(then, red.total(first, size)), atol=1e-6)
            pos = jnp.asarray(np.where(live, np.arange(8), -1), jnp.int32)
            one = jnp.where(both.index >= 0, red.gather(pos, both.index), -1)
            mid = jnp.where(first.index >= 0, red.gather(pos, first.index), -1)
            np.testing.assert_array_equal(one, jnp.where(then.index >= 0, red.gather(mid, then.index), -1))


def test_composition_is_associative_and_has_a_unit():
    rng = np.random.default_rng(7)
    a = make("merge", np.ones((1, 8), bool), 6, rng)
    b = make("selection", np.asarray(a.index) >= 0, 4, rng)
    c = make("merge", np.asarray(b.index) >= 0, 3, rng)
    x = jnp.asarray(rng.normal(size=(1, 8, 2)), jnp.float32)
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    np.testing.assert_array_equal(left.index, right.index)
    np.testing.assert_array_equal(left.assign, right.assign)
    np.testing.assert_allclose(apply(left, x), apply(right, x), atol=1e-6)
    for same in (compose(select.identity((1, 8)), a), compose(a, select.identity((1, 6)))):
        np.testing.assert_array_equal(same.assign, a.assign)
        np.testing.assert_allclose(apply(same, x), apply(a, x), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_same_map(kind):
    rng = np.random.default_rng(3)
    live = np.array([[False, True, True, True, True, True, True]])
    plan = make(kind, live, 4, rng)
    x = jnp.asarray(rng.normal(size=(1, 7, 3)), jnp.float32)
    np.testing.assert_allclose(apply(algebra.dense(plan), x), apply(plan, x), atol=1e-6)
    sums = np.asarray(algebra.dense(plan).w.sum(-1))
    np.testing.assert_allclose(sums, np.asarray(red.representative(plan) >= 0, np.float32), atol=1e-6)


def test_per_head_plans_compose():
    rng = np.random.default_rng(5)
    live = np.ones((2, 6), bool)
    heads = [make("merge", live, 4, rng) for _ in range(3)]
    first = jax.tree.map(lambda *a: jnp.stack(a, 1), *heads)
    then = select.pack(jnp.asarray(rng.random((2, 3, 4)) < 0.6) & (first.index >= 0), 2)
    x = jnp.asarray(rng.normal(size=(2, 3, 6, 5)), jnp.float32)
    np.testing.assert_allclose(apply(compose(first, then), x), apply(then, apply(first, x)), atol=1e-6)
    np.testing.assert_allclose(apply(algebra.dense(first), x), apply(first, x), atol=1e-6)


def test_lift_gives_every_row_the_row_it_is_in():
    y = jnp.array([[[1.0], [2.0], [3.0]]])
    plan = Plan(jnp.array([[-1, 0, 3]], jnp.int32), jnp.array([[1, 2, -1, 2]], jnp.int32), jnp.ones((1, 4)), jnp.zeros((1,), jnp.int32))
    assert lift(plan, y).tolist() == [[[2.0], [3.0], [0.0], [3.0]]]
    # row 0 feeds groups 0 and 1 by 1/4 and 3/4 of its weight, row 1 group 1 only, row 2 none
    dense = DensePlan(jnp.array([[[0.25, 0.75, 0.0], [0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]]))
    np.testing.assert_allclose(lift(dense, y), [[[1.75], [1.25], [0.0]]], rtol=1e-6)
    x = jnp.arange(8.0).reshape(1, 4, 2)
    chosen = select.pack(jnp.array([[True, False, True, True]]), 3)
    assert lift(chosen, apply(chosen, x))[0, :, 1].tolist() == [1.0, 0.0, 5.0, 7.0]


def test_lift_of_a_composition_is_lift_after_lift():
    rng = np.random.default_rng(9)
    a = make("merge", np.ones((1, 8), bool), 6, rng)
    b = make("merge", np.asarray(a.index) >= 0, 4, rng)
    y = jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(lift(compose(a, b), y), lift(a, lift(b, y)))


def test_cost_by_hand():
    rng = np.random.default_rng(0)
    live = np.ones((1, 8), bool)
    assert algebra.cost(make("selection", live, 4, rng), 16) == algebra.PlanCost(8, 4, 0, 2 * 4 * 16 * 4 + 4 * 4)
    assert algebra.cost(make("merge", live, 4, rng), 16, itemsize=2) == algebra.PlanCost(8, 4, 2 * 8 * 16 + 4 * 16, 12 * 16 * 2 + 8 * 8)
    assert algebra.cost(make("dense", live, 4, rng), 16) == algebra.PlanCost(8, 4, 2 * 8 * 4 * 16, 12 * 16 * 4 + 4 * 32)
