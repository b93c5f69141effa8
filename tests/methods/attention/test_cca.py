import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import CCA
from tests.methods import golden
from tests.methods.attention import run

small = lambda capacity: CCA(group=2, window=max(capacity // 4 * 2, 2))
METHOD = CCA(group=2, window=4)


def reference(m, q, k, v, cap=None, scale=None):
    """The card query by query: cores of complete groups, then one softmax over cores and raw keys; also which of both a row sees."""
    (b, h, n, _), g, s = q.shape, m.group, m.window
    k, v = (np.repeat(x, h // k.shape[1], 1) for x in (k, v))
    out = np.zeros_like(q)
    for a in np.ndindex(b, h):
        cores = []
        for c in range(n // g):
            part = slice(c * g, (c + 1) * g)
            y = run.logits(q[a][(c + 1) * g - 1 : (c + 1) * g], k[a][part], None, scale)[0]
            w = np.exp(y - y.max()) / np.exp(y - y.max()).sum()
            pool = {"cca": lambda x, w=w: w @ x, "mean": lambda x: x.mean(0), "max": lambda x: x.max(0)}[m.pooling]
            cores.append((pool(k[a][part]), pool(v[a][part])))
        for i in range(1, n + 1):
            old = max(0, math.floor((i - s) / g))
            keys = np.array([c[0] for c in cores[:old]] + list(k[a][old * g : i]))
            values = np.array([c[1] for c in cores[:old]] + list(v[a][old * g : i]))
            assert old * g + (i - old * g) == i and len(keys) == old + i - old * g
            y = run.logits(q[a][i - 1 : i], keys, cap, scale)[0]
            w = np.exp(y - y.max())
            out[a][i - 1] = w @ values / w.sum()
    return out


def matrices(m):
    """The same with whole matrices in JAX: all cores beside all keys, under the card's two masks."""

    def one(q, k, v):
        (_, h, n, d), g, s = q.shape, m.group, m.window
        k, v, c = *(jnp.repeat(x, h // k.shape[1], 1) for x in (k, v)), n // g
        cut = lambda x: x[:, :, : c * g].reshape(*x.shape[:2], c, g, d)
        w = jax.nn.softmax(jnp.einsum("bhcd,bhcgd->bhcg", cut(q)[:, :, :, -1], cut(k)) * d**-0.5, -1)
        pool = {"cca": lambda x: jnp.einsum("bhcg,bhcgd->bhcd", w, x), "mean": lambda x: x.mean(3), "max": lambda x: x.max(3)}[m.pooling]
        i, core, j = np.arange(n)[:, None] + 1, np.arange(c)[None], np.arange(n)[None] + 1
        see = np.concatenate([(core + 1) * g <= i - s, (j <= i) & (j > np.maximum(0, (i - s) // g) * g)], 1)
        y = jnp.einsum("bhid,bhjd->bhij", q, jnp.concatenate([pool(cut(k)), k], 2)) * d**-0.5
        return jax.nn.softmax(jnp.where(see[None, None], y, -1e9), -1) @ jnp.concatenate([pool(cut(v)), v], 2)

    return one


@pytest.mark.parametrize("pooling", ["cca", "mean", "max"])
@pytest.mark.parametrize("group, window, n, g", [(2, 4, 23, 2), (3, 6, 23, 4), (4, 4, 9, 1)])
def test_the_reference(group, window, n, g, pooling):
    m, x = CCA(group=group, window=window, pooling=pooling), run.arrays(n=n, g=g)
    np.testing.assert_allclose(run.attend(m, *x), reference(m, *x), atol=2e-5)


def test_by_hand():
    """Groups of 2, window 2, values 1, 2, 4, ..., all logits 0: token 5 sees the core of 1, 2 and the tokens 3, 4, 5."""
    zero, v = np.zeros((1, 1, 6, 4)), np.broadcast_to(2.0 ** np.arange(6)[:, None], (1, 1, 6, 4))
    out = run.attend(CCA(group=2, window=2), zero, zero, v)[0, 0, :, 0]
    np.testing.assert_allclose(out, [1, 1.5, 7 / 3, (1.5 + 4 + 8) / 3, (1.5 + 4 + 8 + 16) / 4, (1.5 + 6 + 16 + 32) / 4], rtol=1e-6)


@pytest.mark.parametrize("method", [CCA(group=1, window=4), CCA(group=1, window=1), CCA(group=4, window=24)])
def test_groups_of_one_and_short_texts_are_plain_attention(method):
    q, k, v = run.arrays()
    np.testing.assert_allclose(run.attend(method, q, k, v), run.dense(q, k, v, run.causal(q.shape[2])), atol=2e-5)


@pytest.mark.parametrize("group, window, n", [(3, 6, 29), (2, 2, 12), (4, 8, 8), (1, 3, 9)])
def test_cores_and_tokens_part_the_past(group, window, n):
    """With logits 0 each thing seen weighs the same: a token near counts 1, one in a core 1 / group, and together they are the past."""
    zero = np.zeros((1, 1, n, 4))
    out = run.weights(CCA(group=group, window=window), zero, zero)[0, 0]
    for i in range(1, n + 1):
        old = max(0, (i - window) // group)
        count = old + i - old * group
        want = [1 / (group * count)] * (old * group) + [1 / count] * (i - old * group) + [0.0] * (n - i)
        np.testing.assert_allclose(out[i - 1], want, atol=1e-6)


def test_the_official_outputs(data):
    """Cases whose window is no multiple of the group have official masks that contradict each other, and the class refuses them."""
    used = 0
    for c in golden.cases(data, "cca_attention"):
        g, s = int(c["pool_size"]), int(c["window"])
        if s % g == 0:
            m = CCA(group=g, window=s, pooling=str(c["pool_func"]))
            np.testing.assert_allclose(run.attend(m, c["q"], c["k"], c["v"]), c["out"], atol=3e-5)
            zero, cores = np.zeros_like(c["q"]), int(c["num_pool"])
            seen = run.weights(m, zero, zero[:, : c["k"].shape[1]])[0, 0] > 0
            covered = np.concatenate([np.repeat(c["visible"][:, :cores], g, 1), np.zeros((len(seen), len(seen) - cores * g), bool)], 1)
            np.testing.assert_array_equal(seen, covered.astype(bool) | c["visible"][:, cores:].astype(bool))
            used += 1
    assert used
    for c in golden.cases(data, "cca_decode"):
        m = CCA(group=int(c["pool_size"]), window=int(c["window"]))
        np.testing.assert_allclose(run.attend(m, c["q"], c["k"], c["v"]), c["out_full"], atol=3e-5)
        first, cores = int(c["prefill"]), c["core_k"].shape[2]
        out, state = run.stepwise(m, c["q"], c["k"], c["v"], first)
        np.testing.assert_allclose(out, c["out_prefill_then_decode"][:, :, first:], atol=3e-5)
        np.testing.assert_allclose(np.asarray(state.far.k)[:, :, :cores], c["core_k"], atol=3e-5)
        np.testing.assert_allclose(np.asarray(state.far.v)[:, :, :cores], c["core_v"], atol=3e-5)


@pytest.mark.parametrize("method", [METHOD, CCA(group=3, window=3), CCA(group=2, window=2, pooling="max")])
def test_decode_is_the_parallel_pass(method):
    run.decode_is_parallel(method)


@pytest.mark.parametrize("method", [METHOD, CCA(group=3, window=3, pooling="mean")])
def test_later_tokens_do_not_matter(method):
    run.later_tokens_do_not_matter(method)


def test_dead_steps_leave_the_states():
    run.dead_steps_leave_the_states(METHOD)


def test_padding_does_not_matter():
    run.padding_does_not_matter(METHOD)


def test_gradients():
    run.gradients_are_right(METHOD)


@pytest.mark.parametrize("pooling", ["cca", "mean", "max"])
def test_gradients_are_those_of_whole_matrices(pooling):
    m = CCA(group=3, window=6, pooling=pooling)
    run.same_gradients(m, matrices(m))


def test_bfloat16():
    run.in_bfloat16(METHOD, lambda *x: reference(METHOD, *x))
    run.decodes_in_bfloat16(METHOD)


def test_soft_cap_and_scale():
    run.capped(METHOD, lambda *x: reference(METHOD, *x, *run.CAPPED))


def test_a_step_pools_the_group_that_ends_with_it():
    """Cores made one step after another are those of a prefill, by every pooling."""
    q, k, v = run.arrays(n=17)
    for pooling in ("cca", "mean", "max"):
        m = CCA(group=3, window=6, pooling=pooling)
        out, state = run.stepwise(m, q, k, v, 4)
        np.testing.assert_allclose(out, reference(m, q, k, v)[:, :, 4:], atol=2e-5)
        whole = run.stepwise(m, q, k, v, 17)[1].far
        np.testing.assert_allclose(np.asarray(state.far.k), np.asarray(whole.k), atol=2e-5)
        np.testing.assert_allclose(np.asarray(state.far.v), np.asarray(whole.v), atol=2e-5)
        np.testing.assert_array_equal(np.asarray(state.far.pos), np.asarray(whole.pos))


def test_defaults():
    assert (CCA().group, CCA().window, CCA().pooling) == (16, 1024, "cca")


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of group"):
        CCA(group=4, window=6)
    with pytest.raises(ValueError, match="pooling"):
        CCA(pooling="sum")
