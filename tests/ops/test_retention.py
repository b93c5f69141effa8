import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.evals import cost
from jaxtok.ops.retention import retain, retained, retention


def arrays(n=23, b=2, h=4, g=2, d=8, c=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (b, e, n, w), dtype) for key, e, w in zip(keys, (h, g, g), (d, d, c), strict=False))
    return q, k, v, jax.nn.log_sigmoid(jax.random.normal(keys[3], (b, g, n))) / 4


def matrices(q, k, v, fade):
    """All pairs at once: (q k^T D) v with D_ij = exp(fade_(j+1) + ... + fade_i)."""
    k, v, fade = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v, fade))
    total = jnp.cumsum(fade, -1)
    tril = jnp.tril(jnp.ones((q.shape[2],) * 2, bool))[None, None]
    stay = jnp.exp(jnp.where(tril, total[..., None] - total[..., None, :], -jnp.inf))
    return (jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5 * stay) @ v


@pytest.mark.parametrize("chunk, g", [(4, 2), (64, 2), (23, 4), (1, 1), (7, 2)])
def test_chunks_are_all_pairs_at_once(chunk, g):
    x = arrays(g=g)
    np.testing.assert_allclose(np.asarray(retention(*x, chunk=chunk)), np.asarray(matrices(*x)), atol=3e-5)


def test_by_hand():
    """q = k = 1, half of the state stays: values 1, 2, 4, 8 give 1, 2.5, 5.25, 10.625; the state is the last of them."""
    one, v = jnp.ones((1, 1, 4, 1)), jnp.asarray([1.0, 2, 4, 8])[None, None, :, None]
    half = jnp.full((1, 1, 4), float(np.log(0.5)), jnp.float32)
    np.testing.assert_allclose(np.asarray(retention(one, one, v, half, chunk=2))[0, 0, :, 0], [1, 2.5, 5.25, 10.625], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(retained(one, v, half)).ravel(), [10.625], rtol=1e-6)


def test_nothing_fades_is_linear_attention():
    q, k, v, fade = arrays()
    k2, v2 = (np.repeat(np.asarray(x, np.float64), 2, 1) for x in (k, v))
    sums = np.cumsum(k2[..., None] * v2[..., None, :], 2)
    want = np.einsum("bhnd,bhndc->bhnc", np.asarray(q, np.float64), sums) / np.sqrt(8)
    np.testing.assert_allclose(np.asarray(retention(q, k, v, jnp.zeros_like(fade), chunk=5)), want, atol=3e-5)


def test_steps():
    """From the state of a prefix, row by row; a row with k = 0 and fade = 0 leaves the state as it is."""
    q, k, v, fade = arrays()
    want, cut = np.asarray(matrices(q, k, v, fade)), lambda i, j: (x[:, :, i:j] for x in (q, k, v, fade))
    _, k0, v0, f0 = cut(0, 9)
    state, one = retained(k0, v0, f0), jax.jit(retain)
    for i in range(9, 23):
        out, state = one(state, *cut(i, i + 1))
        np.testing.assert_allclose(np.asarray(out)[:, :, 0], want[:, :, i], atol=3e-5)
    np.testing.assert_allclose(np.asarray(state), np.asarray(retained(k, v, fade)), atol=3e-5)
    none = one(state, q[:, :, :1], 0 * k[:, :, :1], v[:, :, :1], 0 * fade[:, :, :1])[1]
    np.testing.assert_array_equal(np.asarray(none), np.asarray(state))


def test_gradients_are_those_of_all_pairs():
    x = arrays(n=11)
    total = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3)))(*x)
    for got, want in zip(total(lambda *x: retention(*x, chunk=4)), total(matrices), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=5e-5)


def test_bfloat16():
    x = arrays(dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in x]
    got = retention(*x, chunk=8)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), np.asarray(matrices(*wide)), atol=0.15)
    np.testing.assert_allclose(np.asarray(retained(*x[1:])), np.asarray(retained(*wide[1:])), atol=1e-5)


def test_flops_are_linear():
    def flops(n):
        x = jax.ShapeDtypeStruct((1, 1, n, 16), jnp.float32)
        return cost.count(retention, x, x, x, jax.ShapeDtypeStruct((1, 1, n), jnp.float32)).flops

    assert flops(4096) == pytest.approx(4 * flops(1024), rel=0.02)


def test_bad_shapes():
    q, k, v, fade = arrays()
    with pytest.raises(ValueError, match="multiple"):
        retention(q[:, :3], k, v, fade)
    with pytest.raises(ValueError, match="chunk"):
        retention(q, k, v, fade, chunk=0)
