import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import LagKV
from tests.methods import toys

small = lambda capacity: LagKV(capacity=capacity, sinks=1, lag=2)


def spread(run, after):
    """Softmax over the tokens of a run of the spread of their channels, scaled by the run behind."""
    lo, hi = after.min(0), after.max(0)
    s = np.array([np.std((x - lo) / (hi - lo), ddof=1) for x in run])
    return np.exp(s) / np.exp(s).sum()


def reference(k, v, length, sinks, lag, cross):
    """(scores of the live tokens, which of them were compared with a run behind theirs) of one head."""
    k, v = (np.asarray(x, np.float64)[len(x) - length :] for x in (k, v))
    score = 1 + (np.arange(length) - sinks) / 1e9  # those without a run behind: newest first
    scored = np.zeros(length, bool)
    for r in range((length - sinks) // lag - 1 if length >= sinks else 0):
        at, after = (slice(sinks + i * lag, sinks + (i + 1) * lag) for i in (r, r + 1))
        u = (spread(k[at], k[after]) + spread(v[at], v[after])) / 2
        score[at] = u if cross else [np.sum(u < x) / lag for x in u]
        scored[at] = True
    return score, scored


def test_by_hand():
    """Runs of two; behind the first run every channel of k goes from 0 to 2, of v from 0 to 1. Keys (0, 2), (1, 1) become (0, 1),
    (.5, .5) of spread sqrt(.5) and 0; values (0, 1), (0, 0) keep theirs: the first of them stands out."""
    k = np.array([[9, 9], [0, 2], [1, 1], [0, 2], [2, 0]])[None, None]
    v = np.array([[9, 9], [0, 1], [0, 0], [0, 1], [1, 0]])[None, None]
    kv = toys.cache(k, v)
    u = np.exp(0.5**0.5) / (np.exp(0.5**0.5) + 1)
    raw = toys.scorer(LagKV(capacity=3, sinks=1, lag=2, cross=True))(kv, Evidence())[0, 0]
    np.testing.assert_allclose(raw[1:3], [u, 1 - u], rtol=1e-6)
    ranked = toys.scorer(LagKV(capacity=3, sinks=1, lag=2))(kv, Evidence())[0, 0]
    np.testing.assert_allclose(ranked[1:3], [0.5, 0.0])
    assert toys.kept(toys.run(LagKV(capacity=4, sinks=1, lag=2), kv, Evidence())) == [[{0, 1, 3, 4}]]
    assert toys.kept(toys.run(LagKV(capacity=2, sinks=1, lag=2), kv, Evidence())) == [[{0, 4}]], "of the last run the newest"


@pytest.mark.parametrize("cross", [False, True])
def test_equals_numpy(cross):
    _, kv = toys.problem(2, live=(24, 17, 7, 2), junk=1e4)
    method = LagKV(capacity=14, sinks=2, lag=4, cross=cross)
    got, out = np.asarray(toys.scorer(method)(kv, Evidence())), toys.kept(toys.run(method, kv, Evidence()))
    for b, length in enumerate((24, 17, 7, 2)):
        for g in range(2):
            want, scored = reference(kv.k[b, g], kv.v[b, g], length, 2, 4, cross)
            np.testing.assert_allclose(got[b, g, 24 - length :][scored], want[scored], rtol=2e-5)
            assert (got[b, g, 24 - length :][~scored][2:] >= 1).all()
            order = sorted(range(2, length), key=lambda p: (-want[p], p))
            assert out[b][g] == {0, 1} | set(order[:12])


def test_every_run_keeps_the_same_share():
    """Ranks tie between runs: with a budget for half of each of five runs, each keeps its half."""
    _, kv = toys.problem(3, live=(24, 24))
    out = toys.kept(toys.run(LagKV(capacity=14, sinks=0, lag=4), kv, Evidence()))
    assert all(len({p for p in head if r * 4 <= p < r * 4 + 4}) == 2 for row in out for head in row for r in range(5))


def test_a_short_row_keeps_its_newest():
    _, kv = toys.problem(4, live=(24, 9))
    assert toys.kept(toys.run(LagKV(capacity=5, sinks=2, lag=4), kv, Evidence()))[1] == [{0, 1, 6, 7, 8}] * 2
    assert toys.kept(toys.run(LagKV(capacity=5), kv, Evidence())) == [[{0, 1, 2, 3, 23}] * 2, [{0, 1, 2, 3, 8}] * 2]


def test_a_constant_channel_is_no_error():
    _, kv = toys.problem(5)
    flat = kv._replace(k=kv.k.at[..., 0].set(1.0))
    assert np.isfinite(toys.scorer(LagKV(capacity=9, sinks=1, lag=4))(flat, Evidence())).all()


def test_checks_of_a_scorer():
    toys.check_scorer(lambda c: LagKV(capacity=c, sinks=1, lag=4), lambda q, kv: Evidence(), protected=lambda p, seen: p < 1)
    assert LagKV(capacity=9).lag == 128 and LagKV(capacity=9).needs == type(LagKV(capacity=9).needs)()
    for match, options in {
        "lag must be >= 2": dict(capacity=9, lag=1),
        "sinks must be >= 0": dict(capacity=9, sinks=-1),
        "capacity=3 has no room for the 4": dict(capacity=3),
    }.items():
        with pytest.raises(ValueError, match=match):
            LagKV(**options)
    assert jnp.isfinite(LagKV(capacity=9).score({}, toys.problem()[1], Evidence())).all()
