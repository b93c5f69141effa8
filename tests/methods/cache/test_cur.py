import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import CUR
from tests.methods import toys

NOTHING = Evidence()
small = lambda capacity: CUR(capacity=capacity, sinks=1, local=3)


def shares(x, local):
    """Squared lengths as shares of their run's sum, one token after another."""
    square = [float(np.dot(row, row)) for row in np.asarray(x, np.float64)]
    if local is None:
        return np.array(square)
    return np.array([s / sum(square[j // local * local : (j // local + 1) * local]) for j, s in enumerate(square)])


def reference(k, v, length, local, kind):
    a, c = (shares(x[len(x) - length :], local) for x in (k, v))
    score = {"product": a * c, "mean": (a + c) / 2, "key": a, "value": c}[kind]
    return score / score.sum()


def test_by_hand():
    """Runs of two: squared lengths of keys (1 3) (4), of values (1 1) (9): shares (1/4 3/4) (1), (1/2 1/2) (1)."""
    k, v = (np.array([[x**0.5, 0] for x in squares])[None, None] for squares in ((1, 3, 4), (1, 1, 9)))
    run = lambda **options: toys.scorer(CUR(capacity=3, sinks=0, local=2, **options))(toys.cache(k, v), Evidence())[0, 0]
    np.testing.assert_allclose(run(), np.array([1 / 8, 3 / 8, 1]) / 1.5, rtol=1e-6)
    np.testing.assert_allclose(run(kind="key"), np.array([1 / 4, 3 / 4, 1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(run(kind="value"), np.array([1 / 2, 1 / 2, 1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(run(kind="mean"), np.array([3 / 8, 5 / 8, 1]) / 2, rtol=1e-6)


@pytest.mark.parametrize("local, kind", [(5, "product"), (None, "product"), (4, "mean"), (16, "value"), (3, "key")])
def test_equals_numpy(local, kind):
    _, kv = toys.problem(2, junk=1e4)
    method = CUR(capacity=9, sinks=2, local=local, kind=kind)
    got, want = np.asarray(toys.scorer(method)(kv, Evidence())), np.full(kv.pos.shape, np.nan)
    for b, g in np.ndindex(2, 2):
        want[b, g, 24 - toys.LIVE[b] :] = reference(kv.k[b, g], kv.v[b, g], toys.LIVE[b], local, kind)
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=1e-5)
    assert toys.kept(toys.run(method, kv, Evidence())) == toys.top(np.nan_to_num(want), kv.pos, 9, lambda p, seen: p < 2)


def test_a_projection_keeps_lengths_on_average():
    """|x G|^2 / |x|^2 has mean 1 and spread sqrt(2 / rank); another seed, another draw; the model's key decides where there is one."""
    _, kv = toys.problem(3)
    run = lambda seen=NOTHING, **options: np.asarray(toys.scorer(CUR(capacity=9, sinks=0, local=None, kind="key", **options))(kv, seen))[
        0, 0
    ]
    exact, drawn = run(), run(rank=4000)
    np.testing.assert_allclose(drawn, exact, rtol=0.15)
    few = run(rank=2)
    assert np.abs(few / exact - 1).max() > 0.3 and (run(rank=2, seed=1) != few).all()
    assert (run(Evidence(key=jax.random.key(5)), rank=2) != few).all() and (run(Evidence(layer=jnp.asarray(1)), rank=2) != few).all()


def test_a_run_of_one_knows_nothing():
    _, kv = toys.problem(4)
    got = np.asarray(toys.scorer(CUR(capacity=9, sinks=0, local=1))(kv, Evidence()))
    np.testing.assert_allclose(got[0], 1 / 24, rtol=1e-6)
    assert toys.kept(toys.run(CUR(capacity=9, sinks=0, local=1), kv, Evidence())) == [[set(range(9))] * 2] * 2


def test_checks_of_a_scorer():
    toys.check_scorer(lambda c: CUR(capacity=c, sinks=2, local=4), lambda q, kv: Evidence(), protected=lambda p, seen: p < 2)
    zero = toys.problem()[1]
    zero = zero._replace(k=jnp.zeros_like(zero.k))
    np.testing.assert_array_equal(toys.scorer(CUR(capacity=9))(zero, Evidence()), 0.0)
    for match, options in {
        "kind must be one of": dict(kind="kv"),
        "local must be >= 1": dict(local=0),
        "rank must be >= 1": dict(rank=0),
        "capacity=9 has no room for the 10": dict(sinks=10),
    }.items():
        with pytest.raises(ValueError, match=match):
            CUR(capacity=9, **options)
