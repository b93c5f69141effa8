import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.store import begin, extend, write


def rows(n, start=0):
    return jnp.broadcast_to(jnp.arange(start, start + n, dtype=jnp.float32)[None, None, :, None], (2, 1, n, 1))


def test_a_ring_holds_the_last_tokens():
    """Slots 4, counts 6 and 3 of 7 rows: orders 4 5 2 3, and 0 1 2."""
    store = begin(rows(7), rows(7) + 10, jnp.array([6, 3]), 4)
    np.testing.assert_array_equal(store.pos, [[4, 5, 2, 3], [0, 1, 2, -1]])
    np.testing.assert_array_equal(store.k[0, 0, :, 0], [4, 5, 2, 3])
    np.testing.assert_array_equal(store.v[1, 0, :3, 0], [10, 11, 12])


def test_one_token_at_a_time_is_all_at_once():
    store = begin(rows(0), rows(0), jnp.zeros((2,), jnp.int32), 3)
    for p in range(5):
        store = extend(store, rows(1, p), rows(1, p), jnp.array([p, p if p < 2 else -1]))
    want = begin(rows(5), rows(5), jnp.array([5, 2]), 3)
    np.testing.assert_array_equal(store.pos, want.pos)
    np.testing.assert_array_equal(store.k, want.k)


def test_nowhere():
    store = begin(rows(2), rows(2), jnp.array([2, 2]), 2)
    same = write(store, rows(1, 9), rows(1, 9), jnp.array([-1, 2]), jnp.array([5, 5]))
    np.testing.assert_array_equal(same.pos, store.pos)
    np.testing.assert_array_equal(same.k, store.k)


def test_bad_sizes():
    with pytest.raises(ValueError, match="slots"):
        begin(rows(2), rows(2), jnp.array([2, 2]), 0)
