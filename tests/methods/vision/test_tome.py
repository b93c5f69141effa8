"""ToMe against its formulas, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.types import SPECIAL, Evidence
from jaxtok.methods import KthToMe, RandomToMe, ToMe
from jaxtok.methods.vision.tome import schedule
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.toyrows import normal, rows, unit

small = {
    "tome": lambda n: ToMe(remove=16 - n),
    "tome.kth": lambda n: KthToMe(k=1 if n == 16 else 2),
    "tome.random": lambda n: RandomToMe(remove=16 - n),
}


def reference(metric, x, size, remove, special):
    """The card's formulas in loops -> (rows merged, sizes, for each old row its new one)."""
    n = len(x)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    a, b = list(range(0, n, 2)), list(range(1, n, 2))
    best = {}
    for i in a:
        score = [-np.inf if j < special else unit[i] @ unit[j] for j in b]
        best[i] = (max(score) if i >= special else -np.inf, b[int(np.argmax(score))])
    gone = sorted((i for i in a if best[i][0] > -np.inf), key=lambda i: (-best[i][0], i))[:remove]
    order = sorted((i for i in a if i not in gone), key=lambda i: i if special else -best[i][0]) + b
    into = {i: best[i][1] if i in gone else i for i in range(n)}
    out, total = np.zeros((len(order), x.shape[1])), np.zeros(len(order))
    for i in range(n):
        out[order.index(into[i])] += size[i] * x[i]
        total[order.index(into[i])] += size[i]
    return out / total[:, None], total, [order.index(into[i]) for i in range(n)]


def merged(tokens, metric, remove, keep=None):
    special = int((np.asarray(tokens.kind[0]) == SPECIAL).sum())
    return _merged(ToMe(remove=remove, special=special), tokens, jnp.asarray(metric), keep)


@functools.partial(jax.jit, static_argnums=0)
def _merged(method, tokens, metric, keep):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence(keys=metric[:, None]), keep)
    return plan, reduce(plan, tokens)


def test_by_hand():
    """Rows 1 and 2 are alike, 3 and 4 nearly: with one removal row 2 joins row 1."""
    metric = np.array([[[1, 0], [0, 1], [0, 1], [1, 0.1], [1, 0]]], np.float32)
    tokens = rows(np.arange(5, dtype=np.float32).reshape(1, 5, 1), special=1)
    _, out = merged(tokens, metric, 1)
    assert out.x[0, :, 0].tolist() == [0, 4, 1.5, 3] and out.size[0].tolist() == [1, 1, 2, 1]
    assert out.source[0].tolist() == [0, 2, 2, 3, 1]
    _, out = merged(tokens, metric, 2)
    assert out.x[0, :, 0].tolist() == [0, 1.5, 3.5] and out.size[0].tolist() == [1, 2, 2]


@pytest.mark.parametrize("special, n, remove", [(0, 12, 4), (1, 13, 5), (2, 14, 6), (1, 10, 100)])
def test_reference(special, n, remove):
    rng = np.random.default_rng(n)
    metric, x = rng.normal(size=(3, n, 6)).astype(np.float32), rng.normal(size=(3, n, 4)).astype(np.float32)
    tokens = rows(x, special)._replace(size=jnp.asarray(rng.integers(1, 5, (3, n)), jnp.float32))
    _, out = merged(tokens, metric, remove)
    for i in range(3):
        want, size, source = reference(metric[i], x[i], np.asarray(tokens.size[i]), min(remove, (n - special) // 2), special)
        assert out.x.shape[1] >= len(want)
        np.testing.assert_allclose(out.x[i][-len(want) :], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i][-len(want) :], size)
        assert (np.asarray(out.source[i]) - (out.x.shape[1] - len(want))).tolist() == source


def test_padding_before_the_rows_changes_nothing():
    rng = np.random.default_rng(3)
    metric, x = rng.normal(size=(1, 11, 6)).astype(np.float32), rng.normal(size=(1, 11, 4)).astype(np.float32)
    _, want = merged(rows(x), metric, 4)
    pad = lambda a: np.concatenate([rng.normal(size=(1, 3, a.shape[2])).astype(np.float32), a], 1)
    live = np.arange(14)[None] >= 3
    _, out = merged(rows(pad(x), live=live), pad(metric), 4)
    np.testing.assert_allclose(out.x[:, -7:], want.x, atol=1e-6)
    assert (np.asarray(out.pos)[:, :-7] == -1).all()


def test_a_traced_budget_is_obeyed():
    rng = np.random.default_rng(4)
    metric, x = rng.normal(size=(2, 12, 6)).astype(np.float32), rng.normal(size=(2, 12, 4)).astype(np.float32)
    _, out = merged(rows(x, 0), metric, 3, jnp.asarray([8, 30]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [8, 9]
    _, two = merged(rows(x, 0), metric, 4)
    np.testing.assert_allclose(out.x[0, -8:], two.x[0], atol=1e-6)


def test_schedules():
    assert [(k, m.remove) for k, m in schedule(8, 3)] == [(0, 8), (1, 8), (2, 8)]
    assert [m.remove for _, m in schedule((8, -1.0), 5)] == [16, 12, 8, 4]  # the last is 0
    assert [(k, m.remove) for k, m in schedule([0, 5, 3], 5)] == [(1, 5), (2, 3)]


def test_official_outputs(data):
    """Kept groups, merged rows and sizes, and what a second merge makes of them."""
    for case in cases(data, "tome"):
        special = int(case["class_token"]) + int(case["distill_token"])
        tokens = rows(case["x"].astype(np.float32), special)
        for step in (1, 2):
            if f"x_merged{step}" not in case:
                continue
            _, tokens = merged(tokens, case[f"metric{step}"].astype(np.float32), int(case["r"]))
            want = case[f"x_merged{step}"], case[f"size{step}"][..., 0], case[f"assign{step}"]
            np.testing.assert_allclose(tokens.x, want[0], atol=2e-5)
            np.testing.assert_allclose(tokens.size, want[1])
            assert (np.asarray(tokens.source) == want[2]).all()


def test_official_schedules(data):
    for case in cases(data, "tome_parse_r"):
        layers, kind, r = int(case["num_layers"]), str(case["kind"]), case["r"]
        given = int(r) if kind == "int" else (int(r), float(case["inflect"])) if kind == "pair" else [int(i) for i in r]
        found = dict(schedule(given, layers))
        assert [found[i].remove if i in found else 0 for i in range(layers)] == case["out"].tolist()


def kth(metric, x, size, k, special):
    """Of each run of k the last row is a destination -> (merged rows, sizes, source), the rest joining."""
    free = list(range(special, len(x)))
    full = len(free) // k * k
    target = [i for r, i in enumerate(free) if r < full and r % k == k - 1] or free[-1:]
    like = unit(metric) @ unit(metric).T
    into = [i if i < special or i in target else target[int(np.argmax(like[i, target]))] for i in range(len(x))]
    order = list(range(special)) + target
    source = np.array([order.index(i) for i in into])
    total = np.bincount(source, size)
    out = np.zeros((len(order), x.shape[1]))
    np.add.at(out, source, size[:, None] * x)
    return out / total[:, None], total, source


@pytest.mark.parametrize("special, k", [(0, 3), (1, 2), (1, 5), (0, 20)])
def test_kth_reference(special, k):
    metric, x, size = normal(k, 2, 14, 6), normal(k + 1, 2, 14, 4), np.random.default_rng(k).integers(1, 4, (2, 14))
    method = KthToMe(k=k, special=special)
    tokens = rows(x, special, size=size)
    _, out = _merged(method, tokens, jnp.asarray(metric), None)
    assert out.x.shape[1] == method.count(14, 14 - special)
    for i in range(2):
        want, total, source = kth(metric[i], x[i], size[i], k, special)
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], total)
        assert (np.asarray(out.source[i]) == source).all()


def test_kth_obeys_a_traced_budget():
    _, out = _merged(KthToMe(k=2, special=0), rows(normal(1, 3, 12, 4), 0), jnp.asarray(normal(2, 3, 12, 6)), jnp.asarray([6, 4, 1]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [6, 4, 1] and np.allclose(np.asarray(out.size).sum(1), 12)


def test_official_kth(data):
    """Destinations, merged rows and sizes; what is left behind the last full run is dropped."""
    for case in cases(data, "tome_kth"):
        k, n = int(case["k"]), case["x"].shape[1]
        tokens, metric = rows(case["x"], 0), jnp.asarray(case["metric"])
        plan, out = _merged(KthToMe(k=k, special=0, rest="drop"), tokens, metric, None)
        np.testing.assert_allclose(out.x, case["x_merged"], atol=2e-5)
        np.testing.assert_allclose(out.size, case["size"][..., 0])
        runs = np.asarray(out.source)[:, : n // k * k].reshape(len(metric), -1, k)
        assert "dst_idx" not in case or (runs[:, :, : k - 1].reshape(len(metric), -1) == case["dst_idx"]).all()
        assert (np.asarray(out.source)[:, n // k * k :] == -1).all()
        plain = reduce(plan._replace(weight=jnp.ones(plan.assign.shape)), tokens)
        np.testing.assert_allclose(plain.x, case["x_merged_mean"], atol=2e-5)


def test_random_draws_the_sources():
    """As many as said, others from each key, each to its best of the rows not drawn; the class row stays out of it."""
    metric, x = normal(5, 2, 13, 6), normal(6, 2, 13, 4)
    tokens, seen = rows(x), []
    method, draw = (
        RandomToMe(remove=5),
        jax.jit(lambda m, t, k, key: reduce(m.plan({}, m.start({}, t), t, Evidence(keys=k, key=key))[1], t), static_argnums=0),
    )
    for seed in range(3):
        out = draw(method, tokens, jnp.asarray(metric)[:, None], jax.random.key(seed))
        index = np.asarray(out.pos)  # old orders of the rows that stayed
        assert out.x.shape[1] == 8 and (index[:, 0] == 0).all() and (np.asarray(out.source[:, 0]) == 0).all()
        for i in range(2):
            stay = [j for j in index[i] if j]
            like = unit(metric[i]) @ unit(metric[i])[stay].T
            for j in set(range(1, 13)) - set(stay):
                assert index[i][int(out.source[i][j])] == stay[int(np.argmax(like[j]))]
        np.testing.assert_allclose(np.asarray(out.size).sum(1), 13)
        seen.append(tuple(index[0]))
    assert len(set(seen)) == 3


def test_merging_exact_duplicates_is_undone_exactly():
    """Every even row equals an odd one: what each row finds in its group is itself."""
    x = np.repeat(normal(7, 1, 6, 4), 2, 1)
    _, out = merged(rows(x, 0), x, 6)
    np.testing.assert_allclose(np.asarray(out.x)[0][np.asarray(out.source)[0]], x[0], atol=1e-6)
    assert np.asarray(out.size).sum() == 12


def test_proportional_attention_of_merged_duplicates_is_exact():
    """An image whose patches come in equal pairs: merged from the first layer on, the class row's output is that of all rows."""
    cfg = EncoderConfig(width=8, layers=3, heads=2, hidden=12, image=(8, 8), patch=(2, 2), channels=3, final_norm=False)
    params = encoder.init(cfg, jax.random.key(0))
    params["layers"] = tuple(p | {"q": p["q"] * 3, "k": p["k"] * 3} for p in params["layers"])
    x = jnp.concatenate([jnp.asarray(normal(8, 2, 1, 8)), jnp.repeat(jnp.asarray(normal(9, 2, 8, 8)), 2, 1)], 1)
    recipe = Recipe(vit=((0, ToMe(remove=8)),))
    run = lambda r: jax.jit(lambda t: vit.encode(cfg, params, t, r, proportional=True).tokens)(rows(x))
    out, want = run(recipe), run(Recipe())
    assert (np.asarray(out.size)[:, 1:] == 2).all() and out.x.shape[1] == 9
    np.testing.assert_allclose(np.take_along_axis(np.asarray(out.x), np.asarray(out.source)[..., None], 1), want.x, atol=1e-5)


def test_bad_input():
    for make in (lambda: KthToMe(k=0), lambda: KthToMe(k=2, rest="lose"), lambda: RandomToMe(remove=-1), lambda: ToMe(remove=-1)):
        with pytest.raises(ValueError):
            make()
