"""Ratios to counts, budgets over layers, exact sums."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.core import budget

FEW = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    "ratio, n, want",
    [(0.35, 10, 4), (0.45, 10, 5), (0.9, 10, 9), (0.1, 10, 1), (0.04, 10, 1), (1.0, 7, 7), (0.5, 7, 4), (0.7, 10, 7), (1, 3, 3)],
)
def test_capacity_rounds_the_written_decimal_half_up(ratio, n, want):
    assert budget.capacity(ratio, n) == want


def test_a_full_row_keeps_the_capacity():
    live = jnp.arange(1, 201, dtype=jnp.int32)
    for percent in (*range(7, 100, 7), 25, 50, 75, 90, 100):
        want = [max(1, math.floor(Fraction(percent * n, 100) + Fraction(1, 2))) for n in range(1, 201)]
        assert [budget.capacity(percent / 100, n) for n in range(1, 201)] == want
        assert budget.keep(percent / 100, live).tolist() == want


def test_keep_is_exact_for_long_rows_and_at_least_one():
    live = jnp.array([0, 1, 2_000_000_000, 131_072], jnp.int32)
    assert budget.keep(0.3333, live).tolist() == [1, 1, 666_600_000, 43_686]
    assert budget.keep(0.5, live).dtype == jnp.int32


def test_ratio_out_of_range():
    for bad in (1.2, -0.1, 0.0, math.nan):
        with pytest.raises(ValueError, match="ratio is the fraction kept, over 0 and at most 1"):
            budget.capacity(bad, 10)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        budget.capacity(0.5, 0)


def test_per_head_takes_every_shape_and_never_exceeds_the_cap():
    assert budget.per_head(None, (2, 3), 5).tolist() == [[5] * 3] * 2
    assert budget.per_head(9, (2, 3), 5).tolist() == [[5] * 3] * 2
    assert budget.per_head(jnp.array([1, 7], jnp.int32), (2, 3), 5).tolist() == [[1] * 3, [5] * 3]
    assert budget.per_head(jnp.array([[1], [-7]], jnp.int32), (2, 3), 5).tolist() == [[1] * 3, [0] * 3]
    assert budget.per_head(jnp.arange(6, dtype=jnp.int32).reshape(2, 3), (2, 3), 4).tolist() == [[0, 1, 2], [3, 4, 4]]
    with pytest.raises(ValueError, match=r"\(1, 2, 3\)"):
        budget.per_head(jnp.zeros((1, 2, 3), jnp.int32), (2, 3), 4)
    with pytest.raises(TypeError, match=r"float32.*budget.keep"):
        budget.per_head(0.5, (2, 3), 4)


def test_pyramid_by_hand():
    assert [budget.pyramid(40, i, 5, 20) for i in range(5)] == [78, 59, 40, 21, 2]
    assert [budget.pyramid(40, i, 5, 20, most=60) for i in range(5)] == [60, 50, 40, 30, 20]
    assert budget.pyramid(40, 0, 1, 20) == 40
    with pytest.raises(ValueError, match="beta must be >= 1"):
        budget.pyramid(40, 0, 5, 0.5)


@FEW
@given(st.integers(1, 300), st.integers(2, 40), st.integers(1, 30))
def test_pyramid_sums_to_the_average_and_falls_with_depth(total, layers, beta):
    counts = [budget.pyramid(total, i, layers, beta) for i in range(layers)]
    assert counts == sorted(counts, reverse=True)
    assert abs(sum(counts) - layers * total) <= layers / 2
    assert counts[-1] == total // beta and counts[0] == 2 * total - total // beta
    assert [budget.pyramid(total, i, layers, 1) for i in range(layers)] == [total] * layers


@FEW
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(0, 60), st.integers(0, 3), st.integers(4, 12))
def test_shares_sum_exactly_inside_the_bounds(weights, total, least, most):
    weights = tuple(map(float, weights))
    n = len(weights)
    if not sum(weights) or not n * least <= total <= n * most:
        with pytest.raises(ValueError):
            budget.shares(weights, total, least, most)
        return
    out = budget.shares(weights, total, least, most)
    assert sum(out) == total and all(least <= x <= most for x in out)
    if all(a == weights[0] for a in weights):
        assert max(out) - min(out) <= 1
    ideal = [Fraction(w) / Fraction(sum(weights)) * total for w in weights]
    if all(least <= x <= most for x in ideal):
        assert all(abs(a - x) < 1 for a, x in zip(out, ideal, strict=True)), "largest remainder stays within one row of the share"


def test_shares_by_hand_and_refused():
    assert budget.shares((1.0, 1.0, 2.0), 8) == (2, 2, 4)
    assert budget.shares((1.0, 1.0, 1.0), 8) == (3, 3, 2)
    assert budget.shares((0.0, 1.0), 4) == (1, 3)
    with pytest.raises(ValueError, match="3 shares from 2 to 3 cannot sum to 10"):
        budget.shares((1.0, 1.0, 1.0), 10, least=2, most=3)
    for bad in ((), (0.0, 0.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="weights"):
            budget.shares(bad, 4)


def test_shares_far_from_their_ideal_take_no_row_by_row_walk():
    most = 10**6 + 1
    assert budget.shares((1.0, 0.0, 0.0), 2 * 10**6, least=0, most=most) == (most, 499_999 + 1, 499_999)
    assert budget.shares((1.0, 1.0), 10**9, least=1) == (5 * 10**8, 5 * 10**8)


apportion = jax.jit(budget.apportion)


@FEW
@given(st.lists(st.integers(0, 30), min_size=5, max_size=5), st.integers(1, 9))
def test_apportion_is_the_largest_remainder(part, over):
    part[0] += -sum(part) % over
    floor = [x // over for x in part]
    by_rest = sorted(range(len(part)), key=lambda i: (-(part[i] % over), i))
    for i in by_rest[: sum(part) // over - sum(floor)]:
        floor[i] += 1
    got = apportion(jnp.array([part, [0] * 5], jnp.int32), jnp.array([over, 0], jnp.int32))
    np.testing.assert_array_equal(got, [floor, [0] * 5])


def test_apportion_takes_one_static_denominator():
    assert apportion(jnp.array([[[3, 3, 3], [4, 4, 1]]], jnp.int32), 3).tolist() == [[[1, 1, 1], [2, 1, 0]]]
