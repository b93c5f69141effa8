"""The read kernel against its reference, and its lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.read import cases, read, reference


def arrays(case):
    q, q_pos, k, v, *rest = map(jnp.asarray, case.arrays())
    q, k, v = (x.astype(case.dtype) for x in (q, k, v))
    return q, q_pos, k, v, *rest


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference(name):
    case = cases.CASES[name]
    given = arrays(case)
    out, lse = read(*given, **case.options(), impl="interpret")
    want, want_lse = reference.read(*given, **case.options())
    tol = 2e-6 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.float32(out), want, atol=tol * max(1, float(jnp.abs(want).max())))
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=tol)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_tpu(name):
    case = cases.LARGE[name]
    structs = jax.eval_shape(lambda: arrays(case))
    fn = jax.jit(lambda *a: read(*a, **case.options(), impl="pallas_tpu"))
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(fn, platforms=["tpu"])(*structs)
    assert "tpu_custom_call" in exported.mlir_module()


def test_refused():
    case = cases.Case()
    given = list(arrays(case))
    with pytest.raises(ValueError, match="a block of 7 at a multiple of 7"):
        read(*given, **case.options() | {"block": 7}, impl="interpret")
    with pytest.raises(ValueError, match="impl is 'fast'"):
        read(*given, **case.options(), impl="fast")
    with pytest.raises(ValueError, match="multiple of g"):
        read(jnp.zeros((2, 3, 4, 32)), *given[1:6], jnp.zeros((2, 3, 1), jnp.int32), **case.options(), impl="interpret")
