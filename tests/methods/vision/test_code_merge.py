"""Merging the sub-tokens of code: against its formulas and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import CodeMerge
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.vision.toyrows import normal, rows

small = {"code_merge": lambda n: CodeMerge(), "code_merge:learned": lambda n: CodeMerge(weights="learned")}


@functools.partial(jax.jit, static_argnums=0)
def merged(method, params, tokens, keep=None):
    _, plan = method.plan(params, method.start(params, tokens), tokens, Evidence(), keep)
    return reduce(plan, tokens, method.positions)


SPANS = np.array([[-1, 0, 0, 0, 1, 2, 2, -1, -1, 5, 5, 5], [-1, 3, 3, 4, 4, 4, 4, 4, 1, 1, 0, -1]])
UNITS = [[[0], [1, 2, 3], [4], [5, 6], [7], [8], [9, 10, 11]], [[0], [1, 2], [3, 4, 5, 6, 7], [8, 9], [10], [11]]]


@pytest.mark.parametrize("weights", ["mean", "learned"])
def test_reference(weights):
    x, w = normal(1, 2, 12, 4), normal(2, 4)
    params = {"score": jnp.asarray(w)} if weights == "learned" else {}
    out = merged(CodeMerge(capacity=7, weights=weights), params, rows(x, segment=SPANS))
    for i, units in enumerate(UNITS):
        want = []
        for unit in units:
            a = np.exp(x[i, unit] @ w) if weights == "learned" else np.ones(len(unit))
            want.append((a[:, None] * x[i, unit]).sum(0) / a.sum())
        m = len(units)
        np.testing.assert_allclose(out.x[i][7 - m :], want, atol=1e-5)
        assert np.asarray(out.size[i])[7 - m :].tolist() == [len(unit) for unit in units]
        assert np.asarray(out.source[i]).tolist() == [7 - m + j for j, unit in enumerate(units) for _ in unit]
        assert np.asarray(out.rope[i, 7 - m :, 0]).tolist() == list(range(m))
    assert (np.asarray(out.lost) == 0).all()


def test_limits():
    """Units of one row are the identity; a scorer at zero is the mean; equal rows stay; the source takes every sub-token to its unit."""
    x = normal(3, 2, 12, 4)
    alone = rows(x, segment=np.broadcast_to(np.arange(12), (2, 12)))
    np.testing.assert_array_equal(merged(CodeMerge(), {}, alone).x, x)
    cfg = EncoderConfig(width=4, layers=1, heads=1, hidden=4, image=None, vocab=5, pool="eos")
    learned = CodeMerge(capacity=7, weights="learned")
    zero = merged(learned, learned.init_params(jax.random.key(0), cfg), rows(x, segment=SPANS))
    np.testing.assert_allclose(zero.x, merged(CodeMerge(capacity=7), {}, rows(x, segment=SPANS)).x, atol=1e-6)
    same = np.concatenate([np.broadcast_to(x[0, unit[:1]], (len(unit), 4)) for unit in UNITS[0]])[None]
    out = merged(CodeMerge(capacity=7), {}, rows(same, segment=SPANS[:1]))
    np.testing.assert_allclose(gather(out.x, out.source), same, atol=1e-6)


def test_no_room_is_counted():
    out = merged(CodeMerge(capacity=5), {}, rows(normal(4, 2, 12, 4), segment=SPANS))
    assert np.asarray(out.lost).tolist() == [2, 1] and np.asarray(out.pos)[0].tolist() == [4, 5, 7, 8, 9]
    out = merged(CodeMerge(capacity=7), {}, rows(normal(4, 2, 12, 4), segment=SPANS), jnp.asarray([3, 9]))
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [3, 6]


def test_in_a_text_encoder():
    """At the input of an encoder: as the encoder on the merged rows; gradients reach the scorer."""
    cfg = EncoderConfig(width=8, layers=2, heads=2, hidden=8, image=None, vocab=20, context=12, pool="eos")
    recipe = Recipe(vit=((0, CodeMerge(capacity=7, weights="learned")),))
    params = encoder.init(cfg, jax.random.key(0))
    params["methods"] = recipe.init_params(jax.random.key(1), cfg)
    tokens = vit.embed_text(cfg, params, jax.random.randint(jax.random.key(2), (2, 12), 0, 20))._replace(
        segment=jnp.asarray(SPANS, jnp.int32)
    )

    @jax.jit
    def run(score, tokens):
        learned = params | {"methods": {"vit": ({"score": score},)}}
        return vit.encode(cfg, learned, tokens, recipe).tokens.x

    score = params["methods"]["vit"][0]["score"]
    short = merged(CodeMerge(capacity=7), {}, tokens)
    want = jax.jit(lambda t: vit.encode(cfg, params, t).tokens.x)(short)
    live = np.asarray(short.pos) >= 0
    np.testing.assert_allclose(np.asarray(run(score, tokens))[live], np.asarray(want)[live], atol=1e-5)
    grad = jax.grad(lambda s: jnp.sum(jnp.where(live[..., None], run(s, tokens), 0.0) ** 2))(score)
    assert np.isfinite(grad).all() and float(jnp.abs(grad).max()) > 0


def test_bad_input():
    for bad in ({"capacity": 0}, {"weights": "max"}, {"positions": "new"}):
        with pytest.raises(ValueError):
            CodeMerge(**bad)
