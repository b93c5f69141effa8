import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import TOVA
from tests.methods import toys

small = {
    "tova": lambda capacity: TOVA(capacity=capacity),
    "tova:kvpress": lambda capacity: TOVA(capacity=capacity, variant="kvpress"),
}


def reference(q, k, v, prefill, capacity, variant):
    """TOVA for one sequence from the card, numpy float64: the list of positions that all heads keep, one step after another."""
    (h, n, d), g = q.shape, k.shape[0]
    live = list(range(prefill - 1))
    for t in range(prefill - 1, n):
        live.append(t)
        outs, mean = np.zeros((h, d)), np.zeros(len(live))
        for head in range(h):
            w = np.exp(k[head // (h // g)][live].astype(np.float64) @ q[head, t] / d**0.5)
            mean += w / w.sum() / h
            outs[head] = w / w.sum() @ v[head // (h // g)][live]
        order = sorted(range(len(live)), key=lambda j: (-(9.0 if variant == "kvpress" and live[j] == t else mean[j]), j))
        live = sorted(live[j] for j in order[:capacity])
        yield list(live), outs


def test_by_hand():
    """Two KV heads, four query heads; the newest query's mean attention is .1 .4 .3 .2: the newest is third."""
    kv = toys.cache(np.zeros((1, 2, 4, 2)), np.zeros((1, 2, 4, 2)))
    rows = np.array([[0.4, 0.4, 0.2, 0], [0, 0.4, 0.4, 0.2], [0, 0.4, 0.4, 0.2], [0, 0.4, 0.2, 0.4]])
    evidence = Evidence(rows=jnp.asarray(np.stack([0 * rows, rows], 1)[None], jnp.float32))
    for variant, keep, want in (
        ("official", 2, [-1, 1, 2]),
        ("kvpress", 2, [-1, 1, 3]),
        ("official", 3, [1, 2, 3]),
        ("kvpress", 1, [-1, -1, 3]),
    ):
        policy = TOVA(capacity=3, variant=variant)
        state, plan = toys.fit(policy, kv, evidence, keep)
        np.testing.assert_allclose(state.slots, np.broadcast_to([0.1, 0.4, 0.3, 0.2], (1, 2, 4)), rtol=1e-6)
        np.testing.assert_array_equal(plan.index[0], [want, want])


@pytest.mark.parametrize("variant", ["kvpress", "official"])
def test_equals_numpy(variant):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, e, 30, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    got = toys.drive(TOVA(capacity=7, variant=variant), q, k, v, (5,), 5)
    want = list(reference(q[0], k[0], v[0], 5, 7, variant))
    assert variant == "kvpress" or any(4 + t not in live for t, (live, _) in enumerate(want)), "the newest never goes: a weak case"
    for (live, outs), (kv, _, out, _) in zip(want, got, strict=True):
        assert toys.kept(kv)[0] == [set(live)] * 2
        if out is not None:
            np.testing.assert_allclose(out[0, :, 0], outs, atol=1e-5)


def test_each_step_evicts_the_argmin():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, e, 20, 8)).astype(np.float32) for e in (4, 2, 2))
    before = None
    for kv, _, _, row in toys.drive(TOVA(capacity=6, variant="official"), q, k, v, (9, 4), 9):
        if row is not None:
            mean = np.asarray(row)[:, :, 0].mean(1)
            for b in range(2):
                live = {int(p): mean[b, j] for j, p in enumerate(before[b]) if p >= 0}
                gone = set(live) - toys.kept(kv)[b][0]
                assert gone == ({min(live, key=live.get)} if len(live) > 6 else set())
        before = np.asarray(kv.pos)[:, 0].copy()
        before[:, 6] = kv.seen


def test_checks_of_a_policy():
    toys.check_policy(lambda capacity: TOVA(capacity=capacity, variant="kvpress"), protected=lambda p, seen: p == seen - 1)
    with pytest.raises(ValueError, match="variant must be one of kvpress, official"):
        TOVA(capacity=4, variant="mean")
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        TOVA(capacity=4).start({}, toys.problem()[1], Evidence())


def test_official_outputs(data):
    """schwartz-lab-NLP/TOVA, GQA: kept tokens and attention outputs after the prompt and at every step."""
    z = np.load(data / "golden" / "tova.npz")
    n, policy = int(z["c2_n_prefill"]), TOVA(capacity=int(z["c2_cache_size"]), variant="official")
    for t, (kv, _, out, _) in enumerate(toys.drive(policy, z["c2_q"], z["c2_k"], z["c2_v"], (n,), n)):
        assert toys.kept(kv)[0] == [set(z[f"c2_s{t}_kept"].tolist())] * 2
        if out is not None:
            np.testing.assert_allclose(out, z[f"c2_s{t}_out"], atol=1e-5)
