"""prefill and step against the parallel pass, and every way in which state goes in and out."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import CachePolicy, CacheScorer, Held
from jaxtok.core.reader import Reader
from jaxtok.core.recipe import Recipe
from jaxtok.core.reducer import Reducer
from jaxtok.core.rotary import turn
from jaxtok.core.select import choose, pack
from jaxtok.core.types import KeyIndex, Needs
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.ops import cache

CFG = Config(vocab=40, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=32)
N, TOTAL = 12, 20
LENGTHS = np.array([12, 7, 9])
LIVE = np.arange(TOTAL)[None] >= (N - LENGTHS)[:, None]
PLAIN = Recipe()
frozen = dataclasses.dataclass(frozen=True, kw_only=True)


@pytest.fixture(scope="module")
def world():
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    ids = jax.random.randint(jax.random.key(1), (3, TOTAL), 0, CFG.vocab)
    return params, ids, jax.jit(lambda p: blocks.forward(CFG, p, ids, jnp.asarray(LIVE)))(params)


def prompt(world, n=N):
    params, ids, _ = world
    return decoder.embed(CFG, params, ids[:, :n], jnp.asarray(LIVE[:, :n]))


@functools.cache
def fill(recipe, new):
    """The jitted prefill of a recipe."""
    return jax.jit(lambda params, tokens, keep=None: decoder.prefill(CFG, params, tokens, recipe, new=new, keep=keep))


@functools.cache
def stepper(recipe):
    """The jitted step of a recipe on ids."""

    def step(params, ids, layers, live=None):
        live = jnp.ones(ids.shape, bool) if live is None else live
        x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, ids), live, layers, recipe)
        return decoder.logits(CFG, params, x), layers

    return jax.jit(step)


def far(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_cached_decode_equals_transformers(golden):
    """Every family; left and right padding; prefill, then one row at a time, against the logits of the whole sequence."""
    case, n = golden, golden.ids.shape[1]
    live, ids = jnp.asarray(case.live), jnp.asarray(case.ids)
    order = np.argsort(case.live, axis=1, kind="stable")  # right padding to the left: decoding appends behind the last token
    ids, live = jnp.asarray(np.take_along_axis(case.ids, order, 1)), jnp.asarray(np.take_along_axis(case.live, order, 1))
    want = np.take_along_axis(case.logits, order[..., None], 1)
    half = n - 6

    @jax.jit
    def run(params):
        tokens, layers = decoder.prefill(case.cfg, params, decoder.embed(case.cfg, params, ids[:, :half], live[:, :half]), new=6)
        whole, _ = decoder.prefill(case.cfg, params, decoder.embed(case.cfg, params, jnp.asarray(case.ids), jnp.asarray(case.live)), new=0)

        def one(layers, row):
            x, layers = decoder.step(case.cfg, params, blocks.embed(case.cfg, params, row[0][:, None]), row[1][:, None], layers)
            return layers, decoder.logits(case.cfg, params, x)[:, 0]

        _, rows = jax.lax.scan(one, layers, (ids[:, half:].T, live[:, half:].T))
        return decoder.logits(case.cfg, params, tokens.x), jnp.swapaxes(rows, 0, 1), decoder.logits(case.cfg, params, whole.x)

    first, rows, whole = run(case.params)
    got = np.concatenate([first, rows], 1)
    assert np.abs(np.where(np.asarray(live)[..., None], got - want, 0)).max() <= 1e-4
    assert np.abs(np.where(np.asarray(live)[..., None], whole - want, 0)).max() <= 1e-4


def test_steps_continue_the_prompt(world):
    params, ids, want = world
    tokens, layers = jax.jit(lambda p, t: decoder.prefill(CFG, p, t, new=8))(params, prompt(world))
    assert far(decoder.logits(CFG, params, tokens.x)[:, -1], want[:, N - 1]) < 1e-5
    for i in range(N, 16):
        got, layers = stepper(PLAIN)(params, ids[:, i : i + 1], layers)
        assert far(got[:, 0], want[:, i]) < 1e-5
    got, layers = stepper(PLAIN)(params, ids[:, 16:], layers)  # several rows at once
    assert far(got, want[:, 16:]) < 1e-5
    kv = layers[0][0].kv
    assert int(kv.cursor) == TOTAL and kv.seen.tolist() == (LENGTHS + 8).tolist() and not kv.lost.any()


def test_a_full_cache_counts_what_it_loses_and_keeps_what_it_has(world):
    params, ids, _ = world
    _, layers = fill(PLAIN, 2)(params, prompt(world))
    before = layers[1][0].kv
    _, layers = stepper(PLAIN)(params, ids[:, 12:13], layers)
    _, layers = stepper(PLAIN)(params, ids[:, 13:16], layers)
    kv = layers[1][0].kv
    assert kv.lost.tolist() == [[2, 2]] * 3 and int(kv.cursor) == N + 2
    assert np.array_equal(kv.k[:, :, :N], before.k[:, :, :N]), "old slots were overwritten"
    assert kv.pos[0, 0, -2:].tolist() == [12, 13] and kv.seen.tolist() == (LENGTHS + 4).tolist()
    _, layers = stepper(PLAIN)(params, ids[:, 16:17], layers)
    assert layers[1][0].kv.lost.tolist() == [[3, 3]] * 3 and np.array_equal(layers[1][0].kv.pos, kv.pos)


def test_rows_that_are_not_live_leave_no_trace(world):
    params, ids, _ = world
    _, layers = fill(PLAIN, 8)(params, prompt(world))
    _, a = stepper(PLAIN)(params, ids[:, 12:13], layers, jnp.array([[True], [False], [True]]))
    assert a[0][0].kv.seen.tolist() == (LENGTHS + np.array([1, 0, 1])).tolist() and a[0][0].kv.pos[1, 0, N] == -1
    got, _ = stepper(PLAIN)(params, ids[:, 12:13], a)
    want, _ = stepper(PLAIN)(params, ids[:, 12:13], layers)
    assert far(got[1], want[1]) < 1e-5


def test_prefill_goes_on_where_the_caches_are(world):
    params, ids, want = world
    _, layers = fill(PLAIN, 0)(params, prompt(world, 8))
    rest = decoder.embed(CFG, params, ids[:, 8:16], jnp.asarray(LIVE[:, 8:16]))
    tokens, layers = jax.jit(lambda p, t, layers: decoder.prefill(CFG, p, t, new=4, layers=layers))(params, rest, layers)
    ok = np.asarray(rest.pos >= 0)[..., None]
    assert far(np.where(ok, decoder.logits(CFG, params, tokens.x), 0), np.where(ok, want[:, 8:16], 0)) < 1e-5
    got, _ = stepper(PLAIN)(params, ids[:, 16:17], layers)
    assert far(got[:, 0], want[:, 16]) < 1e-5


def test_caches_are_donated(world):
    params, ids, _ = world
    _, layers = fill(PLAIN, 8)(params, prompt(world))
    step = jax.jit(lambda params, x, layers: decoder.step(CFG, params, x, jnp.ones(x.shape[:2], bool), layers)[1], donate_argnums=2)
    x = blocks.embed(CFG, params, ids[:, :1])
    held = step.lower(params, x, layers).compile().memory_analysis()
    size = sum(a.nbytes for a in jax.tree.leaves(layers))
    assert held.alias_size_in_bytes >= 0.95 * size


def test_one_compile_for_lengths_and_steps(world):
    params, ids, _ = world
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(lambda p, ids, live: decoder.prefill(CFG, p, decoder.embed(CFG, p, ids, live), new=4), n=1))
    step = jax.jit(chex.assert_max_traces(lambda p, x, layers: decoder.step(CFG, p, x, jnp.ones(x.shape[:2], bool), layers), n=1))
    for lengths in ([12, 7, 9], [3, 12, 1], [5, 5, 5]):
        live = jnp.arange(N)[None] >= N - jnp.asarray(lengths)[:, None]
        _, layers = run(params, ids[:, :N], live)
        for i in range(4):
            _, layers = step(params, blocks.embed(CFG, params, ids[:, i : i + 1]), layers)
        assert layers[0][0].kv.seen.tolist() == [n + 4 for n in lengths]


def test_temp_memory_grows_linearly():
    """A prefill that returns last-row logits only: compiled temp memory at 32k over that at 8k."""
    cfg = dataclasses.replace(CFG, layers=2)
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))

    def last(params, ids):
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), new=0)
        return decoder.logits(cfg, params, tokens.x[:, -1:]), layers

    def temp(n):
        return jax.jit(last).lower(params, jax.ShapeDtypeStruct((1, n), jnp.int32)).compile().memory_analysis().temp_size_in_bytes

    ratio = temp(32768) / temp(8192)
    assert ratio <= 4.4, f"temp memory grows {ratio:.2f} times from 8k to 32k"


# --- sites -------------------------------------------------------------------------------------------------------------


@frozen
class Drop(Reducer):
    """Site 3: keep the rows that the last row attends to most."""

    keep: int
    positions: str = "keep"
    own: bool = False
    name, site = "drop", "layers"

    @property
    def needs(self):
        return Needs(rows=1, own=self.own)

    def plan(self, params, state, tokens, evidence, keep=None):
        cap = min(self.keep, tokens.pos.shape[1])
        last = tokens.pos == tokens.seen[:, None] - 1
        room = (jnp.full(tokens.seen.shape, cap, jnp.int32) if keep is None else keep) - 1
        return state, pack(choose(evidence.rows[:, :, -1].mean(1), tokens.pos >= 0, room, last, most=cap), cap)


@pytest.mark.parametrize("own", [False, True])
def test_a_pruner_shortens_the_rows_that_follow(world, own):
    params, ids, want = world
    everything = Recipe(layers=((1, Drop(keep=99, own=own)),))
    tokens, _ = fill(everything, 0)(params, prompt(world))
    assert far(decoder.logits(CFG, params, tokens.x)[:, -1], want[:, N - 1]) < 1e-5
    recipe = Recipe(layers=((1, Drop(keep=5, own=own)),))
    tokens, layers = fill(recipe, 2)(params, prompt(world))
    assert [parts[0].kv.k.shape[2] for parts in layers] == [14, 7, 7] and tokens.x.shape[1] == 5
    assert tokens.seen.tolist() == LENGTHS.tolist() and (tokens.pos[:, -1] == LENGTHS - 1).all()
    kept = np.asarray(tokens.source[0])
    assert (kept >= 0).sum() == 5 and tokens.pos[0, kept[kept >= 0]].tolist() == np.flatnonzero(kept >= 0).tolist()

    got, _ = stepper(PLAIN)(params, ids[:, 12:13], layers)
    assert np.isfinite(got).all()
    fewer = fill(recipe, 2)(params, prompt(world), {"layers": (jnp.array([5, 3, 4]),)})[0]
    assert (fewer.pos >= 0).sum(1).tolist() == [5, 3, 4]


@frozen
class Pages(Reader):
    """Reads the blocks whose keys the query likes most."""

    block: int = 4
    pages: int = 99
    name, site = "pages", "reader"

    def read(self, params, layer, state, carry, q, pos, kv, see):
        b, g, s, d = kv.k.shape
        score = jnp.einsum("bgtd,bgsd->bgs", q.reshape(b, g, -1, d), kv.k) + jnp.where(kv.pos < 0, -1e9, 0.0)
        best = score.reshape(b, g, s // self.block, self.block).max(-1)
        count = min(self.pages, best.shape[-1])
        index = jnp.sort(jax.lax.top_k(best, count)[1], -1).astype(jnp.int32)
        return state, carry, KeyIndex(index)


def test_a_reader_that_reads_everything_changes_nothing(world):
    params, ids, want = world
    recipe = Recipe(reader=Pages())
    _, layers = fill(recipe, 7)(params, prompt(world))
    assert layers[0][0].kv.k.shape[2] == 20  # 19 rounded up to blocks
    for i in range(N, 15):
        got, layers = stepper(recipe)(params, ids[:, i : i + 1], layers)
        assert far(got[:, 0], want[:, i]) < 1e-5
    _, layers = fill(recipe, 7)(params, prompt(world))
    less = Recipe(reader=Pages(pages=1))
    got, _ = stepper(less)(params, ids[:, 12:13], layers)
    assert far(got[:, 0], want[:, 12]) > 1e-3


@frozen
class Loud(CachePolicy):
    """Evicts what was attended to least so far; every k steps."""

    capacity: int
    every: int = 1
    raw: bool = False
    name, site = "loud", "policy"

    @property
    def needs(self):
        return Needs(received=True)

    @property
    def step_needs(self):
        return Needs(received=True)

    def _sum(self, kv, evidence):
        b, h, s = evidence.received.shape
        return evidence.received.reshape(b, kv.k.shape[1], -1, s).sum(2)

    def start(self, params, kv, evidence):
        return Held(slots=self._sum(kv, evidence))

    def observe(self, params, state, kv, evidence):
        return Held(slots=state.slots + self._sum(kv, evidence))

    def victim(self, params, state, kv, keep):
        return kv.pos >= kv.seen[:, None, None] - 2, state.slots


@pytest.mark.parametrize("every", [1, 3])
def test_a_policy_holds_its_capacity_every_k_steps(world, every):
    params, ids, _ = world
    recipe = Recipe(policy=Loud(capacity=6, every=every))
    _, layers = fill(recipe, 8)(params, prompt(world))
    assert layers[0][0].kv.k.shape[2] == 6 + every
    counts = []
    for i in range(N, 19):
        _, layers = stepper(recipe)(params, ids[:, i : i + 1], layers)
        kv, state = layers[1][0].kv, layers[1][0].policy
        live = np.asarray(kv.pos >= 0)
        counts.append(int(live.sum(-1).max()))
        assert np.array_equal(np.asarray(state.slots) > 0, live), "the state moves with its slots"
        for row, seen in zip(kv.pos.reshape(6, -1), np.repeat(kv.seen, 2), strict=True):
            kept = row[row >= 0].tolist()
            assert len(set(kept)) == len(kept) and max(kept) == seen - 1
    assert counts == ([6] * 7 if every == 1 else [7, 8, 6, 7, 8, 6, 7])


def test_a_policy_with_a_reader_and_scattered_evidence(world):
    params, ids, _ = world
    both = Recipe(policy=Loud(capacity=6), reader=Pages(block=2))
    only = Recipe(policy=Loud(capacity=6))
    _, a = fill(both, 8)(params, prompt(world))
    _, b = fill(only, 8)(params, prompt(world))
    for i in range(N, 16):
        y, a = stepper(both)(params, ids[:, i : i + 1], a)
        z, b = stepper(only)(params, ids[:, i : i + 1], b)
        assert far(y, z) < 1e-5
    assert far(a[2][0].policy.slots[:, :, :7], b[2][0].policy.slots) < 1e-5


def test_raw_keys_are_placed_at_their_rank(world):
    """With room for everything compact positions are the absolute ones; after an eviction distances are those inside the cache."""
    params, ids, want = world
    recipe = Recipe(policy=Loud(capacity=30, raw=True))
    _, layers = fill(recipe, 8)(params, prompt(world))
    for i in range(N, 15):
        got, layers = stepper(recipe)(params, ids[:, i : i + 1], layers)
        assert far(got[:, 0], want[:, i]) < 1e-5
    q = jax.random.normal(jax.random.key(3), (3, 4, 1, 8))
    kv = layers[0][0].kv._replace(pos=jnp.where(layers[0][0].kv.pos % 3 == 0, -1, layers[0][0].kv.pos))
    freqs = jnp.asarray(blocks.frequencies(CFG, 0))
    _, keys = cache.place(q, kv, jnp.int32(0), freqs)
    pos = np.asarray(kv.pos[0, 0])
    rank = {p: r for r, p in enumerate(sorted(pos[pos >= 0].tolist()))}
    for slot in np.flatnonzero(pos >= 0):
        at = jnp.full((3, 2, 1), rank[int(pos[slot])], jnp.int32)
        assert far(keys[0, 0, slot], turn(kv.k[:, :, slot : slot + 1], at, freqs)[0, 0, 0]) < 1e-6


@frozen
class Last(CacheScorer):
    capacity: int
    name, site = "last", "cache"

    def score(self, params, kv, evidence):
        return kv.pos.astype(jnp.float32)


def test_compression_inside_the_layer_loop_lowers_memory():
    cfg = dataclasses.replace(CFG, layers=6)
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def peak(recipe):
        run = lambda p, ids: decoder.prefill(cfg, p, decoder.embed(cfg, p, ids), recipe, new=0)[1]
        m = jax.jit(run).lower(params, ids).compile().memory_analysis()
        return m.temp_size_in_bytes + m.output_size_in_bytes

    assert peak(Recipe(cache=Last(capacity=64))) < peak(Recipe()) - 3 * 2048 * 2 * 2 * 8 * 4


def test_compress_the_context_then_ask(world):
    """The question goes through a second prefill over the compressed cache, and decoding through both."""
    params, ids, _ = world
    _, layers = fill(Recipe(cache=Last(capacity=5)), 0)(params, prompt(world))
    assert layers[0][0].kv.k.shape[2] == 5
    question = decoder.embed(CFG, params, ids[:, 12:16])
    asked, layers = jax.jit(lambda p, t, layers: decoder.prefill(CFG, p, t, new=3, layers=layers))(params, question, layers)
    kv = layers[0][0].kv
    assert kv.k.shape[2] == 12 and kv.seen.tolist() == (LENGTHS + 4).tolist()
    assert sorted(p for p in kv.pos[0, 0].tolist() if p >= 0) == [7, 8, 9, 10, 11, 12, 13, 14, 15]
    # the same by single steps
    _, step_layers = fill(Recipe(cache=Last(capacity=5)), 8)(params, prompt(world))
    for i in range(12, 16):
        got, step_layers = stepper(PLAIN)(params, ids[:, i : i + 1], step_layers)
    assert far(got[:, 0], decoder.logits(CFG, params, asked.x)[:, -1]) < 1e-5


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p, t: decoder.prefill(CFG, p, t, new=-1), "new must be >= 0"),
        (lambda p, t: decoder.prefill(CFG, blocks.stack(p), t, new=1), "unstack"),
        (lambda p, t: decoder.prefill(CFG, p, t, Recipe(layers=((9, Drop(keep=2)),)), new=1), "before layer 9"),
        (lambda p, t: decoder.prefill(CFG, p, t, Recipe(policy=Loud(capacity=4), cache=Last(capacity=6)), new=1), "at least 6"),
    ],
)
def test_bad_input(world, call, match):
    with pytest.raises(ValueError, match=match):
        call(world[0], prompt(world))
