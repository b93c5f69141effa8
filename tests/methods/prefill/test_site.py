"""The laws of site sparsify, over every registered sparsifier, and what the decoder makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.core.sparsifier import Sparsifier, for_heads
from jaxtok.core.types import BlockTable, Needs
from jaxtok.decode import prefill_chunked
from jaxtok.methods import AShape, SnapKV
from jaxtok.models import blocks, decoder, sparsify
from jaxtok.models.config import Config
from tests.methods.laws import makers
from tests.methods.prefill import views

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
N, LENGTHS = 24, (24, 15, 9)
MAKERS = {label: make for name in registry.names() if registry.get(name).site == "sparsify" for label, make in makers(name).items()}
EVERY = pytest.mark.parametrize("make", [pytest.param(make, id=label) for label, make in MAKERS.items()])


@dataclasses.dataclass(frozen=True)
class Full(Sparsifier):
    """Every block, by the table's way."""

    block_q: int = 5
    block_k: int = 4
    tail: int = 0

    def table(self, params, view):
        (b, n), nq, nk = view.pos.shape, view.blocks(self.block_q), view.blocks(self.block_k)
        assert n == view.q.shape[2]
        index = jnp.broadcast_to(jnp.arange(nk, dtype=jnp.int32)[None, None, None], (b, 1, nq, nk))
        return for_heads(BlockTable(index, jnp.full((b, 1, nq), nk, jnp.int32)), view.k.shape[1])


@functools.cache
def world():
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    ids = np.asarray(jax.random.randint(jax.random.key(1), (3, N), 0, CFG.vocab))
    return params, ids, np.arange(N)[None] >= N - np.asarray(LENGTHS)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def run(recipe, params, ids, live):
    """Logits of all rows, dead ones 0, in the rows' order (packed: the last is the last token), and of one step."""
    params = params | {"methods": recipe.init_params(jax.random.key(2), CFG)}
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=1)
    out = jnp.where((tokens.pos >= 0)[..., None], decoder.logits(CFG, params, tokens.x), 0.0)
    x, _ = decoder.step(CFG, params, blocks.embed(CFG, params, ids[:, :1]), live[:, -1:], layers, recipe)
    return out, decoder.logits(CFG, params, x)


def test_a_full_table_is_the_plain_model():
    params, ids, live = world()
    want = run(Recipe(), params, ids, live)
    for method in (Full(), Full(tail=7), Full(block_q=1, block_k=1), Full(block_q=64, block_k=64)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(Recipe(sparsify=method), params, ids, live), want)


@EVERY
def test_a_budget_of_all_is_the_plain_model(make):
    params, ids, live = world()
    got, want = run(Recipe(sparsify=make(1000)), params, ids, live), run(Recipe(), params, ids, live)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@EVERY
def test_padding_changes_nothing(make):
    """Left padding, by rows of the batch and to another static length with other tokens in the dead rows."""
    params, ids, live = world()
    recipe = Recipe(sparsify=make(8))
    out, _ = run(recipe, params, ids, live)
    assert np.abs(np.asarray(out) - np.asarray(run(Recipe(), params, ids, live)[0])).max() > 1e-3, "the method drops something here"
    for row, length in enumerate(LENGTHS):
        alone, _ = run(recipe, params, ids[row : row + 1, -length:], np.ones((1, length), bool))
        np.testing.assert_allclose(out[row, -length:], alone[0], atol=2e-5)
    other = np.where(live, ids, (ids + 7) % CFG.vocab)
    np.testing.assert_array_equal(out, run(recipe, params, other, live)[0])


@EVERY
def test_no_query_attends_to_a_later_key(make):
    """Values of later rows never reach earlier ones; what lies in dead rows reaches none."""
    x, rng = views.view(1, live=(24, 17)), np.random.default_rng(2)
    q, k, pos = (jnp.flip(a, 1 if a.ndim == 2 else 2) for a in (x.q, x.k, x.pos))
    pos = jnp.where(pos >= 0, jnp.arange(24, dtype=jnp.int32)[None] - (24 - x.length[:, None]), -1)  # dead first, live last
    v, method = jnp.asarray(rng.normal(size=k.shape), jnp.float32), make(8)
    params = method.init_params(jax.random.key(0), CFG)
    attend = jax.jit(lambda q, k, v: sparsify.attend(method, params, 0, q, k, v, pos))
    out, lse = attend(q, k, v)
    late, _ = attend(q, k, v.at[:, :, 20:].add(9.0))
    np.testing.assert_array_equal(late[:, :, :20], out[:, :, :20])
    assert not np.array_equal(late[:, :, 20:], out[:, :, 20:])
    dead = (pos < 0)[:, None, :, None]
    junk = attend(*(jnp.where(dead, 1e4, a) for a in (q, k, v)))
    jax.tree.map(np.testing.assert_array_equal, junk, (out, lse))
    assert (np.asarray(out)[np.broadcast_to(dead, out.shape)] == 0).all() and np.isneginf(lse[1, :, :7]).all()
    if getattr(method, "variant", None) != "topk":  # it spends its budget on the future, too: an early query may be left with nothing
        assert np.isfinite(np.asarray(lse)[np.broadcast_to((pos >= 0)[:, None], lse.shape)]).all(), "every live query reads something"


def test_a_pattern_of_places_is_causal_through_the_model():
    params, ids, live = world()
    recipe = Recipe(sparsify=AShape(local=3, sinks=2, block_q=4, block_k=2))
    out, _ = run(recipe, params, ids, live)
    later, _ = run(recipe, params, np.concatenate([ids[:, :16], (ids[:, 16:] + 3) % CFG.vocab], 1), live)
    np.testing.assert_array_equal(out[:, :16], later[:, :16])


@EVERY
def test_gradients_are_finite_also_of_nothing(make):
    params, ids, live = world()
    none = np.where(np.arange(3)[:, None] == 1, False, live)

    def loss(layers, live):
        return jnp.sum(run(Recipe(sparsify=make(8)), params | {"layers": layers}, ids, live)[0] ** 2)

    for alive in (live, none):
        grads = jax.grad(loss)(params["layers"], jnp.asarray(alive))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_evidence_is_made_with_the_same_logsumexp():
    """Attention received = exp(logit - lse of what was listed), over all visible keys; a compressor runs behind it."""
    params, ids, live = world()
    method = AShape(local=3, sinks=2, block_q=4, block_k=2)
    tokens = decoder.embed(CFG, params, jnp.asarray(ids), jnp.asarray(live))
    _, layers, found = decoder.survey(CFG, params, tokens, Needs(received=True, turned=N), Recipe(sparsify=method))
    ((part,), (seen,)) = layers[0], found[0]
    pos = tokens.pos
    _, lse = sparsify.attend(method, {}, 0, seen.turned, part.kv.k, part.kv.v, pos)
    logit = np.einsum("bhtd,bhsd->bhts", seen.turned, np.repeat(part.kv.k, 2, 1)) * 8**-0.5
    visible = (pos[:, :, None] >= pos[:, None]) & (pos[:, None] >= 0) & (pos[:, :, None] >= 0)
    want = np.where(visible[:, None], np.exp(np.minimum(logit - np.where(np.isfinite(lse), lse, 0)[..., None], 80)), 0).sum(2)
    np.testing.assert_allclose(seen.received, want, rtol=1e-4, atol=1e-5)
    assert np.isfinite(run(Recipe(sparsify=method, cache=SnapKV(capacity=8, window=2)), params, ids, live)[0]).all()


def test_given_caches_are_read_whole():
    params, ids, live = world()
    recipe = Recipe(sparsify=AShape(local=1, sinks=1, block_q=1, block_k=1))
    tokens = decoder.embed(CFG, params, jnp.asarray(ids), jnp.asarray(live))
    _, layers = decoder.prefill(CFG, params, tokens, new=N)
    got, _ = decoder.prefill(CFG, params, tokens, recipe, new=0, layers=layers)
    want, _ = decoder.prefill(CFG, params, tokens, new=0, layers=layers)
    np.testing.assert_array_equal(got.x, want.x)


def test_refuses_what_does_not_go_together():
    params, ids, _ = world()
    recipe = Recipe(sparsify=AShape(local=3))
    with pytest.raises(ValueError, match="a_shape lists the keys of a whole prompt at once"):
        prefill_chunked(CFG, params, jnp.asarray(ids), recipe=recipe, chunk=8, new=0)
    with pytest.raises(TypeError, match="sparsify takes a Sparsifier"):
        Recipe(sparsify=SnapKV(capacity=9, window=2))  # type: ignore[arg-type]
