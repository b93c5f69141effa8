"""VTC-CLS against its formula, the official outputs and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import VTCCLS, FasterVLM
from tests.methods.golden import cases
from tests.methods.vision.select import best, images, kept, left
from tests.methods.vision.toyrows import do

small = lambda n: VTCCLS(capacity=n, layers=(0, 1))


def attention(rng, *shape):
    a = np.exp(rng.normal(size=shape))
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


def test_by_hand():
    """Sums over two layers .5, .6, .4: rows 1 and 2 stay though row 3 is the best of the last layer."""
    cls = np.array([[[[0.4, 0.3, 0.3, 0.0]]], [[[0.1, 0.2, 0.3, 0.4]]]], np.float32)
    assert kept(VTCCLS(capacity=2, layers=(0, 1)), images(np.zeros((1, 4, 1))), Evidence(cls=cls)) == [0, 1, 2]
    assert kept(VTCCLS(capacity=1, layers=(0, 1), over="max"), images(np.zeros((1, 4, 1))), Evidence(cls=cls)) == [0, 3]
    assert kept(VTCCLS(capacity=1, layers=(0, 1), over="min"), images(np.zeros((1, 4, 1))), Evidence(cls=cls)) == [0, 2]


def test_reference():
    rng = np.random.default_rng(0)
    cls, tokens = attention(rng, 4, 2, 3, 15), images(rng.normal(size=(2, 15, 4)))
    for i in range(2):
        score = sum(cls[layer, i].astype(np.float64).mean(0) for layer in range(4))[1:]
        want = [0] + [1 + j for j in best(score, 5)]
        assert kept(VTCCLS(capacity=5, layers=(0, 1, 2, 3)), tokens, Evidence(cls=cls), row=i) == want


def test_of_the_last_layer_alone_it_is_fastervlm():
    rng = np.random.default_rng(1)
    cls, tokens = attention(rng, 1, 1, 3, 15), images(rng.normal(size=(1, 15, 4)))
    want = kept(FasterVLM(capacity=5), tokens, Evidence(cls=cls[0]), jnp.asarray([5]))
    assert kept(VTCCLS(capacity=5, layers=(-1,)), tokens, Evidence(cls=cls), jnp.asarray([5])) == want


def test_bad_layers():
    with pytest.raises(ValueError, match="layers"):
        VTCCLS(capacity=3, layers=())


def test_official_outputs(data):
    for case in cases(data, "vtc_cls"):
        start, t = int(case["start_layer"]), int(case["token_num"])
        cls = case["cls_attn_all_layers"][start:-1]
        method = VTCCLS(capacity=t, layers=tuple(range(start, start + len(cls))))
        tokens = images(case["features_with_cls"])
        np.testing.assert_allclose(np.asarray(do(method, "score", {}, tokens, Evidence(cls=cls)))[0, 1:], case["score_sum"], rtol=1e-5)
        assert (np.array(kept(method, tokens, Evidence(cls=cls))[1:]) - 1).tolist() == case["kept_indices_sorted"].tolist()
        np.testing.assert_allclose(left(method, tokens, Evidence(cls=cls)).x[:, 1:], case["out_features"])
