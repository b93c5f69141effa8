"""KeyRerotation: ids by hand, the identity, and a model that was only given the tokens that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.rotary import turn
from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import AdaKV, KeyDiff, KeyRerotation, KNorm, StreamingLLM
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from tests.methods.wrap.given import NOTHING, Given, cache, kept, run

small = {
    "key_rerotation": lambda capacity: KeyRerotation(base=KeyDiff(capacity=capacity, protect=Protect(recent=2))),
    "key_rerotation-ada_kv": lambda capacity: KeyRerotation(base=AdaKV(base=KNorm(capacity=capacity))),
}
CFG = Config(vocab=23, width=16, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=24, rope_theta=100.0)
FREQS = np.array([1.0, 0.1], np.float32)


def rotated(scores, lengths=None, dtype=jnp.float32):
    """A cache whose keys are rotated at their positions, and the evidence with the unrotated ones."""
    kv = cache(scores, lengths, dtype)
    return kv._replace(k=turn(kv.k, jnp.maximum(kv.pos, 0), jnp.asarray(FREQS))), Evidence(keys=kv.k, freqs=jnp.asarray(FREQS))


def reference(raw, ids):
    """float64 rotation of one key [4] at an id, pairs (0, 2) and (1, 3)."""
    z = (raw[:2] + 1j * raw[2:]) * np.exp(1j * ids * FREQS.astype(np.float64))
    return np.concatenate([z.real, z.imag])


def test_keys_stand_at_their_rank_aligned_at_the_end():
    rng = np.random.default_rng(0)
    scores = np.array([[[9, 1, 8, 2, 7, 3], [1, 2, 3, 4, 5, 6]], [[0, 0, 5, 6, 1, 2], [0, 0, 1, 2, 3, 4]]]) + 0.1 * rng.random((2, 2, 6))
    kv, seen = rotated(scores, [6, 4])
    budgets = jnp.array([[3, 1], [2, 2]], jnp.int32)
    plain, out = run((Given(capacity=4), kv, budgets, seen), (KeyRerotation(base=Given(capacity=4)), kv, budgets, seen))
    assert kept(out) == kept(plain) == [[[0, 2, 4], [5]], [[0, 1], [2, 3]]], "who stays is the base's choice, and order is untouched"
    # 3 and 1 live keys: ids 0 1 2 and 2, so that both heads put the next token at 3
    for b, g, pairs in ((0, 0, [(0, 0), (2, 1), (4, 2)]), (0, 1, [(5, 2)]), (1, 0, [(0, 0), (1, 1)]), (1, 1, [(2, 0), (3, 1)])):
        slots = np.flatnonzero(np.asarray(out.pos[b, g]) >= 0)
        for slot, (p, i) in zip(slots, pairs, strict=True):
            raw = np.asarray(seen.keys)[b, g, p + (0, 2)[b]].astype(np.float64)
            np.testing.assert_allclose(out.k[b, g, slot], reference(raw, i), atol=1e-5)
    assert out.delta.tolist() == [3 - 6, 2 - 4] and out.seen.tolist() == [6, 4]
    np.testing.assert_array_equal(out.v, plain.v)
    np.testing.assert_array_equal(out.pos, plain.pos)


def test_nothing_dropped_is_the_identity():
    kv, seen = rotated(np.random.default_rng(1).random((2, 2, 6)), [6, 4])
    method = KeyRerotation(base=Given(capacity=6))
    assert method.compress({}, kv, seen)[0] is kv
    (out,) = run((method, kv, jnp.array([6, 6], jnp.int32), seen))
    live = np.asarray(kv.pos)[..., None] >= 0
    np.testing.assert_allclose(np.where(live, out.k, 0), np.where(live, kv.k, 0), atol=1e-5)
    assert out.delta.tolist() == [0, 0]


def test_bf16_turns_in_float32():
    kv, seen = rotated(np.random.default_rng(2).random((1, 2, 8)), dtype=jnp.bfloat16)
    method = KeyRerotation(base=Given(capacity=3))
    wide = seen._replace(keys=seen.keys.astype(jnp.float32))
    low, high = run((method, kv, None, seen), (method, kv._replace(k=kv.k.astype(jnp.float32)), None, wide))
    assert low.k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.k, high.k.astype(jnp.bfloat16))


class Pattern(Given):
    """The same tokens in every head."""

    def score(self, params, kv, evidence):
        return jnp.sin(3.0 * kv.pos.astype(jnp.float32))


def test_the_next_logits_are_those_of_a_model_that_read_only_what_stays():
    """One layer: a token's key and value depend on the token alone, so a cache of compact positions is a shorter prompt."""
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    ids = np.random.default_rng(3).integers(0, CFG.vocab, (2, 9)).astype(np.int32)
    live = np.arange(9)[None] >= np.array([0, 3])[:, None]
    recipe = Recipe(cache=KeyRerotation(base=Pattern(capacity=4)))
    places = [sorted(sorted(range(n), key=lambda p: -np.sin(3.0 * p))[:4]) for n in (9, 6)]
    fewer = np.stack([ids[0][places[0]], ids[1][3:][places[1]]])

    @jax.jit
    def both(params, ids, live, fewer):
        x, more = blocks.embed(CFG, params, jnp.array([[5, 8], [7, 1]], jnp.int32)), jnp.ones((2, 2), bool)
        out = []
        for rows, alive, how in ((ids, live, recipe), (fewer, None, Recipe())):
            _, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, rows, alive), how, new=2)
            y, layers = decoder.step(CFG, params, x, more, layers, how)
            out.append((layers[0][0].kv, decoder.logits(CFG, params, y)))
        return out

    (kv, logits), (short, expected) = both(params, jnp.asarray(ids), jnp.asarray(live), jnp.asarray(fewer))
    assert kept(kv) == [[places[0] + [9, 10]] * 2, [places[1] + [6, 7]] * 2]
    np.testing.assert_allclose(kv.k, short.k, atol=1e-5)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert (kv.delta + kv.seen).tolist() == [6, 6]


def test_refused():
    kv, seen = rotated(np.ones((1, 1, 4)))
    method = KeyRerotation(base=Given(capacity=2))
    for less in (NOTHING, seen._replace(freqs=None)):
        with pytest.raises(ValueError, match="keys before the rotary embedding"):
            method.compress({}, kv, less)
    with pytest.raises(ValueError, match="key_rerotation turns keys and streaming_llm takes a plan"):
        Recipe(cache=method, policy=StreamingLLM(capacity=4, sinks=1, compact=False)).validate(CFG)
    assert method.needs.keys and method.rotates and method.slots == method.capacity == 2
    assert method.resize(3).layer(0, 2) == KeyRerotation(base=Given(capacity=3))
