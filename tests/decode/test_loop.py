"""Generation, replay and chunked prefill against the parallel pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import Sampler, generate, prefill_chunked, replay
from jaxtok.methods import H2O, ExpectedAttention, Quest, SnapKV, StreamingLLM
from jaxtok.models import blocks, decoder, load
from jaxtok.models.config import Config

PLAIN = Recipe()
CFG = Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)
N, NEW = 16, 8
LIVE = jnp.arange(N)[None] >= jnp.asarray([0, 9, 5])[:, None]


@pytest.fixture(scope="module")
def world():
    return blocks.init(CFG, jax.random.key(0), embed_std=1.0), jax.random.randint(jax.random.key(1), (3, N), 0, CFG.vocab)


def continued(params, ids, live, recipe=PLAIN, **options):
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=NEW)
    return generate(CFG, params, tokens, layers, recipe, new=NEW, **options)


@pytest.fixture(scope="module")
def greedy(world):
    return jax.jit(lambda p, ids, live: continued(p, ids, live, eos=()))(*world, LIVE)


def test_greedy_is_the_argmax_of_the_parallel_pass(world, greedy):
    """Every token is the argmax of the logits that a pass over the whole sequence gives there."""
    params, ids = world
    whole = jnp.concatenate([ids, greedy.ids], 1)
    live = jnp.concatenate([LIVE, jnp.ones((3, NEW), bool)], 1)
    logits = jax.jit(lambda p: blocks.forward(CFG, p, whole, live))(params)
    assert np.array_equal(greedy.ids, logits[:, N - 1 : -1].argmax(-1)) and greedy.count.tolist() == [NEW] * 3


def test_a_sequence_stops_at_its_end_token(world, greedy):
    stop = int(greedy.ids[1, 2])
    want = np.array(greedy.ids)
    for row in want:
        hit = np.flatnonzero(row == stop)
        if len(hit):
            row[hit[0] + 1 :] = -1
    out = jax.jit(lambda p, ids, live: continued(p, ids, live, eos=(stop, 39)))(*world, LIVE)
    ok = np.isin(greedy.ids, [39]).any()
    assert ok or np.array_equal(out.ids, want)
    assert out.count.tolist() == (np.asarray(out.ids) >= 0).sum(1).tolist()
    assert (out.layers[0][0].kv.seen <= jnp.asarray([N, 7, 11]) + out.count).all()


def test_an_empty_prompt_generates_nothing(world):
    live = LIVE.at[1].set(False)
    out = jax.jit(lambda p, ids, live: continued(p, ids, live, eos=()))(*world, live)
    assert out.count.tolist() == [NEW, 0, NEW] and (out.ids[1] == -1).all()


def test_sampling_needs_a_key_and_follows_it(world):
    params, ids = world
    with pytest.raises(ValueError, match="needs key="):
        continued(params, ids, LIVE, sampler=Sampler(temperature=1.0))
    run = jax.jit(lambda p, key: continued(p, ids, LIVE, sampler=Sampler(temperature=2.0), key=key, eos=()).ids)
    a, b, c = run(params, jax.random.key(1)), run(params, jax.random.key(1)), run(params, jax.random.key(2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_one_compile_for_lengths_and_budgets(world):
    params, ids = world
    recipe = Recipe(cache=SnapKV(capacity=8, window=2, pool=3))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, ids, live, keep):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=NEW, keep={"cache": keep})
        return generate(CFG, params, tokens, layers, recipe, new=NEW, eos=()), layers

    kept = []
    for first, keep in ((0, 8), (3, 5), (7, 3)):
        out, layers = run(params, ids, jnp.arange(N)[None] >= jnp.full((3, 1), first), jnp.int32(keep))
        kept.append(int((layers[0][0].kv.pos >= 0).sum(-1).max()))
        assert out.layers[0][0].kv.seen.tolist() == [N - first + NEW - 1] * 3
    assert kept == [8, 5, 3]


def test_replay_gives_the_logits_of_the_parallel_pass(world, greedy):
    params, ids = world
    forced = jax.random.randint(jax.random.key(5), (3, NEW), 0, CFG.vocab)
    live = jnp.concatenate([LIVE, jnp.ones((3, NEW), bool)], 1)

    @jax.jit
    def run(params):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, LIVE), new=NEW)
        out, _ = replay(CFG, params, tokens, layers, forced)
        best, _ = replay(CFG, params, tokens, layers, forced, take=lambda z: z.argmax(-1))
        return out, best, blocks.forward(CFG, params, jnp.concatenate([ids, forced], 1), live)

    out, best, whole = run(params)
    np.testing.assert_allclose(np.swapaxes(out, 0, 1), whole[:, N - 1 : -1], atol=2e-5)
    assert np.array_equal(best, out.argmax(-1))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(cache=SnapKV(capacity=6, window=3, pool=3)),
        Recipe(policy=H2O(capacity=6)),
        Recipe(policy=StreamingLLM(capacity=6)),
    ],
    ids=["plain", "snapkv", "h2o", "streaming_llm"],
)
def test_chunked_prefill_equals_prefill_at_once(world, recipe):
    """Also where the prompt is no multiple of the chunk; a step policy has observed every chunk."""
    params, ids = world

    @jax.jit
    def run(params):
        a = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, LIVE), recipe, new=3)
        b = prefill_chunked(CFG, params, ids, LIVE, recipe, chunk=5, new=3)
        after = [replay(CFG, params, *state, ids[:, :3], recipe)[0] for state in (a, b)]
        return a, b, after

    (tokens, layers), (chunked, pieces), after = run(params)
    np.testing.assert_allclose(tokens.x[:, -1], chunked.x[:, -1], atol=2e-5)
    np.testing.assert_allclose(after[0], after[1], atol=2e-5)
    for (a,), (b,) in zip(layers, pieces, strict=True):
        for row_a, row_b in zip(a.kv.pos.reshape(6, -1), b.kv.pos.reshape(6, -1), strict=True):
            assert sorted(row_a[row_a >= 0].tolist()) == sorted(row_b[row_b >= 0].tolist())


def test_chunks_through_a_reader(world):
    """A reader that reads everything is the plain prefill, and goes on so; its slots are rounded up to its blocks."""
    params, ids = world

    @jax.jit
    def run(params):
        a = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, LIVE), new=3)
        b = prefill_chunked(CFG, params, ids, LIVE, Recipe(reader=Quest(pages=9, block=4)), chunk=5, new=3, read=True)
        return (
            a[0].x,
            b[0].x,
            replay(CFG, params, *a, ids[:, :3])[0],
            replay(CFG, params, *b, ids[:, :3], Recipe(reader=Quest(pages=9, block=4))),
        )

    x, y, plain, (read, layers) = run(params)
    np.testing.assert_allclose(x[:, -1], y[:, -1], atol=2e-5)
    np.testing.assert_allclose(plain, read, atol=2e-5)
    assert layers[0][0].kv.k.shape[2] % 4 == 0


def test_chunked_prefill_refuses_what_it_cannot_do(world):
    params, ids = world
    with pytest.raises(ValueError, match="read=True prefills through a reader"):
        prefill_chunked(CFG, params, ids, LIVE, Recipe(policy=H2O(capacity=6)), chunk=5, new=3, read=True)
    with pytest.raises(ValueError, match="prefill it at once"):
        prefill_chunked(CFG, params, ids, LIVE, Recipe(cache=ExpectedAttention(capacity=8)), chunk=4, new=1)
    with pytest.raises(ValueError, match="prefill it at once"):
        prefill_chunked(CFG, params, ids, LIVE, Recipe(cache=SnapKV(capacity=9, window=8)), chunk=4, new=1)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        prefill_chunked(CFG, params, ids, LIVE, chunk=0, new=1)


def test_a_real_checkpoint_continues_as_published(data):
    """200 greedy tokens of the TinyStories Llama through prefill, cache and the jitted loop: the published text, character for character."""
    cfg, params, tokenizer = load.load(data / "stories260K")
    start = jnp.asarray([[cfg.bos]], jnp.int32)

    @jax.jit
    def run(params):
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, start), new=200)
        return generate(cfg, params, tokens, layers, new=200, eos=()).ids

    said = tokenizer.decode([cfg.bos, *run(params)[0].tolist()])
    assert said.strip() == (data / "stories260K" / "expected_greedy_200steps.txt").read_text().strip()
