"""The oracle's mass against attending again without each key; what keeping its slots, and others, holds of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.rotary import rotate_by
from jaxtok.evals import cases, measure, oracle
from jaxtok.models import blocks
from tests.evals import tiny

CFG, PARAMS, TOKENIZER = tiny.make()
BUDGETS = ("50%", "25%")


SAID = np.random.default_rng(0).integers(1, CFG.vocab, (3, 5)).astype(np.int32)  # a continuation
LIVE = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


@functools.cache
def world(aware: bool):
    """(group, cases and rows of its batch)."""
    (g,) = cases.group(cases.make("needle", TOKENIZER, lengths=(48,), count=2, seed=0), query_aware=aware)
    return g, cases.batches(g, 3)[0]


def by_removal(i: int, aware: bool) -> np.ndarray:
    """Layer 0's mass of case i: queries of the question and of the continuation, each attending again without each key of the context."""
    case, said = world(aware)[1][0][i], SAID[i][LIVE[i]]
    ids = np.asarray([*case.context, *case.question, *said[:-1]])
    n, keys = len(ids), len(case.context) + (len(case.question) if aware else 0)
    q, k, v = blocks.qkv(CFG, PARAMS["layers"][0], blocks.embed(CFG, PARAMS, jnp.asarray(ids[None])))
    turn = lambda x: np.asarray(rotate_by(x, jnp.arange(n)[None, :, None], jnp.asarray(blocks.frequencies(CFG, 0))), np.float64)[0]
    q, k, v = turn(q), turn(k), np.asarray(v, np.float64)[0]
    out = np.zeros((CFG.kv_heads, keys))
    for h in range(CFG.heads):
        e = h // (CFG.heads // CFG.kv_heads)
        for t in range(len(case.context), n):
            z = k[e, : t + 1] @ q[h, t] / CFG.head_dim**0.5
            w = np.exp(z - z.max())
            for j in range(min(keys, t + 1)):
                rest = np.arange(t + 1) != j
                out[e, j] += np.sum((w[rest] @ v[e, : t + 1][rest] / w[rest].sum() - w @ v[e, : t + 1] / w.sum()) ** 2)
    return out


@pytest.mark.parametrize("aware", [True, False], ids=["question seen", "question unseen"])
def test_mass_is_what_removing_each_key_does(aware):
    _, (mine, rows) = world(aware)
    asked = jnp.asarray([len(c.question) if aware else 0 for c in mine] + [0])
    fn = jax.jit(functools.partial(oracle.mass, CFG, most=int(asked.max()) + aware))
    masses = fn(PARAMS, rows, asked, jnp.asarray(SAID), jnp.asarray(LIVE))
    for i in range(2):
        got = np.asarray(masses[0][i])
        want = by_removal(i, aware)
        np.testing.assert_allclose(got[:, -want.shape[1] :], want, rtol=2e-3, atol=1e-7)
        assert not got[:, : -want.shape[1]].any()  # padding
    assert all(np.isfinite(m).all() for m in masses)


def test_its_slots_hold_most_and_several_budgets_run_as_one():
    g, _ = world(True)
    work = measure.Work(CFG, PARAMS, TOKENIZER, 3, 0, 0, grade=True)
    reference = work.reference(g)
    best = work.measure(g, reference, oracle.ORACLE, *BUDGETS)[0]
    other = work.measure(g, reference, "k_norm", *BUDGETS)[0]
    (alone,), _ = work.measure(g, reference, "k_norm", "25%")
    for mine, theirs in zip(best, other, strict=True):
        assert 0 < theirs["oracle"] < mine["oracle"] <= 1 and mine["kept"] == theirs["kept"]
        assert mine["cache_bytes"] == theirs["cache_bytes"] and mine["time_s"] is None
    for name in ("score", "kl", "top1", "kept", "lost", "oracle", "cache_bytes", "step_bytes", "capacity"):
        assert other[1][name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    with pytest.raises(ValueError, match="takes no traced budget"):
        work.measure(g, reference, "quest:dense_layers=0", *BUDGETS)


def test_share_by_hand():
    """Two heads in two groups, context of 3 in 4 slots: the first holds 1 + 4 of 7, the second all; a later position does not count."""
    mass = (jnp.asarray([[[0.0, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 5.0]]]),)
    held = [[np.array([[[0, 2, -1]]]), np.array([[[2, 3, 0]]])]]
    assert oracle.share(mass, np.array([3]), held)[0] == pytest.approx((5 / 7 + 1) / 2)
    assert np.isnan(oracle.share((jnp.zeros((1, 2, 4)),), np.array([3]), held)[0])


def test_a_budget_goes_by_layer_where_a_method_says_so():
    """Weights 3 and 1 of 12 slots each on average: 18 and 6; a traced budget of 8: 12 and 4."""
    recipe = measure.recipe_of("per_layer:base=k_norm,weights=3+1", 12)
    keep, after = measure.keeps(recipe, jnp.asarray([12, 8]), 12)
    assert after is None and jax.tree.map(lambda x: x.tolist(), keep) == {"cache": [[18, 12], [6, 4]]}
