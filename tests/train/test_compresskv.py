"""CompressKV's calibrations against plain loops over the model: growing prompts, and numpy attention over what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.methods import CompressKV, KVzip
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, B, N, tokens_of, world
from jaxtok.train import compresskv as calibrate

NEW, ANSWER = 5, 4
METHOD = CompressKV(capacity=5, window=2, pool=1)


@pytest.fixture(scope="module")
def haystack():
    """(needle, scores): a needle of two tokens in each prompt, or all of it, so that some outputs hit it."""
    params, ids, _ = world()
    needle = np.zeros((B, N), bool)
    needle[:2, 6:9], needle[2] = True, True
    find = jax.jit(lambda needle: calibrate.calibrate_heads(CFG, params, ids, jnp.asarray(LIVE), needle, new=NEW))
    return needle, find(jnp.asarray(needle)), find(jnp.zeros((B, N), bool))


def test_heads_by_growing_prompts(haystack):
    """Prefill prompt and output so far; the last row's attention counts where its arg max is in the needle."""
    needle, (heads, hits), _ = haystack
    params, ids, _ = world()
    n = N + NEW

    @jax.jit
    def last(ids, live):
        tokens, _, seen = decoder.survey(CFG, params, decoder.embed(CFG, params, ids, live), Needs(rows=1))
        return decoder.logits(CFG, params, tokens.x[:, -1:])[:, 0], [part.rows[:, :, 0] for (part,) in seen]

    want, count = np.zeros((CFG.layers, CFG.heads)), np.zeros(B, int)
    for b in range(B):
        text = np.asarray(ids)[b][LIVE[b]].tolist()
        inside = needle[b] & LIVE[b]
        words, span = set(np.asarray(ids)[b][inside].tolist()), np.flatnonzero(inside[LIVE[b]])
        span = span[span < len(text) - 1]
        for _ in range(NEW):
            pad = n - len(text)
            row = jnp.asarray([[0] * pad + text], jnp.int32)
            logits, seen = last(row, jnp.arange(n)[None] >= pad)
            token = int(np.argmax(logits[0]))
            if token in words:
                count[b] += 1
                want += [np.asarray(layer)[0][:, pad + span].sum(-1) for layer in seen]
            text.append(token)
    assert count[2] >= 1 and count[3] == 0, "the needle is never hit: a weak case"
    assert hits.tolist() == count.tolist()
    np.testing.assert_allclose(heads, want, rtol=1e-4, atol=1e-6)


def test_no_needle_no_hits(haystack):
    heads, hits = haystack[2]
    assert not np.asarray(heads).any() and not np.asarray(hits).any()


def test_the_table_is_the_method_s(haystack):
    params, ids, _ = world()
    table = haystack[1].heads
    own = params | {"methods": {"cache": {"heads": table}}}
    shapes = jax.eval_shape(lambda: decoder.prefill(CFG, own, tokens_of(params, ids), Recipe(cache=METHOD), new=1)[1])
    assert shapes[0][0].kv.k.shape[2] == 6


@pytest.fixture(scope="module")
def layers():
    """e of each layer, of a compression and of none."""
    params, ids, force = world()
    own = params | {"methods": Recipe(cache=METHOD).init_params(jax.random.key(0), CFG)}
    alive = jnp.arange(ANSWER)[None] < jnp.array([4, 2, 4, 1])[:, None]

    @jax.jit
    def go(alive):
        each = lambda method: calibrate.calibrate_layers(
            CFG, own, ids, jnp.asarray(LIVE), force[:, :ANSWER], method, answer_live=alive, key=jax.random.key(4)
        )
        compressed = decoder.prefill(CFG, own, tokens_of(params, ids), Recipe(cache=METHOD), new=0)[1]
        text = jnp.concatenate([ids, force[:, :ANSWER]], 1)
        joint = decoder.embed(CFG, params, text, jnp.concatenate([jnp.asarray(LIVE), alive], 1))
        rows, _, seen = decoder.survey(CFG, params, joint, Needs(hidden=True))
        return each(METHOD), each(CompressKV(capacity=N)), compressed, [part.hidden for (part,) in seen], rows.pos

    return jax.device_get(go(alive)), np.asarray(alive)


def test_layers_by_numpy_attention(layers):
    """Rows that enter each layer of the uncompressed model; the answer's queries over all keys, and over those that stay."""
    (errors, _, compressed, hidden, pos), alive = layers
    params, _, _ = world()

    def rotated(x, p):  # half-split
        r = x.shape[-1] // 2
        angle = p[:, None] * CFG.rope_theta ** (-np.arange(r) / r)
        lo, hi = x[..., :r], x[..., r:]
        return np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)

    want = []
    for i, p in enumerate(params["layers"]):
        weights = {name: np.asarray(x, np.float64) for name, x in p.items()}
        each = []
        for b in range(B):
            at = pos[b] >= 0
            x, place = np.asarray(hidden[i][b], np.float64)[at], pos[b][at]
            y = x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps) * weights["attn_norm"]
            q, k, v = ((y @ weights[name]).reshape(len(y), -1, CFG.head_dim).swapaxes(0, 1) for name in "qkv")
            q, k = rotated(q, place), rotated(k, place)
            stay = set(compressed[i][0].kv.pos[b, 0].tolist())  # the last layer's input differs, so its choice is checked elsewhere
            out = []
            for left in (range(len(place)), [j for j in range(len(place)) if j in stay or j >= LENGTHS[b]]):
                rows = []
                for t in range(LENGTHS[b], LENGTHS[b] + alive[b].sum()):
                    see = [j for j in left if j <= t]
                    heads = []
                    for h in range(CFG.heads):
                        a = np.exp(k[h // 2][see] @ q[h, t] / CFG.head_dim**0.5)
                        heads.append(a / a.sum() @ v[h // 2][see])
                    rows.append(np.concatenate(heads) @ weights["o"])
                out.append(np.array(rows))
            each.append(np.linalg.norm(out[1] - out[0]) / (np.linalg.norm(out[0]) + 1e-5))
        want.append(np.mean(each))
    np.testing.assert_allclose(errors, want, rtol=1e-3)
    assert min(want) > 0.01


def test_a_cache_that_stays_whole_loses_nothing(layers):
    np.testing.assert_allclose(layers[0][1], 0.0, atol=1e-6)


def test_errors_are_the_method_s(layers):
    errors = tuple(layers[0][0].tolist())
    table = CompressKV(capacity=40, errors=errors).table
    assert sum(table) == 80 and (table[0] > table[1]) == (errors[0] > errors[1])


def test_refused():
    params, ids, force = world()
    heads = lambda **changes: calibrate.calibrate_heads(CFG, params, **({"ids": ids, "live": None, "needle": ids > 3, "new": 2} | changes))
    one = dict(ids=ids[:, :1], needle=ids[:, :1] > 3)
    for match, changes in {"new must be >= 1": dict(new=0), "they must be alike, two tokens or more": one}.items():
        with pytest.raises(ValueError, match=match):
            heads(**changes)
    with pytest.raises(ValueError, match=r"they must be \[b n\], \[b t\]"):
        calibrate.calibrate_layers(CFG, params, ids, None, force[:, :0], METHOD)
    with pytest.raises(ValueError, match="kvzip needs more than one pass"):
        calibrate.calibrate_layers(CFG, params, ids, None, force, KVzip(capacity=4))
