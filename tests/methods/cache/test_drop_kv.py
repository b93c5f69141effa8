import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import DropKV, KeyDiff, KNorm, Random, SnapKV
from tests.methods import toys

small = lambda capacity: DropKV(capacity=capacity, window=2)


def attend(keys, q, k, v):
    z = k[keys] @ q / len(q) ** 0.5
    p = np.exp(z - z.max())
    return (p / p.sum()) @ v[keys]


def left_out(q, kv, window):
    """sum over the window's queries and the group of |attention without key j - attention|^2, by attending again without each key."""
    q, k, v, pos = (np.asarray(x, np.float64) for x in (q, kv.k, kv.v, kv.pos))
    (b, h, n, _), g = q.shape, k.shape[1]
    out = np.zeros((b, g, n))
    for i, e, head in ((i, head // (h // g), head) for i in range(b) for head in range(h)):
        for t in range(n - window, n):
            see = [j for j in range(n) if 0 <= pos[i, e, j] <= pos[i, e, t]]

            whole = attend(see, q[i, head, t], k[i, e], v[i, e])
            for j in see:
                if len(see) > 1:
                    rest = [x for x in see if x != j]
                    out[i, e, j] += np.sum((attend(rest, q[i, head, t], k[i, e], v[i, e]) - whole) ** 2)
    return out


def test_by_hand():
    """One query gives 1/2, 1/4, 1/4; values 0, 4, 8 -> o = 3; without each: 6, 8/3, 4/3 -> squared changes 9, 1/9, 25/9."""
    rows = jnp.asarray([[[[0.5, 0.25, 0.25]]]])
    kv = toys.cache(np.zeros((1, 1, 3, 1)), np.array([0.0, 4.0, 8.0]).reshape(1, 1, 3, 1))
    got = toys.scorer(DropKV(capacity=2, window=1))(kv, Evidence(rows=rows))[0, 0]
    np.testing.assert_allclose(got, [9, 1 / 9, 25 / 9], rtol=1e-6)
    assert toys.kept(toys.run(DropKV(capacity=2, window=1), kv, Evidence(rows=rows))) == [[{0, 2}]]
    assert toys.kept(toys.run(DropKV(capacity=1, window=1, recent=0), kv, Evidence(rows=rows))) == [[{0}]]


def test_is_the_leave_one_out_residual():
    """The identity o without j - o = p/(1-p) (o - v_j), against attending again; ragged, grouped, junk in dead rows."""
    q, kv = toys.problem(1, live=(12, 7), n=12, junk=1e4)
    got = np.asarray(toys.scorer(DropKV(capacity=9, window=4))(kv, toys.look(q, kv, 6)))
    want = left_out(q, kv, 4)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7)
    out = toys.kept(toys.run(DropKV(capacity=6, window=4), kv, toys.look(q, kv, 4)))
    assert out == toys.top(want, kv.pos, 6, lambda p, seen: p >= seen - 4)


def test_a_query_that_sees_one_key_says_nothing():
    q, kv = toys.problem(2, live=(1, 1), n=4)
    np.testing.assert_array_equal(toys.scorer(DropKV(capacity=3, window=2))(kv, toys.look(q, kv, 2)), 0.0)


def test_a_key_that_takes_nearly_all():
    """1 - p under what float32 can tell from 1: without it the output is the mean of the others, (3 * 1 + 5) / 4 = 2, not 0."""
    rows = jnp.asarray([[[[3e-9, 1e-9, 1.0]], [[0.0, 0.0, 1.0]]]])  # of the second query it is the only key
    kv = toys.cache(np.zeros((1, 1, 3, 1)), np.array([1.0, 5.0, 9.0]).reshape(1, 1, 3, 1))
    got = toys.scorer(DropKV(capacity=2, window=1))(kv, Evidence(rows=rows))[0, 0]
    np.testing.assert_allclose(got, [(3e-9 * 8) ** 2, (1e-9 * 4) ** 2, 49], rtol=1e-5)


def test_grades_other_scores():
    """Of single evictions none does less harm to the window than the oracle's, and its ranking is the true one."""
    q, kv = toys.problem(3, live=(24, 24))
    seen, true = toys.look(q, kv, 8)._replace(key=jax.random.key(0)), left_out(q, kv, 8)[..., :16]
    harm = {}
    for method in (
        DropKV(capacity=9, window=8),
        SnapKV(capacity=9, window=8, pool=1),
        KeyDiff(capacity=9),
        KNorm(capacity=9),
        Random(capacity=9),
    ):
        first = np.asarray(toys.scorer(method)(kv, seen))[..., :16].argmin(-1)
        harm[method.name] = np.take_along_axis(true, first[..., None], -1)[..., 0]
    assert all((harm["drop_kv"] <= other).all() for other in harm.values()) and (harm["drop_kv"] < harm["random"]).any()
    np.testing.assert_array_equal(harm["drop_kv"], true.min(-1))


def test_checks_of_a_scorer():
    make = lambda capacity: DropKV(capacity=capacity, window=3)
    toys.check_scorer(make, lambda q, kv: toys.look(q, kv, 3), protected=lambda p, seen: p >= seen - 3)
    for match, options in {
        "window must be >= 1": dict(window=0),
        "recent must be >= 0": dict(recent=-1),
        "capacity=9 has no room for the 64": dict(),
    }.items():
        with pytest.raises(ValueError, match=match):
            DropKV(capacity=9, **options)
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        DropKV(capacity=9, window=2).score({}, toys.problem()[1], Evidence())
