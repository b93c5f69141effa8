import math

import numpy as np
import pytest

from jaxtok.methods import CCA
from tests.methods import golden
from tests.methods.attention import run

small = lambda capacity: CCA(group=2, window=max(capacity // 4 * 2, 2))
METHOD = CCA(group=2, window=4)


def reference(m, q, k, v):
    """The card query by query: cores of complete groups, then one softmax over cores and raw keys; also which of both a row sees."""
    (b, h, n, d), g, s = q.shape, m.group, m.window
    k, v = (np.repeat(x, h // k.shape[1], 1) for x in (k, v))
    out = np.zeros_like(q)
    for a in np.ndindex(b, h):
        cores = []
        for c in range(n // g):
            part = slice(c * g, (c + 1) * g)
            y = k[a][part] @ q[a][(c + 1) * g - 1] / math.sqrt(d)
            w = np.exp(y - y.max()) / np.exp(y - y.max()).sum()
            pool = {"cca": lambda x, w=w: w @ x, "mean": lambda x: x.mean(0), "max": lambda x: x.max(0)}[m.pooling]
            cores.append((pool(k[a][part]), pool(v[a][part])))
        for i in range(1, n + 1):
            old = max(0, math.floor((i - s) / g))
            keys = np.array([c[0] for c in cores[:old]] + list(k[a][old * g : i]))
            values = np.array([c[1] for c in cores[:old]] + list(v[a][old * g : i]))
            assert old * g + (i - old * g) == i and len(keys) == old + i - old * g
            y = keys @ q[a][i - 1] / math.sqrt(d)
            w = np.exp(y - y.max())
            out[a][i - 1] = w @ values / w.sum()
    return out


@pytest.mark.parametrize("pooling", ["cca", "mean", "max"])
@pytest.mark.parametrize("group, window, n", [(2, 4, 23), (3, 6, 23), (4, 4, 9)])
def test_the_reference(group, window, n, pooling):
    m, x = CCA(group=group, window=window, pooling=pooling), run.arrays(n=n)
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


def test_the_official_outputs(data):
    used = 0
    for c in golden.cases(data, "cca_attention"):
        g, s = int(c["pool_size"]), int(c["window"])
        if s % g == 0:  # elsewhere the official masks contradict each other, and the class refuses
            m = CCA(group=g, window=s, pooling=str(c["pool_func"]))
            np.testing.assert_allclose(run.attend(m, c["q"], c["k"], c["v"]), c["out"], atol=3e-5)
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


def test_later_tokens_do_not_matter():
    run.later_tokens_do_not_matter(METHOD)


def test_gradients():
    run.gradients_are_right(METHOD)


def test_flops_grow_slower_than_the_square():
    assert run.exponent(CCA()) <= 1.6


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of group"):
        CCA(group=4, window=6)
    with pytest.raises(ValueError, match="pooling"):
        CCA(pooling="sum")
