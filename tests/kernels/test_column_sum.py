"""The column_sum kernels against their reference, and their lowering."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.column_sum import cases, column_sum, reference
from jaxtok_kernels.flash import reference as dense


def arrays(case):
    """q, k and lse, and the named arrays."""
    q, k, v, named = case.arrays()
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k, v))
    named = jax.tree.map(jnp.asarray, named)
    return q, k, dense.flash(q, k, v, **named, **case.options())[1], named


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference(name):
    equal(cases.CASES[name], "interpret")


# What lies in dead rows overflows, and the interpreter's numpy says so.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.py312
@pytest.mark.parametrize("name", cases.GPU)
def test_equals_the_reference_in_the_gpu_interpreter(name):
    if not hasattr(pytest.importorskip("jax.experimental.pallas.mosaic_gpu"), "InterpretGPUParams"):
        pytest.skip("this JAX has no public GPU interpreter (jax >= 0.11.2 has)")
    equal(cases.GPU[name], "interpret_gpu")


def equal(case, impl):
    @jax.jit
    def both():
        q, k, lse, named = arrays(case)
        got = column_sum(q, k, lse, **named, **case.options(), **case.blocks(), impl=impl)
        return got, reference.column_sum(q, k, lse, **named, **case.options()), lse

    got, want, lse = both()
    tol = 2e-6 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * max(1, want.max()))
    np.testing.assert_allclose(got.sum(-1), (lse > -jnp.inf).sum(-1), rtol=0, atol=tol * case.t)


def large(case, impl):
    """The call, and the shapes of its arguments."""
    shape = lambda *n, dtype: jax.ShapeDtypeStruct(n, dtype)
    f32, i32, row, key = jnp.float32, jnp.int32, (case.b, case.t), (case.b, case.s)
    named = {"q_pos": shape(*row, dtype=i32), "k_pos": shape(*key, dtype=i32)}
    if case.heads:
        named["k_pos"] = shape(case.b, case.g, case.s, dtype=i32)
    if case.biased:
        named["bias"] = shape(case.b, case.g, case.s, dtype=f32)
    if case.segments:
        named |= {"q_segment": shape(*row, dtype=i32), "k_segment": shape(*key, dtype=i32)}
    q, k = (shape(case.b, *n, case.d, dtype=case.dtype) for n in ((case.h, case.t), (case.g, case.s)))
    fn = lambda q, k, lse, named: column_sum(q, k, lse, **named, **case.options(), **case.blocks(), impl=impl)
    return fn, (q, k, shape(case.b, case.h, case.t, dtype=f32), named)


DEVICES = {"tpu": ("TPU v5 lite", 1, "tpu"), "cuda": ("NVIDIA H100", None, "gpu")}


@pytest.mark.py312
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers(name, platform):
    case = cases.LARGE[name]
    if platform == "cuda":
        pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
        case = dataclasses.replace(case, dtype="bfloat16")
    fn, structs = large(case, {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform])
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(*DEVICES[platform]))
    ours = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(fn), platforms=[platform], disabled_checks=ours)(*structs)
    assert {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform] in exported.mlir_module()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", cases.LARGE)
def test_compiles_for_a_chip(name, chip, monkeypatch):
    """All the way, with libtpu: within the chip's VMEM, or the compiler refuses."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    where = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(chip, platform="tpu").devices[0])
    fn, structs = large(cases.LARGE[name], "pallas_tpu")
    assert "tpu_custom_call" in jax.jit(fn, in_shardings=where, out_shardings=where).lower(*structs).compile().as_text()


def test_refused():
    q = jnp.ones((1, 2, 8, 16))
    at = jnp.arange(8, dtype=jnp.int32)[None]
    call = lambda q=q, k=q, lse=q[..., 0], **options: column_sum(q, k, lse, **{"q_pos": at, "k_pos": at, "impl": "interpret"} | options)
    with pytest.raises(ValueError, match="impl is 'xla'"):
        call(impl="xla")
    with pytest.raises(ValueError, match="no multiple of 2 KV heads"):
        call(q[:, :1], lse=q[:, :1, :, 0])
    with pytest.raises(NotImplementedError, match="column_sum has no gradient"):
        jax.grad(lambda q: call(q).sum())(q)
    assert not call(k=q[:, :, :0], k_pos=at[:, :0]).size
