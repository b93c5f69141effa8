import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import SnapKV
from tests.methods import toys

small = lambda capacity: SnapKV(capacity=capacity, window=2, pool=3)


def pooled(x, width, kind):
    """Centred pooling, written out."""
    half, n = width // 2, len(x)
    near = [[x[j] for j in range(max(i - half, 0), min(i + half + 1, n))] for i in range(n)]
    return np.array([sum(a) / width if kind == "avg" else max(a) for a in near])


def reference(q, kv, window, width, kind, how):
    """The card's score for each KV head, numpy float64; nan outside the candidates."""
    rows = toys.softmax_rows(q, kv.k, kv.pos)
    (b, h, n, _), g = rows.shape, kv.k.shape[1]
    out = np.full((b, g, n), np.nan)
    for i in range(b):
        live = int(kv.seen[i])
        inside = slice(n - live, n - window)
        if live <= window:
            continue
        votes = [rows[i, j, -window:, inside].sum(0) for j in range(h)]
        for e in range(g):
            group = np.array(votes[e * (h // g) : (e + 1) * (h // g)])
            out[i, e, inside] = pooled({"mean": group.mean(0), "max": group.max(0), "sum": group.sum(0)}[how], width, kind)
    return out


def by_hand(**options):
    """Six tokens, a window of two; the window gives itself a lot and the candidates, summed: head 0 (.3 0 .6 0), head 1 (0 .9 0 0)."""
    one, two = (
        np.array([[0.1, 0, 0.4, 0, 0.5, 0], [0.2, 0, 0.2, 0, 0.3, 0.3]]),
        np.array([[0, 0.5, 0, 0, 0.5, 0], [0, 0.4, 0, 0, 0.1, 0.5]]),
    )
    kv = toys.cache(np.zeros((1, 1, 6, 2)), np.zeros((1, 1, 6, 2)))
    evidence = Evidence(rows=jnp.asarray(np.stack([one, two])[None], jnp.float32))
    method = SnapKV(capacity=4, window=2, pool=3, **options)
    return np.asarray(toys.scorer(method)(kv, evidence))[0, 0, :4], toys.kept(toys.run(method, kv, evidence))[0][0]


@pytest.mark.parametrize(
    "options, score, kept",
    [
        ({}, [0.2, 0.3, 0.25, 0.1], {1, 2, 4, 5}),
        ({"group": "max"}, [0.4, 0.6, 0.5, 0.2], {1, 2, 4, 5}),
        ({"kind": "max"}, [0.45, 0.45, 0.45, 0.3], {0, 1, 4, 5}),
        ({"kind": "max", "group": "max"}, [0.9, 0.9, 0.9, 0.6], {0, 1, 4, 5}),
    ],
)
def test_by_hand(options, score, kept):
    got, chosen = by_hand(**options)
    np.testing.assert_allclose(got, score, rtol=1e-6)
    assert chosen == kept


def test_checks_of_a_scorer():
    make = lambda capacity: SnapKV(capacity=capacity, window=5, pool=3)
    toys.check_scorer(make, lambda q, kv: toys.look(q, kv, 5), protected=lambda p, seen: p >= seen - 5)


@pytest.mark.parametrize("kind, width, how", [("avg", 5, "mean"), ("max", 3, "max"), ("avg", 1, "sum")])
def test_equals_numpy(kind, width, how):
    q, kv = toys.problem(2, live=(24, 15), junk=1e4)
    method = SnapKV(capacity=11, window=4, pool=width, kind=kind, group=how)
    evidence = toys.look(q, kv, 6)  # more rows than asked for: another method wanted them
    want = reference(q, kv, 4, width, kind, how)
    got = np.asarray(toys.scorer(method)(kv, evidence))
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=2e-5)
    if kind == "avg":  # max pooling ties
        want = toys.top(np.nan_to_num(want), kv.pos, 11, lambda p, seen: p >= seen - 4)
        assert toys.kept(toys.run(method, kv, evidence)) == want


def test_one_query_without_pooling_is_its_attention():
    q, kv = toys.problem(3)
    rows = toys.softmax_rows(q, kv.k, kv.pos)[:, :, -1].reshape(2, 2, 2, -1).mean(2)
    got = np.asarray(toys.scorer(SnapKV(capacity=9, window=1, pool=1))(kv, toys.look(q, kv, 1)))
    np.testing.assert_allclose(got[:, :, :-1], rows[:, :, :-1], atol=1e-6)


def test_permuting_the_context_permutes_what_is_kept():
    q, kv = toys.problem(4, live=(24, 24))
    method = SnapKV(capacity=10, window=4, pool=1)
    order = np.concatenate([np.random.default_rng(0).permutation(20), np.arange(20, 24)])
    moved = kv._replace(k=kv.k[:, :, order])
    before = toys.kept(toys.run(method, kv, toys.look(q, kv, 4)))
    after = toys.kept(toys.run(method, moved, toys.look(q, moved, 4)))
    assert [[{int(order[p]) for p in head} for head in row] for row in after] == before


def test_a_row_no_longer_than_the_window_stays_whole():
    q, kv = toys.problem(5, live=(24, 6))
    out = toys.run(SnapKV(capacity=12, window=8), kv, toys.look(q, kv, 8))
    assert toys.kept(out)[1] == [set(range(6))] * 2
    long = toys.run(SnapKV(capacity=23, window=23), kv, toys.look(q, kv, 24))
    assert toys.kept(long) == [[set(range(1, 24))] * 2, [set(range(6))] * 2]


def test_refuses():
    for match, options in {
        "capacity=8 has no room for the 9": dict(capacity=8, window=9),
        "pool must be odd and >= 1": dict(capacity=80, pool=4),
        "window must be >= 1": dict(capacity=80, window=0),
        "kind must be one of avg, max": dict(capacity=80, kind="min"),
        "group must be one of": dict(capacity=80, group="median"),
    }.items():
        with pytest.raises(ValueError, match=match):
            SnapKV(**options)
    _, kv = toys.problem()
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        SnapKV(capacity=8, window=4).score({}, kv, Evidence())


@pytest.mark.parametrize(
    "file, case, count", [("snapkv_official", "c0", 4), ("snapkv_factory_gqa", "c2", 3), ("adakv_repo_snapkv_gqa", "c0", 2)]
)
def test_official_outputs(data, file, case, count):
    """FasterDecoding/SnapKV (MHA), KVCache-Factory and AdaKV's repository (GQA); where pooling ties, the scores at the kept places."""
    z = np.load(data / "golden" / f"{file}.npz")
    q, kv = z[f"{case}_q"], toys.cache(z[f"{case}_k"], z[f"{case}_v"])
    g = kv.k.shape[1]
    for v in range(count):
        get = lambda name, v=v: z[f"{case}_v{v}_{name}"]
        w, group = int(get("window_size")), next((str(get(x)) for x in ("gqa_score_agg", "gqa") if f"{case}_v{v}_{x}" in z), "mean")
        method = SnapKV(
            capacity=int(get("max_capacity_prompt")), window=w, pool=int(get("kernel_size")), kind=str(get("pooling"))[:3], group=group
        )
        evidence = toys.look(q, kv, w)
        score = np.asarray(toys.scorer(method)(kv, evidence))[0, :, :-w]
        scale = w if file.startswith("adakv") else 1  # the mean over the window there
        np.testing.assert_allclose(score, get("scores")[0] * scale, atol=2e-6)
        chosen = toys.kept(toys.run(method, kv, evidence))[0]
        for head in range(g):
            official = {int(p) for p in get("kept")[0, head]}
            if get("gap")[0, head] > 1e-6:
                assert chosen[head] == official
            else:
                mine, theirs = (np.sort([score[head, p] for p in keep if p < score.shape[1]]) for keep in (chosen[head], official))
                np.testing.assert_allclose(mine, theirs, atol=2e-6)
