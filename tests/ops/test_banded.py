import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.evals import cost
from jaxtok.ops.attention import attention
from jaxtok.ops.banded import banded


def arrays(n, h=4, g=2, d=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (2, e, n, d)) for k, e in zip(keys, (h, g, g), strict=True))


def dense(q, k, v, first, softcap=None):
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    y = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    y = y if softcap is None else softcap * jnp.tanh(y / softcap)
    i, j = np.arange(q.shape[2])[:, None], np.arange(q.shape[2])[None]
    y = jnp.where(((j <= i) & (j >= first[:, None]))[None, None], y, -jnp.inf)
    return jax.nn.softmax(y, -1) @ v, jax.nn.logsumexp(y, -1)


@pytest.mark.parametrize("n, chunk, reach", [(23, 4, 5), (23, 128, 5), (16, 4, 1), (5, 2, 9), (24, 8, 24), (23, 4, 9), (23, 4, 19)])
def test_is_attention_under_the_mask(n, chunk, reach):
    x, first = arrays(n), np.maximum(0, np.arange(n) - reach + 1) // 2 * 2
    for softcap in (None, 0.7):
        for got, want in zip(banded(*x, first, chunk=chunk, softcap=softcap), dense(*x, first, softcap), strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-5)


@pytest.mark.parametrize("reach", [4, 9])
def test_gradients_are_those_of_the_mask(reach):
    x, first = arrays(11), np.maximum(0, np.arange(11) - reach + 1)
    total = lambda f: lambda *x: sum(jnp.sum(jnp.sin(y)) for y in f(*x, first))
    got = jax.grad(total(lambda *a: banded(*a, chunk=4)), (0, 1, 2))(*x)
    for a, b in zip(got, jax.grad(total(dense), (0, 1, 2))(*x), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_the_whole_past_is_causal_attention():
    q, k, v = arrays(9)
    pos = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    for a, b in zip(banded(q, k, v, np.zeros(9, int)), attention(q, k, v, q_pos=pos, k_pos=pos), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_rows_that_see_everything_cost_no_more_than_attention():
    """A window as long as the text, and one of half of it: the head is causal attention, which leaves out the future."""
    x = jax.ShapeDtypeStruct((1, 1, 1024, 16), jnp.float32)
    pos = jnp.arange(1024, dtype=jnp.int32)[None]
    flops = lambda f: cost.count(f, x, x, x).flops
    full = flops(lambda q, k, v: attention(q, k, v, q_pos=pos, k_pos=pos, diagonal=0))
    assert flops(lambda q, k, v: banded(q, k, v, np.zeros(1024, int))) <= full
    wide = flops(lambda q, k, v: banded(q, k, v, np.maximum(0, np.arange(1024) - 1023), chunk=1024))
    assert full < 0.7 * wide


def test_flops_are_linear():
    def flops(n):
        x = jax.ShapeDtypeStruct((1, 1, n, 16), jnp.float32)
        return cost.count(lambda q, k, v: banded(q, k, v, np.maximum(0, np.arange(n) - 63)), x, x, x).flops

    assert flops(4096) == pytest.approx(4 * flops(1024), rel=0.02)


@pytest.mark.parametrize("first", [np.zeros(4, int), np.arange(5) + 1, np.full(5, -1)])
def test_bad_first(first):
    with pytest.raises(ValueError, match="first"):
        banded(*arrays(5), first)
