"""CriticalKV: two stages by hand, the base where values say nothing, a numpy reference, head budgets, head groups of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import AdaKV, CriticalKV, PerLayer, SnapKV
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, near, tokens_of, world
from tests.methods.wrap.given import NOTHING, Given, cache, kept, run

snap = lambda capacity: SnapKV(capacity=capacity, window=2, pool=3)
small = {
    "criticalkv": lambda capacity: CriticalKV(base=snap(capacity)),
    "criticalkv-ada_kv": lambda capacity: CriticalKV(base=AdaKV(base=snap(capacity)), safeguard=0.2),
}


class FirstOfKey(Given):
    """The score of a slot is |the first channel of its key|."""

    def score(self, params, kv, evidence):
        return jnp.abs(kv.k[..., 0])


def problem(seed, h=6, g=3, n=15, d=4, c=5, lengths=(15, 8, 3)):
    """(cache whose first value channel is the score, evidence with an output projection, its rows [h d c])."""
    rng = np.random.default_rng(seed)
    scores = rng.random((len(lengths), g, n)).astype(np.float32)
    kv, o = cache(scores, lengths), rng.normal(size=(h, d, c)).astype(np.float32)
    return kv, Evidence(weights={"o": jnp.asarray(o.reshape(h * d, c))}), o


def reference(kv, o, budgets, first, epsilon, recent, safeguard=0.0):
    """Kept positions of each (sequence, head) for `budgets` [b][g]."""
    pos, v = np.asarray(kv.pos), np.asarray(kv.v, np.float64)
    (b, g, _), h = pos.shape, len(o)
    out = []
    for i in range(b):
        out.append([])
        for e in range(g):
            group = range(e * (h // g), (e + 1) * (h // g))
            score = {int(p): v[i, e, j, 0] for j, p in enumerate(pos[i, e]) if p >= 0}
            norm = {int(p): np.mean([np.abs(v[i, e, j] @ o[q]).sum() for q in group]) for j, p in enumerate(pos[i, e]) if p >= 0}
            k, safe = budgets[i][e], {p for p in score if p >= int(kv.seen[i]) - recent}
            order = [*sorted(safe), *sorted(set(score) - safe, key=lambda p: (-score[p], p))]
            least = max(int(k * first), 1 if first else 0, int(np.sum(budgets[i]) // g * safeguard), 1 if safeguard else 0)
            stay = set(order[: max(min(least, k), len(safe))])
            rest = sorted(set(score) - stay, key=lambda p: (-(score[p] + epsilon) * norm[p], p))
            out[-1].append(sorted(stay | set(rest[: max(k - len(stay), 0)])))
    return out


def test_by_hand():
    """Scores .5 .4 .3 .2 .1, each also the first channel of its value; |v W_O| = |.5| + |second channel|: the fourth is long."""
    kv = cache([[[0.5, 0.4, 0.3, 0.2, 0.1]]])
    kv = kv._replace(v=kv.v.at[0, 0, :, 1:].set(0).at[0, 0, :, 1].set(jnp.array([0.0, 0, 0, 8, 0])))
    seen = Evidence(weights={"o": jnp.asarray(np.diag([1.0, -1, 1, 1]), jnp.float32)})  # an output of four channels: |x| + |y| in all
    make = lambda **options: CriticalKV(base=Given(capacity=2), **options)
    two, one, all_ = run((make(), kv, None, seen), (make(first=0.0), kv, None, seen), (make(first=1.0), kv, None, seen))
    # weighed: .25 .16 .09 (.2 * 8.2 = 1.64) .01
    assert [kept(x)[0][0] for x in (two, one, all_)] == [[0, 3], [0, 3], [0, 1]]
    (three,) = run((CriticalKV(base=Given(capacity=3)), kv, None, seen))
    assert kept(three) == [[[0, 1, 3]]], "floor(3 / 2) = 1 by score, then the long one, then the best of what is left"


@pytest.mark.parametrize("first, epsilon, recent", [(0.5, 1e-4, 0), (0.3, 0.5, 2), (0.0, 1e-4, 1)])
def test_against_the_reference(first, epsilon, recent):
    kv, seen, o = problem(2)
    method = CriticalKV(base=Given(capacity=6, protect=Protect(recent=recent)), first=first, epsilon=epsilon)
    keep = jnp.array([6, 5, 4], jnp.int32)
    out, traced = run((method, kv, None, seen), (method, kv, keep, seen))
    budgets = lambda keep: [[min(k, length)] * 3 for k, length in zip(keep, (15, 8, 3), strict=True)]
    assert kept(out) == reference(kv, o, budgets([6, 6, 6]), first, epsilon, recent)
    assert kept(traced) == reference(kv, o, budgets([6, 5, 4]), first, epsilon, recent)


def test_equal_values_are_the_base():
    """The card's check: where every value can do the same, the base's order stands."""
    rng = np.random.default_rng(3)
    kv = cache(rng.random((2, 2, 14)), [14, 9])
    same = kv._replace(v=jnp.ones_like(kv.v))
    seen = Evidence(weights={"o": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)})
    base = FirstOfKey(capacity=6)
    a, b = run((CriticalKV(base=base), same, None, seen), (base, same))
    assert kept(a) == kept(b)


def test_first_one_is_the_base():
    kv, seen, _ = problem(4)
    base = Given(capacity=6)
    a, b = run((CriticalKV(base=base, first=1.0), kv, None, seen), (base, kv))
    assert kept(a) == kept(b)


@pytest.mark.parametrize("safeguard", [0.0, 0.5])
def test_head_budgets_are_those_of_ada_kv(safeguard):
    kv, seen, o = problem(5)
    skew = kv._replace(v=kv.v.at[:, 0].multiply(3.0))
    ada = AdaKV(base=Given(capacity=6), alpha=0.2, slack=2.5, variant="kvpress")
    out, even = run((CriticalKV(base=ada, safeguard=safeguard), skew, None, seen), (ada, skew))
    budgets = [[len(head) for head in row] for row in kept(even)]
    assert budgets[0][0] > budgets[0][1], "the heads do not share equally"
    assert kept(out) == reference(skew, o, budgets, 0.5, 1e-4, 0, safeguard) and not out.lost.any()
    assert kept(out) != kept(even)


def test_a_head_group_meets_its_own_rows_of_the_output_projection():
    params, ids, _ = world()
    method = CriticalKV(base=snap(6), first=0.2)
    tokens = tokens_of(params, ids)
    fn = lambda heads: decoder.prefill(CFG, params, tokens, Recipe(cache=method, heads=heads), new=1)[1]
    one, two = jax.jit(lambda: (fn(()), fn(((1, 1), (1, 1)))))()
    for whole, parts in zip(one, two, strict=True):
        np.testing.assert_array_equal(whole[0].kv.pos, jnp.concatenate([p.kv.pos for p in parts], 1))
        near(whole[0].kv.v, jnp.concatenate([p.kv.v for p in parts], 1), 1e-6, "values")


def test_what_it_says_of_itself():
    method = CriticalKV(base=AdaKV(base=SnapKV(capacity=90, window=9)))
    assert method.needs.rows == 9 and method.needs.weights == ("o",) and method.slots == 135 and method.resize(70).capacity == 70
    assert isinstance(method.layer(0, 2), CriticalKV) and method.scorer == SnapKV(capacity=90, window=9)
    for match, options in {
        "first must be": dict(first=1.5),
        "safeguard must be": dict(safeguard=-1.0),
        "epsilon must be": dict(epsilon=-1.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            CriticalKV(base=Given(capacity=4), **options)
    with pytest.raises(TypeError, match="Put other wrappers around"):
        CriticalKV(base=PerLayer(base=Given(capacity=2), capacities=(2,)))
    with pytest.raises(ValueError, match=r"evidence\.weights is missing"):
        CriticalKV(base=Given(capacity=4)).plan({}, cache(np.ones((1, 1, 5))), NOTHING)
    with pytest.raises(ValueError, match="10 rows does not belong to 1 KV heads of 4 channels"):
        CriticalKV(base=Given(capacity=4)).plan({}, cache(np.ones((1, 1, 5))), Evidence(weights={"o": jnp.ones((10, 3))}))
