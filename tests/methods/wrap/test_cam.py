"""CaM: shares by hand, a plain-Python reference of the mean draw, coins that fall as often as they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import H2O, CaM, KeyRerotation, SnapKV
from jaxtok.testing.world import CFG
from tests.methods.wrap.given import Given, cache, kept, run

small = {
    "cam": lambda capacity: CaM(base=SnapKV(capacity=capacity, window=2, pool=3), window=2),
    "cam-mean": lambda capacity: CaM(base=SnapKV(capacity=capacity, window=2, pool=3), sample=False),
}


class ByKey(Given):
    """The score of a slot is the first channel of its key."""

    def score(self, params, kv, evidence):
        return kv.k[..., 0]


def received(a) -> Evidence:
    return Evidence(received=jnp.asarray(a, jnp.float32))


def reference(kv, a, stay, window):
    """{(sequence, head, position): value} with every chance itself as its coin; a [b h n]."""
    v, pos = np.asarray(kv.v, np.float64), np.asarray(kv.pos)
    out = {}
    for b, row in enumerate(stay):
        for g, keep in enumerate(row):
            slot = {int(p): j for j, p in enumerate(pos[b, g]) if p >= 0}
            group = a.shape[1] // len(row)
            mean = a[b, g * group : (g + 1) * group].mean(0)
            value = {q: v[b, g, slot[q]].copy() for q in keep}
            for p in set(slot) - set(keep):
                targets = [q for q in sorted(keep) if q > p][:window]
                if targets:
                    level = np.mean([mean[slot[q]] for q in targets])
                    for q in targets:
                        value[q] += min(1.0, mean[slot[p]] / level) * v[b, g, slot[p]] / len(targets)
            out |= {(b, g, q): x for q, x in value.items()}
    return out


def test_by_hand():
    """Attention 1 4 2 2 8: the first token goes to the next two kept with chance 1 / 3, the third to the last with 1 / 4."""
    kv = cache([[[0.0] * 5]])
    kv = kv._replace(k=jnp.asarray([0.0, 1, 0, 1, 1])[None, None, :, None] * jnp.ones((1, 1, 1, 4)))
    v = jnp.asarray(np.array([[12.0], [1], [8], [2], [3]]) * np.ones((1, 4)), jnp.float32)[None, None]
    seen = received([[[1.0, 4, 2, 2, 8]]])
    (out,) = run((CaM(base=ByKey(capacity=3), window=2, sample=False), kv._replace(v=v), None, seen))
    # tokens 1, 3, 4 stay; token 0: level (4 + 2) / 2 = 3; token 2: targets 3 and 4, level 5, chance 2 / 5
    np.testing.assert_allclose(out.v[0, 0, :, 0], [1 + 2, 2 + 2 + 1.6, 3 + 1.6], rtol=1e-6)
    assert kept(out) == [[[1, 3, 4]]]


@pytest.mark.parametrize("window", [1, 3, 40])
def test_against_the_reference(window):
    rng = np.random.default_rng(1)
    kv, a = cache(rng.normal(size=(3, 2, 15)), [15, 8, 2]), rng.random((3, 4, 15))
    method = CaM(base=Given(capacity=5), window=window, sample=False)
    out, alone = run((method, kv, None, received(a)), (method.base, kv))
    want = reference(kv, np.float32(a), kept(alone), window)
    assert kept(out) == kept(alone)
    for (b, g, j), p in np.ndenumerate(np.asarray(out.pos)):
        if p >= 0:
            np.testing.assert_allclose(out.v[b, g, j], want[b, g, int(p)], rtol=2e-5, atol=1e-5)


def test_coins():
    """Averaged over draws the values are those of the mean; each draw adds a share or nothing; the draw is the position's."""
    rng = np.random.default_rng(2)
    kv, seen = cache(rng.normal(size=(1, 2, 12))), received(rng.random((1, 2, 12)))
    coin, mean = CaM(base=Given(capacity=4), window=2), CaM(base=Given(capacity=4), window=2, sample=False)
    draw = jax.jit(jax.vmap(lambda key: coin.compress({}, kv, seen._replace(key=key))[0].v))
    values = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    (want,) = run((mean, kv, None, seen))
    np.testing.assert_allclose(values.mean(0), want.v, atol=0.06)
    assert values.std(0).max() > 0.1
    again = functools.partial(run, (coin, kv, None, seen))
    np.testing.assert_array_equal(again()[0].v, again()[0].v)


def test_certain_and_impossible():
    """More attention than its targets have: always; none at all, or nobody behind: never."""
    kv = cache([[[-1.0, 5.0, -1.0, 4.0, -1.0]]])
    out, none, alone = run(
        (CaM(base=Given(capacity=2), window=1), kv, None, received([[[9.0, 1, 9, 1, 9]]])),
        (CaM(base=Given(capacity=2), window=1), kv, None, received([[[0.0, 1, 0, 1, 9]]])),
        (Given(capacity=2), kv),
    )
    np.testing.assert_allclose(out.v[0, 0], kv.v[0, 0, [1, 3]] + kv.v[0, 0, [0, 2]], rtol=1e-6)
    np.testing.assert_array_equal(none.v, alone.v)


def test_what_it_says_of_itself():
    method = CaM(base=SnapKV(capacity=90, window=9))
    assert method.edits and method.needs.rows == 9 and method.needs.received and method.slots == 90 and method.resize(70).capacity == 70
    with pytest.raises(ValueError, match="window must be >= 1"):
        CaM(base=Given(capacity=4), window=0)
    with pytest.raises(ValueError, match="key_rerotation changes what it keeps"):
        CaM(base=KeyRerotation(base=Given(capacity=4)))
    with pytest.raises(ValueError, match="cam changes what stays and h2o takes a plan"):
        Recipe(cache=method, policy=H2O(capacity=99)).validate(CFG)
    with pytest.raises(ValueError, match=r"evidence\.received is missing"):
        CaM(base=Given(capacity=2)).compress({}, cache(np.ones((1, 1, 5))), Evidence())
