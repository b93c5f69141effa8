"""The rotary embedding as an operation on keys, against complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import rotary


def reference_turn(x, ids, freqs):
    """One row at a time, as complex numbers."""
    r, out = len(freqs), np.array(x, np.float64)
    for at in np.ndindex(*ids.shape):
        z = (out[at][:r] + 1j * out[at][r : 2 * r]) * np.exp(1j * ids[at] * freqs)
        out[at][:r], out[at][r : 2 * r] = z.real, z.imag
    return out


@pytest.mark.parametrize("r", [4, 3])
def test_turn(r):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(1, 2, 5, 8)).astype(np.float32)
    a, b = rng.integers(0, 50, (2, 1, 2, 5))
    freqs = (100.0 ** -np.linspace(0, 1, r)).astype(np.float32)
    turn = lambda y, ids: rotary.turn(y, jnp.asarray(ids, jnp.int32), jnp.asarray(freqs))
    np.testing.assert_allclose(turn(jnp.asarray(x), a), reference_turn(x, a, freqs.astype(np.float64)), atol=1e-4)
    np.testing.assert_allclose(turn(turn(jnp.asarray(x), a), b), turn(jnp.asarray(x), a + b), atol=1e-4)
    np.testing.assert_allclose(turn(turn(jnp.asarray(x), a), -a), x, atol=1e-5)
    np.testing.assert_array_equal(turn(jnp.asarray(x), 0 * a), x)
    np.testing.assert_array_equal(turn(jnp.asarray(x), a)[..., 2 * r :], x[..., 2 * r :])
    q = jnp.asarray(x[:, ::-1].copy())
    far, near = (jnp.sum(turn(q, a + c) * turn(jnp.asarray(x), b + c), -1) for c in (0, 9))
    np.testing.assert_allclose(far, near, atol=1e-4)  # only distances matter
    assert turn(jnp.asarray(x, jnp.bfloat16), a).dtype == jnp.bfloat16
    bounded = lambda ids: rotary.turn(jnp.asarray(x), jnp.asarray(ids, jnp.int32), jnp.asarray(freqs), 50)
    np.testing.assert_allclose(bounded(a), turn(jnp.asarray(x), a), atol=1e-6)
    np.testing.assert_array_equal(bounded(a + 100 * (a > 25) - 100 * (a < 9)), bounded(np.where(a > 25, 49, np.where(a < 9, 0, a))))


def test_each_frequency_follows_its_axis():
    rng = np.random.default_rng(6)
    x, ids = rng.normal(size=(2, 3, 4, 6)).astype(np.float32), rng.integers(0, 30, (2, 4, 3))
    freqs = np.array([1.0, 0.3, 0.1], np.float32)
    got = rotary.rotate_by(jnp.asarray(x), jnp.asarray(ids, jnp.int32), freqs, (2, 0, 1))
    z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * ids[:, None, :, [2, 0, 1]] * freqs.astype(np.float64))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-4)
    one = rotary.rotate_by(jnp.asarray(x), jnp.asarray(ids[..., 0], jnp.int32), freqs)
    np.testing.assert_allclose(
        one, rotary.turn(jnp.asarray(x), jnp.asarray(np.repeat(ids[:, None, :, 0], 3, 1), jnp.int32), jnp.asarray(freqs)), atol=1e-6
    )
    with pytest.raises(ValueError, match="ids have 3 rotary axes; name the axis of each of the 3 frequencies"):
        rotary.rotate_by(jnp.asarray(x), jnp.asarray(ids, jnp.int32), freqs)
    with pytest.raises(ValueError, match=r"2 entries in 0\.\.1; need 3 entries, each in 0\.\.2"):
        rotary.rotate_by(jnp.asarray(x), jnp.asarray(ids, jnp.int32), freqs, (0, 1))
