"""Merging: folds by hand, a plain-Python reference over ragged rows, what it reduces to, kvpress's numbers are in test_kvpress.py."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import H2O, AdaKV, Chain, ChunkKV, KeyRerotation, Merging, PerLayer, SnapKV
from jaxtok.testing.world import CFG
from tests.methods.wrap.given import NOTHING, Given, cache, kept, run

small = lambda capacity: Merging(base=SnapKV(capacity=capacity, window=2, pool=3))


class Oldest(Given):
    def score(self, params, kv, evidence):
        return -kv.pos.astype(jnp.float32)


def reference(kv, stay, threshold, fraction):
    """{(sequence, head, position): value} of the kept tokens, in float64."""
    k, v, pos = (np.asarray(x, np.float64) for x in (kv.k, kv.v, kv.pos))
    out = {}
    for b, row in enumerate(stay):
        for g, keep in enumerate(row):
            slot = {int(p): j for j, p in enumerate(pos[b, g]) if p >= 0}
            cos = lambda p, q, b=b, g=g, slot=slot: float(
                np.dot(k[b, g, slot[p]], k[b, g, slot[q]]) / np.linalg.norm(k[b, g, slot[p]]) / np.linalg.norm(k[b, g, slot[q]])
            )
            best = {p: max((cos(p, q), -q) for q in keep) for p in set(slot) - set(keep)} if keep else {}
            m = len(best)
            fits = max(m - math.ceil((1 - Fraction(str(fraction))) * (m - 1)), 0)
            joins = sorted((p for p in best if best[p][0] >= threshold), key=lambda p: (-best[p][0], p))[:fits]
            for q in keep:
                value, mass = v[b, g, slot[q]].copy(), 1.0
                for p in joins:
                    if -best[p][1] == q:
                        a, c = (np.linalg.norm(v[b, g, slot[x]]) for x in (p, q))
                        w = max(best[p][0], 0) * a / (a + c + 1e-6)
                        value, mass = value + w * v[b, g, slot[p]], mass + w
                out[b, g, q] = value / mass
    return out


def agrees(out, want, tol=2e-5):
    pos, v = np.asarray(out.pos), np.asarray(out.v)
    got = {(b, g, int(p)): v[b, g, j] for (b, g, j), p in np.ndenumerate(pos) if p >= 0}
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=tol, atol=tol)


def test_by_hand():
    """Kept keys x and y; the evicted (3, 4) / 5 is .8 y, .6 x: its value, as long as y's, goes to y with weight .8 / 2."""
    kv = cache([[[0.0, 0.0, -9.0]]])
    kv = kv._replace(
        k=jnp.asarray([[[[1.0, 0, 0, 0], [0, 2, 0, 0], [3, 4, 0, 0]]]]), v=jnp.asarray([[[[9.0, 0, 0, 0], [8, 0, 0, 0], [-8, 0, 0, 0]]]])
    )
    out, dropped = run((Merging(base=Given(capacity=2)), kv), (Merging(base=Given(capacity=2), threshold=0.9), kv))
    np.testing.assert_allclose(out.v[0, 0, :, 0], [9, (8 - 0.4 * 8) / 1.4], rtol=1e-6)
    np.testing.assert_array_equal(out.k, kv.k[:, :, :2])
    np.testing.assert_array_equal(out.bias, 0.0)
    assert kept(out) == [[[0, 1]]] and dropped.v[0, 0, :, 0].tolist() == [9, 8]


@pytest.mark.parametrize("threshold, fraction, recent", [(0.0, 1.0, 0), (0.2, 1.0, 2), (0.0, 0.5, 1), (-1.0, 0.3, 0)])
def test_against_the_reference(threshold, fraction, recent):
    kv = cache(np.random.default_rng(1).normal(size=(4, 3, 19)), [19, 11, 5, 1])
    method = Merging(base=Given(capacity=6, protect=Protect(recent=recent)), threshold=threshold, fraction=fraction)
    out, fewer = run((method, kv), (method, kv, jnp.array([4, 3, 2, 0], jnp.int32)))
    for x in (out, fewer):
        agrees(x, reference(kv, kept(x), threshold, fraction))
    alone, less = run((method.base, kv), (method.base, kv, jnp.array([4, 3, 2, 0], jnp.int32)))
    assert kept(out) == kept(alone) and kept(fewer) == kept(less)
    assert np.abs(np.asarray(out.v) - np.asarray(alone.v)).max() > 0.05


def test_around_other_wrappers():
    kv = cache(np.random.default_rng(2).normal(size=(2, 3, 14)), [14, 9])
    for base in (AdaKV(base=Given(capacity=5), alpha=0.1), ChunkKV(base=Given(capacity=6), chunk=3)):
        (out,) = run((Merging(base=base), kv))
        agrees(out, reference(kv, kept(out), 0.0, 1.0))


def test_equal_tokens_merge_to_themselves_and_opposite_ones_do_not_merge():
    kv = cache([[[3.0, 2.0, 1.0, 3.0, 2.0, 1.0]]])
    twins = kv._replace(k=jnp.concatenate([kv.k[:, :, :3]] * 2, 2), v=jnp.concatenate([kv.v[:, :, :3]] * 2, 2))
    apart = twins._replace(k=jnp.concatenate([kv.k[:, :, :1], jnp.zeros((1, 1, 2, 4)), *[-kv.k[:, :, :1]] * 3], 2))
    first = Oldest(capacity=3)
    a, b, c = run((Merging(base=first), twins), (first, twins), (Merging(base=first), apart))
    np.testing.assert_allclose(a.v, b.v, rtol=1e-6)
    np.testing.assert_array_equal(c.v, b.v)


def test_no_budget_and_bf16():
    kv = cache(np.random.default_rng(3).normal(size=(2, 2, 12)), [12, 5])
    half = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    method = Merging(base=Given(capacity=5))
    nothing, low = run((method, kv, jnp.array([0, 0])), (method, half))
    assert kept(nothing) == [[[], []], [[], []]] and np.isfinite(np.asarray(nothing.v)).all()
    assert low.v.dtype == jnp.bfloat16
    agrees(low, reference(half, kept(low), 0.0, 1.0), tol=1e-2)
    assert Merging(base=Given(capacity=12)).compress({}, kv, NOTHING)[0] is kv


def test_evidence_moves_along():
    kv = cache(np.random.default_rng(4).normal(size=(1, 2, 9)))
    seen = Evidence(received=jnp.asarray(np.random.default_rng(5).random((1, 4, 9)), jnp.float32))
    left, moved = Merging(base=Given(capacity=4)).compress({}, kv, seen)
    want = gather(seen.received, jnp.repeat(left.pos, 2, 1))
    np.testing.assert_array_equal(moved.received, want)


def test_what_it_says_of_itself():
    method = Merging(base=SnapKV(capacity=90, window=9))
    assert method.edits and method.needs.rows == 9 and method.slots == method.capacity == 90 and method.resize(70).base.capacity == 70
    outer = (Chain(methods=(method,)), KeyRerotation(base=method), PerLayer(base=method, capacities=(90, 80)))
    assert all(x.edits for x in outer) and not PerLayer(base=method.base, capacities=(90, 80)).edits
    for match, options in {"threshold must be": dict(threshold=2.0), "fraction is the fraction": dict(fraction=0.0)}.items():
        with pytest.raises(ValueError, match=match):
            Merging(base=Given(capacity=4), **options)
    with pytest.raises(ValueError, match="key_rerotation changes what it keeps"):
        Merging(base=KeyRerotation(base=Given(capacity=4)))
    with pytest.raises(ValueError, match="merging changes what stays and h2o takes a plan"):
        Recipe(cache=method, policy=H2O(capacity=99)).validate(CFG)
