import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import KNorm
from tests.methods import toys

small = lambda capacity: KNorm(capacity=capacity)
NONE = lambda q, kv: Evidence()


def test_by_hand():
    """Norms 5, 1, 13, 2, 0, 3: the three shortest keys are those at 4, 1 and 3."""
    k = np.array([[3, 4], [1, 0], [5, 12], [0, -2], [0, 0], [0, 3]])[None, None]
    kv = toys.cache(k, k)
    np.testing.assert_allclose(toys.scorer(KNorm(capacity=3))(kv, Evidence())[0, 0], [-5, -1, -13, -2, 0, -3])
    assert toys.kept(toys.run(KNorm(capacity=3), kv, Evidence())) == [[{1, 3, 4}]]
    protect = KNorm(capacity=3, protect=Protect(sinks=1, recent=1))
    assert toys.kept(toys.run(protect, kv, Evidence())) == [[{0, 4, 5}]]


def test_checks_of_a_scorer():
    toys.check_scorer(small, NONE, protected=lambda p, seen: False)
    with pytest.raises(ValueError, match="no room"):
        KNorm(capacity=1, protect=Protect(recent=2))


def test_equals_numpy_and_ignores_rotation():
    _, kv = toys.problem(1)
    norm = np.linalg.norm(np.asarray(kv.k, np.float64), axis=-1)
    assert toys.kept(toys.run(KNorm(capacity=9), kv, Evidence())) == toys.top(-norm, kv.pos, 9)
    turned = jnp.concatenate([-kv.k[..., 4:], kv.k[..., :4]], -1)  # a quarter turn of each pair
    assert toys.kept(toys.run(KNorm(capacity=9), kv._replace(k=turned), Evidence())) == toys.top(-norm, kv.pos, 9)


def test_bf16_keys_are_told_apart_in_float32():
    """Norms that differ by less than bf16 can tell: 8 keys sqrt(64 + j/256) long tie in bf16, not in float32."""
    k = np.zeros((1, 1, 8, 2))
    k[..., 0], k[..., 1] = 8, np.sqrt(np.arange(8)[::-1]) / 16
    kv = toys.cache(k, k, dtype=jnp.bfloat16)
    assert len(set(np.asarray(jnp.linalg.norm(kv.k.astype(jnp.float32), axis=-1).astype(jnp.bfloat16)).ravel().tolist())) == 1
    assert toys.kept(toys.run(KNorm(capacity=3), kv, Evidence())) == [[{5, 6, 7}]]
