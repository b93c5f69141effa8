"""The read kernel against its reference, its counters, its lowering, and what it refuses."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.read import cases, read, reference


def arrays(case):
    q, q_pos, k, v, *rest = (None if x is None else jnp.asarray(x) for x in case.arrays())
    q, k, v = (x.astype(case.dtype) for x in (q, k, v))
    return q, q_pos, k, v, *rest


@functools.cache
def wanted(case):
    options = case.options()
    del options["split"]
    return jax.jit(lambda *a: reference.read(*a, **options))(*arrays(case))


@functools.cache
def program(case, impl="interpret"):
    return jax.jit(lambda *a: read(*a, **case.options(), count=True, impl=impl))


def compare(case, out, lse):
    want, want_lse = wanted(case)
    tol = 2e-6 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.float32(out), want, atol=tol * max(1, float(jnp.abs(want).max())))
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=tol)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference_and_reads_what_is_listed(name):
    case = cases.CASES[name]
    given = arrays(case)
    out, lse, counted = program(case)(*given)
    compare(case, out, lse)
    if not case.full:
        np.testing.assert_array_equal(counted[..., 1], jnp.sum(given[6] >= 0, -1))
        assert int(counted[..., 0].max()) <= (case.split or 1) * -(-case.m * case.block // 64)


@pytest.mark.parametrize("share", [16, 8, 4, 2, 1])
def test_cost_follows_the_list(share):
    """A page listed is a page copied: 32 tiles of 16 pages of 16 slots at density 1, 2 at 1/16."""
    case = cases.Case(b=1, g=1, e=1, s=8192, block=16, m=512, d=8, c=8, r=1)
    given = list(arrays(case))
    given[6] = given[6].at[..., 512 // share :].set(-1)
    *_, counted = program(case)(*given)
    np.testing.assert_array_equal(counted, [[[32 // share, 512 // share]]])


def test_junk_in_dead_slots_changes_nothing():
    for case in (cases.CASES["split"], cases.CASES["all"]):
        q, q_pos, k, v, k_pos, *rest = arrays(case)
        dead = k_pos[..., None] < 0
        compare(case, *program(case)(q, q_pos, jnp.where(dead, 1e30, k), jnp.where(dead, -1e30, v), k_pos, *rest)[:2])


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_tpu(name):
    case = cases.LARGE[name]
    fn = jax.jit(lambda *a: read(*a, **case.options(), count=True, impl="pallas_tpu"))
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(fn, platforms=["tpu"])(*case.structs())
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", ["quest 16k", "blocks of 51", "rows 16k", "all 128k"])  # pages, runs, single rows, everything
def test_lowers_for_gpu(name):
    case = cases.LARGE[name]
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in ("mosaic_gpu", "mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(
            jax.jit(lambda *a: read(*a, **case.options(), count=True, impl="pallas_gpu")), platforms=["cuda"], disabled_checks=checks
        )(*case.structs())
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.GPU)
def test_gpu_kernel_equals_the_reference(name):
    if not hasattr(pytest.importorskip("jax.experimental.pallas.mosaic_gpu"), "InterpretGPUParams"):
        pytest.skip("needs the GPU interpreter of jax >= 0.11.2")
    case = cases.GPU[name]
    given = arrays(case)
    out, lse, counted = program(case, "interpret_gpu")(*given)
    compare(case, out, lse)
    first = jnp.arange(case.e, dtype=jnp.int32) % (case.e // case.g) == 0  # the list that has the count
    listed = jnp.where(first, -(-case.s // 64), 0)[None] if case.full else jnp.sum(given[6] >= 0, -1)
    np.testing.assert_array_equal(counted[..., 1], listed)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", cases.LARGE)
def test_compiles_for_a_chip(name, chip, monkeypatch):
    """All the way, with libtpu: within the chip's VMEM, or the compiler refuses."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    mesh = jax.sharding.Mesh(np.array(topologies.get_topology_desc(chip, platform="tpu").devices[:1]), ("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    case = cases.LARGE[name]
    fn = lambda a: read(*a, **case.options(), count=True, impl="pallas_tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(fn, in_shardings=where, out_shardings=where).lower(case.structs()).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_refused():
    case = cases.Case()
    given = list(arrays(case))
    call = lambda *a, impl="interpret", **more: read(*a, **case.options() | more, impl=impl)
    with pytest.raises(ValueError, match="a block of 7 at a multiple of 7"):
        call(*given, block=7)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        call(*given, impl="fast")
    with pytest.raises(ValueError, match="multiple of g"):
        call(jnp.zeros((2, 3, 4, 32)), *given[1:6], jnp.zeros((2, 3, 1), jnp.int32))
    with pytest.raises(ValueError, match="split must be at least 1, got 0"):
        call(*given, split=0)
    with pytest.raises(ValueError, match="ids are those of listed slots"):
        call(*given[:6], None, jnp.zeros((2, 2, 4), jnp.int32), jnp.ones(4))


def test_refused_on_gpus():
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    for match, case in {
        "float32": cases.Case(),
        "not turned on GPUs": cases.Case(turned=16, dtype="bfloat16"),
        "multiples of 16": cases.Case(d=24, dtype="bfloat16"),
        "multiples of 64": cases.CASES["bf16 rows"],
    }.items():
        with pytest.raises(NotImplementedError, match=match):
            read(*arrays(case), **case.options(), impl="pallas_gpu")
