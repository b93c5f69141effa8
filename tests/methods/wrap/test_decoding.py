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
    ThinK,
    TokenSelect,
)
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, B, N, T, near, run, tokens_of, world

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
        return decoder.steps._recalled(CFG, 0, part.kv, Evidence(freqs=freqs), policy.recall({}, part.policy), "auto"), part.kv.pos

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


# --- bases that merge, share, come in layers ------------------------------------------------------------------------------

COUNTED = EMS(capacity=6, window=2, tau=-1.0, merge=9.0, count=True)


def test_what_goes_is_counted_where_the_base_counts():
    """EMS that merges all and counts: through the whole generation the slots stand for every token that was seen; nothing is lost."""
    out = play(Decoding(base=COUNTED, interval=3))
    for kv in out["final"]:
        live = kv.pos >= 0
        np.testing.assert_allclose(np.where(live, np.exp(kv.bias), 0.0).sum(-1), np.repeat(kv.seen[:, None], CFG.kv_heads, 1), rtol=1e-4)
        assert live.sum(-1).max() <= 6 + 2 and kv.k.shape[2] == 6 + 3 and not kv.lost.any()


@pytest.mark.parametrize(
    "base, slots",
    [
        (AdaKV(base=SnapKV(capacity=6, window=2, pool=1), slack=1.5), 9),
        (CaM(base=SnapKV(capacity=6, window=2, pool=1), window=2), 6),
    ],
    ids=["ada_kv", "cam"],
)
def test_wrappers_as_bases(base, slots):
    """Heads share one budget (its slots are more than its capacity); values are folded: the same tokens as without, other logits."""
    out = play(Decoding(base=base, interval=3))
    live = [(kv.pos >= 0).sum(-1) for kv in out["filled"]]
    assert all(kv.k.shape[2] == slots + 3 for kv in out["filled"]) and all((x.sum(-1) == np.minimum(LENGTHS, 6) * 2).all() for x in live)
    assert np.isfinite(out["logits"]).all()
    if slots == 6:
        plain = play(Decoding(base=base.base, interval=3))
        np.testing.assert_array_equal(out["sets"][0], plain["sets"][0])
        assert np.abs(out["logits"] - plain["logits"]).max() > 1e-3
    else:
        assert max(x.max() for x in live) > 6, "no head had more than its share: a weak case"


def test_in_the_loops():
    """`generate` with a sequence that ends early and a reader beside it; a prompt in chunks keeps what a prompt at once keeps."""
    params, ids, _ = world()
    base = SnapKV(capacity=5, window=3, pool=1)
    recipe = Recipe(policy=Decoding(base=base, interval=2), reader=Quest(pages=9, block=1, dense_layers=0))

    def go():
        tokens, layers = decoder.prefill(CFG, params, tokens_of(params, ids), recipe, new=0)
        first = decoder.logits(CFG, params, tokens.x[:, -1:])[0, 0]
        plain = recipe.replace(reader=None)
        whole = generate(CFG, params, *decoder.prefill(CFG, params, tokens_of(params, ids), plain, new=0), plain, new=7, eos=())
        read = generate(CFG, params, tokens, layers, recipe, new=7, eos=())
        chunked = prefill_chunked(CFG, params, ids, jnp.asarray(LIVE), plain, chunk=5, new=0)
        return jnp.argmax(first), whole, read, chunked, layers

    token, whole, read, chunked, layers = jax.device_get(jax.jit(go)())
    np.testing.assert_array_equal(whole.ids, read.ids)  # all pages are read
    assert whole.count.tolist() == [7] * B and whole.ids[0, 0] == token
    for a, b in zip(layers, chunked[1], strict=True):
        live = lambda kv: [[sorted(head[head >= 0].tolist()) for head in row] for row in kv.pos]
        assert live(a[0].kv) == live(b[0].kv)
    # the sequence that ends leaves no trace: its ring and cache stay
    stop = int(whole.ids[0, 2])
    early = jax.jit(
        lambda: generate(
            CFG, params, *decoder.prefill(CFG, params, tokens_of(params, ids), recipe.replace(reader=None), new=0),
            recipe.replace(reader=None), new=7, eos=(stop,),
        )
    )()  # fmt: skip
    seen = np.asarray(early.layers[0][0].kv.seen)
    ended = np.asarray(early.count) < 7
    assert ended[0] and (seen[ended] == (LENGTHS + np.asarray(early.count) - 1)[ended]).all()
    running = np.flatnonzero(~ended)
    np.testing.assert_array_equal(np.asarray(early.ids)[running], whole.ids[running])
    ring = early.layers[0][0].policy.rest
    assert (np.sort(np.asarray(ring.pos), -1)[:, -1] == seen - 1).all()


def test_refused():
    for base, match in {
        KVzip(capacity=4): "kvzip needs decode.prefill_reread",
        CriticalKV(base=SnapKV(capacity=70)): "criticalkv needs weights",
        KeyRerotation(base=KNorm(capacity=4)): "key_rerotation needs keys",
        ThinK(): "think drops no slots",
    }.items():
        with pytest.raises(ValueError, match=match):
            Decoding(base=base)
    with pytest.raises(ValueError, match="interval must be >= 1, got 0"):
        Decoding(base=KNorm(capacity=4), interval=0)
    inner = Recipe(policy=Decoding(base=AdaKV(base=KVzip(capacity=4))))
    assert inner.passes == ("kvzip", "decode.prefill_reread")
    method = Decoding(base=SnapKV(capacity=70, window=9), interval=5)
    with pytest.raises(ValueError, match="decoding works on rotated keys, but they are stored unrotated"):
        Recipe(policy=method, reader=TokenSelect()).validate(CFG)
    with pytest.raises(ValueError, match=r"cut to the policy's 70; give decoding at least 80"):
        Recipe(policy=method, cache=SnapKV(capacity=80)).validate(CFG)
    assert (method.slots, method.every, method.needs.turned, method.step_needs.turned, method.queries) == (70, 5, 9, 9, 9)
    assert Decoding(base=KNorm(capacity=4)).queries == 0 and Decoding(base=EMS(capacity=4, window=2), buffer=7).queries == 7
    with pytest.raises(ValueError, match=r"evidence\.turned is missing"):
        method.start({}, play(small["decoding:keys"](6))["filled"][0], Evidence())
