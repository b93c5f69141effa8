"""Chain: one after the other by hand, as one plan, and against doing it by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import reduce_kv
from jaxtok.core.types import Evidence, Needs, Plan, Protect
from jaxtok.methods import AdaKV, Chain, KeyDiff, KeyRerotation, KNorm, PerLayer, SnapKV
from tests.methods.wrap.given import NOTHING, Given, Unlike, cache, kept, run

small = lambda capacity: Chain(methods=(SnapKV(capacity=capacity + 3, window=2, pool=3), KeyDiff(capacity=capacity)))


def test_by_hand():
    # the best four are 0 0 4 and 9; of these, 9 and the older 0 are farthest from their mean
    kv = cache([[[0.0, -5.0, 4.0, 0.0, -7.0, 9.0]]])
    one, other = run(
        (Chain(methods=(Given(capacity=4), Unlike(capacity=2))), kv), (Chain(methods=(Unlike(capacity=4), Given(capacity=2))), kv)
    )
    assert kept(one) == [[[0, 5]]]
    # far from the mean 1/6 are 9, -7, -5, 4; of these the best are 9 and 4
    assert kept(other) == [[[2, 5]]], "the order matters"


def test_each_sees_what_the_one_before_left_and_one_plan_says_it_all():
    rng = np.random.default_rng(0)
    kv = cache(rng.normal(size=(3, 2, 12)), [12, 7, 2])
    seen = Evidence(rows=jnp.asarray(rng.random((3, 4, 2, 12)), jnp.float32))
    methods = (
        SnapKV(capacity=9, window=2, pool=3),
        AdaKV(base=Given(capacity=6), alpha=0.1),
        Unlike(capacity=3, protect=Protect(recent=1)),
    )
    chain, budgets = Chain(methods=methods), jnp.array([3, 2, 1], jnp.int32)

    @jax.jit
    def both(kv, seen, budgets):
        alone, left = kv, seen
        for method, keep in zip(methods, (None, None, budgets), strict=True):
            alone, left = method.compress({}, alone, left, keep)
        return alone, chain.compress({}, kv, seen, budgets)[0], reduce_kv(chain.plan({}, kv, seen, budgets), kv)

    alone, chained, planned = both(kv, seen, budgets)
    jax.tree.map(np.testing.assert_array_equal, chained, alone)
    jax.tree.map(np.testing.assert_array_equal, planned, alone)
    assert [[len(h) for h in row] for row in kept(alone)] == [[3, 3], [2, 2], [1, 1]]


def test_merging_links_add_their_counts():
    class Pairs(Given):
        """Slots 2i and 2i + 1 become one, named by the newer."""

        def plan(self, params, kv, evidence, keep=None):
            b, g, n = kv.pos.shape
            row = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, g, n))
            return Plan(row[..., 1::2], row // 2, jnp.exp(kv.bias), jnp.zeros((b, g), jnp.int32))

    kv = cache([[[1.0, 3.0, 5.0, 7.0, 2.0, 2.0, 0.0, 4.0]]])
    chain = Chain(methods=(Pairs(capacity=4), Pairs(capacity=2)))
    one, two = run((chain, kv), (Chain(methods=(Pairs(capacity=4), Given(capacity=3))), kv))
    np.testing.assert_allclose(one.v[0, 0, :, 0], [4.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(one.bias), [[[4.0, 4.0]]], rtol=1e-6)
    assert kept(one) == [[[3, 7]]] and kept(two) == [[[1, 3, 5]]]
    planned = jax.jit(lambda kv: reduce_kv(chain.plan({}, kv, NOTHING), kv))(kv)
    np.testing.assert_allclose(planned.v, one.v, rtol=1e-5)
    np.testing.assert_allclose(planned.bias, one.bias, atol=1e-6)


def test_a_chain_of_one_is_its_method():
    kv = cache(np.random.default_rng(1).random((2, 2, 9)), [9, 5], dtype=jnp.bfloat16)
    chained, alone = run((Chain(methods=(Given(capacity=4),)), kv), (Given(capacity=4), kv))
    jax.tree.map(np.testing.assert_array_equal, chained, alone)
    assert chained.k.dtype == jnp.bfloat16


def test_full_budgets_change_nothing():
    kv = cache(np.ones((1, 2, 4)))
    chain = Chain(methods=(Given(capacity=4), Given(capacity=9)))
    assert chain.compress({}, kv, NOTHING)[0] is kv
    np.testing.assert_array_equal(reduce_kv(chain.plan({}, kv, NOTHING), kv).k, kv.k)


def test_what_it_says_of_itself():
    chain = Chain(methods=(SnapKV(capacity=9, window=3), AdaKV(base=KNorm(capacity=6), slack=1.5)))
    assert chain.capacity == 6 and chain.slots == 9 and chain.needs == Needs(rows=3) and not chain.rotates
    assert Chain(methods=(KNorm(capacity=3), KeyRerotation(base=KNorm(capacity=2)))).rotates
    assert chain.resize(4).methods[1] == AdaKV(base=KNorm(capacity=4), slack=1.5) and chain.resize(4).methods[0] == chain.methods[0]
    deep = Chain(methods=(PerLayer(base=KNorm(capacity=4), capacities=(5, 3)), KNorm(capacity=2)))
    assert deep.layer(1, 2) == Chain(methods=(KNorm(capacity=3), KNorm(capacity=2)))
    assert chain.init_params(jax.random.key(0), None) == ({}, {})


def test_every_link_gets_its_own_weights():
    class Learned(Given):
        def init_params(self, key, cfg):
            return {"w": jax.random.normal(key, ())}

        def score(self, params, kv, evidence):
            return params["w"] * kv.v[..., 0]

    chain = Chain(methods=(Learned(capacity=4), Learned(capacity=2)))
    a, b = chain.init_params(jax.random.key(0), None)
    assert a["w"] != b["w"]
    kv = cache([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    signs = tuple({"w": jnp.float32(w)} for w in (1.0, -1.0))
    out = jax.jit(lambda kv: chain.compress(signs, kv, NOTHING)[0])(kv)
    assert kept(out) == [[[1, 2]]], "the best four, then the worst two of them"


def test_refused():
    with pytest.raises(ValueError, match="at least one method"):
        Chain(methods=())
    bare = object.__new__(Chain)
    object.__setattr__(bare, "methods", (3,))
    with pytest.raises(TypeError, match="chain takes cache compressors, got 3"):
        bare.__post_init__()
