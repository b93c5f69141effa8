"""VFlowOpt's encoder stage against its formulas, the official outputs and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import reduce
from jaxtok.core.types import IMAGE, SPECIAL, Evidence
from jaxtok.methods import VFlowOptSelect
from jaxtok.methods.vision.vflowopt import official_top
from tests.methods.golden import cases
from tests.methods.vision.select import best, grid, images, kept, left

small = {
    "vflowopt.select": lambda n: VFlowOptSelect(capacity=n, t=0.5, m=2.5, shape=(4, 4)),
    "vflowopt.select:plain": lambda n: VFlowOptSelect(capacity=n, t=0.5, recycle=False),
}


def attention(rng, n):
    a = np.exp(2 * rng.normal(size=(1, 3, n, n)))
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


def importance(m, t):
    received = m.mean(0)
    loud = received > t * m.mean()
    return m[loud].mean(0) if loud.any() else received


def reference(x, score, top, m, cell, part):
    """(rows in raster order, their old rows)."""
    stay = best(score, top)
    groups = {}
    for j in range(len(x)):
        if j not in stay:
            groups.setdefault((part[j], *(int(c / m) for c in cell[j])), []).append(j)
    out = {j: x[j] for j in stay}
    for rows in groups.values():
        lead = max(rows, key=lambda j: (score[j], -j))
        out[lead] = (score[rows] / score[rows].sum()) @ x[rows]
    return np.array([out[j] for j in sorted(out)]), sorted(out)


@pytest.mark.parametrize("m, t", [(2.5, 1.1), (2.0, 0.0)])
def test_reference(m, t):
    rng = np.random.default_rng(int(10 * m + t))
    cell, part = np.tile(grid(4, 4), (3, 1)), np.repeat([0, 1, 2], 16)
    probs, x = attention(rng, 48), rng.normal(size=(1, 48, 3)).astype(np.float32)
    tokens = images(x, 0, segment=part, cell=cell)
    method = VFlowOptSelect(capacity=22, special=0, t=t, m=m, shape=(4, 4), grid=(1, 2))
    high, wide, far, away = method.cells
    joined = cell + np.stack([np.zeros(48, int), np.maximum(part - 1, 0) * 4], -1)
    score = importance(probs[0].astype(np.float64).mean(0), t)
    want, rows = reference(x[0].astype(np.float64), score, 22 - high * wide - far * away, m, joined, part > 0)
    out = left(method, tokens, Evidence(probs=probs))
    np.testing.assert_allclose(out.x[0, -len(want) :], want, atol=1e-5)
    assert out.pos[0, -len(want) :].tolist() == rows


def test_at_t_zero_all_rows_vote():
    rng = np.random.default_rng(1)
    probs, free = attention(rng, 12), jnp.ones((1, 12), bool)
    mean = jnp.asarray(probs.mean(1))
    want = probs.mean((1, 2))
    for t in (0.0, 1e5):  # and where nothing is above the threshold (NaN in the code)
        np.testing.assert_allclose(VFlowOptSelect(capacity=4, t=t).importance(mean, free), want, rtol=1e-5)


def test_without_recycling_it_is_a_selection():
    rng = np.random.default_rng(2)
    probs, tokens = attention(rng, 12), images(rng.normal(size=(1, 12, 3)), 0)
    want = best(importance(probs[0].astype(np.float64).mean(0), 1.2), 5)
    assert kept(VFlowOptSelect(capacity=5, special=0, t=1.2, recycle=False), tokens, Evidence(probs=probs)) == want


def test_official_maps(data):
    for case in cases(data, "vflowopt_map"):
        t, alpha = float(case["t"]), float(case["alpha_v"])
        mean = case["head_mean_attention"] if "head_mean_attention" in case else case["attention"].mean(1)
        free = jnp.ones(mean.shape[:2], bool)
        detail = jnp.asarray(case["entropy_used"].reshape(mean.shape[:2])) if alpha else None
        found = VFlowOptSelect(capacity=4, t=t, alpha_v=alpha).importance(jnp.asarray(mean), free, detail)
        if not case["is_nan"]:
            np.testing.assert_allclose(found, case["importance_map"].reshape(found.shape), atol=1e-6)


def test_official_recycling(data, monkeypatch):
    """Newlines are kind SPECIAL here; they weigh 1.0 there and are never dropped."""
    for case in cases(data, "vflowopt_recycle"):
        x, score, width, rows = (case[k] for k in ("features", "attn_map", "local_width_with_newline", "local_rows"))
        n, m, side = len(x), float(case["m"]), 27
        thumb = side * side
        cell = np.concatenate([grid(side, side), grid(int(rows), int(width))])
        part = np.r_[np.zeros(thumb, int), np.ones(n - thumb, int)]
        newline = (part == 1) & (cell[:, 1] == int(width) - 1)
        assert (score[newline] == 1).all()
        tokens = images(x[None], segment=part, cell=cell, kind=np.where(newline, SPECIAL, IMAGE))
        top = official_top(n, float(case["vit_r"]), m)
        assert n - top - int(n / m**2) == int(case["reduce_tokens"])
        shape = max(side, int(rows)), max(side, int(width))
        method = VFlowOptSelect(capacity=n, special=int(newline.sum()), m=m, shape=shape, grid=(1, 1))
        high, wide, far, away = method.cells
        method = VFlowOptSelect(
            capacity=top - int(newline.sum()) + high * wide + far * away, special=method.special, m=m, shape=shape, grid=(1, 1)
        )
        monkeypatch.setattr(VFlowOptSelect, "score", lambda self, params, tokens, evidence, score=score: jnp.asarray(score[None]))
        run = jax.jit(lambda tokens, method=method: (plan := method.plan({}, (), tokens, Evidence())[1], reduce(plan, tokens).x))
        plan, out = run(tokens)
        index = np.asarray(plan.index[0])
        assert index[index >= 0].tolist() == np.flatnonzero(case["kept_mask"]).tolist()
        np.testing.assert_allclose(out[0][index >= 0], case["out_features"], atol=1e-5)
