"""Needs as a union, protected rows, live rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Needs, Protect, live_count


def test_union_of_needs_serves_both():
    a = Needs(rows=3, keys=True, weights=("q", "k"), layers=(4, 1))
    b = Needs(rows=5, received=True, queries=4, weights=("k", "v"), layers=(2, 1))
    want = Needs(rows=5, received=True, keys=True, queries=4, weights=("q", "k", "v"), layers=(1, 2, 4))
    assert a | b == want
    assert (b | a)._replace(weights=()) == want._replace(weights=())
    assert a | Needs() == a._replace(layers=(1, 4))
    assert (Needs(cls=True) | Needs(hidden=True, own=True)) == Needs(cls=True, hidden=True, own=True)
    assert (Needs(queries=0) | Needs()).queries == 0, "moments from order 0 on are a need"


def test_two_starts_of_the_query_moments_are_refused():
    with pytest.raises(ValueError, match=r"order 4 and from 0.*same sinks"):
        Needs(queries=4) | Needs(queries=0)


def test_protect_goes_by_order_and_not_by_row():
    pos = jnp.array([[-1, 0, 1, 4, 7, 9], [-1, -1, -1, -1, 0, 1]], jnp.int32)
    seen = jnp.array([10, 2], jnp.int32)
    got = Protect(sinks=2, recent=3).mask(pos, seen)
    np.testing.assert_array_equal(got, [[False, True, True, False, True, True], [False] * 4 + [True, True]])
    heads = jnp.stack([pos, pos[:, ::-1]], 1)
    got = Protect(sinks=2, recent=3).mask(heads, seen)
    np.testing.assert_array_equal(got[:, 0], got[:, 1, ::-1])
    assert not Protect().mask(pos, seen).any()
    assert Protect(sinks=2, recent=3).total == 5


@pytest.mark.parametrize("bad", [{"sinks": -1}, {"recent": -2}])
def test_protect_refuses_negative_numbers(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Protect(**bad)


def test_live_count():
    assert live_count(jnp.array([[[-1, 0, 3], [-1, -1, -1]]], jnp.int32)).tolist() == [[2, 0]]
