"""Pooled rows against plain means and their limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import PoolRows
from tests.methods.vision.select import grid, images, left

small = lambda n: PoolRows(grid=(4, 4), out=(min(max(n // 4, 1), 4), 4))


def world(rows, cols, special=1):
    x = np.random.default_rng(rows).normal(size=(2, special + rows * cols, 3)).astype(np.float32)
    return x, images(x, special, cell=np.concatenate([np.full((special, 2), -1), grid(rows, cols)]))


def test_two_by_two_is_average_pooling():
    x, tokens = world(4, 6)
    out = left(PoolRows(grid=(4, 6), out=(2, 3)), tokens, Evidence())
    want = x[:, 1:].reshape(2, 2, 2, 3, 2, 3).mean((2, 4)).reshape(2, 6, 3)
    np.testing.assert_allclose(out.x[:, 1:], want, atol=1e-6)
    np.testing.assert_allclose(out.x[:, 0], x[:, 0])
    assert out.size[0].tolist() == [1] + [4] * 6 and out.pos[0].tolist() == [0, 1, 3, 5, 13, 15, 17]


def test_uneven_bins_and_a_smaller_budget():
    x, tokens = world(5, 3, 0)
    out = left(PoolRows(grid=(5, 3), out=(2, 3), special=0), tokens, Evidence(), jnp.asarray([6, 4]))
    grids = x.reshape(2, 5, 3, 3)
    want = np.concatenate([grids[:, :3].mean(1), grids[:, 3:].mean(1)], 1)  # floor(i * 2 / 5): rows 0 to 2, and 3, 4
    np.testing.assert_allclose(out.x[0], want[0], atol=1e-6)
    np.testing.assert_allclose(out.x[1, -4:], want[1, :4], atol=1e-6)
    assert (np.asarray(out.pos[1, :2]) == -1).all()


def test_the_same_grid_is_the_identity_and_a_finer_one_refused():
    x, tokens = world(3, 4)
    np.testing.assert_allclose(left(PoolRows(grid=(3, 4), out=(3, 4)), tokens, Evidence()).x, x, atol=1e-6)
    with pytest.raises(ValueError, match="finer"):
        PoolRows(grid=(3, 4), out=(4, 4))
    with pytest.raises(ValueError, match="capacity"):
        PoolRows(grid=(3, 4), out=(2, 4), capacity=9)
