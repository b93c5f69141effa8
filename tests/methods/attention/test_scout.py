import math

import jax
import numpy as np
import pytest

from jaxtok.methods import SCOUT
from jaxtok.methods.attention.scout import CHECKPOINTS, MIXER
from tests.methods import golden
from tests.methods.attention import run

small = lambda capacity: SCOUT(segment=2, window=max(capacity // 2, 1))
METHOD = SCOUT(segment=3, window=5)


def checkpoints(n, s):
    """Which rows each row sees: itself, and earlier last tokens of segments."""
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    return (i == j) | ((j < i) & (j % s == s - 1))


@pytest.mark.parametrize("segment, n", [(3, 23), (5, 23), (4, 3), (7, 14)])
def test_the_reference(segment, n):
    q, k, v = run.arrays(n=n)
    m = SCOUT(segment=segment, window=5)
    np.testing.assert_allclose(run.attend(m, q, k, v, CHECKPOINTS), run.dense(q, k, v, checkpoints(n, segment)), atol=2e-5)
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    np.testing.assert_allclose(run.attend(m, q, k, v, MIXER), run.dense(q, k, v, (j <= i) & (i - j < 5)), atol=2e-5)


def test_by_hand():
    """Segments of 2, all logits 0, values 1, 2, 4, ...: token 5 sees itself and tokens 2 and 4; token 4, a checkpoint, counts once."""
    zero, v = np.zeros((1, 1, 5, 4)), np.broadcast_to(2.0 ** np.arange(5)[:, None], (1, 1, 5, 4))
    out = run.attend(SCOUT(segment=2), zero, zero, v, CHECKPOINTS)[0, 0, :, 0]
    np.testing.assert_allclose(out, [1, 2, (2 + 4) / 2, (2 + 8) / 2, (2 + 8 + 16) / 3], rtol=1e-6)


def test_segments_of_one_and_wide_windows_are_plain_attention():
    q, k, v = run.arrays()
    want = run.dense(q, k, v, run.causal(q.shape[2]))
    np.testing.assert_allclose(run.attend(SCOUT(segment=1), q, k, v, CHECKPOINTS), want, atol=2e-5)
    np.testing.assert_allclose(run.attend(SCOUT(window=23), q, k, v, MIXER), want, atol=2e-5)


def test_the_official_outputs(data):
    for c in golden.cases(data, "scout_checkpoint_attention"):
        q = c["q"] * float(c["scale"]) * math.sqrt(c["q"].shape[-1])
        out = np.moveaxis(run.attend(SCOUT(segment=int(c["segment"])), q, c["k"], c["v"], CHECKPOINTS), 1, 2)
        np.testing.assert_allclose(out, c["out"], atol=3e-5)
        if "out_decode" in c:
            np.testing.assert_allclose(out, c["out_decode"].reshape(out.shape), atol=3e-5)


@pytest.mark.parametrize("method", [METHOD, SCOUT(segment=1, window=2)])
def test_decode_is_the_parallel_pass(method):
    run.decode_is_parallel(method)


def test_later_tokens_do_not_matter():
    run.later_tokens_do_not_matter(METHOD)


def test_gradients_reach_the_second_half():
    grad = run.gradients_are_right(METHOD)
    assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(grad["methods"]["attention"]))


def test_flops_grow_slower_than_the_square():
    assert run.exponent(SCOUT()) <= 1.6


def test_bad_sizes():
    with pytest.raises(ValueError, match="segment"):
        SCOUT(segment=0)
