import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate, prefill, prefill_chunked, replay
from jaxtok.methods import KVzip, SentenceKV, SentenceKVCache, SnapKV
from jaxtok.methods.read.sentencekv import sentencekv
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, LIVE, world
from tests.methods import toys

small = {
    "sentencekv.cache": lambda capacity: SentenceKVCache(capacity=capacity, window=2),
    "sentencekv.reader": lambda capacity: SentenceKV(budget=capacity, start_tokens=1, recent=2, ends=(1, 2), sentences=8),
}
S, END = 40, 1


@functools.cache
def stepper(method):
    def step(state, q, pos, kv, ids):
        state, _, out, _ = method.attend({}, 0, state, None, q, pos, kv, toys.sight(q.shape[-1], ids=ids))
        return state, out[:, :, 0]

    return jax.jit(step)


@functools.cache
def chooser(method):
    return jax.jit(method.choose)


def drive(method, q, k, v, ids, prompt):
    """Values [b h d] of each step behind a prompt; q [T b h d], k, v [b g T d], ids [b T]: no padding, S slots or T."""
    room = k.shape[2]
    whole = toys.cache(k, v)
    at = np.asarray(whole.pos)
    upto = lambda n: whole._replace(pos=jnp.asarray(np.where(np.arange(room) < n, at, -1)), cursor=jnp.asarray(n, jnp.int32))
    stops = np.isin(ids[:, :prompt], method.ends)
    segment = np.full((len(ids), room), -1)
    segment[:, :prompt] = np.cumsum(stops, 1) - stops
    kv = upto(prompt)._replace(segment=jnp.asarray(np.repeat(segment[:, None], k.shape[1], 1), jnp.int32))
    state, out = toys.begin(method, 0, kv, q.shape[2]), []
    for n in range(prompt, room):
        pos = jnp.full((len(ids), 1), n, jnp.int32)
        state, y = stepper(method)(state, jnp.asarray(q[n])[:, :, None], pos, upto(n + 1), jnp.asarray(ids[:, n : n + 1], jnp.int32))
        out.append((np.asarray(y), state))
    return out, whole


def reference(q, k, ids, prompt, m, official=False):
    """The card for one sequence: for each step the slots that each query head reads (None = all). q [T h d], k [g T d], m a method."""
    total, h, g = len(ids), q.shape[1], k.shape[0]
    sentences, now = [], []
    for j in range(prompt):
        now.append(j)
        if ids[j] in m.ends or j == prompt - 1:
            sentences.append(now)
            now = []
    out = []
    for n in range(prompt, total):
        now.append(n)
        if ids[n] in m.ends:
            sentences.append(now)
            now = []
        if len(now) <= m.threshold:
            out.append(None)
            continue
        mean, count, heads = q[now].mean(0), n + 1, []
        edge = {j for j in range(count) if j < m.start_tokens or j >= count - m.recent}
        for e in range(g):
            like = [np.mean([mean[i] @ k[e, s].mean(0) for i in range(e * h // g, (e + 1) * h // g)]) for s in sentences]
            ranked = [j for s in np.argsort(-np.array(like), kind="stable") for j in sentences[s]]
            line = ranked if official else now + ranked
            line = [j for j in line if j not in edge and not (official and j == m.start_tokens)]
            heads += [edge | set(line[: m.budget - m.start_tokens - m.recent])] * (h // g)
        out.append(heads)
    return out


def stream(seed, total=S, h=4, g=2, d=8, ends=0.2):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(total, 2, h, d)).astype(np.float32)
    k, v = (rng.normal(size=(2, g, total, d)).astype(np.float32) * 2 for _ in range(2))
    return q, k, v, np.where(rng.random((2, total)) < ends, END, 9)


def check(method, q, k, v, ids, prompt, official=False):
    got, kv = drive(method, q, k, v, ids, prompt)
    sparse = 0
    for i in range(2):
        want = reference(q[:, i].astype(np.float64), k[i].astype(np.float64), ids[i], prompt, method, official)
        for t, ((out, _), sets) in enumerate(zip(got, want, strict=True)):
            n = prompt + t
            sets = [range(n + 1)] * q.shape[2] if sets is None else sets
            sparse += sets[0] != range(n + 1)
            assert all(len(a) <= max(method.budget, 0) for a in sets if not isinstance(a, range)), "never above the budget"
            one = kv._replace(**{name: getattr(kv, name)[i : i + 1] for name in ("k", "v", "pos", "bias")})
            np.testing.assert_allclose(out[i], toys.attend_to(q[n, i : i + 1], one, [sets])[0], atol=3e-5, err_msg=f"step {t}")
    assert sparse > 5
    return got


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_equals_numpy(variant):
    """h/g > 1, sequences whose sentences end at different steps."""
    method = SentenceKV(ends=(END,), budget=12, start_tokens=3, recent=4, sentences=32, variant=variant)
    got = check(method, *stream(1), 25, variant == "official")
    q, k, v, ids = stream(1)
    for i in range(2):  # mean keys of generated sentences
        state = got[-1][1]
        marks = [-1, *[j for j in range(S) if ids[i, j] == END or j == 24]]
        for s, (a, b) in enumerate(itertools.pairwise(marks)):
            np.testing.assert_allclose(state.mean[i, :, s], k[i, :, a + 1 : b + 1].mean(1), atol=1e-5)
        assert int(state.open[i]) == len(marks) - 1 and state.known[i].sum() == 2 * (len(marks) - 1)


def test_by_hand():
    """Sentences 0-1, 2-4, 5-6 of a prompt with mean keys 1, 3, 2 in one channel; q = 1, budget 4, first 1, last 1. Two tokens are
    written: the first attends to all, the second to slots 0 and 8, itself, 7 (the open sentence's other), and 2 (of the best)."""
    k = np.array([1, 1, 3, 3, 3, 2, 2, 0, 0], np.float32).reshape(1, 1, 9, 1)
    ids = np.array([[9, END, 9, 9, END, 9, END, 9, 9]])
    method = SentenceKV(ends=(END,), budget=4, start_tokens=1, recent=1, sentences=4)
    (first, second), _ = drive(method, np.ones((9, 1, 1, 1), np.float32), k, k, ids, 7)
    assert chooser(method)(second[1], jnp.asarray(9, jnp.int32)).tolist() == [[[0, 2, 7, 8]]]
    e = np.exp(k[0, 0, :, 0])
    np.testing.assert_allclose(first[0].item(), (e * k[0, 0, :, 0])[:8].sum() / e[:8].sum(), rtol=1e-5)
    at = [0, 2, 7, 8]
    np.testing.assert_allclose(second[0].item(), (e * k[0, 0, :, 0])[at].sum() / e[at].sum(), rtol=1e-5)


def test_one_sentence_a_token_is_the_top_tokens_of_the_mean_query():
    """And a mean key times the query is the mean of the sentence's logits: one reference does both."""
    q, k, v, _ = stream(2, total=24)
    ids = np.where(np.arange(24)[None] < 18, END, 9) * np.ones((2, 1), int)
    method = SentenceKV(ends=(END,), budget=9, start_tokens=2, recent=6, sentences=32)
    got, _ = drive(method, q, k, v, ids, 18)
    logit = np.einsum("bghd,bgjd->bghj", q[18:, :].mean(0).reshape(2, 2, 2, 8), k[:, :, 2:18]).mean(2)
    chosen = np.asarray(chooser(method)(got[-1][1], jnp.asarray(24, jnp.int32)))
    for i in range(2):
        for e in range(2):
            assert set(chosen[i, e].tolist()) == {0, 1, *range(18, 24), int(logit[i, e].argmax()) + 2}


def test_a_budget_that_covers_the_cache_is_full_attention():
    q, k, v, ids = stream(3, total=30)
    for method in (
        SentenceKV(ends=(END,), budget=30, start_tokens=2, recent=3),
        SentenceKV(ends=(END,), budget=29, start_tokens=2, recent=3),
    ):
        got, kv = drive(method, q, k, v, ids, 20)
        for t, (out, _) in enumerate(got[:9]):
            np.testing.assert_allclose(out, toys.attend_to(q[20 + t], kv, [[range(21 + t)] * 4] * 2), atol=3e-5)


def test_more_sentences_than_room():
    """Tokens of sentences beyond the cap come last; nothing breaks."""
    q, k, v, ids = stream(4)
    got, _ = drive(SentenceKV(ends=(END,), budget=12, start_tokens=3, recent=4, sentences=3), q, k, v, ids, 25)
    assert all(np.isfinite(out).all() for out, _ in got) and got[-1][1].known[:, :, :3].all() and got[-1][1].known.shape[-1] == 3


def test_the_cache_site_is_snapkv_with_its_numbers():
    q, kv = toys.problem(5)
    seen = toys.look(q, kv, 4)
    a, b = toys.run(SentenceKVCache(capacity=9, window=4), kv, seen), toys.run(SnapKV(capacity=9, window=4, pool=7, kind="max"), kv, seen)
    np.testing.assert_array_equal(a.pos, b.pos)


def test_through_the_model():
    """Both sites: prompt sentences reach the reader through the compression, generation passes its ids, chunks go on with sentences."""
    params, ids, force = world()
    ids = jnp.where(ids % 4 == 0, END, ids)
    recipe = sentencekv(ends=(END,), budget=5, factor=8.0, start=1, recent=2, sentences=8)
    assert recipe.cache.capacity == 40 and recipe.reader.budget == 5
    recipe = recipe.replace(cache=SentenceKVCache(capacity=8, window=2))

    @functools.partial(jax.jit, static_argnums=0)
    def run(recipe, ends):
        tokens = decoder.embed(CFG, params, ids, jnp.asarray(LIVE), recipe.reader.ends)
        tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=8)
        first = layers[0][0].reader
        return (
            tokens,
            first,
            layers[0][0].kv,
            replay(CFG, params, tokens, layers, force[:, :8], recipe),
            generate(CFG, params, tokens, layers, recipe, new=4, eos=()),
        )

    tokens, state, kv, (logits, layers), made = run(recipe, 0)
    want = np.where(
        np.asarray(kv.pos) >= 0,
        np.take_along_axis(np.asarray(tokens.segment)[:, None], np.maximum(np.asarray(kv.pos) + (12 - LIVE.sum(1))[:, None, None], 0), 2),
        -2,
    )
    np.testing.assert_array_equal(state.segment, want)
    assert kv.segment is None and np.isfinite(logits).all() and (made.ids >= 0).all()
    stops = np.asarray(force[:, :8]) == END
    np.testing.assert_array_equal(layers[1][0].reader.open - state.open, stops.sum(1))

    alone, live = Recipe(reader=recipe.reader), jnp.asarray(LIVE)
    plain, (chunks, layers) = jax.jit(
        lambda: (
            decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=0)[0].x[:, -1],
            prefill_chunked(CFG, params, ids, live, alone, chunk=4, new=3, read=True),
        )
    )()
    np.testing.assert_allclose(chunks.x[:, -1], plain, atol=3e-5)
    number = np.asarray(tokens.segment)
    for i in range(4):
        at = layers[0][0].reader.segment[i, 0]
        assert at[at >= -1].tolist() == number[i][number[i] >= 0].tolist()


def test_turns():
    """A second turn on the caches of a first that ended with a sentence is the text at once; and where the first was compressed, the sentences
    of what is left are still those of the text. `decode.prefill` says what closes a sentence."""
    params, ids, force = world()
    text = jnp.where(jnp.concatenate([ids, force[:, :6]], 1) % 4 == 0, END, jnp.concatenate([ids, force[:, :6]], 1)).at[:, 11].set(END)
    live = jnp.pad(jnp.asarray(LIVE), ((0, 0), (0, 6)), constant_values=True)
    alone = Recipe(reader=SentenceKV(ends=(END,), budget=8, start_tokens=1, recent=2, sentences=12))
    both = alone.replace(cache=SentenceKVCache(capacity=9, window=2))

    @jax.jit
    def run(text, live):
        def twice(recipe):
            _, layers = prefill(CFG, params, text[:, :12], live[:, :12], recipe, new=3)
            more = decoder.embed(CFG, params, text[:, 12:], live[:, 12:], recipe.ends)
            tokens, layers = decoder.prefill(CFG, params, more, recipe, new=6, layers=layers)
            return tokens, layers

        went = lambda tokens, layers: (layers, replay(CFG, params, tokens, layers, force[:, 6:12], alone)[0])
        return went(*prefill(CFG, params, text, live, alone, new=6)), went(*twice(alone)), twice(both)[1]

    once, turns, cut = run(text, live)
    np.testing.assert_allclose(turns[1], once[1], atol=3e-5)
    stop = np.asarray((text == END) & live)
    number = np.cumsum(stop, 1) - stop
    for layers in (once[0], turns[0], cut):
        for (part,) in layers:
            state, pos = part.reader, np.asarray(part.kv.pos)
            at = np.maximum(pos + (18 - np.asarray(live).sum(1))[:, None, None], 0)
            want = np.take_along_axis(np.repeat(number[:, None], 2, 1), at, 2)
            np.testing.assert_array_equal(np.where(pos < 0, -2, want), np.where(pos < 0, -2, state.segment))
            np.testing.assert_array_equal(state.open, number[:, -1] + 1)
    with pytest.raises(ValueError, match="has not kept the segments of these caches, made without it or within its budget"):
        wide = alone.replace(reader=SentenceKV(ends=(END,), budget=99, start_tokens=1, recent=2))
        decoder.prefill(CFG, params, decoder.embed(CFG, params, ids), wide, new=1, layers=decoder.empty(CFG, params, 4, 20, wide))


def test_refuses():
    with pytest.raises(ValueError, match="has no room for the 64 protected rows"):
        SentenceKV(budget=60)
    with pytest.raises(ValueError, match="variant must be one of"):
        SentenceKV(variant="kvpress")
    with pytest.raises(ValueError, match="closes no sentence; give the token ids that do"):
        SentenceKV()
    params, ids, _ = world()
    recipe = Recipe(cache=KVzip(capacity=8, sinks=1), reader=SentenceKV(ends=(END,)))
    with pytest.raises(ValueError, match=r"needs the segments of the prompt, which the prefill of kvzip does not keep"):
        jax.eval_shape(lambda: prefill(CFG, params, ids, None, recipe, new=1))
    with pytest.raises(ValueError, match="threshold must be >= 0"):
        SentenceKV(threshold=-1)


def test_official_outputs(data):
    """zzbright1998/SentenceKV: ten steps behind a prompt of 90 tokens, all kept; the slot after the first eight is never read."""
    z = np.load(data / "golden" / "sentencekv.npz")
    c = {key.removeprefix("c3_"): z[key] for key in z.files}
    h, d, n = (int(c[name]) for name in ("num_heads", "head_dim", "n_prefill"))
    total = n + int(c["n_decode"])
    angle = np.arange(total)[:, None] * 1e4 ** (-np.arange(d // 2) / (d // 2))
    split = lambda name: (c["hidden"][0].astype(np.float64) @ c[f"w.{name}_proj.weight"].T).reshape(total, h, d)

    def turn(x):
        lo, hi = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], -1).astype(np.float32)

    q, k, v = turn(split("q")), turn(split("k")).swapaxes(0, 1)[None], split("v").astype(np.float32).swapaxes(0, 1)[None]
    np.testing.assert_allclose(k[:, :, :n], c["cache_k"], atol=1e-4)
    method = SentenceKV(
        ends=tuple(c["punctuation_ids"].tolist()),
        budget=int(c["token_budget"]),
        start_tokens=int(c["start_budget"]),
        recent=int(c["recent_budget"]),
        threshold=int(c["length_threshold"]),
        sentences=16,
        variant="official",
    )
    got, _ = drive(method, q[:, None], k, v, c["input_ids"], n)
    for t, (out, state) in enumerate(got):
        np.testing.assert_allclose(out.reshape(1, -1) @ c["w.o_proj.weight"].T, c[f"s{t + 1}_out"][0], atol=1e-4)
        assert int(state.open[0]) == int(c[f"s{t + 1}_n_sentences"])
        if int(state.length[0]) > method.threshold:
            read = np.asarray(chooser(method)(state, jnp.asarray(n + t + 1, jnp.int32)))[0]
            assert [set(head[head >= 0].tolist()) for head in read] == [set(np.flatnonzero(a).tolist()) for a in c[f"s{t + 1}_attended"]]
    count = c["final_centroids"].shape[1]
    np.testing.assert_allclose(got[-1][1].mean[0, :, :count], c["final_centroids"], atol=1e-4)
