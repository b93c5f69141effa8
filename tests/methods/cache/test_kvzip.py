import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import AdaKV, KVzip, Merging
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, tokens_of, world
from tests.methods import toys


class Once(KVzip):
    """The formula by itself, on what the prompt's own queries look at: what the laws can run."""

    passes = ""


small = {
    "kvzip": lambda capacity: Once(capacity=capacity, sinks=1),
    "kvzip-plus": lambda capacity: Once(capacity=capacity, sinks=1, plus=True),
}


def look(q, kv):
    """Evidence of all queries of the toy problem: the largest attention of each column."""
    seen = toys.look(q, kv, q.shape[2])
    return Evidence(peak=jnp.max(seen.rows, 2), weights={"o": jnp.asarray(O.reshape(-1, 5))})


O = np.random.default_rng(11).normal(size=(4, 8, 5)).astype(np.float32)


def reference(q, kv, plus):
    rows, v = toys.softmax_rows(q, kv.k, kv.pos), np.asarray(kv.v, np.float64)
    (b, h, n, _), g = rows.shape, kv.k.shape[1]
    out = np.zeros((b, g, n))
    for i, head in np.ndindex(b, h):
        e = head // (h // g)
        weight = np.array([np.linalg.norm(v[i, e, j] @ O[head]) for j in range(n)]) if plus else 1.0
        out[i, e] = np.maximum(out[i, e], rows[i, head].max(0) * weight)
    return out


def test_by_hand():
    """Two query heads of one KV head: the larger peak counts; with values (1, 0), (0, 2) and W_O = 1, 3 for the heads."""
    kv = toys.cache(np.zeros((1, 1, 3, 2)), np.array([[[[1.0, 0], [0, 2], [0, 0]]]]))
    weights = jnp.asarray(np.concatenate([np.eye(2), 3 * np.eye(2)]), jnp.float32)
    seen = Evidence(peak=jnp.asarray([[[0.5, 0.1, 0.4], [0.2, 0.3, 0.9]]]), weights={"o": weights})
    np.testing.assert_allclose(toys.scorer(KVzip(capacity=2, sinks=0))(kv, seen)[0, 0], [0.5, 0.3, 0.9])
    np.testing.assert_allclose(toys.scorer(KVzip(capacity=2, sinks=0, plus=True))(kv, seen)[0, 0], [0.6, 1.8, 0.0], rtol=1e-6)
    assert toys.kept(toys.run(KVzip(capacity=2, sinks=0), kv, seen)) == [[{0, 2}]]


@pytest.mark.parametrize("plus", [False, True])
def test_equals_numpy(plus):
    q, kv = toys.problem(2, junk=1e4)
    method, want = KVzip(capacity=9, sinks=2, plus=plus), reference(q, kv, plus)
    live = np.asarray(kv.pos) >= 0
    np.testing.assert_allclose(np.asarray(toys.scorer(method)(kv, look(q, kv)))[live], want[live], rtol=2e-5)
    assert toys.kept(toys.run(method, kv, look(q, kv))) == toys.top(want, kv.pos, 9, lambda p, seen: p < 2)


def shared(scores, pos, sinks, keep, most, model):
    """Slots of each (layer, sequence, head) by a joint ranking of those that can have room; plain Python."""
    l, b, g, _ = scores.shape
    out = np.zeros((l, b, g), int)
    for i in range(b):
        for layers in [range(l)] if model else [[x] for x in range(l)]:
            pool, room = [], 0
            for x in layers:
                for e in range(g):
                    live = [j for j, p in enumerate(pos[x, i, e]) if p >= 0]
                    safe = sum(pos[x, i, e, j] < sinks for j in live)
                    free = sorted((-scores[x, i, e, j], x, e, j) for j in live if pos[x, i, e, j] >= sinks)
                    pool += free[: max(most - safe, 0)]
                    room += max(min(keep, len(live)) - safe, 0)
                    out[x, i, e] += safe
            for _, x, e, _ in sorted(pool)[:room]:
                out[x, i, e] += 1
    return out


@pytest.mark.parametrize("share, slack", [("layer", 1.5), ("model", 2.0), ("model", 1.0)])
def test_budgets_are_shared(share, slack):
    problems = [toys.problem(seed) for seed in (3, 4, 5)]
    unequal = jnp.array([1.0, 0.4])[None, :, None, None]
    kvs = [kv._replace(k=kv.k * x * unequal) for (_, kv), x in zip(problems, (0.3, 1.0, 1.6), strict=True)]
    seen = [look(q, kv) for (q, _), kv in zip(problems, kvs, strict=True)]
    method = KVzip(capacity=8, sinks=2, share=share, slack=slack)
    budgets = jax.jit(lambda kvs, seen, keep: method.budgets({}, kvs, seen, keep))
    scores = np.stack([toys.scorer(method)(kv, e) for kv, e in zip(kvs, seen, strict=True)])
    pos = np.stack([kv.pos for kv in kvs])
    for keep in (8, 5):
        got = np.asarray(budgets(kvs, seen, [jnp.full((2, 1), keep, jnp.int32)] * 3))
        np.testing.assert_array_equal(got, shared(scores, pos, 2, keep, method.slots, share == "model"))
        assert (got.sum((0, 2)) == 3 * 2 * keep).all() and got.max() <= method.slots
        assert slack == 1.0 or len(set(got[:, 0].ravel().tolist())) > 1
    out = toys.run(method, kvs[0], seen[0], jnp.asarray(got[0]))
    assert [[len(head) for head in row] for row in toys.kept(out)] == got[0].tolist() and out.k.shape[2] == method.slots


def test_a_plain_prefill_is_refused():
    params, ids, _ = world()
    for method in (KVzip(capacity=6), AdaKV(base=KVzip(capacity=6)), Merging(base=KVzip(capacity=6))):
        with pytest.raises(ValueError, match=r"kvzip needs more than one pass over the prompt; use decode\.prefill_reread"):
            decoder.prefill(CFG, params, tokens_of(params, ids), Recipe(cache=method), new=1)


def test_checks_of_a_scorer():
    toys.check_scorer(lambda capacity: KVzip(capacity=capacity, sinks=2), look, protected=lambda p, seen: p < 2)
    assert KVzip(capacity=9).needs.peak and not KVzip(capacity=9).needs.unit and KVzip(capacity=9, plus=True).needs.weights == ("o",)
    assert (
        KVzip(capacity=9).slots == 9
        and KVzip(capacity=9, share="model", slack=1.5).slots == 14
        and KVzip(capacity=9).budgets({}, [], []) is None
    )
    for match, options in {
        "share must be one of head, layer, model": dict(share="all"),
        "slack must be from 1.0": dict(slack=0.5),
        "sinks must be >= 0": dict(sinks=-1),
        "capacity=9 has no room for the 10": dict(sinks=10),
    }.items():
        with pytest.raises(ValueError, match=match):
            KVzip(capacity=9, **options)
    with pytest.raises(ValueError, match=r"evidence\.peak is missing"):
        KVzip(capacity=9).score({}, toys.problem()[1], Evidence())
