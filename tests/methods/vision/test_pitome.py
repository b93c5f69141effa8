"""PiToMe against its formulas, the official outputs and its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.matching import cosine
from jaxtok.core.reduce import reduce
from jaxtok.core.score import energy
from jaxtok.core.types import Evidence
from jaxtok.methods import PiToMe, ToMe
from jaxtok.methods.vision.pitome import schedule
from tests.methods.golden import cases
from tests.methods.vision.toyrows import grouped, normal, rows, unit

small = {
    "pitome": lambda n: PiToMe(remove=16 - n),
    "pitome:bsm": lambda n: PiToMe(remove=16 - n, split="bsm", metric="hidden"),
    "pitome:text": lambda n: PiToMe(remove=16 - n, split="halves", kernel="gauss"),
}


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens, metric, keep=None):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence(keys=metric[:, None]), keep)
    return plan, reduce(plan, tokens)


def energies(metric, margin, alpha, kernel="elu", paper=False):
    """Explicit loops over pairs."""
    u = unit(metric)
    out = []
    for i in range(len(u)):
        total = 0.0
        for j in range(len(u)):
            c = u[i] @ u[j]
            if kernel == "gauss":
                s = 1 - margin
                total += math.exp(-(((1 - c) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
            elif paper:
                total += 0.0 if i == j else c if c > margin else alpha * (math.exp(c - margin) - 1)
            else:
                total += c - margin if c > margin else alpha * (math.exp(c - margin) - 1)
        out.append(total if paper else total / len(u))
    return np.array(out)


def reference(metric, special, r, margin, alpha, kernel, split, paper=False):
    """-> for each row its place in the output."""
    n, u = len(metric), unit(metric)
    e = energies(metric[special:], margin, alpha, kernel, paper)
    ranked = [special + i for i in sorted(range(n - special), key=lambda i: -e[i])]
    if split == "bsm":
        a, b, protected = ranked[::2], ranked[1::2], []
    elif split == "alternate":
        a, b, protected = ranked[: 2 * r : 2], ranked[1 : 2 * r : 2], ranked[2 * r :]
    else:
        a, b, protected = ranked[:r], ranked[r : 2 * r], ranked[2 * r :]
    best = {i: (max(u[i] @ u[j] for j in b), max(b, key=lambda j: u[i] @ u[j])) for i in a} if b else {}
    gone = sorted(best, key=lambda i: -best[i][0])[:r]
    protected = protected + sorted((i for i in a if i not in gone), key=lambda i: -best[i][0])
    order = list(range(special)) + protected + b
    return np.array([order.index(best[i][1] if i in gone else i) for i in range(n)])


@pytest.mark.parametrize(
    "kernel, split, special", [("elu", "alternate", 1), ("elu", "bsm", 1), ("gauss", "halves", 0), ("elu", "alternate", 0)]
)
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_reference(kernel, split, special, variant):
    n = 13
    x, metric, size = normal(1, 2, n, 4), normal(2, 2, n, 5), np.random.default_rng(3).integers(1, 4, (2, n))
    method = PiToMe(remove=4, margin=0.3, alpha=0.7, kernel=kernel, split=split, special=special, variant=variant)
    _, out = merged(method, rows(x, special, size=size), jnp.asarray(metric))
    for i in range(2):
        source = reference(metric[i], special, 4, 0.3, 0.7, kernel, split, variant == "paper")
        want, total = grouped(x[i], size[i], source)
        assert (np.asarray(out.source[i]) == source).all()
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], total)


def test_energy_against_loops():
    metric = normal(4, 1, 9, 5)
    like, live = cosine(jnp.asarray(metric), jnp.asarray(metric)), jnp.arange(9)[None] >= 2
    for margin in (0.1, 0.6):
        for kind, itself in (("elu", True), ("cut", False), ("gauss", True)):
            found = energy(like, live, margin, kind=kind, alpha=0.8, itself=itself)[0, 2:]
            want = energies(metric[0, 2:], margin, 0.8, "gauss" if kind == "gauss" else "elu", kind == "cut")
            np.testing.assert_allclose(found, want, atol=1e-5)


def test_by_hand():
    """Two pairs of equal rows and an outlier: the pairs merge, the outlier stays."""
    metric = np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]], np.float32)
    _, out = merged(PiToMe(remove=1, special=0), rows(np.arange(5.0).reshape(1, 5, 1), 0), jnp.asarray(metric))
    assert 3.0 in np.asarray(out.x)[0, :, 0].tolist() and sorted(np.asarray(out.size)[0].tolist()) == [1, 1, 1, 2]


def test_outliers_survive_and_the_spectrum_stays():
    """Two tight clusters and outliers: outliers are never merged, and the graph lifted from the groups has the old graph's spectrum."""
    rng = np.random.default_rng(0)
    centre = np.eye(8)[:2]
    far = np.eye(8)[2:6]
    metric = np.concatenate([np.repeat(centre, 6, 0) + 1e-4 * rng.normal(size=(12, 8)), far]).astype(np.float32)[None]
    # alternate ranks put both clusters on both sides, as the energies of one cluster are nearly alike
    _, out = merged(PiToMe(remove=4, margin=0.75, special=0), rows(metric, 0), jnp.asarray(metric))
    source = np.asarray(out.source)[0]
    assert all((source == source[i]).sum() == 1 for i in range(12, 16)), "an outlier was merged"

    def spectrum(w):
        d = w.sum(1)
        return np.sort(np.linalg.eigvalsh(np.eye(len(w)) - w / np.sqrt(np.outer(d, d))))

    w = np.maximum(unit(metric[0]) @ unit(metric[0]).T, 0)
    member = np.eye(source.max() + 1)[source]
    pure = all(len({0 if i < 6 else 1 for i in np.flatnonzero(source == g) if i < 12}) <= 1 for g in range(source.max() + 1))
    assert pure, "clusters were mixed"
    mean = member / member.sum(0)
    lifted = member @ (mean.T @ w @ mean) @ member.T
    np.testing.assert_allclose(spectrum(lifted), spectrum(w), atol=1e-3)


def test_limits():
    x = normal(5, 2, 12, 4)
    _, out = merged(PiToMe(ratio=1.0), rows(x), jnp.asarray(normal(6, 2, 12, 5)))
    np.testing.assert_array_equal(out.x, x)
    size = np.random.default_rng(1).integers(1, 5, (2, 12))
    _, out = merged(PiToMe(remove=5), rows(x, size=size), jnp.asarray(normal(6, 2, 12, 5)))
    np.testing.assert_allclose(np.einsum("bn,bnc->bc", out.size, out.x), np.einsum("bn,bnc->bc", size, x), atol=1e-4)
    assert PiToMe(ratio=0.9).count(197, 196) == 197 - math.floor(196 - 196 * 0.9) and PiToMe(ratio=0.1).count(13, 12) == 7


def test_margins_and_schedules():
    assert [round(PiToMe().layer(i, 4).margin, 4) for i in range(4)] == [0.75, 0.5625, 0.375, 0.1875]
    deit, mae, bert, blip = (schedule(0.9, 5, m) for m in ("deit", "mae", "bert", "blip"))
    assert [m.split for _, m in deit] == ["bsm"] * 3 + ["alternate"] * 2 and [m.split for _, m in mae] == ["alternate"] * 3 + ["bsm"] * 2
    assert (
        [k for k, _ in bert] == [0, 1, 2] and bert[0][1].layer(4, 5).margin == pytest.approx(0.7) and [k for k, _ in blip] == [0, 1, 2, 3]
    )


def official(data, name):
    for case in cases(data, name):
        special = int(case["class_token"])
        tokens = rows(case["x"], special)
        for step in (1, 2):
            if f"metric{step}" not in case or f"x_merged{step}" not in case:
                continue
            metric = jnp.asarray(case[f"metric{step}"])
            n = metric.shape[1]
            options = dict(
                ratio=round(float(case["ratio"]), 6), margin=round(float(case["margin"]), 6), alpha=float(case["alpha"]), special=special
            )
            if case.get("use_bsm"):  # plain ToMe at a ratio of all rows
                method = ToMe(remove=int(case[f"r{step}"]), special=special)
            elif name == "pitome_text":
                method = PiToMe(**options, kernel="gauss", split="halves")
            else:
                method = PiToMe(**options, split="bsm" if case["use_bsm_pitome"] else "alternate")
            if f"energy_score{step}" in case:
                like = cosine(metric[:, special:], metric[:, special:])
                kind = "gauss" if name == "pitome_text" else "elu"
                found = energy(like, jnp.ones(like.shape[:2], bool), options["margin"], kind=kind, alpha=options["alpha"])
                np.testing.assert_allclose(found, case[f"energy_score{step}"], atol=2e-6)
            _, tokens = merged(method, tokens, metric)
            assert tokens.x.shape[1] == n - int(case[f"r{step}"])
            want = case[f"x_merged{step}"], case[f"size{step}"][..., 0], case[f"assign{step}"]
            np.testing.assert_allclose(tokens.x, want[0], atol=2e-5)
            np.testing.assert_allclose(tokens.size, want[1])
            assert (np.asarray(tokens.source) == want[2]).all()


@pytest.mark.parametrize("name", ["pitome_vision", "pitome_bsm", "pitome_text"])
def test_official_outputs(data, name):
    """Energies, merged rows and sizes in the official order, and what a second merge makes of them."""
    official(data, name)


def test_a_traced_budget_and_padding():
    x, metric = normal(7, 2, 12, 4), normal(8, 2, 12, 5)
    _, out = merged(PiToMe(remove=3), rows(x), jnp.asarray(metric), jnp.asarray([8, 30]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [8, 9]
    _, less = merged(PiToMe(remove=4), rows(x), jnp.asarray(metric))
    np.testing.assert_allclose(out.x[0, -8:], less.x[0], atol=1e-6)
    pad = lambda a: jnp.asarray(np.concatenate([normal(9, 2, 3, a.shape[2]), a], 1))
    _, want = merged(PiToMe(remove=4), rows(x), jnp.asarray(metric))
    _, out = merged(PiToMe(remove=4), rows(pad(x), live=np.arange(15)[None] >= 3), pad(metric))
    np.testing.assert_allclose(out.x[:, -8:], want.x, atol=1e-6)


def test_bad_input():
    for bad in (
        {"ratio": 0.0},
        {"kernel": "box"},
        {"split": "thirds"},
        {"kernel": "gauss", "margin": 1.0},
        {"remove": -1},
        {"metric": "q"},
    ):
        with pytest.raises(ValueError):
            PiToMe(**bad)
    with pytest.raises(ValueError):
        schedule(0.9, 4, "resnet")
