import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import MetaTokens
from jaxtok.methods.attention.meta_tokens import CAUSAL, META
from jaxtok.models import blocks
from jaxtok.testing import world
from tests.methods.attention import run

TOKEN = run.CFG.vocab - 1
small = lambda capacity: MetaTokens(token=TOKEN, ratio=0.5)
METHOD = MetaTokens(token=TOKEN, ratio=1.0)


def text(seed=3):
    """Ids of the world with a meta-token in about every third place."""
    ids = np.asarray(run.model(METHOD)[1]) % TOKEN
    return jnp.asarray(np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, TOKEN, ids), jnp.int32)


def marks(n=23, b=2):
    return np.random.default_rng(1).random((b, n)) < 0.4


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_gathered_is_masked(ratio):
    """Dense attention under the card's mask; the rows of ordinary tokens are empty and give 0."""
    (q, k, v), mark = run.arrays(), marks()
    m = MetaTokens(token=0, ratio=ratio)
    assert mark.sum(1).max() <= math.ceil(ratio * 23)
    see = run.causal(23)[None] & mark[:, :, None] & mark[:, None]
    out = run.attend(m, q, k, v, META, mark)
    np.testing.assert_allclose(out, run.dense(q, k, v, see[:, None]), atol=2e-5)
    assert not np.moveaxis(out, 1, 2)[~mark].any()
    np.testing.assert_allclose(run.attend(m, q, k, v, CAUSAL, mark), run.dense(q, k, v, run.causal(23)), atol=2e-5)


def test_meta_tokens_without_room_are_ordinary():
    (q, k, v), mark = run.arrays(), marks()
    kept = mark & (np.cumsum(mark, 1) <= 3)
    see = run.causal(23)[None] & kept[:, :, None] & kept[:, None]
    np.testing.assert_allclose(run.attend(MetaTokens(token=0, ratio=0.1), q, k, v, META, mark), run.dense(q, k, v, see[:, None]), atol=2e-5)


def test_by_hand():
    """Meta-tokens at 2 and 4 of 5, all logits 0, values 1, 2, 4, 8, 16."""
    zero, v = np.zeros((1, 1, 5, 4)), np.broadcast_to(2.0 ** np.arange(5)[:, None], (1, 1, 5, 4))
    out = run.attend(METHOD, zero, zero, v, META, np.array([[False, True, False, True, False]]))[0, 0, :, 0]
    np.testing.assert_allclose(out, [0, 2, 0, 5, 0], rtol=1e-6)


def test_without_its_projection_the_model_is_the_plain_one():
    params, ids = run.model(METHOD)[0], text()
    own = tuple(p | {"o": jnp.zeros_like(p["o"])} for p in params["methods"]["attention"])
    out = run.program(METHOD)(params | {"methods": {"attention": own}}, ids, None)
    plain = jax.jit(lambda params: blocks.forward(run.CFG, params, ids))(params)
    np.testing.assert_allclose(np.asarray(out), np.asarray(plain), atol=2e-5)
    assert np.abs(np.asarray(run.program(METHOD)(params, ids, None) - plain)).max() > 1e-2


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_decode_is_the_parallel_pass(ratio):
    run.decode_is_parallel(dataclasses.replace(METHOD, ratio=ratio), text())


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_later_tokens_do_not_matter(ratio):
    """Nor where there is no room for all of them. How many come later moves the gathered rows, and with them the order of sums."""
    run.later_tokens_do_not_matter(dataclasses.replace(METHOD, ratio=ratio), text(), atol=2e-6)


def test_dead_steps_leave_the_states():
    run.dead_steps_leave_the_states(METHOD, text())


def test_padding_does_not_matter():
    run.padding_does_not_matter(METHOD, text())


def test_gradients_are_those_of_the_mask():
    mark = marks()
    see = (run.causal(23)[None] & mark[:, :, None] & mark[:, None])[:, None]
    run.same_gradients(METHOD, run.masked(see), META, mark)


@pytest.mark.parametrize("j", [CAUSAL, META])
def test_soft_cap_and_scale(j):
    mark = marks()
    see = run.causal(23)[None] & (mark[:, :, None] & mark[:, None] | (j == CAUSAL))
    run.capped(METHOD, lambda *x: run.dense(*x, see[:, None], run.CAPPED), j, mark)


def test_bfloat16():
    mark = marks()
    see = (run.causal(23)[None] & mark[:, :, None] & mark[:, None])[:, None]
    run.in_bfloat16(METHOD, lambda *x: run.dense(*x, see), META, mark)
    run.decodes_in_bfloat16(METHOD, text())


def test_the_order_of_a_layer():
    """Causal attention, meta-attention, MLP: the model's own parts, a norm and a residual each."""
    params, ids = run.model(METHOD)[0], text()
    cfg, n = run.CFG, ids.shape[1]
    mark, pos = np.asarray(ids) == TOKEN, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], ids.shape)
    see = run.causal(n)[None] & mark[:, :, None] & mark[:, None]
    x = blocks.embed(cfg, params, ids)
    for p, own in zip(params["layers"], params["methods"]["attention"], strict=True):
        for w, seen in ((p, run.causal(n)), (own, see[:, None])):
            q, k, v = blocks.qkv(cfg, w, x)
            q, k = blocks.rotate(cfg, 0, q, pos), blocks.rotate(cfg, 0, k, pos)
            out = run.dense(*(np.asarray(a, np.float64) for a in (q, k, v)), seen)
            x = blocks.out_proj(cfg, w, x, jnp.asarray(out, jnp.float32))
        x = blocks.mlp(cfg, p, x)
    want = np.asarray(blocks.logits(cfg, params, x))
    np.testing.assert_allclose(np.asarray(run.program(METHOD)(params, ids, None)), want, atol=5e-5)


def test_gradients_reach_its_weights():
    grad = run.gradients_are_right(METHOD, text())
    assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(grad["methods"]["attention"]))


def test_defaults():
    assert MetaTokens(token=0).ratio == 0.1


def test_bad_tokens():
    with pytest.raises(ValueError, match="token"):
        MetaTokens()
    with pytest.raises(ValueError, match="vocabulary"):
        run.decode_is_parallel(MetaTokens(token=world.CFG.vocab))
