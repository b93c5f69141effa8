"""HoloV against its formulas, the official outputs and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import FasterVLM, HoloV
from tests.methods.golden import cases
from tests.methods.vision.select import images, kept, left

small = {
    "holov": lambda n: HoloV(capacity=n, runs=3),
    "holov:order": lambda n: HoloV(capacity=n, runs=3, rank="official"),
}


def reference(x, a, k, runs):
    """(rows that stay in the code's order, rows each run was given)."""
    n = len(a)
    sizes = [n // runs + (p < n % runs) for p in range(runs)]
    parts, at = [], 0
    for m in sizes:
        parts.append(list(range(at, at + m)))
        at += m
    mean = []
    for part in parts:
        if len(part) == 1:
            mean.append(a[part[0]])
            continue
        u = x[part] / np.linalg.norm(x[part], axis=-1, keepdims=True)
        s, m = u @ u.T, len(part)
        np.fill_diagonal(s, 0)
        mu = s.sum(1) / (m - 1)
        var = ((s - mu[:, None]) ** 2).sum(1) / (m - 1)
        loud = 1000 * a[part]
        mean.append((loud + 0.09 * np.abs(loud).mean() / (np.abs(var).mean() + 1e-6) * var).mean())
    w = np.array(mean) / (sum(mean) + 1e-6)
    given = np.floor(w * k).astype(int)
    given[np.argsort(-w, kind="stable")[: k - given.sum()]] += 1
    out = []
    for part, many in zip(parts, given, strict=True):
        out += part if many >= len(part) else sorted(part, key=lambda j: -a[j])[:many]
    return out, given


def world(seed, n):
    rng = np.random.default_rng(seed)
    a = np.exp(rng.normal(size=(2, 3, n)))
    return rng.normal(size=(2, n, 6)).astype(np.float32), (a / a.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("n, k, runs", [(40, 12, 8), (37, 20, 6), (20, 9, 16)])
def test_reference(n, k, runs):
    x, a = world(n, n)
    for i in range(2):
        want, given = reference(x[i].astype(np.float64), a[i].astype(np.float64).mean(0), k, runs)
        assert given.sum() == k  # before runs that are shorter than what they are given
        found = kept(HoloV(capacity=k, special=0, runs=runs, rank="official"), images(x, 0), Evidence(cls=a), row=i)
        assert found == want
        assert kept(HoloV(capacity=k, special=0, runs=runs), images(x, 0), Evidence(cls=a), row=i) == sorted(want)
        fewer, _ = reference(x[i].astype(np.float64), a[i].astype(np.float64).mean(0), k - 3, runs)
        assert kept(HoloV(capacity=k, special=0, runs=runs), images(x, 0), Evidence(cls=a), jnp.asarray([k - 3] * 2), i) == sorted(fewer)


def test_one_run_is_fastervlm():
    x, a = world(3, 21)
    want = kept(FasterVLM(capacity=7), images(x), Evidence(cls=a))
    assert kept(HoloV(capacity=7, runs=1), images(x), Evidence(cls=a)) == want


def test_runs_are_one_dimensional():
    """576 rows, 16 runs: 36 rows each, one and a half grid rows of 24."""
    run, size = HoloV(capacity=64).run(jnp.ones((1, 576), bool))
    assert size[0].tolist() == [36] * 16 and run[0].tolist() == [j // 36 for j in range(576)]


def test_official_outputs(data):
    for case in cases(data, "holov"):
        k, x = int(case["new_image_token_num"]), case["image_tokens"]
        method = HoloV(capacity=k, special=0, runs=int(case["num_patches"]), rank="official")
        evidence = Evidence(cls=case["attention"][:, None].astype(np.float32))
        for i in range(len(x)):
            want = case["kept_positions_in_output_order"][i]
            want = want[want >= 0].tolist()
            assert kept(method, images(x, 0), evidence, row=i) == want
            out = np.asarray(left(method, images(x, 0), evidence).x[i])
            np.testing.assert_allclose(out[len(out) - len(want) :], case["out_tokens"][i][: len(want)], atol=1e-6)
