"""The block-sparse kernel against its reference: forward, backward, counters, lowering."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.block_sparse import block_sparse, cases, reference

FLOATS = ("q", "k", "v", "bias")


def arrays(case, seed=0):
    """(floats by name, the other arrays by name)."""
    (q, k, v, index, count), rest = case.arrays(seed)
    cast = lambda x: jnp.asarray(x).astype(case.dtype)
    floats = {"q": cast(q), "k": cast(k), "v": cast(v)}
    bias = rest.pop("bias")
    if bias is not None:
        floats["bias"] = jnp.asarray(bias)
    other = {"block_index": jnp.asarray(index), "block_count": jnp.asarray(count)}
    return floats, other | {name: None if x is None else jnp.asarray(x) for name, x in rest.items()}


def structs(case, **more):
    """What `arrays` gives, as shapes."""
    given = {name: jax.ShapeDtypeStruct(shape, dtype, **more) for name, (shape, dtype) in case.shapes().items()}
    return {n: x for n, x in given.items() if n in FLOATS}, {n: x for n, x in given.items() if n not in FLOATS}


def both(attend, floats, other, *, options, weight):
    """(result, gradients of a weighted sum of out and of the lse of rows that see something)."""

    def loss(floats):
        result = attend(**floats, **other, **options)
        out, lse = (x.astype(jnp.float32) for x in result[:2])
        return jnp.sum(out * weight) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.sin(lse), 0.0)), result

    (_, result), grads = jax.value_and_grad(loss, has_aux=True)(floats)
    return result, grads


def within(got, want, tol):
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0, atol=tol * max(1, float(np.abs(np.float32(want)).max(initial=0))))


@functools.cache
def program(attend, impl, options):
    """`both`, compiled once for all cases of the same shapes and options."""
    more = {} if impl is None else {"impl": impl, "count": True}
    run = lambda floats, other, weight: both(attend, floats, other, options=dict(options) | more, weight=weight)
    return run if impl == "interpret_gpu" else jax.jit(run)  # that interpreter's threads may wait for ever inside a larger program


@functools.cache
def wanted(case):
    """What the reference gives in float32, and the weight of the loss."""
    floats, other = arrays(case)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((case.b, case.h, case.t, case.c)), jnp.float32)
    wide = {n: x.astype(jnp.float32) for n, x in floats.items()}
    return program(reference.block_sparse, None, tuple(case.options().items()))(wide, other, weight), weight


def compare(case, impl, counts):
    """Out, lse, gradients and the counters against the reference; finite numbers in dead rows do not matter."""
    floats, other = arrays(case)
    ((want, want_lse), want_grads), weight = wanted(case)
    junk = {"q": other["q_pos"][:, None], "k": other["k_pos"], "v": other["k_pos"]}
    given = {n: jnp.where(junk[n][..., None] < 0, jnp.asarray(1e4, x.dtype), x) if n in junk else x for n, x in floats.items()}
    (out, lse, count), grads = program(block_sparse, impl, tuple(case.options().items()))(given, other, weight)
    narrow = case.dtype != "float32"
    within(out, want, 2e-2 if narrow else 2e-6)
    dead = ~np.isfinite(want_lse)
    assert (np.isneginf(lse) == dead).all() and not np.asarray(out)[dead].any()
    within(np.where(dead, 0, lse), np.where(dead, 0, want_lse), 2e-6)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    for n, grad in grads.items():
        assert grad.dtype == floats[n].dtype
        at = junk.get(n)
        within(grad if at is None else jnp.where(at[..., None] < 0, 0, grad), want_grads[n], 2e-2 if narrow else 1e-5)
        assert at is None or not np.asarray(grad)[np.broadcast_to(at[..., None] < 0, grad.shape)].any()
    np.testing.assert_array_equal(count, np.stack([counts(other["block_count"])] * 2, -1))


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference(name):
    case = cases.CASES[name]
    compare(case, "interpret", lambda listed: listed)
    compare(case, "xla", lambda listed: np.full_like(listed, case.room))


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.GPU)
def test_equals_the_reference_on_gpus(name):
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("jax has an interpreter of GPU kernels from 0.11.2 on")
    compare(cases.GPU[name], "interpret_gpu", lambda listed: listed)


def test_cost_follows_the_density():
    """Tiles computed and blocks fetched are the listed blocks, one program for every density."""
    case = cases.Case(t=64, s=256, bq=32, h=4, g=2)
    run = jax.jit(lambda f, o: block_sparse(**f, **o, **case.options(), count=True, impl="interpret")[2])
    floats, other = arrays(cases.Case(t=64, s=256, bq=32, h=4, g=2, density=1.0))
    for part in (1, 2, 4, 8, 16):
        many = other["block_count"] // part
        count = run(floats, other | {"block_count": many})
        assert count.sum((0, 1, 2)).tolist() == [int(many.sum())] * 2 == [4 * 16 // part] * 2


def lower(case, impl, platform, device, grad):
    floats, other = structs(case)
    attend = lambda f, o: block_sparse(**f, **o, **case.options(), impl=impl)
    fn = jax.grad(lambda f, o: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(f, o))) if grad else attend
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
        return jax.export.export(jax.jit(fn), platforms=[platform], disabled_checks=checks)(floats, other).mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_tpu(name):
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    assert lower(cases.LARGE[name], "pallas_tpu", "tpu", device, grad=True).count("tpu_custom_call") >= 3


@pytest.mark.py312
@pytest.mark.parametrize("name", [name for name, case in cases.LARGE.items() if case.dtype != "float32"])
def test_lowers_for_gpus(name):
    pytest.importorskip("absl")
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    assert lower(cases.LARGE[name], "pallas_gpu", "cuda", device, grad=True).count("@mosaic_gpu_v2") >= 3


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", cases.LARGE)
def test_compiles_for_tpu(name, chip):
    """Forward and backward compile within the VMEM limit."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(chip, platform="tpu")
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",)), jax.sharding.PartitionSpec())
    case = cases.LARGE[name]
    given = structs(case, sharding=sharding)

    def loss(floats, other):
        out, lse, count = block_sparse(**floats, **other, **case.options(), count=True, impl="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse), count

    device = jax.sharding.AbstractDevice(topology.devices[0].device_kind, 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*given)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    print(f"{name}, {chip}: arguments {memory.argument_size_in_bytes}, temporary {memory.temp_size_in_bytes} bytes")
    assert "tpu_custom_call" in compiled.as_text()


def test_refused():
    case = cases.Case()
    floats, other = arrays(case)
    call = lambda given, **options: block_sparse(**given, **case.options() | {"impl": "interpret"} | options)
    with pytest.raises(ValueError, match="48 queries in blocks of 32 are 2 blocks, the table has 3"):
        call(floats | other, block_q=32)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        call(floats | other, impl="fast")
    with pytest.raises(ValueError, match="3 lists serve 2 query heads"):
        call(floats | other | {"block_index": jnp.zeros((1, 3, 3, 2), jnp.int32), "block_count": jnp.zeros((1, 3, 3), jnp.int32)})
    with pytest.raises(ValueError, match=r"token_mask must be \[1 1 3 2 16\]"):
        call(floats | other | {"token_mask": jnp.zeros((1, 1, 3, 2, 8), bool)})
    with pytest.raises(ValueError, match="share a dtype"):
        call(floats | other | {"q": floats["q"].astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="window is 0"):
        call(floats | other, window=0)
    out, lse = call(floats | other | {"k": floats["k"][:, :, :0], "v": floats["v"][:, :, :0], "k_pos": other["k_pos"][..., :0]})
    assert not out.any() and np.isneginf(lse).all()
