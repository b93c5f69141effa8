"""SpecPC: scores and picks by hand, by numpy and as the official code has them; the cascade with SpecKV; what a draft sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill, prefill_lookahead
from jaxtok.decode.lookahead import look_ahead
from jaxtok.methods import SpecKV, SpecPC
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, N, near, world

DRAFT = dataclasses.replace(CFG, layers=1)


def small(capacity):
    return SpecPC(capacity=capacity, window=2, look=1, pool=2, first=0)


def reference(score, capacity, window, neighbours):
    """Kept tokens by the card: a list of candidates, first come first in, the window before all."""
    n = len(score)
    best = sorted(range(n), key=lambda j: (-score[j], j))[: min(capacity, n)]
    offsets, k = [0], neighbours
    for o in range(1, k + 1):
        offsets += [x for x in (-o, o) if -((k - 1) // 2) <= x <= k - 1 - (k - 1) // 2]
    found = list(range(max(n - window, 0), n))
    for j in best:
        found += [min(max(j + o, 0), n - 1) for o in offsets]
    return sorted(list(dict.fromkeys(found))[: min(capacity, n)])


def plan(method, score, lengths=None):
    """Kept rows of a batch, counted from each one's own first token."""
    n = score.shape[1]
    lengths = [n] * len(score) if lengths is None else lengths
    live = np.arange(n)[None] >= n - np.asarray(lengths)[:, None]
    index = np.asarray(jax.jit(method.plan)(jnp.asarray(score, jnp.float32), jnp.asarray(live)).index)
    return [[int(i) - (n - length) for i in row if i >= 0] for row, length in zip(index, lengths, strict=True)]


def test_by_hand():
    """Best token 4, then 1: with three neighbours 4, 3, 5, then 1, 0, 2; the window 8, 9 before all. An even k reaches one further right."""
    score = np.array([[0.0, 0.8, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.1]])
    make = lambda capacity, k: SpecPC(capacity=capacity, window=2, neighbours=k, pool=1)
    assert plan(make(7, 3), score) == [[0, 1, 3, 4, 5, 8, 9]]
    assert plan(make(6, 3), score) == [[1, 3, 4, 5, 8, 9]]
    assert plan(make(4, 2), score) == [[4, 5, 8, 9]]
    method = SpecPC(capacity=5, window=3, look=1, pool=3, first=1)
    rows = np.zeros((2, 1, 2, 4, 5), np.float32)  # layers, batch, heads, three of the prompt and one ahead, tokens
    rows[0] = 0.9  # a layer before `first`
    rows[1, 0, 0, 0, 0], rows[1, 0, 0, 1, 1], rows[1, 0, 1, 2, 2], rows[1, 0, 1, 3, 4] = 0.7, 0.6, 0.2, 0.4  # u = 0, 0.5, 1, 1
    both = lambda method: jax.jit(lambda rows: (found := method.score(tuple(rows)), method.pooled(found)))(jnp.asarray(rows))
    score, pooled = both(method)
    np.testing.assert_allclose(score, [[0.0, 0.3, 0.2, 0.0, 0.4]], atol=1e-6)
    np.testing.assert_allclose(pooled, [[0.3, 0.3, 0.3, 0.4, 0.4]], atol=1e-6)
    score, pooled = both(dataclasses.replace(method, over="mean", kind="avg", pool=2, ramp=False))
    np.testing.assert_allclose(score, [[0.7, 0.6, 0.2, 0.0, 0.4]], atol=1e-6)
    np.testing.assert_allclose(pooled, [[0.65, 0.4, 0.1, 0.2, 0.2]], atol=1e-6)  # j and j + 1


def test_reference_and_the_cards_checks():
    """The last window stays, the output ascends and has exactly C tokens; neighbours=0 and pool=1: top C and the window; ragged rows."""
    rng = np.random.default_rng(0)
    for n, capacity, window, k in ((20, 7, 3, 4), (20, 12, 1, 0), (9, 12, 2, 3)):
        score, lengths = rng.random((3, n)), [n, max(n - 4, 1), max(n // 2, 1)]
        kept = plan(SpecPC(capacity=capacity, window=min(window, capacity), neighbours=k, pool=1), score, lengths)
        for row, length, mine in zip(score, lengths, kept, strict=True):
            assert mine == reference(row[n - length :], capacity, window, k), (n, capacity, window, k, length)
            assert len(mine) == min(capacity, length) and (np.diff(mine) > 0).all()
            assert set(range(max(length - window, 0), length)) <= set(mine)
            if k == 0:
                rest = [j for j in np.argsort(-row[n - length :], kind="stable") if j < length - window]
                assert set(mine) == set(range(max(length - window, 0), length)) | set(rest[: min(capacity, length) - window])


@pytest.mark.parametrize("v", range(4))
def test_official_outputs(data, v):
    """The authors' attention of each key from the rows of all layers, their pooled scores, and the tokens they select."""
    z = np.load(data / "golden" / "specpc.npz")
    get = lambda name: z[f"c0_v{v}_{name}"]
    none = lambda x: None if int(x) < 0 else int(x)
    window, look, layers = int(get("window_size")), int(get("lookahead")), int(get("num_layers"))
    pool = str(get("pool"))
    method = SpecPC(
        capacity=int(get("max_capacity_prompt")),
        window=window,
        look=look,
        pool=1 if pool == "None" else int(get("kernel_size")),
        neighbours=none(get("neighbor_tokens")),
        first=int(get("starting_layer_index")),
        ramp=bool(get("weighted_query")),
        over=str(get("reduction")),
        kind="avg" if pool == "avg" else "max",
    )
    seen = []
    for i in range(layers):
        q, k = z[f"c0_l{i}_q"].astype(np.float64), z[f"c0_l{i}_k"].astype(np.float64)
        n = k.shape[2]
        logits = q[:, :, -window:] @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(2, 3) / q.shape[-1] ** 0.5
        logits = np.where(np.arange(n)[None] <= np.arange(n - window, n)[:, None], logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        ahead = [z[f"c0_v{v}_t{t}_l{i}_gen_attn"][..., :n] for t in range(look)]
        seen.append(jnp.asarray(np.concatenate([p / p.sum(-1, keepdims=True), *ahead], 2), jnp.float32))
    score = method.score(tuple(seen))
    np.testing.assert_allclose(score, get("attn_per_key"), rtol=1e-5)
    pooled = method.pooled(score)
    np.testing.assert_allclose(pooled, get("scores"), rtol=1e-5)
    mine, official = plan(method, np.asarray(pooled))[0], get("selected")[0].tolist()
    assert len(mine) == method.capacity and set(range(n - window, n)) <= set(mine)
    if get("gap")[0] > 1e-6:
        assert mine == official
    else:  # plateaus of the max pool: which of equal tokens comes first is not said
        ours, theirs = (np.sort(np.asarray(pooled)[0, x]) for x in (mine, official))
        assert len(set(mine) & set(official)) >= 0.7 * len(mine) and abs(ours.sum() - theirs.sum()) < 0.1 * theirs.sum()


@pytest.fixture(scope="module")
def models():
    params, ids, _ = world()
    return params, blocks.init(DRAFT, jax.random.key(5), jnp.float32, embed_std=1.0), ids, jnp.asarray(LIVE)


LOOK = 3


@pytest.fixture(scope="module")
def ahead(models):
    _, small_params, ids, live = models
    return jax.jit(lambda: look_ahead(DRAFT, small_params, ids, live, look=LOOK))()


def test_through_a_draft(models, ahead):
    """The draft's rows and those of its own greedy tokens decide; the model prefills what is left, as if there were no more."""
    params, small_params, ids, live = models
    method = SpecPC(capacity=7, window=2, look=LOOK, pool=1, neighbours=2, first=0)
    tokens, layers = jax.jit(lambda: prefill(CFG, params, ids, live, Recipe(prompt=method), new=3, draft=(DRAFT, small_params)))()

    def padded(size, fn):
        fn = jax.jit(fn)
        return lambda text: np.asarray(
            fn(jnp.asarray([[0] * (size - len(text)) + [int(t) for t in text]]), jnp.arange(size)[None] >= size - len(text))
        )[0]

    rows_of = padded(N + LOOK, lambda i, l: decoder.last_rows(DRAFT, small_params, decoder.embed(DRAFT, small_params, i, l), 2 + LOOK))
    last_of = padded(7, lambda i, l: decoder.prefill(CFG, params, decoder.embed(CFG, params, i, l), new=0)[0].x[:, -1])
    for b, length in enumerate(LENGTHS.tolist()):
        text = np.asarray(ids)[b, N - length :]
        rows = rows_of([*text, *np.asarray(ahead)[b]])[..., N - length : N]  # of the whole at once: each sees what stands before it
        want = reference((rows * np.array([0, 1, 1, 1, 1])[None, :, None]).max((0, 1)), 7, 2, 2)
        source = np.asarray(tokens.source)[b, N - length :]
        assert np.flatnonzero(source >= 0).tolist() == want
        assert source[want].tolist() == list(range(7 - len(want), 7))  # rows of the short prompt
        np.testing.assert_allclose(tokens.x[b, -1], last_of(text[want]), atol=1e-5)
        assert int(layers[0][0].kv.seen[b]) == len(want) and layers[0][0].kv.k.shape[2] == 7 + 3


def test_the_cascade(models, ahead):
    """SpecKV-PC: the draft's continuation of the whole prompt serves both; equal to the two steps by themselves."""
    params, small_params, ids, live = models
    recipe = Recipe(prompt=SpecPC(capacity=8, window=2, look=LOOK, pool=2, first=0), cache=SpecKV(capacity=5, window=2, look=LOOK, pool=1))
    draft = (DRAFT, small_params)
    assert recipe.look == LOOK and recipe.passes == ("specpc", "decode.prefill") and recipe.drafts == "specpc"
    tokens, layers = jax.jit(lambda: prefill(CFG, params, ids, live, recipe, new=4, draft=draft))()
    first, _ = jax.jit(lambda: prefill(CFG, params, ids, live, recipe.replace(cache=None), new=0, draft=draft))()
    kept = np.asarray(first.source) >= 0
    short = np.zeros((4, 8), np.int32)
    there = np.zeros((4, 8), bool)
    for b in range(4):
        mine = np.asarray(ids)[b, kept[b]]
        short[b, 8 - len(mine) :], there[b, 8 - len(mine) :] = mine, True
    options = dict(look=LOOK, new=4, ahead=ahead)
    want = jax.jit(
        lambda: prefill_lookahead(CFG, params, jnp.asarray(short), jnp.asarray(there), recipe.replace(prompt=None), draft, **options)
    )()
    for (a,), (b,) in zip(layers, want.layers, strict=True):
        np.testing.assert_array_equal(a.kv.pos, b.kv.pos)
        near(a.kv.k, b.kv.k, 1e-5, "keys")
    near(tokens.x[:, -1], want.tokens.x[:, -1], 1e-5, "the last row")


def test_layers_of_a_draft():
    rows = lambda layers: tuple(jnp.full((1, 1, 3, 6), i + 1.0) for i in range(layers))
    score = lambda layers, **options: float(
        SpecPC(capacity=9, window=2, look=1, pool=1, over="mean", ramp=False, **options).score(rows(layers))[0, 0]
    )
    assert score(4) == 3 * (3 + 4) and score(1) == 3  # half of four layers; of one, all
    assert score(17) == 3 * sum(range(9, 18)) and score(4, first=3) == 3 * 4
    with pytest.raises(ValueError, match="specpc reads the draft's layers from 8 on; this draft has 3: give first=1"):
        score(3, first=8)


def test_refused(models):
    params, _, ids, live = models
    with pytest.raises(ValueError, match="specpc needs a draft model with the same token ids"):
        prefill(CFG, params, ids, live, Recipe(prompt=small(6)), new=1)
    for options, message in (
        ({"capacity": 8}, "capacity=8 has no room for the 64 protected rows"),
        ({"window": 0}, "window must be >= 1"),
        ({"look": -1}, "look must be >= 0"),
        ({"pool": 0}, "pool must be >= 1"),
        ({"neighbours": -1}, "neighbours must be >= 0"),
        ({"over": "sum"}, "over must be one of max, mean"),
    ):
        with pytest.raises(ValueError, match=message):
            SpecPC(**{"capacity": 128} | options)
