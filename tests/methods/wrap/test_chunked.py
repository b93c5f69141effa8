"""Chunked: shares by hand, base where one chunk holds all, a plain-Python reference over ragged rows."""

import functools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import CacheScorer
from jaxtok.core.types import Evidence, Needs, Protect
from jaxtok.methods import Chunked, KeyDiff, SnapKV
from tests.methods.wrap.given import NOTHING, Given, Unlike, cache, kept, run

small = {
    "chunked": lambda capacity: Chunked(base=KeyDiff(capacity=capacity), chunk=4),
    "chunked-snapkv": lambda capacity: Chunked(base=SnapKV(capacity=capacity, window=2, pool=3), chunk=5),
}


def reference(x, length, keep, size, protect, score):
    """Kept positions of one head with values x [n] (the last `length` live); `score` gives scores of a list of values."""
    x = list(x)[len(x) - length :]
    chunks = [list(range(i, min(i + size, length))) for i in range(0, length, size)]
    safe = {p for p in range(length) if p < protect.sinks or p >= length - protect.recent}
    free = [[p for p in chunk if p not in safe] for chunk in chunks]
    there = sum(map(len, free))
    room = min(max(keep - len(safe), 0), there)
    ideal = [Fraction(room * len(f), max(there, 1)) for f in free]
    count = [math.floor(i) for i in ideal]
    for c in sorted(range(len(ideal)), key=lambda c: (count[c] - ideal[c], c))[: room - sum(count)]:
        count[c] += 1
    out = set(safe)
    for chunk, f, c in zip(chunks, free, count, strict=True):
        s = dict(zip(chunk, score([x[p] for p in chunk]), strict=True))
        out |= set(sorted(f, key=lambda p: (-s[p], p))[:c])
    return sorted(out)


given = lambda x: x
unlike = lambda x: [abs(a - np.mean(x)) for a in x]


def test_each_chunk_keeps_its_own_best_by_hand():
    # chunks (9 8 7) (1 2 3) (5): 4 of 7 slots are 12/7, 12/7 and 4/7 -> 2, 2, 0
    kv = cache([[[9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 5.0]]])
    # 3 of 7 are 9/7, 9/7, 3/7 -> 1, 1, 1; 5 of 7 are 15/7, 15/7, 5/7 -> 2, 2, 1; 1 of 7: 3/7 3/7 1/7 -> the older
    outs = run(*((Chunked(base=Given(capacity=c), chunk=3), kv) for c in (4, 3, 5, 1)), (Given(capacity=4), kv))
    assert [kept(out)[0][0] for out in outs] == [[0, 1, 4, 5], [0, 5, 6], [0, 1, 4, 5, 6], [0], [0, 1, 2, 6]]


def test_a_chunk_is_scored_as_if_it_were_all():
    # far from the mean of the whole, 20 / 3: the zeros; far from the mean of its chunk: 4 (of 0 0 4) and 10 (of 10 13 13)
    kv = cache([[[0.0, 0.0, 4.0, 10.0, 13.0, 13.0]]])
    apart, whole = run((Chunked(base=Unlike(capacity=2), chunk=3), kv), (Unlike(capacity=2), kv))
    assert kept(apart) == [[[2, 3]]] and kept(whole) == [[[0, 1]]]


def test_against_the_reference():
    rng = np.random.default_rng(3)
    x, lengths = rng.normal(size=(5, 2, 17)).astype(np.float32), [17, 12, 5, 3, 1]
    kv = cache(x, lengths)
    table = [(7, 4, (0, 0), Unlike), (9, 5, (1, 3), Given), (6, 6, (0, 2), Unlike)]
    make = lambda cap, size, p, scorer: Chunked(base=scorer(capacity=cap, protect=Protect(sinks=p[0], recent=p[1])), chunk=size)
    budgets = jnp.array([5, 4, 3, 5, 2], jnp.int32)
    outs = run(*((make(*row), kv) for row in table), (make(*table[0]), kv, budgets))
    for (cap, size, p, scorer), out, keeps in zip(table + table[:1], outs, [None] * len(table) + [budgets], strict=True):
        for b, length in enumerate(lengths):
            for g in range(2):
                keep = cap if keeps is None else int(keeps[b])
                score = given if scorer is Given else unlike
                want = reference(x[b, g], length, keep, size, Protect(sinks=p[0], recent=p[1]), score)
                assert kept(out)[b][g] == want, (cap, size, p, scorer.__name__, b, g)
        assert out.k.shape[2] == cap and not out.lost.any()


def test_one_chunk_is_the_base():
    kv = cache(np.random.default_rng(1).normal(size=(2, 2, 9)), [9, 5])
    base = Unlike(capacity=4, protect=Protect(sinks=1, recent=1))
    a, b, c = run((Chunked(base=base, chunk=9), kv), (Chunked(base=base), kv), (base, kv))
    for out in (a, b):
        np.testing.assert_array_equal(out.pos, c.pos)
        np.testing.assert_array_equal(out.k, c.k)
    assert Chunked(base=Given(capacity=9), chunk=2).compress({}, kv, NOTHING)[0] is kv


def test_slots_in_any_order():
    x = np.random.default_rng(2).normal(size=(1, 2, 10)).astype(np.float32)
    kv = cache(x, [9])
    shuffle = np.random.default_rng(4).permutation(10)
    moved = kv._replace(k=kv.k[:, :, shuffle], v=kv.v[:, :, shuffle], pos=kv.pos[:, :, shuffle])
    a, b = run((Chunked(base=Unlike(capacity=5), chunk=3), kv), (Chunked(base=Unlike(capacity=5), chunk=3), moved))
    assert [[sorted(h) for h in row] for row in kept(b)] == kept(a)


def test_bf16():
    kv = cache(np.random.default_rng(5).normal(size=(1, 2, 12)), dtype=jnp.bfloat16)
    method = Chunked(base=Unlike(capacity=5), chunk=4)
    out, wide = run((method, kv), (method, kv._replace(k=kv.k.astype(jnp.float32), v=kv.v.astype(jnp.float32))))
    assert out.k.dtype == jnp.bfloat16 and kept(out) == kept(wide)


def test_evidence_is_cut_with_the_chunk():
    """h/g = 2: the attention that a chunk's slots received, and nobody else's."""

    class Received(CacheScorer):
        name, capacity, needs = "received", 4, Needs(received=True)

        def score(self, params, kv, evidence):
            assert evidence.received.shape[1:] == (4, kv.pos.shape[-1])
            return evidence.received.reshape(1, 2, 2, -1).sum(2)

    got = jnp.asarray(np.random.default_rng(6).random((1, 4, 11)), jnp.float32)
    (out,) = run((Chunked(base=Received(), chunk=4), cache(np.zeros((1, 2, 11)), [10]), None, Evidence(received=got)))
    votes = np.asarray(got).reshape(2, 2, 11).sum(1)
    assert kept(out)[0] == [reference(v, 10, 4, 4, Protect(), given) for v in votes]


def test_refused():
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
        Chunked(base=Given(capacity=2), chunk=0)
    base = Given(capacity=2)
    hidden = type("Hidden", (Given,), {"needs": Needs(hidden=True), "name": "hidden"})(capacity=2)
    with pytest.raises(ValueError, match="hidden reads hidden rows"):
        Chunked(base=hidden)
    wide = cache(np.zeros((1, 1, 2)))
    wide = wide._replace(pos=np.broadcast_to(np.int32(0), (1, 1, 1 << 17)))
    with pytest.raises(ValueError, match="take chunk <= 16383"):
        Chunked(base=base, chunk=20_000).plan({}, wide, NOTHING)
    with pytest.raises(TypeError, match="Put other wrappers around"):
        bare = object.__new__(Chunked)
        object.__setattr__(bare, "base", Chunked(base=base))
        bare.__post_init__()
    assert functools.reduce(lambda m, c: m.resize(c), (3, 7), Chunked(base=base, chunk=5)) == Chunked(base=Given(capacity=7), chunk=5)
