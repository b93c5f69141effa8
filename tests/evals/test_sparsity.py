"""Density and error by head against the listed mask, token by token; padding; what found no room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.evals.sparsity import by_head
from jaxtok.methods import DHSA, AShape, BlockTopK
from jaxtok.models import blocks, cached, decoder
from jaxtok.models.config import Config
from tests.methods.prefill import views

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)


def world():
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    return params, jax.random.randint(jax.random.key(1), (1, 24), 0, CFG.vocab)


@pytest.mark.parametrize("tail", [0, 4])
def test_equals_the_mask(tail):
    params, ids = world()
    method = BlockTopK(capacity=4, block_q=4, block_k=2, tail=tail)
    found = jax.jit(lambda p, i: by_head(CFG, p, i, None, method))(params, ids)
    tokens = decoder.embed(CFG, params, ids, None)
    for i, p in enumerate(params["layers"]):
        x = tokens.pos
        tokens, ((kv, seen),) = cached.attend_rows(CFG, p, i, tokens, None, Recipe(), Needs(turned=24), False, None, "auto")
        view = views.View(seen.turned, kv.k, x, i)
        mask = views.tokens(method, view)
        mask[:, :, 24 - tail :] = views.seen(view)[:, None, 24 - tail :]
        dense, sparse = (views.attend(view, kv.v, m)[0] for m in (np.broadcast_to(views.seen(view)[:, None], mask.shape), mask))
        error = np.linalg.norm((sparse - dense).reshape(4, -1), axis=1) / np.linalg.norm(dense.reshape(4, -1), axis=1)
        np.testing.assert_allclose(found.error[i], error, atol=1e-4)
        per_block = lambda m: m.reshape(4, 6, 4, 12, 2).any((2, 4)).sum((1, 2))
        np.testing.assert_allclose(found.density[i], per_block(mask[0]) / sum(range(2, 13, 2)), rtol=1e-6)
    assert (found.keys == 1).all() and (found.lost == 0).all()


def test_padding_keys_and_overflow():
    params, ids = world()
    live = jnp.arange(24)[None] >= 7
    method = AShape(local=3, sinks=2, block_q=4, block_k=2, tail=4)
    got, want = by_head(CFG, params, ids, live, method), by_head(CFG, params, ids[:, 7:], None, method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    chunks = dict(chunks=5, local=1, sinks=2, block_q=4, block_k=2, tail=0)
    tight = by_head(CFG, params, ids, None, DHSA(capacity=8, room=1.0, **chunks))
    wide = by_head(CFG, params, ids, None, DHSA(capacity=8, room=9.0, **chunks))
    assert (wide.lost == 0).all() and (wide.keys < 1).all() and (tight.lost >= 0).all() and (tight.density <= wide.density).all()
    with pytest.raises(ValueError, match="reads prompts of 24 tokens whole"):
        by_head(CFG, params, ids, None, AShape(local=24))
