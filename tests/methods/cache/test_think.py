"""ThinK: channels by hand and by numpy, gathered equals zeroed through the decoder, what is saved, beside compressors of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, live_count
from jaxtok.methods import H2O, Chain, KeyDiff, KeyRerotation, PerLayer, SnapKV, ThinK
from jaxtok.models import blocks, decoder
from jaxtok.models.decoder import PLAIN
from jaxtok.testing.world import CFG, LENGTHS, N, near, tokens_of, world
from tests.methods import toys

thin = lambda capacity, **options: ThinK(ratio=1.0 if capacity > N else 0.5, window=3, **options)
small = {"think": lambda capacity: thin(capacity, recent=2), "think-kvpress": lambda capacity: thin(capacity, variant="kvpress")}
STEPS = 4


@functools.cache
def program(method):
    return jax.jit(lambda kv, queries: method.freeze({}, kv, Evidence(turned=queries)))


def reference(q, kv, window, r):
    """Channels of each (sequence, head), the card's score in numpy; of equal ones the lower."""
    q, k, (b, h), g = np.asarray(q, np.float64), np.asarray(kv.k, np.float64), q.shape[:2], kv.k.shape[1]
    out = np.zeros((b, g, r), int)
    for i in range(b):
        n, live = k.shape[2], int(kv.seen[i])
        for e in range(g):
            group = [q[i, j, max(n - window, n - live) :] for j in range(e * (h // g), (e + 1) * (h // g))]
            score = np.mean([(x**2).mean(0) for x in group], 0) * (k[i, e, n - live :] ** 2).mean(0)
            out[i, e] = sorted(sorted(range(len(score)), key=lambda c: (-score[c], c))[:r])
    return out


def test_by_hand():
    """Queries (1 2 0 3), keys' squares (9 1 9 1): channel scores 9, 4, 0, 9; two of four channels stay."""
    q = jnp.asarray([[[[1.0, 2, 0, 3]]]])
    kv = toys.cache(np.array([[3.0, 1, 3, -1], [-3, 1, 3, 1], [3, -1, 3, 1]])[None, None], np.arange(12.0).reshape(1, 1, 3, 4))
    new, old = program(ThinK(ratio=0.5, window=1, recent=1))(kv, q)
    assert old.channels.tolist() == [[[0, 3]]] and old.kv.k[0, 0].tolist() == [[3, -1], [-3, 1]] and old.kv.pos.tolist() == [[[0, 1]]]
    np.testing.assert_array_equal(old.kv.v, kv.v[:, :, :2])
    np.testing.assert_array_equal(new.k, kv.k[:, :, 2:])
    none, all_ = program(ThinK(ratio=0.25, window=1, variant="kvpress"))(kv, q)
    assert none.k.shape[2] == 0 and all_.kv.k[0, 0].tolist() == [[3], [-3], [3]], "of equal channels the lower"


@pytest.mark.parametrize("window, ratio, recent", [(4, 0.5, 5), (20, 0.3, 0), (1, 0.9, 3)])
def test_equals_numpy(window, ratio, recent):
    q, kv = toys.problem(2, junk=1e4)
    dead = (np.asarray(kv.pos)[:, :1] < 0)[..., None]
    seen = jnp.asarray(np.where(dead, 0.0, q)[:, :, -window:])
    new, old = program(ThinK(ratio=ratio, window=window, recent=recent))(kv, seen)
    r = int(ratio * 8 + 0.5)
    want = reference(q, kv, window, r)
    np.testing.assert_array_equal(old.channels, want)
    assert old.kv.k.shape == (2, 2, 24 - recent, r) and new.k.shape == (2, 2, recent, 8)
    for b, live in enumerate(toys.LIVE):
        for g in range(2):
            assert old.kv.pos[b, g].tolist() == [-1] * (24 - live) + list(range(live - recent))
            keys = np.asarray(kv.k)[b, g, 24 - live : 24 - recent][:, want[b, g]]
            np.testing.assert_array_equal(np.asarray(old.kv.k)[b, g, 24 - live :], keys)


def test_rows_of_fewer_tokens_than_stay_whole():
    q, kv = toys.problem(3, live=(24, 3))
    new, old = program(ThinK(ratio=0.5, window=4, recent=6))(kv, jnp.asarray(q[:, :, -4:]))
    assert live_count(new.pos).tolist() == [[6, 6], [3, 3]] and live_count(old.kv.pos).tolist() == [[18, 18], [0, 0]]
    assert ThinK(ratio=0.5, recent=24).freeze({}, kv, Evidence())[1] is None and ThinK(ratio=1.0).freeze({}, kv, Evidence())[0] is kv


# --- in the decoder -----------------------------------------------------------------------------------------------------


def forced(params, layers, force, recipe=PLAIN):
    def one(layers, ids):
        x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, ids[:, None]), jnp.ones(ids.shape, bool)[:, None], layers, recipe)
        return layers, decoder.logits(CFG, params, x)[:, 0]

    return jax.lax.scan(one, layers, force[:, :STEPS].T)[1]


@functools.cache
def run(method, edit=False):
    """(layers after the prefill, logits of forced steps); `edit`: the plain caches with what the method drops set to zero instead."""
    params, ids, force = world()

    def go(tokens, force):
        layers = decoder.prefill(CFG, params, tokens, Recipe(cache=method), new=STEPS)[1]
        out = layers if not edit else tuple(map(zeroed, layers, decoder.prefill(CFG, params, tokens, new=STEPS)[1]))
        return layers, forced(params, out, force)

    return jax.device_get(jax.jit(go)(tokens_of(params, ids), force))


def zeroed(parts, plain):
    """The whole cache with the dropped channels of the frozen tokens at 0."""
    old, kv = parts[0].frozen, plain[0].kv
    keep = jnp.any(old.channels[..., None] == jnp.arange(CFG.head_dim)[None, None, None], 2)  # [b g d]
    frozen = jnp.any((kv.pos[..., None] == old.kv.pos[:, :, None]) & (kv.pos >= 0)[..., None], -1)
    return (plain[0]._replace(kv=kv._replace(k=jnp.where(frozen[..., None] & ~keep[:, :, None], 0.0, kv.k))),)


@pytest.mark.parametrize("make", small.values(), ids=small)
def test_gathered_channels_are_zeroed_channels(make):
    near(run(make(4))[1], run(make(4), edit=True)[1], 2e-5, "logits of steps")
    assert np.abs(run(make(4))[1] - run(ThinK(ratio=1.0))[1]).max() > 1e-2, "nothing was dropped"


def test_dropping_channels_that_are_zero_is_exact():
    """The card's check: channels 1 and 3, with their rotary partners 5 and 7, are zero in all keys."""
    params, ids, force = world()
    mute = jnp.asarray([1.0, 0, 1, 0] * 2 * CFG.kv_heads)
    params = params | {"layers": tuple(p | {"k": p["k"] * mute[None]} for p in params["layers"])}

    @jax.jit
    def both(tokens, force):
        of = lambda recipe: forced(params, decoder.prefill(CFG, params, tokens, recipe, new=STEPS)[1], force)
        return of(Recipe()), of(Recipe(cache=ThinK(ratio=0.5, window=3, recent=2)))

    near(*both(tokens_of(params, ids), force), 2e-5, "logits of steps")


def test_what_is_saved_is_really_gone():
    layers, plain = run(thin(4, recent=2))[0], run(ThinK(ratio=1.0))[0]
    size = lambda layers: sum(
        x.nbytes for parts in layers for x in (parts[0].kv.k, *([] if parts[0].frozen is None else [parts[0].frozen.kv.k]))
    )
    b, g, d = len(LENGTHS), CFG.kv_heads, CFG.head_dim
    assert size(plain) - size(layers) == CFG.layers * b * g * (N - 2) * (d // 2) * 4
    assert [part.pos.shape for parts in layers for part in parts] == [(b, g, N + STEPS)] * CFG.layers


def test_thins_what_a_compressor_of_tokens_keeps():
    """Chained with SnapKV, in either order: SnapKV's tokens, the budget is SnapKV's, channels of the kept keys."""
    params, ids, _ = world()
    snap, think = SnapKV(capacity=6, window=2, pool=3), ThinK(ratio=0.5, window=3, recent=2)
    chains = [Chain(methods=(snap, think)), Chain(methods=(think, snap))]
    tokens, keep = tokens_of(params, ids), {"cache": jnp.array([5, 6, 4, 6], jnp.int32)}
    run = lambda method: decoder.prefill(CFG, params, tokens, Recipe(cache=method), new=1, keep=keep)[1]
    alone, *both = jax.jit(lambda: [run(method) for method in (snap, *chains)])()
    for layers in both:
        for mine, theirs in zip(layers, alone, strict=True):
            assert mine[0].frozen.kv.k.shape[2:] == (4, 4) and mine[0].kv.k.shape[2] == 3
            live = lambda pos: [sorted(x for x in head if x >= 0) for row in pos.tolist() for head in row]
            assert live(mine[0].pos) == live(theirs[0].kv.pos)
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert chains[0].capacity == chains[0].slots == 6 and chains[0].resize(5).methods == (snap.resize(5), think)
    assert PerLayer(base=chains[0], capacities=(4, 3)).layer(1, 2) == Chain(methods=(snap.resize(3), think))


def test_thins_keys_that_were_turned():
    params, ids, _ = world()
    method = KeyRerotation(base=Chain(methods=(KeyDiff(capacity=6), ThinK(ratio=0.5, window=3, recent=2))))
    tokens = tokens_of(params, ids)
    run = lambda method: decoder.prefill(CFG, params, tokens, Recipe(cache=method), new=1)[1]
    thinned, whole = jax.jit(lambda: [run(m) for m in (method, KeyRerotation(base=KeyDiff(capacity=6)))])()
    for mine, theirs in zip(thinned, whole, strict=True):
        old = mine[0].frozen
        want = jnp.take_along_axis(theirs[0].kv.k[:, :, :4], old.channels[:, :, None], -1)
        near(jnp.where((old.kv.pos >= 0)[..., None], old.kv.k - want, 0.0), 0, 1e-6, "keys")


def test_refused():
    for match, options in {
        "ratio is the fraction kept": dict(ratio=0.0),
        "window must be >= 1": dict(window=0),
        "recent must be >= 0": dict(recent=-1),
        "variant must be one of paper, kvpress": dict(variant="official"),
    }.items():
        with pytest.raises(ValueError, match=match):
            ThinK(**options)
    with pytest.raises(ValueError, match="compressed to 2147483647 slots"):
        Recipe(cache=ThinK(), policy=H2O(capacity=9)).validate(CFG)
    with pytest.raises(ValueError, match=r"evidence\.turned is missing"):
        ThinK(recent=2).freeze({}, toys.problem()[1], Evidence())
    twice = Chain(methods=(ThinK(ratio=0.5, recent=2, window=1), ThinK(ratio=0.5, recent=1, window=1)))
    with pytest.raises(ValueError, match="think would freeze what another"):
        twice.freeze({}, toys.problem()[1], Evidence(turned=jnp.ones((2, 4, 1, 8))))
    assert ThinK().kept(128) == 77 and ThinK(variant="kvpress").kept(128) == 77 and ThinK(ratio=0.3, variant="kvpress").kept(8) == 3
