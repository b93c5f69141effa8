"""HiPrune against its formulas, the official outputs of both codes and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import HiPrune
from tests.methods.golden import cases
from tests.methods.vision.select import best, grid, images, kept, left

small = {
    "hiprune": lambda n: HiPrune(capacity=n, layers=(0, 1), alpha=0.5),
    "hiprune:qwen": lambda n: HiPrune(capacity=n, layers=(0, 1), alpha=0.5, variant="qwen", positions="keep_mrope"),
}


def reference(middle, deep, k, alpha, width):
    """Anchors, buffers and registers as sets; a [n] of one image without its class row."""
    n = len(middle)
    anchors = best(middle, round(k * alpha / 5))
    a = set(anchors)
    for j in anchors:
        a |= {min(max(j + step, 0), n - 1) for step in (-1, 1, -width, width)}
    return sorted(a | set(sorted((j for j in range(n) if j not in a), key=lambda j: -deep[j])[: k - len(a)]))


def received(rng, *shape):
    """Column sums of random attention."""
    a = np.exp(rng.normal(size=(*shape, shape[-1])))
    return (a / a.sum(-1, keepdims=True)).sum(-2).astype(np.float32)


def test_by_hand():
    """One anchor, row 4 of a 3 x 3 grid: 3, 5, 1, 7 come with it, then the best of the deep layer."""
    middle, deep = np.zeros((1, 1, 9), np.float32), np.zeros((1, 1, 9), np.float32)
    middle[..., 4], deep[..., 8] = 5, 3
    tokens = images(np.zeros((1, 9, 1)), 0, cell=grid(3, 3))
    method = HiPrune(capacity=6, special=0, alpha=1.0)
    assert kept(method, tokens, Evidence(received=np.stack([middle, deep]))) == [1, 3, 4, 5, 7, 8]
    corner = np.roll(middle, -4, -1)  # anchor 0: its neighbours are cut to 0, or are 1 and 3
    assert kept(HiPrune(capacity=4, special=0, alpha=1.0), tokens, Evidence(received=np.stack([corner, deep]))) == [0, 1, 3, 8]


@pytest.mark.parametrize("k, alpha", [(12, 0.9), (20, 0.5), (24, 0.1)])
def test_reference(k, alpha):
    rng = np.random.default_rng(k)
    a = received(rng, 2, 2, 3, 37)  # layers, batch, heads, class row + 6 x 6
    tokens = images(rng.normal(size=(2, 37, 2)), cell=np.concatenate([[[-1, -1]], grid(6, 6)]))
    for i in range(2):
        middle, deep = a[:, i].astype(np.float64).mean(1)[:, 1:] / 37
        want = [0] + [1 + j for j in reference(middle, deep, k, alpha, 6)]
        assert kept(HiPrune(capacity=k, alpha=alpha), tokens, Evidence(received=a), row=i) == want
        assert kept(HiPrune(capacity=k + 9, alpha=alpha), tokens, Evidence(received=a), jnp.asarray([k + 1] * 2), i) == want


def test_alpha_zero_is_the_deep_layer_alone():
    rng = np.random.default_rng(1)
    a = received(rng, 2, 1, 2, 25)
    tokens = images(rng.normal(size=(1, 25, 2)), cell=np.concatenate([[[-1, -1]], grid(4, 6)]))
    want = [0] + [1 + j for j in best(a[1, 0].mean(0)[1:], 9)]
    assert kept(HiPrune(capacity=9, alpha=0.0), tokens, Evidence(received=a)) == want


def test_crops_share_the_rows_evenly():
    rng = np.random.default_rng(2)
    a = received(rng, 2, 1, 2, 32)
    tokens = images(rng.normal(size=(1, 32, 2)), 0, segment=np.repeat([0, 1], 16), cell=np.tile(grid(4, 4), (2, 1)))
    middle, deep = a[:, 0].mean(1)
    want = [16 * p + j for p in (0, 1) for j in reference(middle[16 * p :][:16], deep[16 * p :][:16], 8, 0.6, 4)]
    assert kept(HiPrune(capacity=17, special=0, alpha=0.6, crops=2), tokens, Evidence(received=a)) == want


def test_official_outputs_of_llava(data):
    for case in cases(data, "hiprune_llava"):
        a = np.stack([case[f"attn_received_{x}"] for x in ("middle", "deep")]) * 577
        b = a.shape[1]
        method = HiPrune(capacity=int(case["K_total"]) // b, alpha=float(case["alpha"]), width=24)
        tokens = images(np.zeros((b, 577, 1)))
        for i in range(b):
            found = kept(method, tokens, Evidence(received=a[:, :, None]), row=i)
            assert (np.array(found[1:]) - 1).tolist() == np.flatnonzero(case["index_mask"][i]).tolist()


def test_official_outputs_of_qwen(data):
    for case in cases(data, "hiprune_qwen"):
        a = np.stack([case[f"attn_{x}_summed"] for x in ("middle", "deep")])[:, None, None]
        n, rows, cols = a.shape[-1], *(int(i) // int(case["merge"]) for i in case["grid_thw"][1:])
        method = HiPrune(capacity=int(case["K_target"]), special=0, alpha=float(case["alpha"]), variant="qwen", positions="keep_mrope")
        where = np.flatnonzero(case["input_ids"][0] == case["image_token_id"])
        tokens = images(case["inputs_embeds"][:, where], 0, cell=np.tile(grid(rows, cols), (n // (rows * cols), 1)))
        tokens = tokens._replace(rope=jnp.asarray(case["position_ids"][:, 0, where].T[None], jnp.int32))
        found = kept(method, tokens, Evidence(received=a))
        assert found == np.flatnonzero(case["select_mask"]).tolist() and len(found) == int(case["kept_count"])
        ids = np.asarray(left(method, tokens, Evidence(received=a)).rope)[0][-len(found) :]
        np.testing.assert_array_equal(ids, case["position_ids"][:, 0, where[found]].T)
