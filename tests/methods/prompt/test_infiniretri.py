"""InfiniRetri: scores, sentences, overflow; the official scores; chunks against one at a time; the whole through a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill, retrieve
from jaxtok.decode.retrieve import _absorb, through
from jaxtok.methods import InfiniRetri
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, world


def small(capacity):
    return InfiniRetri(capacity=capacity, question=2, chunk=5, topk=2, width=3, ends=(0, 1))


def reference(rows, weight, width, sentence, topk, room):
    """(scores, kept tokens, how many went for want of room) of one sequence, by the card: rows [h q n], sentence [n]."""
    q, n = rows.shape[1:]
    score = np.zeros(n)
    for j in range(n):
        for i in range(max(j - width // 2, 0), min(j + (width - 1) // 2, n - 1) + 1):
            score[j] += sum(weight[r] ** 2 * rows[:, r, i].sum() for r in range(q))
    picked = sorted(range(n), key=lambda j: (-score[j], j))[:topk]
    hit = {int(sentence[j]) for j in picked}
    best = sorted(hit, key=lambda s: (-max(score[sentence == s]), s))
    kept, full = [], False
    for rank, s in enumerate(best):
        mine = np.flatnonzero(sentence == s).tolist()
        if rank == 0 and len(mine) > room:
            kept, full = sorted(mine, key=lambda j: (-score[j], j))[:room], True
        full = full or len(kept) + len(mine) > room
        kept += [] if full else mine
    return score, sorted(kept), sum(int((sentence == s).sum()) for s in hit) - len(kept)


def run(method, rows, weight, sentence, score=None):
    """(scores, plan) of a batch in one program; the plan is for `score` where it is given."""

    def both(rows, weight, sentence):
        found = method.scores(rows, weight)
        return found, method.plan(found if score is None else jnp.asarray(score, jnp.float32), sentence)

    return jax.jit(both)(jnp.asarray(rows, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray(sentence, jnp.int32))


def test_by_hand():
    """Two question rows over six tokens in three sentences; w = (1, 2), so the second row counts four times."""
    rows = np.zeros((1, 1, 2, 6), np.float32)
    rows[0, 0, 0] = [0.1, 0.5, 0.0, 0.2, 0.0, 0.2]
    rows[0, 0, 1] = [0.0, 0.1, 0.0, 0.3, 0.1, 0.0]
    given = rows, [[1.0, 2.0]], [[4, 4, 4, 5, 5, 7]]
    make = lambda capacity, topk, width=1: InfiniRetri(capacity=capacity, question=2, topk=topk, width=width)
    score, plan = run(make(5, 1), *given)
    np.testing.assert_allclose(score, [[0.1, 0.9, 0.0, 1.4, 0.4, 0.2]], atol=1e-6)
    assert plan.index.tolist() == [[-1, 3, 4]]  # the sentence of token 3, whole
    plan = run(make(5, 2), *given)[1]
    assert plan.index.tolist() == [[-1, 3, 4]] and plan.lost.tolist() == [3]  # sentence 4 was chosen and has no room
    plan = run(make(3, 1), *given)[1]
    assert plan.index.tolist() == [[3]] and plan.lost.tolist() == [1]  # the best alone is too long: its best token
    np.testing.assert_allclose(run(make(5, 1, 4), *given)[0], [[1.0, 1.0, 2.4, 2.7, 2.0, 2.0]], atol=1e-6)  # tokens j - 2 to j + 1


@pytest.mark.parametrize("topk, width, room", [(1, 8, 20), (4, 3, 9), (6, 2, 7), (9, 1, 12), (24, 5, 24)])
def test_reference(topk, width, room):
    rng, n, q, b = np.random.default_rng(topk), 24, 3, 4
    rows, weight = rng.random((b, 2, q, n)).astype(np.float32), rng.random((b, q)).astype(np.float32)
    sentence = np.cumsum(rng.random((b, n)) < 0.3, 1)
    want = [reference(*each, topk, room) for each in zip(rows, weight, [width] * b, sentence, strict=True)]
    method = InfiniRetri(capacity=room + q, question=q, topk=topk, width=width)
    score, plan = run(method, rows, weight, sentence, [x for x, _, _ in want])
    np.testing.assert_allclose(score, [x for x, _, _ in want], rtol=1e-5)
    assert [[int(i) for i in row if i >= 0] for row in plan.index] == [kept for _, kept, _ in want]
    assert plan.lost.tolist() == [lost for _, _, lost in want]


def test_column_sum_and_topk():
    """The card: width 1 and weights 1 are the plain column sum; topk >= context drops nothing."""
    rows = np.random.default_rng(0).random((2, 4, 3, 9))
    method = InfiniRetri(capacity=12, question=3, width=1, topk=9)
    score, plan = run(method, rows, np.ones((2, 3)), np.broadcast_to(np.arange(9) // 4, (2, 9)))
    np.testing.assert_allclose(score, rows.sum((1, 2)), rtol=1e-6)
    assert plan.index.tolist() == [list(range(9))] * 2 and plan.lost.tolist() == [0, 0]


def test_official(data):
    """Scores, question weights and kept tokens of the package on a first chunk."""
    with np.load(data / "golden/infiniretri.npz") as d:
        get = {name.removeprefix("c2_"): d[name] for name in d.files if name.startswith("c2_")}
    begin, end, first, last = (int(get[name]) for name in ("prefix", "context_end", "question_start", "question_end"))
    options = {"topk": int(get["topk"]), "width": int(get["phrase_token_num"]), "variant": "official"}
    method = InfiniRetri(capacity=200, question=last - first, **options)
    rows = get["attn"][:, :, first:last]
    weight = rows[..., first:last].sum((1, 3))
    np.testing.assert_allclose(weight[0], get["question_weights"][:, 0], rtol=1e-5)
    sentence = np.searchsorted(get["sentence_bounds"], np.arange(begin, end), side="right")
    score, plan = run(method, rows[..., begin:end], weight, sentence[None])
    np.testing.assert_allclose(score[0], get["token_scores"], rtol=1e-5)
    assert [int(i) + begin for i in plan.index[0] if i >= 0] == get["kept_tokens"].tolist()


def planted(n, q, at, size=1.0):
    """A `look` whose question rows attend to the tokens whose id is in `at`, and evenly to themselves."""

    def look(ids, live, rows):
        m = ids.shape[1]
        hit = jnp.isin(ids, jnp.asarray(at)) & live
        base = jnp.where(live, 0.01, 0.0) + jnp.where(hit, size, 0.0)
        return (jnp.broadcast_to(base[:, None, None], (ids.shape[0], 2, rows, m)),)

    return look


def test_a_text_that_fits_stays():
    """The card's identity on one chunk, whatever the question looks at; as well where the chunks are smaller."""
    method = InfiniRetri(capacity=20, question=3, chunk=5, topk=1, ends=(1,))
    live = jnp.arange(40)[None] >= jnp.array([[20], [19]])  # seventeen tokens of text fit, eighteen do not
    plan = jax.jit(lambda ids, live: method.run({}, planted(0, 3, (7,)), ids, live))(jnp.ones((2, 40), jnp.int32), live)
    assert (plan.index[0] >= 0).sum() == 20 and plan.lost[0] == 0 and (plan.index[1] >= 0).sum() < 20


def test_a_needle_survives_every_chunk():
    """The card: planted attention keeps its sentence through all chunks, whole; padding is no text."""
    n, q = 64, 3
    ids = np.full((2, n), 5, np.int32)
    ids[:, 3::4] = 1  # sentences of four
    ids[0, 9], ids[1, 30] = 7, 7
    ids[:, -q:] = 6
    live = np.ones((2, n), bool)
    live[1, :20] = False
    method = InfiniRetri(capacity=q + 8, question=q, chunk=11, topk=1, width=1, ends=(1,))
    plan = jax.jit(lambda ids, live: method.run({}, planted(n, q, (7,)), ids, live))(jnp.asarray(ids), jnp.asarray(live))
    kept = [[int(i) for i in row if i >= 0] for row in plan.index]
    assert kept == [[8, 9, 10, 11, 61, 62, 63], [28, 29, 30, 31, 61, 62, 63]]
    assert plan.lost.tolist() == [0, 0] and plan.index.shape == (2, 11)


def test_chunks_end_with_sentences():
    """Of 11 tokens those up to the last sentence end are taken; without one all; at the end of the text the rest."""
    method = InfiniRetri(capacity=9, question=1, chunk=4, topk=9, width=1, ends=(1,))
    look = planted(4, 1, (99,))
    ids = jnp.array([[5, 1, 5, 5], [5, 5, 5, 5], [5, 1, 5, 5], [5, 5, 9, 9]])
    question, asked = jnp.full((4, 1), 6), jnp.ones((4, 1), bool)
    last = jnp.array([False, False, True, True])
    no = jnp.zeros((4,), bool)
    read = jax.jit(lambda state, count: method.absorb(look, state, ids, count, question, asked, last, no))
    state, taken = read(method.start(4), jnp.array([4, 4, 4, 2]))
    assert taken.tolist() == [2, 4, 4, 2] and state.read.tolist() == [2, 4, 4, 2] and state.closed.tolist() == [1, 0, 1, 0]
    assert state.sentence[2].tolist() == [-1] * 4 + [0, 0, 1, 1]
    again, taken = read(state, jnp.zeros((4,), jnp.int32))
    assert taken.tolist() == [0] * 4
    for a, b in zip(state, again, strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def model():
    params = world()[0]
    ids = jax.random.randint(jax.random.key(8), (3, 40), 2, CFG.vocab).at[:, 4::6].set(1)
    return params, ids, jnp.arange(40)[None] >= jnp.array([[0], [13], [31]])


METHOD = InfiniRetri(capacity=12, question=3, chunk=9, topk=2, width=2, ends=(1,))


@functools.cache
def prefilled():
    params, ids, live = model()
    return jax.jit(lambda ids, live: prefill(CFG, params, ids, live, Recipe(prompt=METHOD), new=2))(ids, live)


def test_through_a_model():
    """Chunk by chunk, as a loop over `decoder.last_rows` and the numpy reference say; then the prompt that is left is prefilled."""
    params, ids, live = model()
    tokens, layers = prefilled()
    size = 12 + 9

    def one(ids, live):
        tokens = decoder.embed(CFG, params, ids, live)
        return decoder.last_rows(CFG, params, tokens, 3), decoder.prefill(CFG, params, tokens, new=0)[0].x[:, -1]

    one = jax.jit(one)

    def at_once(text):
        n = len(text)
        rows, x = one(jnp.asarray([[0] * (size - n) + [int(t) for t in text]]), jnp.arange(size)[None] >= size - n)
        return np.asarray(rows)[0, ..., size - n :], np.asarray(x)[0]

    for b in range(3):
        text = np.asarray(ids)[b][np.asarray(live)[b]]
        question, context = text[-3:], text[:-3]
        number = np.cumsum(context == 1) - (context == 1)
        kept, at, weight, lost = [], 0, None, 0
        while at < len(context):
            part = context[at : at + 9]
            stop = at + len(part)
            if stop < len(context) and (part == 1).any():
                stop = at + int(np.flatnonzero(part == 1)[-1]) + 1
            now = [*kept, *range(at, stop)]
            rows = at_once([*context[now], *question])[0]
            weight = rows[..., len(now) :].sum((0, 2)) if weight is None else weight
            _, stay, gone = reference(rows[..., : len(now)], weight, 2, number[now], min(2, len(now)), 9)
            if len(context) <= 9:
                stay, gone = list(range(len(now))), 0
            kept, at, lost = [now[i] for i in stay], stop, lost + gone
        want = [*kept, *range(len(context), len(text))]
        source = np.asarray(tokens.source)[b][np.asarray(live)[b]]
        assert np.flatnonzero(source >= 0).tolist() == want and int(tokens.lost[b]) == lost
        np.testing.assert_allclose(tokens.x[b, -1], at_once(text[want])[1], atol=1e-5)
        kv = layers[0][0].kv
        assert int(kv.seen[b]) == len(want) and kv.k.shape[2] == 12 + 2 and kv.lost[b].tolist() == [lost] * CFG.kv_heads


@pytest.mark.parametrize("options, kept", [({}, (1, 1)), ({"weigh": False}, (0, 0)), ({"weigh": False, "variant": "official"}, (1, 0))])
def test_question_weights(options, kept):
    """Row 0 looks at id 10 and hardly at the question, row 1 at id 11: weighted, 11 wins, in later chunks by the first one's weights.

    weigh=False: ones; officially the first chunk is weighted all the same.
    """
    method = InfiniRetri(capacity=3, question=2, chunk=4, topk=1, width=1, ends=(10, 11, 12), **options)

    def look(ids, live, rows):
        asking = jnp.where(ids == 6, jnp.array([[0.05], [0.4]]), 0.0)  # each row's attention to the two tokens of the question
        text = jnp.where(ids == 10, jnp.array([[0.6], [0.0]]), 0.0) + jnp.where(ids == 11, jnp.array([[0.0], [0.1]]), 0.0)
        return ((asking + text)[None, None],)

    asked, yes, no = jnp.ones((1, 2), bool), jnp.ones((1,), bool), jnp.zeros((1,), bool)
    read = jax.jit(lambda state, ids, last: method.absorb(look, state, ids, jnp.full((1,), 4), jnp.full((1, 2), 6), asked, last, no)[0])
    state = read(method.start(1), jnp.array([[10, 12, 11, 12]]), no)
    np.testing.assert_allclose(state.weight, [[0.1, 0.8]], rtol=1e-6)
    later = read(state, jnp.array([[11, 12, 12, 10]]), yes)
    assert [int(x.ids[0, 0]) - 10 for x in (state, later)] == list(kept)


def test_a_chunk_at_a_time_from_the_host():
    """`decode.retrieve` is the same as the prefill's loop, for texts of any kind and length; one program for all chunks."""
    params, ids, live = model()
    rows = [np.asarray(ids)[b][np.asarray(live)[b]] for b in range(3)]
    questions = [rows[0][-3:].tolist(), rows[1][-2:].tolist(), rows[2][-3:].tolist()]
    texts = [rows[0][:-3], rows[1][:-2].tolist(), rows[2][:-3].astype(np.uint8)]
    told, before = [], _absorb._cache_size()
    found, there, state = retrieve(CFG, params, texts, questions, METHOD, progress=lambda *at: told.append(at))
    assert _absorb._cache_size() == before + 1 and told[-1] == (68, 68) and len(told) >= 5
    kept = np.asarray(prefilled()[0].source) >= 0
    for b in (0, 2):  # with three tokens of question, as the prefill takes them
        assert found[b][there[b]].tolist() == np.asarray(ids)[b][kept[b]].tolist()
    assert found.shape == (3, 12) and found[1][there[1]].tolist()[-2:] == questions[1]
    order = np.asarray(state.order)[1]
    assert [texts[1][i] for i in order[order >= 0]] == np.asarray(state.ids)[1][order >= 0].tolist()
    for wrong, message in (([[1]], "1 questions for 3 texts"), ([[1], [], [2]], "a question of 0 tokens; infiniretri takes from 1 to 3")):
        with pytest.raises(ValueError, match=message):
            retrieve(CFG, params, texts, wrong, METHOD)


def test_the_layer_that_it_looks_at():
    """`sees` picks the layer of the model whose attention is looked at; layers behind it are not run."""
    params, ids, live = model()
    tokens = decoder.embed(CFG, params, ids, live)
    for layer in (0, -1):
        (rows,) = through(CFG, params, layer=layer)(ids, live, 3)
        np.testing.assert_allclose(rows, decoder.last_rows(CFG, params, tokens, 3, layer=layer), atol=1e-6)
    short = params | {"layers": params["layers"][:1]}
    first = dataclasses.replace(METHOD, sees=0)
    rest = [np.asarray(ids)[b][np.asarray(live)[b]] for b in range(3)]
    texts, questions = [x[:-3] for x in rest], [x[-3:].tolist() for x in rest]
    (got, there, _), (want, _, _) = (retrieve(CFG, p, texts, questions, first) for p in (params, short))
    np.testing.assert_array_equal(got, want)
    last = retrieve(CFG, params, texts, questions, METHOD)
    assert (got[there] != last[0][last[1]]).any()
    with pytest.raises(ValueError, match=f"sees=9, but the model has {CFG.layers} layers"):
        prefill(CFG, params, ids, live, Recipe(prompt=dataclasses.replace(METHOD, sees=9)), new=2)


def test_refused():
    for options, message in (
        ({"capacity": 3, "question": 3}, "no room for the 4 protected rows"),
        ({"chunk": 0}, "chunk must be >= 1"),
        ({"topk": 0}, "topk must be >= 1"),
        ({"ends": (-1,)}, "ends must be >= 0"),
        ({"variant": "x"}, "variant must be one of paper, official"),
    ):
        with pytest.raises(ValueError, match=message):
            InfiniRetri(**{"capacity": 64} | options)
    params, ids, live = model()
    tokens = decoder.embed(CFG, params, ids, live)
    with pytest.raises(ValueError, match=r"infiniretri needs more than one pass over the prompt; use decode\.prefill"):
        decoder.prefill(CFG, params, tokens, Recipe(prompt=InfiniRetri(capacity=12, question=3)), new=0)
