import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import LandmarkAttention
from tests.methods import golden
from tests.methods.attention import run

small = lambda capacity: LandmarkAttention(block=4)
METHOD = LandmarkAttention(block=4)


def weights(q, k, size):
    """The card's grouped softmax as a scatter over groups, [b h n n] in float64: landmarks share the group of the query's own block."""
    n, k = q.shape[2], np.repeat(k, q.shape[1] // k.shape[1], 1)
    y = np.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    out = np.zeros_like(y)
    for i in range(n):
        own, group = i // size, np.full(n, -1)
        for j in range(i + 1):
            mark = j % size == size - 1
            group[j] = -1 if mark and j // size == own else own if mark else j // size
        p = np.zeros((*y.shape[:2], n))
        for c in range(own + 1):
            at = group == c
            e = np.exp(y[:, :, i, at] - y[:, :, i, at].max(-1, keepdims=True))
            p[:, :, at] = e / e.sum(-1, keepdims=True)
        for j in range(i + 1):
            mark = j % size == size - 1
            gate = 1.0 if j // size == own else p[:, :, j // size * size + size - 1]
            out[:, :, i, j] = 0.0 if mark else p[:, :, j] * gate
    return out


@pytest.mark.parametrize("block, n", [(4, 23), (5, 20), (2, 9), (30, 23)])
def test_the_reference(block, n):
    q, k, v = run.arrays(n=n)
    w = weights(q, k, block)
    np.testing.assert_allclose(w.sum(-1), 1.0, rtol=1e-12)
    assert not w[..., block - 1 :: block].any()
    want = np.einsum("bhij,bhjd->bhid", w, np.repeat(v, 2, 1))
    np.testing.assert_allclose(run.attend(LandmarkAttention(block=block), q, k, v), want, atol=2e-5)


def test_one_block_is_plain_attention():
    q, k, v = run.arrays(n=11)
    np.testing.assert_allclose(run.attend(LandmarkAttention(block=12), q, k, v), run.dense(q, k, v, run.causal(11)), atol=2e-5)


def test_landmarks_that_know_their_blocks_mass_are_plain_attention():
    """A block's tokens have one key, k, a landmark k + (0, ..., 0, sqrt(d) log l), queries a last channel of 1: its logit is the logsumexp."""
    block, n, d = 5, 20, 8
    q, k, v = run.arrays(g=4, n=n, d=d)
    q[..., -1] = 1.0
    k = np.repeat(k[:, :, ::block], block, 2)
    mark = np.arange(n) % block == block - 1
    k[..., -1] = np.where(mark, math.sqrt(d) * math.log(block - 1), 0.0)
    plain = run.dense(q, k, v, run.causal(n) & ~mark[None])
    np.testing.assert_allclose(run.attend(LandmarkAttention(block=block), q, k, v), plain, atol=2e-5)


def test_the_official_outputs_and_gradients(data):
    """Those with landmarks at regular places, or none; a landmark at position 0, which official cases have too, is none of ours."""
    used = 0
    for c in golden.cases(data, "landmark_attention"):
        marks = np.asarray(c["is_landmark"]).astype(bool)
        n, first = marks.shape[1], int(np.argmax(marks[0]))
        first = first if marks.any() else n
        if first < 1 or (marks != (np.arange(n) % (first + 1) == first)[None]).any():
            continue
        m, x = LandmarkAttention(block=first + 1), [jnp.asarray(c[name], jnp.float32) for name in "qkv"]
        scale = dict(rtol=1e-4, atol=3e-5)
        np.testing.assert_allclose(run.attend(m, *x), c["out"], **scale)
        used += 1
        if "grad_x" in c:
            h, d = x[0].shape[1], x[0].shape[3]

            def value(rows, m=m, c=c, h=h, d=d):
                b, n, _ = rows.shape
                qkv = (rows @ jnp.asarray(c["w_qkv"], jnp.float32).T).reshape(b, n, 3, h, d)
                q, k, v = (jnp.moveaxis(qkv[:, :, i], 1, 2) for i in range(3))
                return jnp.sum(
                    jnp.moveaxis(m.attend(0, q, k, v, run.rows(b, n)), 1, 2).reshape(b, n, -1)
                    * jnp.asarray(c["out_cotangent"], jnp.float32)
                )

            got = np.asarray(jax.jit(jax.grad(value))(jnp.asarray(c["x"], jnp.float32)))
            np.testing.assert_allclose(got, c["grad_x"], rtol=1e-3, atol=1e-4)
    assert used


def test_decode_is_the_parallel_pass():
    run.decode_is_parallel(METHOD)


def test_later_tokens_do_not_matter():
    run.later_tokens_do_not_matter(METHOD)


def test_gradients():
    run.gradients_are_right(METHOD)


def test_bad_sizes():
    with pytest.raises(ValueError, match="block"):
        LandmarkAttention(block=1)
