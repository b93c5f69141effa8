"""Perplexity: full budgets against one parallel pass, windows of a file, trends on a trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok.methods  # noqa: F401  fills the registry
from jaxtok.evals import measure, perplexity
from jaxtok.models import blocks, load
from tests.evals import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.mark.parametrize("spec", ["full", "snapkv:window=4", "h2o", "streaming_llm:compact=false", "streaming_llm"])
def test_a_budget_that_covers_the_window_is_the_full_model(model, spec):
    cfg, params, _ = model
    ids = np.asarray(jax.random.randint(jax.random.key(0), (2, 24), 0, cfg.vocab, jnp.int32))
    nll, kept, lost, _ = perplexity.measure(cfg, params, measure.recipe_of(spec, 24), ids, skip=10)
    logits = jax.nn.log_softmax(blocks.forward(cfg, params, jnp.asarray(ids)), -1)[:, 9:-1]
    want = -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(ids)[:, 10:, None], 2), (1, 2))
    np.testing.assert_allclose(nll, want, atol=2e-5)
    assert kept.tolist() == [24, 24] and lost.tolist() == [0, 0]


def test_a_smaller_budget_keeps_fewer(model):
    cfg, params, _ = model
    ids = np.ones((1, 24), np.int32)
    assert perplexity.measure(cfg, params, measure.recipe_of("h2o", 6), ids, skip=10)[1] == 6
    # compressed after its prefill of 10, then 14 more
    assert perplexity.measure(cfg, params, measure.recipe_of("k_norm", 6), ids, skip=10)[1] == 6 + 14


def test_windows(model, tmp_path):
    tokenizer = model[2]
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh<|endoftext|>\nxyz\n<|endoftext|>0123456789")
    found = perplexity.windows(tokenizer, str(path), length=4, count=3)
    assert [tokenizer.decode(row) for row in found] == ["abcd", "efgh", "0123"]
    with pytest.raises(ValueError, match="has no document of 11 tokens"):
        perplexity.windows(tokenizer, str(path), length=11, count=1)
    with pytest.raises(ValueError, match="cannot read the text"):
        perplexity.windows(tokenizer, str(tmp_path / "none"), length=4, count=1)
    with pytest.raises(ValueError, match="skip=4 must be from 1 to 3"):
        perplexity.measure(model[0], model[1], measure.PLAIN, found, skip=4)


# NLL at 64, 32 and 16 slots as measured once with independent numpy code, on 420 tokens that were not written down but whose NLL with the
# full cache was: 1.598. So: the mean over all windows of a text that are as hard as that for the full model. No window is chosen by what
# eviction does to it.
FULL, KNOWN = 1.598, {"streaming_llm:compact=false": (1.660, 1.736, 1.797), "h2o": (1.677, 1.743, 1.844)}


@pytest.mark.slow
def test_eviction_on_a_trained_model(data):
    """420 tokens through the policy from the first on, positions of the text, NLL of tokens 200 to 419, at 64, 32 and 16 slots."""
    cfg, params, tokenizer = load.load(data / "stories260K")
    ids = perplexity.windows(tokenizer, str(data / "text/tinystories_a.txt"), length=420, count=1000)
    logp = jax.nn.log_softmax(jax.jit(blocks.forward, static_argnums=0)(cfg, params, jnp.asarray(ids))[:, 199:-1], -1)
    full = -np.asarray(jnp.mean(jnp.take_along_axis(logp, jnp.asarray(ids)[:, 200:, None], 2), (1, 2)))
    ids, full = ids[abs(full - FULL) < 0.05], full[abs(full - FULL) < 0.05]
    assert len(ids) >= 10
    for spec, known in KNOWN.items():
        covered, *less = (perplexity.measure(cfg, params, measure.recipe_of(spec, n), ids, skip=200)[0] for n in (420, 64, 32, 16))
        np.testing.assert_allclose(covered, full, atol=1e-4)
        assert full.mean() < less[0].mean() < less[1].mean() < less[2].mean()
        assert [x.mean() for x in less] == pytest.approx(known, abs=0.03), spec
