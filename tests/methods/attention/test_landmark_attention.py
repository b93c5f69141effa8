import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill_chunked, replay
from jaxtok.methods import Landmark, LandmarkAttention
from jaxtok.testing import world
from tests.methods import golden
from tests.methods.attention import run

small = lambda capacity: LandmarkAttention(block=4)
METHOD = LandmarkAttention(block=4)


def weights(q, k, size, cap=None, scale=None):
    """The card's grouped softmax as a scatter over groups, [b h n n] in float64: landmarks share the group of the query's own block."""
    n, k = q.shape[2], np.repeat(k, q.shape[1] // k.shape[1], 1)
    y = run.logits(q, k, cap, scale)
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


def scattered(size):
    """The same in JAX as the naive form: keys scattered into the groups of each query, one sum a group."""

    def one(q, k, v):
        n = q.shape[2]
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
        i, j = np.arange(n)[:, None], np.arange(n)[None]
        mark, same = (j % size == size - 1) & (i >= 0), i // size == j // size
        seen = (j <= i) & ~(mark & same)
        group = np.where(same | mark, 0, j // size + 1)
        into = jnp.asarray((group[..., None] == np.arange(n // size + 2)) & seen[..., None], jnp.float32)  # [i j group]
        y = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        e = jnp.where(seen[None, None], jnp.exp(y - jax.lax.stop_gradient(y.max(-1, keepdims=True))), 0.0)
        total = jnp.einsum("bhij,ijg->bhig", e, into)
        p = e / jnp.where(seen[None, None], jnp.einsum("bhig,ijg->bhij", total, into), 1.0)
        last = np.minimum(np.arange(n) // size * size + size - 1, n - 1)
        w = jnp.where(same[None, None], p, p * p[..., last])
        return jnp.where(mark[None, None], 0.0, w) @ v

    return one


@pytest.mark.parametrize("block, n, g", [(4, 23, 2), (5, 20, 4), (2, 9, 1), (30, 23, 2)])
def test_the_reference(block, n, g):
    """The weights themselves: they sum to 1, a landmark's is 0, those of later rows too."""
    q, k, v = run.arrays(n=n, g=g)
    want, m = weights(q, k, block), LandmarkAttention(block=block)
    w = run.weights(m, q, k)
    np.testing.assert_allclose(w, want, atol=2e-5)
    np.testing.assert_allclose(w.sum(-1), 1.0, atol=1e-5)
    assert not w[..., block - 1 :: block].any() and not w[:, :, ~run.causal(n)].any()
    np.testing.assert_allclose(run.attend(m, q, k, v), np.einsum("bhij,bhjd->bhid", want, np.repeat(v, 4 // g, 1)), atol=2e-5)


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
        if "weights" in c:
            np.testing.assert_allclose(run.weights(m, c["q"], c["k"]), c["weights"], atol=3e-5)
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


def test_dead_steps_leave_the_states():
    run.dead_steps_leave_the_states(METHOD)


def test_padding_does_not_matter():
    run.padding_does_not_matter(METHOD)


def test_gradients():
    run.gradients_are_right(METHOD)


@pytest.mark.parametrize("block, n", [(4, 23), (5, 20)])
def test_gradients_are_those_of_the_scattered_form(block, n):
    q, k, v = run.arrays(n=n)
    got = np.asarray(jax.jit(scattered(block))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v))))
    np.testing.assert_allclose(got, np.einsum("bhij,bhjd->bhid", weights(q, k, block), np.repeat(v, 2, 1)), atol=2e-5)
    run.same_gradients(LandmarkAttention(block=block), scattered(block), shape=dict(n=n))


def test_soft_cap_and_scale():
    run.capped(METHOD, lambda q, k, v: np.einsum("bhij,bhjd->bhid", weights(q, k, 4, *run.CAPPED), np.repeat(v, 2, 1)))


def test_bfloat16():
    run.in_bfloat16(METHOD, lambda q, k, v: np.einsum("bhij,bhjd->bhid", weights(q, k, 4), np.repeat(v, 2, 1)))
    run.decodes_in_bfloat16(METHOD)


@pytest.mark.parametrize("top_k, chunk, far", [(9, 12, False), (9, 5, False), (1, 5, True)])
def test_a_trained_model_is_read_by_retrieval(top_k, chunk, far):
    """Prompt in chunks and steps through the reader `landmark`: with room for all blocks the same logits, with fewer others."""
    params, ids = run.model(METHOD)
    recipe = Recipe(reader=Landmark(top_k=top_k, block=4))

    @jax.jit
    def read(params, ids):
        tokens, layers = prefill_chunked(run.CFG, params, ids[:, : world.N], None, recipe, chunk=chunk, new=world.T, read=True)
        return replay(run.CFG, params, tokens, layers, ids[:, world.N :], recipe)[0]

    got = np.moveaxis(np.asarray(read(params, ids)), 0, 1)
    off = np.abs(got - np.asarray(run.program(METHOD)(params, ids, None))[:, world.N - 1 : -1]).max()
    assert off > 1e-2 if far else off < 5e-5


def test_defaults():
    assert LandmarkAttention().block == 50 + 1 == Landmark().block


def test_bad_sizes():
    with pytest.raises(ValueError, match="block"):
        LandmarkAttention(block=1)
