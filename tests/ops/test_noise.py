"""Threefry's published vectors, the distribution, and what a number hangs on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.noise import _threefry, gumbel, words

draw = jax.jit(gumbel, static_argnames="heads")


@pytest.mark.parametrize(
    "key, counter, want",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_numbers(key, counter, want):
    assert tuple(int(x) for x in _threefry(*(jnp.uint32(x) for x in (*key, *counter)))) == want


def test_numbers_hang_on_head_and_positions_alone():
    seed = words(None, 3, 0)
    q_pos, k_pos = jnp.asarray([[5, 9]], jnp.int32), jnp.asarray([[[0, 4, 9, -1]]], jnp.int32)
    z = draw(seed, q_pos, k_pos, heads=4)
    assert z.shape == (1, 4, 2, 4) and z.dtype == jnp.float32
    turned = draw(seed, q_pos[:, ::-1], k_pos[:, :, ::-1], heads=4)
    np.testing.assert_array_equal(turned[:, :, ::-1, ::-1], z)
    both = draw(jnp.stack([seed, words(None, 4, 0)]), jnp.repeat(q_pos, 2, 0), jnp.repeat(jnp.repeat(k_pos, 2, 1), 2, 0), heads=4)
    np.testing.assert_array_equal(both[0], z[0])  # another row of a batch, keys with a head axis
    assert len(np.unique(both)) == both.size, "two of 64 numbers are alike"
    assert len({tuple(np.asarray(x).tolist()) for x in (seed, words(None, 3, 1), words(None, 4, 0), words(jax.random.key(1), 3, 0))}) == 4
    assert words(None, None, 0) is None


def test_numbers_are_gumbel_and_independent():
    """Mean, variance and quantiles of 2**18 numbers; neighbours along head, query and key do not know of each other."""
    pos = jnp.arange(256, dtype=jnp.int32)[None]
    z = np.asarray(draw(words(None, 0, 0), pos, pos[:, None], heads=4), np.float64)[0]
    n = z.size
    assert abs(z.mean() - np.euler_gamma) < 5 * (np.pi**2 / 6 / n) ** 0.5 and abs(z.var() - np.pi**2 / 6) < 0.03
    for p in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert abs((z < -np.log(-np.log(p))).mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    for axis in range(3):
        a, b = (np.take(z, i, axis).ravel() for i in (range(z.shape[axis] - 1), range(1, z.shape[axis])))
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / a.size**0.5
    assert np.isfinite(z).all() and z.min() > -2.8 and z.max() < 16


def test_refuses():
    pos = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="4 heads do not share the keys of 3"):
        gumbel(words(None, 0, 0), pos, jnp.zeros((1, 3, 2), jnp.int32), 4)
