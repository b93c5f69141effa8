"""Decoding: whole generations in numpy, what a step is told against a prefill of the same text, schedules, merging bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Needs
from jaxtok.decode import generate, prefill_chunked
from jaxtok.methods import (
    EMS,
    AdaKV,
    CaM,
    CriticalKV,
    Decoding,
    ExpectedAttention,
    KeyDiff,
    KeyRerotation,
    KNorm,
    KVzip,
    Quest,
    SnapKV,
    StreamingLLM,
    ThinK,
    TokenSelect,
)
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, B, N, T, near, run, tokens_of, world
from tests.methods import toys

small = {
    "decoding": lambda capacity: Decoding(base=SnapKV(capacity=capacity, window=2, pool=3), interval=3),
    "decoding:keys": lambda capacity: Decoding(base=KeyDiff(capacity=capacity), interval=1),
    "decoding:moments": lambda capacity: Decoding(base=ExpectedAttention(capacity=capacity, sinks=1, future=4), interval=2, buffer=5),
}


@functools.cache
def program(method):
    def go(params, tokens, force):
        return run(Recipe(policy=method), params, tokens, force, None, jax.random.key(4))

    return jax.jit(go)


def play(method):
    """Prefill and T forced steps -> what the laws look at: `sets` bool [t l b g P] live before each step, `final` caches, ..."""
    params, ids, force = world()
    return jax.device_get(program(method)(params, tokens_of(params, ids), force))


@functools.cache
def keys():
    """Rotated keys and unrotated queries of all rows of prompt and continuation in the plain model: [l] of [b g P d] and [b h P d]."""
    params, ids, force = world()
    text, live = jnp.concatenate([ids, force], 1), np.concatenate([LIVE, np.ones((B, T), bool)], 1)

    @jax.jit
    def go():
        tokens = decoder.embed(CFG, params, text, jnp.asarray(live))
        _, layers, seen = decoder.survey(CFG, params, tokens, Needs(hidden=True, turned=N + T))
        return [(parts[0].kv.k, part.turned) for parts, (part,) in zip(layers, seen, strict=True)], tokens.pos

    return jax.device_get(go())


def test_layer_0_by_numpy():
    """The first layer's keys and queries do not depend on what was dropped: KeyDiff and SnapKV replayed there over the whole generation."""
    layers, pos = keys()
    k, q = (np.asarray(x, np.float64) for x in layers[0])

    def key_diff(b, g, live, last):
        x = {j: k[b, g, slot(b, j)] for j in live}
        unit = {j: y / np.linalg.norm(y) for j, y in x.items()}
        mean = np.mean(list(unit.values()), 0)
        return {j: -float(unit[j] @ mean) for j in live}, ()

    def snap(b, g, live, last):
        score = dict.fromkeys(live, 0.0)
        for h in (2 * g, 2 * g + 1):
            for i in (last - 1, last):
                see = [j for j in live if j <= i]
                a = np.exp([k[b, g, slot(b, j)] @ q[b, h, slot(b, i)] / CFG.head_dim**0.5 for j in see])
                for j, p in zip(see, a / a.sum(), strict=True):
                    score[j] += p
        window = (last - 1, last)
        order = sorted(live)
        inside = [0.0 if j in window else score[j] for j in order]
        pooled = [sum(inside[max(n - 1, 0) : n + 2]) / 3 for n in range(len(order))]
        return dict(zip(order, pooled, strict=True)), window

    slot = lambda b, j: int(np.flatnonzero(pos[b] == j)[0])
    for label, score, interval in (("decoding", snap, 3), ("decoding:keys", key_diff, 1)):
        got = play(small[label](6))["sets"]
        for b in (0, 2):  # prompts over the capacity
            for g in range(CFG.kv_heads):
                live = list(range(LENGTHS[b]))
                for t in range(T):
                    if t == 0 or len(live) == 6 + interval:
                        value, safe = score(b, g, live, LENGTHS[b] - 1 + t)
                        rest = sorted((j for j in live if j not in safe), key=lambda j: (-value[j], j))
                        live = sorted([*safe, *rest[: 6 - len(safe)]])
                    assert np.flatnonzero(got[t, 0, b, g]).tolist() == live, (label, b, g, t)
                    live.append(LENGTHS[b] + t)


class Curious(KNorm):
    """Key norms, and all that can be known."""

    @property
    def needs(self):
        return Needs(rows=3, received=True, peak=True, queries=1, turned=2)


def test_what_a_step_is_told():
    """Nothing was dropped so far: rows, sums, peaks and moments of the last queries are those of a prefill of the whole text, and where
    there were fewer queries than the buffer holds, of those that there were."""
    params, ids, force = world()
    w, steps = 9, 4
    policy = Decoding(base=Curious(capacity=N), interval=steps + 1, buffer=w)
    whole = np.concatenate([LIVE, np.ones((B, steps), bool)], 1)

    def through(tokens):
        _, layers = decoder.prefill(CFG, params, tokens, Recipe(policy=policy), new=0)
        for t in range(steps):
            x = blocks.embed(CFG, params, force[:, t : t + 1])
            _, layers = decoder.step(CFG, params, x, jnp.ones((B, 1), bool), layers, Recipe(policy=policy))
        part = layers[0][0]
        freqs = jnp.asarray(blocks.frequencies(CFG, 0))
        return decoder.cached._recalled(CFG, 0, part.kv, Evidence(freqs=freqs), policy.recall({}, part.policy), "auto"), part.kv.pos

    def at_once():
        text = decoder.embed(CFG, params, jnp.concatenate([ids, force[:, :steps]], 1), jnp.asarray(whole))
        _, layers, seen = decoder.survey(CFG, params, text, Needs(rows=w, turned=w))
        return seen[0][0], layers[0][0].kv.pos

    (got, slots), (want, places) = jax.jit(lambda: (through(tokens_of(params, ids)), at_once()))()
    rows = np.asarray(want.rows, np.float64)  # [b h w n], by place
    for b in range(B):
        here = [int(np.flatnonzero(np.asarray(slots)[b, 0] == j)[0]) for j in range(LENGTHS[b] + steps)]
        there = [int(np.flatnonzero(np.asarray(places)[b, 0] == j)[0]) for j in range(LENGTHS[b] + steps)]
        for name, value in {
            "rows": rows[b][:, -3:][..., there],
            "received": rows[b][..., there].sum(1),
            "peak": rows[b][..., there].max(1),
        }.items():
            a = np.asarray(getattr(got, name))[b]
            near((a[:, -3:] if name == "rows" else a)[..., here], value, 2e-5, name)
        near(got.turned[b][:, -2:], want.turned[b][:, -2:], 2e-5, "turned")
    # moments: of the last w queries before the rotary embedding, but for the first token's
    layers, pos = keys()
    p, r = pos[0][N + steps - w : N + steps], CFG.head_dim // 2
    q = np.asarray(layers[0][1], np.float64)[0][:, N + steps - w : N + steps]
    angle = -p[:, None] * CFG.rope_theta ** (-np.arange(r) / r)
    lo, hi = q[..., :r], q[..., r:]
    q = np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)[:, p >= 1]
    near(got.queries[0][0], q.mean(1), 2e-5, "mean of queries")
    near(got.queries[1][0], np.einsum("hni,hnj->hij", *[q - q.mean(1, keepdims=True)] * 2) / q.shape[1], 5e-5, "covariance")
