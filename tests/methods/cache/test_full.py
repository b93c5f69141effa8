import jax.numpy as jnp
import numpy as np

from jaxtok.core.reduce import reduce_kv
from jaxtok.core.types import Evidence
from jaxtok.methods import Full
from tests.methods import toys


def small(capacity):
    return Full()  # has no use for a capacity


def test_the_cache_goes_through_untouched():
    _, kv = toys.problem(junk=1e4)
    for method, keep in ((Full(), None), (Full(capacity=3), jnp.full((2,), 1, jnp.int32))):
        out, _ = method.compress({}, kv, Evidence(), keep)
        assert out is kv


def test_the_plan_names_all_live_slots_in_order():
    _, kv = toys.problem()
    plan = Full(capacity=1).plan({}, kv, Evidence())
    out = reduce_kv(plan, kv)
    np.testing.assert_array_equal(out.pos, kv.pos)
    np.testing.assert_array_equal(plan.assign >= 0, kv.pos >= 0)
    assert (np.asarray(plan.index)[1, :, :7] == -1).all() and not np.asarray(plan.lost).any()
