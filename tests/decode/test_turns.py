"""Conversations: turns read on one cache and replies in blocks equal prefills and generation of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import build
from jaxtok.decode import Sampler, generate, turns
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.models.text import pad

CFG = Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)
N, NEW, SLOTS = 16, 8, 64
CACHE = {
    "snapkv": "snapkv:window=4",
    "ada_kv": "ada_kv:base=k_norm",
    "expected_attention": "expected_attention",
    "pyramid": "pyramidkv:window=4",
}
RECIPES = {
    "plain": Recipe(),
    **{name: Recipe(cache=build(spec, 9)) for name, spec in CACHE.items()},
    "rerotated": Recipe(cache=build("key_rerotation:base=k_norm", 9)),
    **{spec: Recipe(policy=build(spec, 9)) for spec in ("h2o", "tova", "streaming_llm:compact=true")},
    "quest": Recipe(reader=build("quest:pages=2,block=4", 9)),
    "sentences": Recipe(reader=build("sentencekv.reader:ends=3+4,budget=12,start_tokens=2,recent=4", 9)),
    "both": Recipe(cache=build("snapkv:window=4", 9), reader=build("quest:pages=2,block=4", 9)),
}


@pytest.fixture(scope="module")
def params():
    return blocks.init(CFG, jax.random.key(0), embed_std=1.0)


def ids_of(seed, *lengths, n=N):
    """Right-padded prompts."""
    ids, live = pad([np.random.default_rng([seed, i]).integers(0, CFG.vocab, k).tolist() for i, k in enumerate(lengths)], n, side="right")
    return jnp.asarray(ids), jnp.asarray(live)


class Talk:
    """A conversation through two jitted programs that count their traces."""

    def __init__(self, params, recipe, b=1, slots=SLOTS, most=3, sampler=turns.GREEDY, eos=()):
        self.traces = dict(listen=0, speak=0)

        def counted(fn, **static):
            def run(*args, **options):
                self.traces[fn.__name__] += 1
                return fn(CFG, *args, recipe, **static, **options)

            return jax.jit(run)

        self.params = params
        self._listen = counted(turns.listen, new=NEW)
        self._speak = counted(turns.speak, most=most, sampler=sampler, eos=eos)
        self.layers = turns.begin(CFG, params, recipe, slots=slots, new=NEW, b=b)

    def __call__(self, ids, live, new=NEW, key=0):
        """What is said to a turn, i32 [b new or more]."""
        x, self.layers = self._listen(self.params, self.layers, ids, live)
        said, found = turns.Said.start(x), []
        while bool(said.running.any()) and int(said.count) < new:
            ids, said, self.layers = self._speak(self.params, said, self.layers, left=new - int(said.count), key=jax.random.key(key))
            found.append(np.asarray(ids))
        return np.concatenate(found, 1)


@functools.partial(jax.jit, static_argnums=1)
def at_once(params, recipe, ids, live):
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=NEW)
    return generate(CFG, params, tokens, layers, recipe, new=NEW, eos=()).ids


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("sentences", "snapkv", "tova")])
def test_a_turn_is_a_prefill_and_a_generation(params, name):
    """Ragged: 16 and 11 tokens; rows of a batch share a cursor, so the shorter one leaves dead slots. Left out: "sentences", which reads the
    turn sparsely too; what is in "both"; a second policy that evicts by attention."""
    ids, live = ids_of(1, 16, 11)
    said = Talk(params, RECIPES[name], b=2)(ids, live)
    assert said.shape == (2, 9) and (said[:, 8] == -1).all()
    np.testing.assert_array_equal(said[:, :8], at_once(params, RECIPES[name], ids, live))


def test_turns_equal_the_whole_text(params):
    """Three turns with their replies, on one cache, against one pass over all of it; padding takes no slot."""
    talk, text, takes = Talk(params, Recipe(), slots=5 + 7 + 12 + 3 * NEW), [], []
    for seed, n in ((2, 5), (3, 7), (4, 12)):
        ids, live = ids_of(seed, n)
        said = talk(ids, live)[0]
        text += [*np.asarray(ids)[0, :n].tolist()]
        takes += list(range(len(text) - 1, len(text) - 1 + NEW))
        text += said[said >= 0].tolist()
    logits = blocks.forward(CFG, params, jnp.asarray([text]), jnp.ones((1, len(text)), bool))
    best = np.asarray(logits.argmax(-1))[0]
    assert [text[i + 1] for i in takes] == best[takes].tolist()
    kv = talk.layers[0][0].kv
    assert int(kv.cursor) == kv.k.shape[2] == len(text) == int(kv.seen[0]) and int(kv.lost.sum()) == 0
    assert talk.traces == dict(listen=1, speak=1)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "quest", "sentences"])
def test_later_turns_compile_nothing_and_keep_the_capacity(params, name):
    talk = Talk(params, RECIPES[name])
    shape = jax.tree.map(jnp.shape, talk.layers)
    for seed in range(3):
        said = talk(*ids_of(seed, 9 + seed))
        assert jax.tree.map(jnp.shape, talk.layers) == shape and (said[:, :8] >= 0).all()
    assert talk.traces == dict(listen=1, speak=1)
    assert int(talk.layers[0][0].kv.seen[0]) == 9 + 10 + 11 + 3 * NEW


@pytest.mark.parametrize("sampler", [turns.GREEDY, Sampler(temperature=1.0)], ids=["greedy", "drawn"])
def test_the_blocks_do_not_matter(params, sampler):
    ids, live = ids_of(5, 12, 16)
    one, three = (Talk(params, Recipe(), b=2, most=most, sampler=sampler)(ids, live)[:, :NEW] for most in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_the_end_is_said_and_not_kept(params):
    ids, live = ids_of(6, 10, 10)
    free = Talk(params, Recipe(), b=2)(ids, live)[:, :NEW]
    stop = int(free[0, 3])
    ends = [int(np.flatnonzero(row == stop)[0]) if stop in row else NEW for row in free]
    talk = Talk(params, Recipe(), b=2, eos=(stop,))
    said = talk(ids, live)
    for row, mine, end in zip(free, said, ends, strict=True):
        assert mine[:NEW][: end + 1].tolist() == row[: end + 1].tolist() and (mine[:NEW][end + 1 :] == -1).all()
    assert talk.layers[0][0].kv.seen.tolist() == [10 + end for end in ends]


def test_what_finds_no_room_is_counted(params):
    """20 slots: 16 of the turn, 4 of the reply; the other 4 are lost, and said all the same."""
    talk = Talk(params, Recipe(), slots=20)
    said = talk(*ids_of(7, 16))
    assert (said[:, :8] >= 0).all()
    for (part,) in talk.layers:
        assert part.kv.lost.tolist() == [[4, 4]] and int(part.kv.seen[0]) == 24 and int((part.kv.pos >= 0).sum()) == 2 * 20
    talk(*ids_of(8, 3))
    assert talk.layers[0][0].kv.lost.tolist() == [[4 + 3 + NEW] * 2]


def test_refused(params):
    with pytest.raises(ValueError, match="16 rows cannot be appended to a cache of 12 slots"):
        Talk(params, Recipe(), slots=12)(*ids_of(7, 9))
    with pytest.raises(ValueError, match=r"temperature 1\.0 needs key="):
        layers = turns.begin(CFG, params, slots=8, new=1)
        turns.speak(CFG, params, turns.Said.start(jnp.zeros((1, 1, 16))), layers, most=1, left=1, sampler=Sampler(temperature=1.0))
    with pytest.raises(ValueError, match="kvzip needs more than one pass over a prompt, which a conversation does not make"):
        Talk(params, Recipe(cache=build("kvzip", 9)))
    with pytest.raises(ValueError, match="duo_attention leaves some heads whole, whose caches would grow with every turn"):
        turns.begin(CFG, params, Recipe(policy=build("duo_attention:sinks=2", 9), heads=((1, 1), (0, 2))), slots=8, new=1)
    talk = Talk(params, RECIPES["rerotated"])
    talk(*ids_of(9, 12))
    with pytest.raises(ValueError, match="they are not kept after a prefill"):
        talk(*ids_of(9, 12))
