"""The merge kernels against their references and the plans of `core`, their lowering, and what they refuse."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.merge import cases, match, reference, segment_merge

from jaxtok.core.matching import bipartite, unit
from jaxtok.core.reduce import apply, segment_sum
from jaxtok.core.types import Plan


@functools.cache
def program(case, impl):
    if isinstance(case, cases.Match):
        return jax.jit(lambda given: match(**given, impl=impl))
    return jax.jit(lambda given: segment_merge(**given, m=case.m, mean=case.mean, impl=impl))


def compare_match(case, best, where):
    given = case.arrays()
    want, first = jax.jit(lambda a: reference.match(**a))(given)
    tol = 2e-6 * max(1, float(jnp.abs(jnp.where(jnp.isfinite(want), want, 0)).max()))
    np.testing.assert_allclose(best, want, atol=tol)
    wide = {name: x.astype(jnp.float32) for name, x in given.items()}
    score = jnp.einsum("bnd,bmd->bnm", wide["a"], wide["c"], precision="highest") + wide.get("bias", jnp.zeros((case.b, case.m)))[:, None]
    if case.whole or case.forbidden == 1.0:
        np.testing.assert_array_equal(where, first)
    else:  # nearly equal scores may change places
        np.testing.assert_allclose(jnp.take_along_axis(score, where[..., None], 2)[..., 0], want, atol=2 * tol)
    assert best.dtype == jnp.float32 and where.dtype == jnp.int32


def compare_merge(case, out):
    want = jax.jit(lambda a: reference.segment_merge(**a, m=case.m, mean=case.mean))(case.arrays())
    tol = 2e-6 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=tol * max(1, float(jnp.abs(want).max())))
    assert out.dtype == (case.dtype if case.mean else "float32")


@pytest.mark.parametrize("name", cases.MATCH)
def test_match_equals_the_reference(name):
    case = cases.MATCH[name]
    compare_match(case, *program(case, "interpret")(case.arrays()))


@pytest.mark.parametrize("name", cases.MERGE)
def test_merge_equals_the_reference(name):
    case = cases.MERGE[name]
    given = case.arrays()
    moved = (given["assign"] >= 0) & (given["weight"] > 0)
    given["x"] = jnp.where(moved[..., None], given["x"], jnp.nan)  # rows of no weight may hold anything
    compare_merge(case, program(case, "interpret")(given))


def test_core_gets_the_same_partners_and_rows():
    """Where they are built in: `core.matching.bipartite` on an n x m array of cosines, `core.reduce.apply` on a plan."""
    rng = np.random.default_rng(3)
    x = unit(jnp.asarray(rng.standard_normal((2, 30, 8)), jnp.float32))
    target = jnp.asarray(rng.random((2, 14)) < 0.7)
    source = jnp.asarray(rng.random((2, 16)) < 0.8)
    a, c = x[:, :16], x[:, 16:]
    partner, score = bipartite(jnp.einsum("bnd,bmd->bnm", a, c), source, target, jnp.array([16, 16]), 16)
    best, where = match(a, c, jnp.where(target, 0.0, -jnp.inf), impl="interpret")
    np.testing.assert_array_equal(jnp.where(source, where, -1), partner)
    np.testing.assert_allclose(jnp.where(source, best, -jnp.inf), score, atol=2e-6)
    size = jnp.asarray(rng.integers(1, 5, (2, 30)), jnp.float32)
    into = jnp.concatenate([jnp.where(partner >= 0, partner, -1), jnp.broadcast_to(jnp.arange(14, dtype=jnp.int32)[None], (2, 14))], 1)
    plan = Plan(jnp.broadcast_to(jnp.arange(14, dtype=jnp.int32)[None] + 16, (2, 14)), into, size, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(segment_merge(x, size, into, 14, impl="interpret"), apply(plan, x), atol=2e-6)
    sums = segment_merge(x, jnp.ones_like(size), into, 14, mean=False, impl="interpret")
    np.testing.assert_allclose(sums, segment_sum(x, into, 14), atol=2e-6)


def large(case, impl):
    if isinstance(case, cases.Match):
        return lambda given: match(**given, impl=impl)
    return lambda given: segment_merge(**given, m=case.m, impl=impl)


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_tpu(name):
    case = cases.LARGE[name]
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(large(case, "pallas_tpu")), platforms=["tpu"])(case.structs())
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_gpu(name):
    case = cases.LARGE[name]
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in ("mosaic_gpu", "mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(large(case, "pallas_gpu")), platforms=["cuda"], disabled_checks=checks)(case.structs())
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.GPU)
def test_gpu_kernel_equals_the_reference(name):
    if not hasattr(pytest.importorskip("jax.experimental.pallas.mosaic_gpu"), "InterpretGPUParams"):
        pytest.skip("needs the GPU interpreter of jax >= 0.11.2")
    case = cases.GPU[name]
    out = program(case, "interpret_gpu")(case.arrays())
    compare_match(case, *out) if isinstance(case, cases.Match) else compare_merge(case, out)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", cases.LARGE)
def test_compiles_for_a_chip(name, chip, monkeypatch):
    """All the way, with libtpu: within the chip's VMEM, or the compiler refuses. No array of all pairs is among the temporaries."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    mesh = jax.sharding.Mesh(np.array(topologies.get_topology_desc(chip, platform="tpu").devices[:1]), ("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    case = cases.LARGE[name]
    fn = large(case, "pallas_tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(fn, in_shardings=where, out_shardings=where).lower(case.structs()).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory, inputs = compiled.memory_analysis(), sum(x.size * x.dtype.itemsize for x in case.structs().values())
    assert memory.temp_size_in_bytes <= 2 * inputs + 2**20


def test_refused():
    a, w, i = jnp.zeros((1, 4, 8)), jnp.ones((1, 4)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        match(a, a, impl="fast")
    with pytest.raises(ValueError, match="of the same dtype"):
        match(a, a.astype(jnp.bfloat16), impl="interpret")
    with pytest.raises(ValueError, match="m must be at least 0, got -1"):
        segment_merge(a, w, i, -1, impl="interpret")
    assert match(a, a[:, :0], impl="interpret")[1].tolist() == [[-1] * 4]
    assert segment_merge(a, w, i, 0, impl="interpret").shape == (1, 0, 8)
