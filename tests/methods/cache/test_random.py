import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import Random
from tests.methods import toys

small = lambda capacity: Random(capacity=capacity, seed=1)


def test_checks_of_a_scorer():
    make = lambda capacity: Random(capacity=capacity, protect=Protect(sinks=1, recent=2))
    toys.check_scorer(make, lambda q, kv: Evidence(), protected=lambda p, seen: p == 0 or p >= seen - 2)


def test_the_draw_depends_on_key_seed_layer_head_and_position_only():
    _, kv = toys.problem(live=(24, 17))
    score = np.asarray(toys.scorer(Random(capacity=5))(kv, Evidence()))
    np.testing.assert_array_equal(score[0, :, :17], score[1, :, 7:])  # the same positions in other slots of another row
    assert (score[0, 0] != score[0, 1]).all()
    shuffled = kv._replace(pos=kv.pos[:, :, ::-1])
    np.testing.assert_array_equal(toys.scorer(Random(capacity=5))(shuffled, Evidence())[0], score[0, :, ::-1])
    layer = jnp.ones((), jnp.int32)
    draws = [toys.scorer(Random(capacity=5, seed=seed))(kv, Evidence(layer=layer * i)) for seed, i in ((0, 0), (1, 0), (0, 1))]
    draws += [toys.scorer(Random(capacity=5))(kv, Evidence(key=jax.random.key(i))) for i in (5, 6)]
    assert all((np.asarray(a) != np.asarray(b)).mean() > 0.99 for i, a in enumerate(draws) for b in draws[:i])


def test_every_position_is_kept_equally_often():
    """4 of 8 over 4,000 seeds' worth of heads: each position in half of them, each pair in 3/14, within 5 standard errors."""
    pos = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (1, 4000, 8))
    kv = toys.cache(np.zeros((1, 4000, 8, 1)), np.zeros((1, 4000, 8, 1)))._replace(pos=pos)
    score = np.asarray(toys.scorer(Random(capacity=4))(kv, Evidence()))[0]
    assert score.min() >= 0 and score.max() < 1
    chosen = np.argsort(np.argsort(-score, -1), -1) < 4
    assert np.abs(chosen.mean(0) - 0.5).max() < 5 * (0.25 / 4000) ** 0.5
    pairs = (chosen[:, :, None] & chosen[:, None, :]).mean(0)[~np.eye(8, dtype=bool)]
    assert np.abs(pairs - 3 / 14).max() < 5 * (3 / 14 * 11 / 14 / 4000) ** 0.5


def test_refuses_a_budget_without_room():
    with pytest.raises(ValueError, match="capacity=3 has no room for the 4"):
        Random(capacity=3, protect=Protect(sinks=4))
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        Random(capacity=0)
