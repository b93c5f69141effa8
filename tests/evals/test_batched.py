"""Likelihoods and continuations in batches equal those of each request by itself, with and without a method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import build
from jaxtok.decode import Sampler, generate, replay
from jaxtok.evals import batched, measure
from jaxtok.evals.batched import Model, Prompt, wanted
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config

CFG = Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
PARAMS = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
RNG = np.random.default_rng(0)
IDS = lambda n: RNG.integers(0, CFG.vocab, n).tolist()
PROMPTS = [Prompt(IDS(n)) for n in (5, 14, 16, 40, 1)]
SAID = [IDS(n) for n in (3, 1, 16, 7, 20)]
REQUESTS = list(zip(PROMPTS, SAID, strict=True))
model = lambda method="full", budget="100%", **options: Model(cfg=CFG, params=PARAMS, method=method, budget=budget, batch=3, **options)


@functools.partial(jax.jit, static_argnums=0)
def by_itself(recipe, ids, ask, said):
    tokens, layers = decoder.prefill(CFG, PARAMS, decoder.embed(CFG, PARAMS, ids), recipe, new=said.shape[1] + ask.shape[1])
    x, later = tokens.x, recipe.replace(cache=None)
    if ask.shape[1]:
        x, layers = decoder.step(CFG, PARAMS, blocks.embed(CFG, PARAMS, ask), jnp.ones(ask.shape, bool), layers, later)
    return jax.nn.log_softmax(replay(CFG, PARAMS, tokens._replace(x=x[:, -1:]), layers, said, later)[0][:, 0], -1)


def alone(recipe, prompt, said):
    """(log-likelihood, greedy) through the library's own loops, one request unpadded."""
    logp = np.asarray(by_itself(recipe, *(jnp.asarray([ids], jnp.int32) for ids in (*prompt, said))))
    return float(logp[np.arange(len(said)), said].sum()), bool((logp.argmax(-1) == said).all())


def agree(found, expected):
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=2e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_the_full_cache_is_one_pass_over_the_whole():
    out = []
    for prompt, said in REQUESTS:
        ids = np.zeros((1, 64), np.int32)
        ids[0, -len(prompt.context + said) :] = prompt.context + said
        live = np.arange(64)[None] >= 64 - len(prompt.context + said)
        logp = np.asarray(jax.nn.log_softmax(jax.jit(functools.partial(blocks.forward, CFG))(PARAMS, ids, live)[0], -1))
        rows = logp[-len(said) - 1 : -1]
        out.append((float(rows[np.arange(len(said)), said].sum()), bool((rows.argmax(-1) == said).all())))
    agree(model().likelihoods(REQUESTS), out)
    agree(model(Recipe()).likelihoods(REQUESTS[:3]), out[:3])
    agree(model("k_norm").likelihoods(REQUESTS[:3]), out[:3])  # a budget that covers the context, token by token
    agree(model().likelihoods([(Prompt(p.context[:-1], p.context[-1:]), s) for p, s in REQUESTS[:4]]), out[:4])


@pytest.mark.parametrize("spec", ["snapkv:window=4", "h2o", "quest:pages=1,block=4"])
def test_with_a_method_a_row_of_a_batch_is_itself_alone(spec):
    method = build(spec, 9)
    recipe = Recipe(**{method.site: method})
    two = [REQUESTS[2], REQUESTS[1]]
    agree(model(spec, "9").likelihoods(two), [alone(recipe, *r) for r in two])
    asked = [(p._replace(question=IDS(n)), s) for (p, s), n in zip(two, (2, 13), strict=True)]
    agree(model(recipe).likelihoods(asked)[1:], [alone(recipe, *asked[1])])


def test_a_method_that_reads_the_prompt_twice():
    """KVzip at a budget that covers the prompt is the full cache; below it, only the first token (of the prefill itself) is as likely."""
    encode = lambda text, special: [ord(c) % 40 for c in text]
    one, many = REQUESTS[1:3]
    full = model().likelihoods([one, many])
    agree(model("kvzip", "100%", encode=encode).likelihoods([one, many]), full)
    small = model("kvzip", "25%", encode=encode).likelihoods([one, many])
    assert small[0][0] == pytest.approx(full[0][0], abs=1e-4) and abs(small[1][0] - full[1][0]) > 1e-2


def test_a_method_that_looks_at_a_draft():
    """SpecKV with a draft, at a budget that covers the prompt: the full cache; without a draft it is refused at once."""
    two = [(p._replace(question=IDS(n)), s) for (p, s), n in zip(REQUESTS[1:3], (0, 3), strict=True)]
    spec = "speckv:window=2,look=2"
    agree(model(spec, "64", draft=(CFG, PARAMS)).likelihoods(two), model("k_norm", "64").likelihoods(two))
    wanted = [(p, 3) for p, _ in two]
    assert model(spec, "64", draft=(CFG, PARAMS)).continuations(wanted) == model().continuations(wanted)
    with pytest.raises(ValueError, match="speckv needs a draft model"):
        model(spec, "64")


def test_a_share_is_of_each_context():
    """25% of 40 tokens keep 10, in a bucket of 48 whose slots are 12; of 16 tokens 4."""
    for prompt, said, keep in ((PROMPTS[3], SAID[3], 10), (PROMPTS[2], SAID[2], 4)):
        want = alone(Recipe(cache=build("k_norm", keep)), prompt, said)
        agree(model("k_norm", "25%").likelihoods([(prompt, said)]), [want])


def test_a_greedy_continuation_is_greedy():
    """What is generated is what `likelihoods` calls greedy, and changing its last token is not."""
    m, prompts = model("h2o", "9"), PROMPTS[:3]
    said = m.continuations([(p, 6) for p in prompts])
    assert [g for _, g in m.likelihoods(list(zip(prompts, said, strict=True)))] == [True] * 3
    assert [g for _, g in m.likelihoods([(p, [*s[:-1], (s[-1] + 1) % 40]) for p, s in zip(prompts, said, strict=True)])] == [False] * 3


@pytest.mark.parametrize("spec", ["full", "snapkv:window=4", "h2o"])
def test_continuations_are_those_of_generate(spec):
    prompts, counts, recipe = PROMPTS[1:3], (12, 3), measure.recipe_of(spec, 9)
    found = model(spec, "9").continuations(list(zip(prompts, counts, strict=True)))

    @jax.jit
    def whole(ids):
        tokens, layers = decoder.prefill(CFG, PARAMS, decoder.embed(CFG, PARAMS, ids), recipe, new=12)
        return generate(CFG, PARAMS, tokens, layers, recipe, new=12).ids

    for prompt, n, ids in zip(prompts, counts, found, strict=True):
        assert ids == whole(jnp.asarray([prompt.context]))[0, :n].tolist()


def test_what_ends_a_continuation():
    free = model().continuations([(p, 16) for p in PROMPTS[:3]])
    seen = []
    done = lambda i, ids: seen.append((i, len(ids))) or (i == 1 and len(ids) >= 8)
    short = model().continuations([(p, n) for p, n in zip(PROMPTS[:3], (16, 16, 5), strict=True)], done=done)
    assert short == [free[0], free[1][:8], free[2][:5]] and (1, 16) not in seen
    stop = free[0][2]
    ending = Model(cfg=dataclasses.replace(CFG, eos=(stop,)), params=PARAMS, batch=3)
    ended = ending.continuations([(p, 16) for p in PROMPTS[:3]])
    assert ended == [row[: row.index(stop)] if stop in row else row for row in free] and len(ended[0]) <= 2


def test_draws_depend_on_the_seed():
    draw = lambda seed: model(seed=seed).continuations([(PROMPTS[3], 16)], sampler=Sampler(temperature=2.0))
    assert draw(0) == draw(0) != draw(1)


def test_one_program_a_shape():
    assert [batched.up(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 96, 97)] == [16, 16, 24, 24, 32, 48, 64, 96, 96, 128]
    m = model("k_norm", "9")
    m.likelihoods(REQUESTS)
    compiled = batched._score_by_steps._cache_size()
    other = [(Prompt(IDS(n)), IDS(k)) for n, k in ((3, 2), (16, 16), (9, 24 - 1), (33, 3), (48, 9), (41, 16), (12, 17))]
    assert len(m.likelihoods(other)) == 7 and m.sizes == {(16, 0, 16), (48, 0, 16), (16, 0, 24)}
    assert batched._score_by_steps._cache_size() == compiled, "lengths of a bucket compile one program"


def test_refused():
    for requests in ([(Prompt([]), [1])], [(Prompt([1]), [])]):
        with pytest.raises(ValueError, match="needs a prompt and a continuation"):
            model().likelihoods(requests)
    with pytest.raises(ValueError, match="needs a prompt and at least one token, got 1 and 0"):
        model().continuations([(Prompt([1]), 0)])
    with pytest.raises(ValueError, match="unknown method 'nope'"):
        model("nope")
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        Model(cfg=CFG, params=PARAMS, batch=0)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (7, (), Sampler())),
        ({"until": "\n", "max_gen_toks": 3}, (3, ("\n",), Sampler())),
        (
            {"until": ["a", "", "b"], "max_new_tokens": "5", "do_sample": False, "temperature": 0.7, "num_beams": 1},
            (5, ("a", "b"), Sampler()),
        ),
        ({"do_sample": True}, (7, (), Sampler(temperature=1.0))),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": None}, (7, (), Sampler(temperature=0.5, top_p=0.9))),
    ],
)
def test_options_of_a_generation(options, expected):
    assert tuple(wanted(options, 7)) == expected


def test_options_that_are_not_supported_are_refused_and_texts_are_cut():
    for options in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="supported are until, max_gen_toks"):
            wanted(options, 7)
    cut = wanted({"until": ["\n\n", "end"]}, 7).cut
    assert cut("an end\n\n") == "an " and cut("a\n\nend") == "a" and cut("en") is None and cut("end") == ""
