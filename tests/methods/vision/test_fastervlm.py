"""FasterVLM against its formula, the official outputs and its limits."""

import jax.numpy as jnp
import numpy as np

from jaxtok.core.types import SPECIAL, Evidence
from jaxtok.methods import VTCCLS, FasterVLM, HiRED
from tests.methods.golden import cases
from tests.methods.vision.select import best, images, kept, left

small = lambda n: FasterVLM(capacity=n)


def attention(rng, b, h, n):
    a = np.exp(rng.normal(size=(b, h, n)))
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


def reference(cls, t):
    """Rows that stay of one sub-image, cls [h 1+n] with the class row first."""
    return [0] + [1 + j for j in best(cls[:, 1:].mean(0), t)]


def test_by_hand():
    """Means over heads .3, .1, .25, .05: rows 1 and 3 stay, and the class row."""
    cls = np.array([[[0.3, 0.4, 0.1, 0.1, 0.1], [0.3, 0.2, 0.1, 0.4, 0.0]]], np.float32)
    x = np.arange(5, dtype=np.float32).reshape(1, 5, 1)
    out = left(FasterVLM(capacity=2), images(x), Evidence(cls=cls))
    assert out.x[0, :, 0].tolist() == [0, 1, 3] and out.rope[0, :, 0].tolist() == [0, 1, 2]  # repacked
    assert FasterVLM(capacity=2, positions="keep").plan and out.delta.tolist() == [-2]


def test_reference_and_traced_budget():
    rng = np.random.default_rng(0)
    cls, tokens = attention(rng, 2, 3, 14), images(rng.normal(size=(2, 14, 4)))
    for i in range(2):
        assert kept(FasterVLM(capacity=6), tokens, Evidence(cls=cls), row=i) == reference(cls[i], 6)
        assert kept(FasterVLM(capacity=6), tokens, Evidence(cls=cls), jnp.asarray([4, 6]), i) == reference(cls[i], (3, 5)[i])


def test_all_rows_is_the_identity():
    rng = np.random.default_rng(1)
    tokens = images(rng.normal(size=(1, 14, 4)))
    out = left(FasterVLM(capacity=13), tokens, Evidence(cls=attention(rng, 1, 2, 14)))
    np.testing.assert_array_equal(out.x, tokens.x)


def test_the_same_rows_as_vtc_cls_from_the_last_layer_and_as_hired_of_one_image():
    rng = np.random.default_rng(2)
    cls, tokens = attention(rng, 1, 3, 20), images(rng.normal(size=(1, 20, 4)))
    want = kept(FasterVLM(capacity=7), tokens, Evidence(cls=cls))
    assert kept(VTCCLS(capacity=7, layers=(-1,)), tokens, Evidence(cls=cls[None])) == want
    assert kept(HiRED(capacity=7), tokens, Evidence(cls=np.stack([attention(rng, 1, 3, 20), cls]))) == want


def test_crops_keep_equally_many_and_all_newlines():
    rng = np.random.default_rng(3)
    cls = attention(rng, 1, 2, 3 * 8 + 2)
    segment = np.r_[np.repeat([0, 1, 2], 8), 1, 2]
    kind = np.r_[np.repeat([1, 2, 2], 8), SPECIAL, SPECIAL]
    tokens = images(rng.normal(size=(1, 26, 4)), segment=segment, kind=kind)
    want = [8 * p + j for p in range(3) for j in best(cls[0].mean(0)[8 * p : 8 * p + 8], 3)] + [24, 25]
    assert kept(FasterVLM(capacity=9, crops=3, special=2), tokens, Evidence(cls=cls)) == want


def test_official_outputs(data):
    for case in cases(data, "fastervlm"):
        cls, x, t = case["cls_attn_layer_minus2"], case["features_with_cls"], int(case["visual_token_num"])
        out = left(FasterVLM(capacity=t), images(x), Evidence(cls=cls))
        np.testing.assert_allclose(out.x[:, 1:], case["kept_features"])
        for i in range(len(x)):
            there = kept(FasterVLM(capacity=t), images(x), Evidence(cls=cls), row=i)[1:]
            assert (np.array(there) - 1).tolist() == np.flatnonzero(case["index_mask"][i]).tolist()
