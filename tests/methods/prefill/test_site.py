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


@functools.cache
def packed():
    """(q, k, v, pos) of rows as the model packs them: dead ones first, live ones last; 24 and 17 live."""
    x, rng = views.view(1, live=(24, 17)), np.random.default_rng(2)
    q, k, pos = (jnp.flip(a, 1 if a.ndim == 2 else 2) for a in (x.q, x.k, x.pos))
    pos = jnp.where(pos >= 0, jnp.arange(N, dtype=jnp.int32)[None] - (N - x.length[:, None]), -1)
    return q, k, jnp.asarray(rng.normal(size=k.shape), jnp.float32), pos


@functools.partial(jax.jit, static_argnums=(0, 5))
def attend(method, q, k, v, pos, impl="auto"):
    params = {} if method is None else method.init_params(jax.random.key(0), CFG)
    return sparsify.attend(method, params, 0, q, k, v, pos, impl=impl)


@functools.cache
def attended(method):
    return attend(method, *packed())


def test_a_full_table_is_the_plain_model():
    params, ids, live = world()
    for method in (Full(), Full(tail=7)):
        got, want = run(Recipe(sparsify=method), params, ids, live), run(Recipe(), params, ids, live)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    for method in (Full(block_q=1, block_k=1), Full(block_q=64, block_k=64)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), attended(method), attended(None))


@EVERY
def test_a_budget_of_all_is_plain_attention(make):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), attended(make(1000)), attended(None))


@EVERY
def test_padding_changes_nothing(make):
    """A sequence alone, without its dead rows, attends as in the batch; what lies in dead rows reaches nothing."""
    (q, k, v, pos), method = packed(), make(8)
    out, lse = attended(method)
    assert np.abs(np.asarray(out - attended(None)[0])).max() > 1e-3, "the method drops something here"
    alone = attend(method, *(a[1:, :, 7:] for a in (q, k, v)), pos[1:, 7:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:, :, 7:], b, atol=2e-6), (out, lse), alone)
    dead = (pos < 0)[:, None, :, None]
    junk = attend(method, *(jnp.where(dead, 1e4, a) for a in (q, k, v)), pos)
    jax.tree.map(np.testing.assert_array_equal, junk, (out, lse))
    assert (np.asarray(out)[np.broadcast_to(dead, out.shape)] == 0).all() and np.isneginf(lse[1, :, :7]).all()


@pytest.mark.parametrize("label", ["sale", "dhsa:predicted"])
def test_padding_changes_nothing_through_the_model(label):
    """Left padding, by rows of the batch and to another static length, with other tokens in the dead rows."""
    params, ids, live = world()
    recipe = Recipe(sparsify=MAKERS[label](8))
    out, _ = run(recipe, params, ids, live)
    assert np.abs(np.asarray(out) - np.asarray(run(Recipe(), params, ids, live)[0])).max() > 1e-3, "the method drops something here"
    alone, _ = run(recipe, params, ids[1:2, -LENGTHS[1] :], np.ones((1, LENGTHS[1]), bool))
    np.testing.assert_allclose(out[1, -LENGTHS[1] :], alone[0], atol=2e-5)
    other = np.where(live, ids, (ids + 7) % CFG.vocab)
    np.testing.assert_array_equal(out, run(recipe, params, other, live)[0])


AHEAD = {"a_shape": "row", "block_topk": "block", "block_topk:shared": "block", "dhsa:a": "block"}  # all others: "prompt"


@EVERY
def test_causality(make, request):
    """Values of later rows never reach earlier ones. What is chosen looks ahead by nothing, to the end of the block of queries, or over the prompt.

    Rows from a bound of blocks on (12, 16, 20) or from 17 on, within one, are changed, or not there: the rows before them stay by the method's kind.
    """
    (q, k, v, pos), method = packed(), make(14)
    q, k, v, pos = (a[:1] for a in (q, k, v, pos))  # no padding: block bounds are multiples
    out, lse = attend(method, q, k, v, pos)
    if getattr(method, "variant", None) != "topk":  # it spends its budget on the future, too: an early query may be left with nothing
        assert np.isfinite(lse).all(), "every live query reads something"
    late, _ = attend(method, q, k, v.at[:, :, 20:].add(9.0), pos)
    np.testing.assert_array_equal(late[:, :, :20], out[:, :, :20])
    assert not np.array_equal(late[:, :, 20:], out[:, :, 20:])
    tail, same = method.tail, {}
    for at in (12, 16, 20, 17):
        changed = (a.at[:, :, at:].multiply(-3.0) for a in (q, k, v))
        other, _ = attend(method, *changed, pos)
        short = (jnp.roll(a, N - at, 2) for a in (q, k, v))
        less, _ = attend(method, *short, jnp.where(pos < N - at, -1, pos - (N - at)))
        less = np.roll(less, at - N, 2)
        same[at] = all(np.array_equal(x[:, :, : at - tail], out[:, :, : at - tail]) for x in (other, less))
    kind = AHEAD.get(request.node.callspec.id, "prompt")
    assert (same[17], same[12] and same[16] and same[20]) == {"row": (True, True), "block": (False, True), "prompt": (False, False)}[kind]


def test_a_pattern_of_places_is_causal_through_the_model():
    params, ids, live = world()
    recipe = Recipe(sparsify=AShape(local=3, sinks=2, block_q=4, block_k=2))
    out, _ = run(recipe, params, ids, live)
    later, _ = run(recipe, params, np.concatenate([ids[:, :16], (ids[:, 16:] + 3) % CFG.vocab], 1), live)
    np.testing.assert_array_equal(out[:, :16], later[:, :16])


@functools.partial(jax.jit, static_argnums=0)
def slope(method, q, k, v, pos):
    def loss(q, k, v):
        out, lse = attend(method, q, k, v, pos)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@EVERY
def test_gradients_are_finite_also_of_nothing(make):
    q, k, v, pos = packed()
    for places in (pos, jnp.full_like(pos, -1)):
        assert all(np.isfinite(g).all() for g in slope(make(8), q, k, v, places))


@pytest.mark.parametrize("label", ["block_topk", "sale", "dhsa"])
def test_kernels_in_interpret_mode_and_bfloat16(label):
    """The kernels' path gives XLA's result; bfloat16 rows that of the same rows in float32, to its precision."""
    (q, k, v, pos), method = packed(), MAKERS[label](8)
    out, lse = attended(method)
    got = attend(method, q, k, v, pos, "interpret")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, (out, lse))
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    wide, _ = attend(method, *(a.astype(jnp.float32) for a in half), pos)
    narrow, _ = attend(method, *half, pos)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=3e-2)


def test_evidence_is_made_with_the_same_logsumexp():
    """Attention received = exp(logit - lse of what was listed), over all visible keys; a compressor runs behind it."""
    params, ids, live = world()
    method = AShape(local=3, sinks=2, block_q=4, block_k=2)
    tokens = decoder.embed(CFG, params, jnp.asarray(ids), jnp.asarray(live))
    survey = jax.jit(lambda params, tokens: decoder.survey(CFG, params, tokens, Needs(received=True, turned=N), Recipe(sparsify=method)))
    _, layers, found = survey(params, tokens)
    ((part,), (seen,)) = layers[0], found[0]
    pos = tokens.pos
    _, lse = attend(method, seen.turned, part.kv.k, part.kv.v, pos)
    logit = np.einsum("bhtd,bhsd->bhts", seen.turned, np.repeat(part.kv.k, 2, 1)) * 8**-0.5
    visible = (pos[:, :, None] >= pos[:, None]) & (pos[:, None] >= 0) & (pos[:, :, None] >= 0)
    want = np.where(visible[:, None], np.exp(np.minimum(logit - np.where(np.isfinite(lse), lse, 0)[..., None], 80)), 0).sum(2)
    np.testing.assert_allclose(seen.received, want, rtol=1e-4, atol=1e-5)
    assert np.isfinite(run(Recipe(sparsify=method, cache=SnapKV(capacity=8, window=2)), params, ids, live)[0]).all()


def test_given_caches_are_read_whole():
    params, ids, live = world()
    recipe = Recipe(sparsify=AShape(local=1, sinks=1, block_q=1, block_k=1))
    tokens = decoder.embed(CFG, params, jnp.asarray(ids), jnp.asarray(live))
    layers = jax.jit(lambda tokens: decoder.prefill(CFG, params, tokens, new=N)[1])(tokens)
    again = jax.jit(lambda recipe, layers: decoder.prefill(CFG, params, tokens, recipe, new=0, layers=layers)[0], static_argnums=0)
    got, want = again(recipe, layers), again(Recipe(), layers)
    np.testing.assert_array_equal(got.x, want.x)


def test_refuses_what_does_not_go_together():
    params, ids, _ = world()
    recipe = Recipe(sparsify=AShape(local=3))
    with pytest.raises(ValueError, match="a_shape lists the keys of a whole prompt at once"):
        prefill_chunked(CFG, params, jnp.asarray(ids), recipe=recipe, chunk=8, new=0)
    bare = object.__new__(Recipe)  # past the type checks of the test run
    for field in dataclasses.fields(Recipe):
        object.__setattr__(bare, field.name, SnapKV(capacity=9, window=2) if field.name == "sparsify" else field.default)
    with pytest.raises(TypeError, match="sparsify takes a Sparsifier, got SnapKV"):
        bare.__post_init__()
