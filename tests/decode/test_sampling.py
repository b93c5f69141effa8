"""Sampling: numbers by hand, limiting identities, a NumPy reference, frequencies, independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decode import sampling
from jaxtok.decode.sampling import Sampler, row_keys

# compiled as a whole: op by op they would cost a compilation an operation and shape
sample = jax.jit(sampling.sample, static_argnums=0)
filter_logits = jax.jit(sampling.filter_logits, static_argnums=0)
keep_top_k = jax.jit(sampling.keep_top_k, static_argnums=1)
keep_top_p, keep_min_p = jax.jit(sampling.keep_top_p), jax.jit(sampling.keep_min_p)

# probabilities 0.5, 0.25, 0.125, 0.125 in another order
HALVES = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]]))


def kept(logits):
    return np.flatnonzero(np.asarray(logits)[0] > -np.inf).tolist()


@pytest.mark.parametrize("k, want", [(1, [1]), (2, [1, 3]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_ties_by_hand(k, want):
    assert kept(keep_top_k(HALVES, k)) == want


@pytest.mark.parametrize(
    "p, want", [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [0, 1, 3]), (0.87, [0, 1, 3]), (0.88, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p, want):
    # at 0.76 one of the tied tokens 0 and 2 is enough: the lower id
    assert kept(keep_top_p(HALVES, p)) == kept(keep_top_p(HALVES, jnp.float32(p))) == want


@pytest.mark.parametrize("p, want", [(0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 3]), (0.49, [1, 3]), (0.51, [1]), (1.0, [1])])
def test_min_p_by_hand(p, want):
    assert kept(keep_min_p(HALVES, p)) == want


def test_the_order_of_filters_by_hand():
    # temperature 0.5 squares the odds: 1/64, 1/4, 1/64, 1/16 -> mass 16 : 4 : 1 : 1 of 22; top_p 0.8 keeps 16+4 (16/22 = 0.73 falls short)
    got = filter_logits(Sampler(temperature=0.5, top_p=0.8), HALVES)
    np.testing.assert_allclose(got[0], [-np.inf, 0, -np.inf, np.log(0.25)], rtol=1e-6)
    # at temperature 1 the same p keeps three
    assert kept(filter_logits(Sampler(temperature=1.0, top_p=0.8), HALVES)) == [0, 1, 3]
    # top_k first: of 0.5 and 0.25 alone the best has 2/3 of the mass, so p = 0.6 keeps one; without top_k two
    assert kept(filter_logits(Sampler(temperature=1.0, top_k=2, top_p=0.6), HALVES)) == [1]
    assert kept(filter_logits(Sampler(temperature=1.0, top_p=0.6), HALVES)) == [1, 3]


def reference(logits, temperature, top_k, top_p, min_p):
    """The filters one row and one token at a time, in float64."""
    out = np.full(logits.shape, -np.inf)
    for row, x in enumerate(np.asarray(logits, np.float64)):
        alive = list(range(len(x)))
        x = x / temperature
        if top_k is not None:
            kth = sorted(x)[-min(top_k, len(x))]
            alive = [i for i in alive if x[i] >= kth]
        if top_p is not None:
            total, mass, nucleus = sum(np.exp(x[i]) for i in alive), 0.0, []
            for i in sorted(alive, key=lambda i: (-x[i], i)):
                if mass >= top_p * total and nucleus:
                    break
                nucleus.append(i)
                mass += np.exp(x[i])
            alive = nucleus
        if min_p is not None:
            alive = [i for i in alive if np.exp(x[i] - max(x)) >= min_p]
        out[row, alive] = x[alive] - max(x)
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(0.3, None, None, None), (2.5, 5, None, 0.2), (1.0, 40, 0.05, None), (2.5, None, 0.7, None), (0.7, 12, 0.7, 0.02), (2.5, 1, 0.9, 0.5)],
)
def test_filters_equal_the_reference(temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(6, 33)).astype(np.float32) * 2
    logits[0, 4:9] = logits[0, 3]  # ties
    got = filter_logits(Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), jnp.asarray(logits))
    np.testing.assert_allclose(got, reference(logits, temperature, top_k, top_p, min_p), rtol=2e-5, atol=2e-5)


def test_filters_equal_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(1).normal(size=(16, 65)).astype(np.float32) * 3
    logits[:4] = np.round(logits[:4])
    logits[:4] += np.arange(65) * 1e-3 * (np.arange(65) % 2)  # half of the ties stay, and none at a top-p boundary decides
    for t, k, p, m in [(0.7, 10, None, None), (1.3, None, 0.8, None), (1.0, None, None, 0.05), (0.9, 20, 0.9, 0.02)]:
        scores = warpers.TemperatureLogitsWarper(t)(None, torch.from_numpy(logits))
        for value, make in ((k, warpers.TopKLogitsWarper), (p, warpers.TopPLogitsWarper), (m, warpers.MinPLogitsWarper)):
            scores = scores if value is None else make(value)(None, scores)
        got = filter_logits(Sampler(temperature=t, top_k=k, top_p=p, min_p=m), jnp.asarray(logits[4:]))
        want = jax.nn.softmax(jnp.asarray(scores.numpy()[4:]), axis=-1)
        np.testing.assert_allclose(jax.nn.softmax(got, axis=-1), want, atol=1e-6)
        if p is None:
            got = filter_logits(Sampler(temperature=t, top_k=k, min_p=m), jnp.asarray(logits[:4]))
            assert (np.isneginf(got) == np.isneginf(scores.numpy()[:4])).all()


def test_limits():
    logits = jax.random.normal(jax.random.key(1), (64, 50)) * 2
    key, best = jax.random.key(2), jnp.argmax(logits, -1)
    greedy = sample(Sampler(), None, logits)
    assert greedy.dtype == jnp.int32
    np.testing.assert_array_equal(greedy, best)
    np.testing.assert_array_equal(sample(Sampler(temperature=1.0, top_k=1), key, logits), best)
    np.testing.assert_array_equal(sample(Sampler(temperature=1e-6), key, logits), best)
    for s in (Sampler(temperature=2.0, top_k=1), Sampler(temperature=2.0, top_p=1e-6), Sampler(temperature=2.0, min_p=1.0)):
        np.testing.assert_array_equal(filter_logits(s, logits), filter_logits(Sampler(), logits))
    plain = filter_logits(Sampler(temperature=1.0), logits)
    for s in (Sampler(temperature=1.0, top_p=1.0, min_p=0.0), Sampler(temperature=1.0, top_k=50), Sampler(temperature=1.0, top_k=99)):
        np.testing.assert_array_equal(filter_logits(s, logits), plain)
    only = filter_logits(Sampler(), logits)
    np.testing.assert_array_equal(jax.nn.softmax(only, axis=-1), jax.nn.one_hot(best, 50))
    # ties: greedy takes the first
    assert sample(Sampler(), None, jnp.array([[1.0, 3.0, 3.0]])).tolist() == [1]
    np.testing.assert_array_equal(kept(filter_logits(Sampler(), jnp.array([[1.0, 3.0, 3.0]]))), [1])


@pytest.mark.parametrize(
    "sampler", [Sampler(temperature=1.0), Sampler(temperature=0.7, top_k=4), Sampler(temperature=1.5, top_p=0.8, min_p=0.1)]
)
def test_frequencies(sampler):
    logits = jnp.array([[0.1, 2.0, -1.0, 1.2, 0.7, -jnp.inf, 1.9]])
    n = 20_000
    drawn = np.bincount(sample(sampler, jax.random.key(3), jnp.broadcast_to(logits, (n, 7))), minlength=7)
    p = np.asarray(jax.nn.softmax(filter_logits(sampler, logits)[0]))
    assert (drawn[p == 0] == 0).all() and drawn[5] == 0
    expected = n * p[p > 0]
    chi2 = ((drawn[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 22.5  # 99.9th percentile at 6 degrees of freedom


def test_a_row_depends_on_its_own_logits_and_key():
    sampler = Sampler(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01)
    logits = jax.random.normal(jax.random.key(4), (8, 40))
    key = jax.random.key(5)
    batch, keys = sample(sampler, key, logits), row_keys(key, 8)
    assert all(keys[i] == jax.random.fold_in(key, i) for i in (0, 7))
    loop = [int(sample(sampler, keys[i : i + 1], logits[i : i + 1])[0]) for i in range(8)]
    assert batch.tolist() == loop == sample(sampler, keys, logits).tolist()
    other = logits.at[3].set(-logits[3])
    changed = np.asarray(sample(sampler, key, other) != batch)
    assert not np.delete(changed, 3).any()
    np.testing.assert_array_equal(sample(sampler, key, logits[:5]), batch[:5])  # a longer batch begins alike
    alike = jnp.broadcast_to(jnp.linspace(0, 1e-3, 40)[None], (8, 40))
    assert len(set(sample(sampler, key, alike).tolist())) > 3
    np.testing.assert_array_equal(sample(sampler, jax.random.key_data(key), logits), batch)


def test_rows_without_a_possible_token():
    dead = jnp.full((1, 5), -jnp.inf)
    logits = jnp.concatenate([dead, jnp.array([[-jnp.inf, 0.0, -jnp.inf, -jnp.inf, -jnp.inf]])])
    for s in (Sampler(), Sampler(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1)):
        assert sample(s, jax.random.key(0), logits).tolist() == [-1, 1]
        out = filter_logits(s, logits)
        assert not np.isnan(out).any() and np.isneginf(out[0]).all() and out[1, 1] == 0


def test_dtypes_and_leading_axes():
    logits = jax.random.normal(jax.random.key(6), (2, 3, 16)).astype(jnp.bfloat16)
    s = Sampler(temperature=0.8, top_k=5, top_p=0.9)
    out = filter_logits(s, logits)
    assert out.dtype == jnp.float32 and out.shape == (2, 3, 16)
    np.testing.assert_array_equal(out[1], filter_logits(s, logits[1]))
    assert sample(Sampler(), None, logits[0]).dtype == jnp.int32


@pytest.mark.parametrize(
    "kw, match",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1e-9}, "0 for greedy"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
    ],
)
def test_wrong_settings(kw, match):
    with pytest.raises(ValueError, match=match):
        Sampler(**kw)


def test_wrong_keys():
    logits = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match="needs a key"):
        sample(Sampler(temperature=1.0), None, logits)
    with pytest.raises(ValueError, match="for 3 rows"):
        sample(Sampler(temperature=1.0), jax.random.split(jax.random.key(0), 2), logits)
    with pytest.raises(ValueError, match="k=0"):
        keep_top_k(logits, 0)
