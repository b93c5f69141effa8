import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.types import Evidence
from jaxtok.methods import H2O
from tests.methods import toys

small = {
    "h2o": lambda capacity: H2O(capacity=capacity),
    "h2o:kvpress": lambda capacity: H2O(capacity=capacity, variant="kvpress", recent=0.2),
}


def reference(q, k, v, prefill, capacity, newest, group, variant="paper"):
    """H2O for one sequence from the card, numpy float64: a dict position -> A for each KV head, one step after another."""
    (h, n, d), g = q.shape, k.shape[0]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = [dict[int, float]() for _ in range(g)]
    reduce_ = {"mean": np.mean, "max": np.max, "sum": np.sum}[group]
    for t in range(prefill, n + 1):
        outs = np.zeros((h, d))
        for e in range(g):
            mine = range(e * (h // g), (e + 1) * (h // g))
            if t == prefill:
                see, queries = list(range(t)), range(t)
            else:
                see, queries = [*scores[e], t - 1], [t - 1]
            add = np.zeros((len(mine), len(see)))
            for i in queries:
                ok = [j for j, p in enumerate(see) if p <= i]
                for x, head in enumerate(mine):
                    w = np.exp(k[e][[see[j] for j in ok]] @ q[head, i] / d**0.5)
                    add[x, ok] += w / w.sum()
                    outs[head] = (w / w.sum()) @ v[e][[see[j] for j in ok]]
            total = reduce_(add, 0)
            now = {p: scores[e].get(p, 0) + a for p, a in zip(see, total, strict=True)}
            rank = {p: a / (t - p) if variant == "kvpress" else a for p, a in now.items()}
            old = sorted((p for p in now if p < t - newest), key=lambda p: (-rank[p], p))
            keep = set(old[: max(capacity - min(newest, len(now)), 0)]) | {p for p in now if p >= t - newest}
            scores[e] = {p: a for p, a in now.items() if p in keep}
        yield scores, outs


def test_by_hand():
    """Budget 4, half of it recent. A = 5 1 4 2 | 9 9: of the four older ones 0 and 2 stay. Then the step gives 1 2 0 1 1 and 4 ages."""
    kv = toys.cache(np.zeros((1, 1, 6, 2)), np.zeros((1, 1, 6, 2)))
    policy, budget = H2O(capacity=4), jnp.full((1, 1), 4, jnp.int32)
    _, plan = toys.fit(policy, kv, Evidence(received=jnp.asarray([[[5.0, 1, 4, 2, 9, 9]]])))
    np.testing.assert_array_equal(plan.index[0, 0], [0, 2, 4, 5])
    spare = toys.cache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2)))
    spare = spare._replace(pos=jnp.asarray([[[0, 2, 4, 5, 6]]], jnp.int32), seen=jnp.asarray([7], jnp.int32))
    state = policy.observe({}, Held(jnp.asarray([[[5.0, 4, 9, 9, 0]]])), spare, Evidence(received=jnp.asarray([[[1.0, 2, 0, 1, 1]]])))
    safe, score = policy.victim({}, state, spare, budget)
    np.testing.assert_array_equal(safe[0, 0], [False, False, False, True, True])
    np.testing.assert_array_equal(score[0, 0], [6, 6, 9, 10, 1])
    _, mean = H2O(capacity=4, variant="kvpress").victim({}, state, spare, budget)
    np.testing.assert_allclose(mean[0, 0], [6 / 7, 6 / 5, 9 / 3, 10 / 2, 1], rtol=1e-6)


def test_the_group_is_reduced_at_its_kv_head():
    kv = toys.cache(np.zeros((1, 2, 3, 2)), np.zeros((1, 2, 3, 2)))
    received = jnp.asarray([[[1.0, 2, 3], [5, 0, 1], [0, 0, 2], [2, 2, 4]]])
    for group, want in {"mean": [[3, 1, 2], [1, 1, 3]], "max": [[5, 2, 3], [2, 2, 4]], "sum": [[6, 2, 4], [2, 2, 6]]}.items():
        np.testing.assert_array_equal(H2O(capacity=2, group=group).start({}, kv, Evidence(received=received)).slots[0], want)


@pytest.mark.parametrize("prefill, options", [(14, {}), (5, {"group": "max", "recent": 0.25, "variant": "kvpress"})])
def test_equals_numpy(prefill, options):
    """Kept sets, scores and attention outputs at every step, over twice the capacity; a prompt over and one under it."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, e, 32, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    newest = {0.5: 4, 0.25: 2}[options.get("recent", 0.5)]
    want = reference(q[0], k[0], v[0], prefill, 8, newest, options.get("group", "mean"), options.get("variant", "paper"))
    got = toys.drive(H2O(capacity=8, **options), q, k, v, (prefill,), prefill)
    for t, ((scores, outs), (kv, state, out, row)) in enumerate(zip(want, got, strict=True)):
        assert toys.kept(kv)[0] == [set(head) for head in scores]
        assert out is None or (np.asarray(row > 0).sum(-1) == min(prefill + t, 9)).all()  # a step sees the budget and itself
        held = [{int(p): a for p, a in zip(*pair, strict=True) if p >= 0} for pair in zip(kv.pos[0], state.slots[0], strict=True)]
        for head, expect in zip(held, scores, strict=True):
            np.testing.assert_allclose([head[p] for p in expect], list(expect.values()), rtol=1e-4, atol=1e-6)
        if out is not None:
            np.testing.assert_allclose(out[0, :, 0], outs, atol=1e-5)


def test_checks_of_a_policy():
    toys.check_policy(lambda capacity: H2O(capacity=capacity), protected=lambda p, seen: p >= seen - 4)


def test_recent_is_a_fraction_of_the_budget_in_force():
    x = np.random.default_rng(2).normal(size=(2, 1, 30, 4)).astype(np.float32)
    window = toys.drive(H2O(capacity=8, recent=1.0), x, x, x, (12, 12), 12, jnp.asarray([6, 5], jnp.int32))
    for t, (kv, *_) in enumerate(window):
        assert toys.kept(kv) == [[set(range(6 + t, 12 + t))], [set(range(7 + t, 12 + t))]]
    kv = toys.cache(x[:, :, :8], x[:, :, :8])
    safe = lambda recent, keep: H2O(capacity=8, recent=recent).victim({}, Held(jnp.zeros((2, 1, 8))), kv, jnp.full((2, 1), keep))[0]
    counts = [int(safe(*pair)[0, 0].sum()) for pair in ((0.5, 5), (0.5, 1), (0.25, 8), (0.0, 8))]
    assert counts == [3, 1, 2, 0]  # half up, and the newest at least unless 0


def test_refuses():
    for match, options in {
        "capacity must be >= 1": dict(capacity=0),
        "recent must be from 0": dict(capacity=4, recent=1.5),
        "variant must be one of": dict(capacity=4, variant="official"),
    }.items():
        with pytest.raises(ValueError, match=match):
            H2O(**options)
    assert H2O(capacity=4, compact=True).raw and not H2O(capacity=4).raw


def layer(z):
    """Queries, keys (both unrotated) and values of a golden layer, [1 h T d]."""
    h, d = int(z["c1_num_heads"]), int(z["c1_head_dim"])
    return (
        (z["c1_hidden"].astype(np.float64) @ z[f"c1_w.{x}_proj.weight"].T.astype(np.float64)).reshape(1, -1, h, d).swapaxes(1, 2)
        for x in "qkv"
    )


def rotate(x, ids, theta=1e4):
    r = x.shape[-1] // 2
    angle = np.asarray(ids)[:, None] * theta ** (-np.arange(r) / r)
    a, b = x[..., :r], x[..., r:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


@pytest.mark.parametrize("compact", [False, True])
def test_official_real_drop(data, compact):
    """FMInference/H2O, real drop at absolute and at rolled positions: kept tokens, scores and outputs at every step."""
    z = np.load(data / "golden" / ("h2o_real_drop_streaming.npz" if compact else "h2o_real_drop.npz"))
    q, k, v = layer(z)
    ids, n = np.arange(q.shape[2]), int(z["c1_n_prefill"])
    hh, recent = int(z["c1_hh_size"]), int(z["c1_recent_size"])
    policy = H2O(capacity=hh + recent, recent=recent / (hh + recent), compact=compact)
    q, k = (q, k) if compact else (rotate(q, ids), rotate(k, ids))
    for t, (kv, state, out, _) in enumerate(toys.drive(policy, *(x.astype(np.float32) for x in (q, k, v)), (n,), n)):
        assert toys.kept(kv)[0] == [set(head) for head in z[f"c1_s{t}_kept"].tolist()]
        for e in range(kv.pos.shape[1]):
            got = {int(p): float(a) for p, a in zip(kv.pos[0, e], state.slots[0, e], strict=True) if p >= 0}
            official = dict(zip(z[f"c1_s{t}_kept"][e].tolist(), z[f"c1_s{t}_hh_score"][e], strict=True))
            np.testing.assert_allclose([got[p] for p in official], list(official.values()), atol=2e-5)
        if out is not None:
            flat = np.asarray(out[0, :, 0]).reshape(-1) @ z["c1_w.o_proj.weight"].T
            np.testing.assert_allclose(flat, z[f"c1_s{t}_out"][0, 0], atol=2e-5)


@pytest.mark.parametrize("mode", ["kv", "q"])
def test_official_prefill(data, mode):
    """KVCache-Factory's H2O of a prompt: column sums, the recent window, what is kept; of each KV head, and of each query head on repeated keys."""
    z = np.load(data / "golden" / "h2o_prefill_factory.npz")
    q, k, v = (z[f"c0_{x}"] for x in "qkv")
    copies = q.shape[1] // k.shape[1] if mode == "q" else 1
    kv = toys.cache(*(np.repeat(x, copies, 1) for x in (k, v)))
    evidence = toys.look(q, kv, 1)
    for i in range(2):
        get = lambda name, i=i: z[f"c0_v{i}_{mode}_{name}"]
        capacity, window = int(get("max_capacity_prompt")), int(get("window_size"))
        policy = H2O(capacity=capacity, recent=window / capacity, group=str(get("gqa_score_agg")))
        state, plan = toys.fit(policy, kv, evidence)
        np.testing.assert_allclose(state.slots[0, :, :-window], get("scores")[0], atol=1e-5)
        index = np.asarray(plan.index)[0]
        assert [set(head) for head in index.tolist()] == [set(head) for head in get("kept")[0].tolist()]


def test_official_masking(data):
    """FMInference/H2O, masks of ratios of the prompt: the cache of what is not masked, its scores and the outputs of every step.

    `recent` counts the coming token there. The token that leaves that window is hidden whatever it has received; in this case it is never
    among the best, so that the slip does not show.
    """
    z = np.load(data / "golden" / "h2o_masking.npz")
    q, k, v = layer(z)
    ids, n = np.arange(q.shape[2]), int(z["c1_n_prefill"])
    heavy, newest = int(z["c1_heavy_budget"]), int(z["c1_recent_budget"]) - 1
    assert (heavy, newest + 1) == (int(n * z["c1_heavy_ratio"]), int(n * z["c1_recent_ratio"]))
    policy = H2O(capacity=heavy + newest, recent=newest / (heavy + newest))
    rows = (x.astype(np.float32) for x in (rotate(q, ids), rotate(k, ids), v))
    for t, (kv, state, out, _) in enumerate(toys.drive(policy, *rows, (n,), n)):
        assert toys.kept(kv)[0] == [set(np.flatnonzero(row[:-1]).tolist()) for row in z[f"c1_s{t}_mask_next"]]
        for e in range(kv.pos.shape[1]):
            for p, a in zip(np.asarray(kv.pos)[0, e], np.asarray(state.slots)[0, e], strict=True):
                assert p < 0 or a == pytest.approx(z[f"c1_s{t}_scores"][e, p], abs=2e-5)
        if out is not None:
            flat = np.asarray(out[0, :, 0]).reshape(-1) @ z["c1_w.o_proj.weight"].T
            np.testing.assert_allclose(flat, z[f"c1_s{t}_out"][0, 0], atol=2e-5)
