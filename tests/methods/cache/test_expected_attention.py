import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.score import moments
from jaxtok.core.types import Evidence
from jaxtok.methods import ExpectedAttention
from jaxtok.methods.cache.expected_attention import mean_rotation
from tests.methods import toys

small = lambda capacity: ExpectedAttention(capacity=capacity, sinks=1, future=8)
FREQS = np.array([1.0, 0.3, 0.1, 0.03], np.float32)


@jax.jit
def evidence(q, kv):
    live = kv.pos[:, 0] >= 2
    return Evidence(queries=moments(jnp.asarray(q), live), freqs=jnp.asarray(FREQS))


def rotation(p, d=8):
    """The rotary matrix of one id, pairs (i, i + r)."""
    out, r = np.eye(d), len(FREQS)
    for i, f in enumerate(FREQS.astype(np.float64)):
        c, s = np.cos(p * f), np.sin(p * f)
        out[i, i], out[i + r, i + r], out[i, i + r], out[i + r, i] = c, c, -s, s
    return out


def reference(q, kv, sinks, future, covariance=True, vnorm=True, epsilon=0.0):
    """The card's score, one head after another, numpy float64; nan outside the candidates."""
    q, k, v, pos = (np.asarray(x, np.float64) for x in (q, kv.k, kv.v, kv.pos))
    (b, h, n, d), g = q.shape, k.shape[1]
    out = np.full((b, g, n), np.nan)
    for i in range(b):
        live = [j for j in range(n) if pos[i, 0, j] >= sinks]
        nxt = int(kv.seen[i] + kv.delta[i])
        turn = np.mean([rotation(p, d) for p in range(nxt, nxt + future)], 0)
        for e in range(g):
            shares = []
            for head in range(e * (h // g), (e + 1) * (h // g)):
                x = q[i, head, live]
                mu, sigma = turn @ x.mean(0), turn @ np.cov(x.T, bias=True) @ turn.T
                z = np.array([mu @ y / d**0.5 + covariance * y @ sigma @ y / (2 * d) for y in k[i, e, live]])
                shares.append(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
            score = np.mean(shares, 0)
            out[i, e, live] = (score + epsilon) * np.linalg.norm(v[i, e, live], axis=-1) if vnorm else score
    return out


def test_by_hand():
    """One head, d = 2, no rotation: mu = (2, 0), Sigma = diag(0, 4); keys x, y, -x: z = sqrt(2), 1, -sqrt(2); values 1, 2, 3 long."""
    k = np.array([[1, 0], [0, 1], [-1, 0]])[None, None]
    v = np.array([[1, 0], [0, 2], [3, 0]])[None, None]
    moment = (jnp.asarray([[[2.0, 0.0]]]), jnp.asarray([[[[0.0, 0.0], [0.0, 4.0]]]]))
    share = np.exp([2**0.5, 1, -(2**0.5)]) / np.exp([2**0.5, 1, -(2**0.5)]).sum()
    run = lambda **options: toys.scorer(ExpectedAttention(capacity=3, sinks=0, **options))(toys.cache(k, v), Evidence(queries=moment))[0, 0]
    np.testing.assert_allclose(run(), share * [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(run(vnorm=False), share, rtol=1e-6)
    np.testing.assert_allclose(run(epsilon=0.5), (share + 0.5) * [1, 2, 3], rtol=1e-6)
    flat = np.exp([2**0.5, 0, -(2**0.5)])
    np.testing.assert_allclose(run(covariance=False, vnorm=False), flat / flat.sum(), rtol=1e-6)
    other = np.exp([1, 0.5, -1])
    np.testing.assert_allclose(run(scale=0.5, vnorm=False), other / other.sum(), rtol=1e-6)


def test_mean_rotation():
    """The mean of the matrices of the next ids, by row; partial rotary leaves the last channels; one id is that rotation."""
    got = mean_rotation(jnp.asarray([3, 50], jnp.int32), jnp.asarray(FREQS), 6, 10)
    want = [np.mean([rotation(p, 10) for p in range(first, first + 6)], 0) for first in (3, 50)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got[:, 8:, 8:], np.tile(np.eye(2), (2, 1, 1)))


def test_monte_carlo():
    """exp(z) is the expected exp(q . k / sqrt(d)) of queries drawn from the turned Gaussian, within 1%."""
    rng, d = np.random.default_rng(0), 8
    half = rng.normal(size=(d, d)) * 0.4
    mu, sigma, k = rng.normal(size=d), half @ half.T, rng.normal(size=(6, d))
    turn = np.mean([rotation(p) for p in range(6, 6 + 16)], 0)
    q = turn @ (mu[:, None] + half @ rng.normal(size=(d, 400_000)))
    want = np.exp(k @ q / d**0.5).mean(1)
    kv = toys.cache(k[None, None], k[None, None])
    moment = tuple(jnp.asarray(x[None, None], jnp.float32) for x in (mu, sigma))
    method = ExpectedAttention(capacity=3, sinks=0, future=16, vnorm=False)
    got = toys.scorer(method)(kv, Evidence(queries=moment, freqs=jnp.asarray(FREQS)))[0, 0]
    np.testing.assert_allclose(got, want / want.sum(), rtol=0.01)


@pytest.mark.parametrize("options", [{}, {"covariance": False, "epsilon": 0.02}, {"vnorm": False}])
def test_equals_numpy(options):
    """g > 1, h/g > 1, ragged, junk in dead slots, a next rotary id that is not the next order."""
    q, kv = toys.problem(2, junk=1e4)
    kv = kv._replace(delta=jnp.asarray([5, -3], jnp.int32))
    want = reference(q, kv, 2, 9, **options)
    method = ExpectedAttention(capacity=9, sinks=2, future=9, **options)
    got = np.asarray(toys.scorer(method)(kv, evidence(q, kv)))
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=1e-4, atol=1e-7)
    assert toys.kept(toys.run(method, kv, evidence(q, kv))) == toys.top(np.nan_to_num(want), kv.pos, 9, lambda p, seen: p < 2)


def test_a_slot_of_three_tokens_counts_three_times():
    q, kv = toys.problem(3, live=(24, 24))
    method = ExpectedAttention(capacity=9, sinks=2, vnorm=False)
    twins = [jnp.concatenate([x, x[:, :, -1:], x[:, :, -1:]], 2) for x in (kv.k, kv.v)]
    twice = toys.cache(*twins)._replace(delta=kv.delta - 2)  # the same next rotary id
    seen = evidence(q, kv)
    merged = kv._replace(bias=kv.bias.at[:, :, -1].set(np.log(3)))
    a, b = (np.asarray(toys.scorer(method)(x, seen)) for x in (twice, merged))
    np.testing.assert_allclose(a[..., 23:].sum(-1), b[..., 23], rtol=1e-5)
    np.testing.assert_allclose(a[..., 2:23], b[..., 2:23], rtol=1e-5)


def test_checks_of_a_scorer():
    make = lambda capacity: ExpectedAttention(capacity=capacity, sinks=2, future=8)
    toys.check_scorer(make, evidence, protected=lambda p, seen: p < 2)
    assert make(5).needs.queries == 2
    with pytest.raises(ValueError, match="capacity=3 has no room for the 4"):
        ExpectedAttention(capacity=3)
    with pytest.raises(ValueError, match=r"evidence\.queries is missing"):
        make(5).score({}, toys.problem()[1], Evidence())
