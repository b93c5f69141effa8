"""GlobalCom2 against its formulas, the official outputs and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import SPECIAL, Evidence
from jaxtok.methods import GlobalCom2
from tests.methods.golden import cases
from tests.methods.vision.select import best, grid, images, kept

small = {
    "globalcom2": lambda n: GlobalCom2(capacity=n, side=4, rank="raster"),
    "globalcom2:order": lambda n: GlobalCom2(capacity=n, side=4),
}


def told(logits):
    """Evidence whose class-row logits are `logits` [1 n]: one head of one channel."""
    return Evidence(lead=np.ones((1, 1, 1), np.float32), keys=np.asarray(logits, np.float32)[:, None, :, None])


def crops(logits, side, live=None):
    parts = len(logits)
    n = side * side
    live = np.ones((1, parts * n), bool) if live is None else live
    x = np.arange(parts * n, dtype=np.float32).reshape(1, -1, 1)
    return images(x, 0, live, np.repeat(np.arange(parts), n), np.tile(grid(side, side), (parts, 1))), told(logits.reshape(1, -1))


def bilinear(table, height, width):
    side = len(table)
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            sy, sx = max((y + 0.5) * side / height - 0.5, 0), max((x + 0.5) * side / width - 0.5, 0)
            y0, x0 = int(sy), int(sx)
            y1, x1, fy, fx = min(y0 + 1, side - 1), min(x0 + 1, side - 1), sy - y0, sx - x0
            out[y, x] = (table[y0, x0] * (1 - fx) + table[y0, x1] * fx) * (1 - fy) + (table[y1, x0] * (1 - fx) + table[y1, x1] * fx) * fy
    return out


def reference(logits, shape, ratio, temperature, live):
    """(kept rows: thumbnail by falling score, then crops; ratios); logits [1+P n], live [P side side] a centred band."""
    rows, cols = shape
    side = int(logits.shape[1] ** 0.5)
    thumb = logits[0].astype(np.float64).reshape(side, side)
    cut = lambda k: [i * (side // k) for i in range(k)] + [side]
    y, x = cut(rows), cut(cols)
    s = np.array([thumb[y[i] : y[i + 1], x[j] : x[j + 1]].sum() for i in range(rows) for j in range(cols)])
    sigma = np.exp((s - s.max()) / temperature)
    sigma /= sigma.sum()
    r = np.minimum(ratio * (1 + sigma - sigma.mean()), 1)
    whole = live.reshape(rows, cols, side, side).transpose(0, 2, 1, 3).reshape(rows * side, cols * side)
    ys, xs = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    wide = np.zeros(whole.shape)
    wide[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = bilinear(thumb, len(ys), len(xs))
    out = sorted(range(side * side), key=lambda j: (-logits[0, j], j))[: int(side * side * ratio + 1e-9)]
    for p in range(rows * cols):
        i, j = divmod(p, cols)
        mine = np.flatnonzero(live[p].reshape(-1))
        g = logits[1 + p].astype(np.float64)[mine]
        w = wide[i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(-1)[mine]
        score = g / np.linalg.norm(g) + w / np.linalg.norm(w)
        out += [(1 + p) * side * side + mine[m] for m in best(score, int(len(mine) * r[p]))]
    return out, r


@pytest.mark.parametrize("shape, pad", [((2, 2), 0), ((1, 3), 0), ((2, 2), 2)])
def test_reference(shape, pad):
    rng = np.random.default_rng(shape[1] + pad)
    parts, side = shape[0] * shape[1], 6
    logits = (3 * rng.normal(size=(1 + parts, side * side))).astype(np.float32)
    whole = np.ones((shape[0] * side, shape[1] * side), bool)
    whole[:pad], whole[len(whole) - pad :] = False, False
    live = whole.reshape(shape[0], side, shape[1], side).transpose(0, 2, 1, 3).reshape(parts, side, side)
    alive = np.concatenate([np.ones(side * side, bool), live.reshape(-1)])[None]
    tokens, evidence = crops(logits, side, alive)
    method = GlobalCom2(capacity=90, special=0, grid=shape, ratio=0.4, side=side)
    want, _ = reference(logits, shape, 0.4, 10.0, live)
    assert kept(method, tokens, evidence) == want


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (2, 2)])
def test_a_grid_that_is_told(shape):
    """Of at most four crops."""
    rng, parts = np.random.default_rng(sum(shape)), 1 + shape[0] * shape[1]
    logits = (3 * rng.normal(size=(5, 36))).astype(np.float32)
    live = np.repeat(np.arange(5) < parts, 36)[None]
    tokens, evidence = crops(logits, 6, live)
    method = GlobalCom2(capacity=90, special=0, crops=5, ratio=0.4, side=6)
    want, _ = reference(logits[:parts], shape, 0.4, 10.0, np.ones((parts - 1, 6, 6), bool))
    assert kept(method, tokens, evidence._replace(grid=np.array([shape], np.int32))) == want


def test_equal_logits_give_every_crop_the_ratio():
    method = GlobalCom2(capacity=9, grid=(2, 2), side=6)
    np.testing.assert_allclose(method.ratios(jnp.full((1, 6, 6), -3.0), jnp.asarray([0.3]), Evidence()), np.full((1, 4), 0.3), rtol=1e-6)


def test_everything_stays_at_ratio_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 16)).astype(np.float32)
    tokens, evidence = crops(logits, 4)
    for rank in ("official", "raster"):
        found = kept(GlobalCom2(capacity=80, special=0, grid=(2, 2), ratio=1.0, side=4, rank=rank), tokens, evidence)
        thumb = sorted(range(16), key=lambda j: -logits[0, j]) if rank == "official" else list(range(16))
        assert found[:16] == thumb and found[16:] == list(range(16, 80))


def test_newlines_stay_and_the_budget_is_obeyed():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 3 * 16 + 4)).astype(np.float32)
    kind = np.r_[np.repeat([1, 2, 2], 16), np.full(4, SPECIAL)]
    segment, cell = np.r_[np.repeat([0, 1, 2], 16), 1, 1, 2, 2], np.concatenate([np.tile(grid(4, 4), (3, 1)), np.full((4, 2), -1)])
    tokens = images(np.zeros((1, 52, 1)), segment=segment, cell=cell, kind=kind)
    method = GlobalCom2(capacity=24, special=4, grid=(1, 2), side=4, rank="raster")
    found = kept(method, tokens, told(logits))
    assert found[-4:] == [48, 49, 50, 51] and len(found) <= 28
    assert len(kept(method, tokens, told(logits), jnp.asarray([14]))) <= 14


def test_logits_are_means_over_heads_each_crop_by_its_own_class_row():
    rng = np.random.default_rng(2)
    lead, keys = rng.normal(size=(1, 2, 3, 4)).astype(np.float32), rng.normal(size=(1, 2, 27, 4)).astype(np.float32)
    tokens, _ = crops(np.zeros((3, 9), np.float32), 3)
    found = GlobalCom2(capacity=9, special=0, grid=(1, 2), side=3).logits(tokens, Evidence(lead=lead, keys=keys))
    want = [np.mean([lead[0, h, j // 9] @ keys[0, h, j] / 2 for h in range(2)]) for j in range(27)]
    np.testing.assert_allclose(found[0], want, rtol=1e-5)


def test_official_outputs(data):
    for case in cases(data, "globalcom2"):
        logits, side = case["cls_logits"], int(case["side"])
        shape = int(case["num_patch_height"]), int(case["num_patch_width"])
        method = GlobalCom2(capacity=logits.size, special=0, grid=shape, ratio=float(case["retention_ratio"]), side=side)
        ratios = method.ratios(
            jnp.asarray(logits[:1].reshape(1, side, side)), jnp.asarray([float(case["retention_ratio"])], jnp.float32), Evidence()
        )
        np.testing.assert_allclose(ratios[0], case["crop_ratios"], atol=2e-6)
        (width, height), (rows, cols) = case["original_size_wh"].tolist(), shape
        live = np.ones((rows * side, cols * side), bool)
        if width / height > cols / rows:  # un-padding as LLaVA does
            pad = (rows * side - int(height * (cols * side / width))) // 2
            live[:pad], live[rows * side - pad :] = False, False
        else:
            pad = (cols * side - int(width * (rows * side / height))) // 2
            live[:, :pad], live[:, cols * side - pad :] = False, False
        live = live.reshape(rows, side, cols, side).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
        assert live.sum(1).tolist() == case["crop_valid_tokens"].tolist()
        tokens, evidence = crops(logits, side, np.concatenate([np.ones(side * side, bool), live.reshape(-1)])[None])
        found = np.array(kept(method, tokens, evidence))
        thumb = len(case["thumbnail_indices_desc"])
        assert found[:thumb].tolist() == case["thumbnail_indices_desc"].tolist()
        for p in range(rows * cols):
            mine = found[(found // side**2) == p + 1] - (p + 1) * side**2
            want = np.flatnonzero(live[p])[case[f"crop{p}_topk_indices_in_unpadded_list"]]
            assert mine.tolist() == sorted(want.tolist())
