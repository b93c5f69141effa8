"""The flash kernels against their reference, what they skip, and their lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.flash import cases, flash, reference
from jaxtok_kernels.flash._block import check


def arrays(case):
    q, k, v, named = case.arrays()
    return *(jnp.asarray(x, case.dtype) for x in (q, k, v)), jax.tree.map(jnp.asarray, named)


def with_gradients(fn, weights):
    """out, lse and the gradients for q, k, v, bias of a sum that weighs every number of both."""

    def loss(q, k, v, bias, named):
        out, lse = fn(q, k, v, bias=bias, **named)
        return sum(jnp.sum(w * jnp.where(x > -jnp.inf, x, 0)) for w, x in zip(weights, (out.astype(jnp.float32), lse), strict=True)), (
            out,
            lse,
        )

    @jax.jit
    def run(q, k, v, named):
        bias = named.get("bias")
        wrt = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        grads, (out, lse) = jax.grad(loss, wrt, has_aux=True)(q, k, v, bias, {n: x for n, x in named.items() if n != "bias"})
        return out, lse, *grads

    return run


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference_and_its_gradients(name):
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
    """Everything the kernels return against the reference."""
    q, k, v, named = arrays(case)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((*q.shape[:3], v.shape[3]), np.float32), rng.standard_normal(q.shape[:3], np.float32)
    got = with_gradients(lambda *a, **n: flash(*a, **n, **case.options(), **case.blocks(), impl=impl), weights)(q, k, v, named)
    want = with_gradients(lambda *a, **n: reference.flash(*a, **n, **case.options()), weights)(q, k, v, named)
    assert [x.dtype for x in got] == [case.dtype, jnp.float32, *[case.dtype] * 3, *[jnp.float32] * case.biased]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        tol = 2e-2 if case.dtype == "bfloat16" and i != 1 else 2e-6 if i < 2 else 1e-5
        b = np.float32(b)
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=tol * max(1, np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max()))


def test_what_cannot_be_seen_is_neither_computed_nor_fetched():
    """Tiles computed and K/V blocks fetched, of 16 rows by 16 keys, for 4 blocks of each."""
    q, k, v = (jnp.ones((1, 1, 64, 8)) for _ in range(3))
    at = jnp.arange(64, dtype=jnp.int32)[None]

    @jax.jit
    def counts(q_pos, k_pos, q_segment, k_segment):
        call = lambda **options: flash(q, k, v, block_q=16, block_k=16, count=True, impl="interpret", **options)[2]
        return {
            "diagonal": call(q_pos=q_pos, k_pos=k_pos, diagonal=0),
            "positions": call(q_pos=q_pos, k_pos=k_pos),
            "window": call(q_pos=q_pos, k_pos=k_pos, diagonal=0, window=17),
            "full": call(q_pos=q_pos, k_pos=k_pos, causal=False),
            "segments": call(q_pos=q_pos, k_pos=k_pos, causal=False, q_segment=q_segment, k_segment=k_segment),
        }

    whole = jax.tree.map(np.ndarray.tolist, jax.device_get(counts(at, at, at // 32, at // 32)))
    # rows 1 begin with the keys that rows 0 ended with, which are there; so does every block of rows with the window, which needs two
    assert whole == {"diagonal": [10, 9], "positions": [10, 9], "window": [7, 4], "full": [16, 16], "segments": [8, 8]}
    few = jax.device_get(counts(at, jnp.where(at < 10, at, -1), at // 32, at // 32))  # a cache that is mostly empty
    assert few["positions"].tolist() == [4, 1] and few["full"].tolist() == [4, 1]


DEVICES = {"tpu": ("TPU v5 lite", 1, "tpu"), "cuda": ("NVIDIA H100", None, "gpu")}


@pytest.mark.py312
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers(name, platform):
    case = cases.LARGE[name]
    impl = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]
    if platform == "cuda":
        pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    fn, structs = large(case, impl)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(*DEVICES[platform]))
    ours = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    with jax.sharding.use_abstract_mesh(mesh):
        lower = lambda: jax.export.export(jax.jit(fn), platforms=[platform], disabled_checks=ours)(*structs).mlir_module()
        if impl == "pallas_gpu" and case.dtype == "float32":
            with pytest.raises(NotImplementedError, match="cast q, k, v to bfloat16"):
                lower()
        else:
            assert lower().count({"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform]) >= 3


def large(case, impl):
    """The call with its gradients, and the shapes of its arguments."""
    f32, i32 = jnp.float32, jnp.int32
    shape = lambda *n, dtype=case.dtype: jax.ShapeDtypeStruct(n, dtype)
    keys = (case.b, case.g, case.s) if case.heads else (case.b, case.s)
    named = {"q_pos": shape(case.b, case.t, dtype=i32), "k_pos": shape(*keys, dtype=i32)}
    if case.biased:
        named["bias"] = shape(case.b, case.g, case.s, dtype=f32)
    if case.segments:
        named |= {"q_segment": shape(case.b, case.t, dtype=i32), "k_segment": shape(case.b, case.s, dtype=i32)}

    def fn(q, k, v, named):
        return with_gradients(lambda *a, **n: flash(*a, **n, **case.options(), **case.blocks(), impl=impl), (1.0, 1.0))(q, k, v, named)

    heads = ((case.h, case.t, case.d), (case.g, case.s, case.d), (case.g, case.s, case.c))
    return fn, (*(shape(case.b, *x) for x in heads), named)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", cases.LARGE)
def test_compiles_for_a_chip(name, chip, monkeypatch):
    """All the way, with libtpu: within the chip's VMEM, or the compiler refuses."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(chip, platform="tpu").devices
    where = jax.sharding.SingleDeviceSharding(devices[0])
    fn, structs = large(cases.LARGE[name], "pallas_tpu")
    compiled = jax.jit(fn, in_shardings=where, out_shardings=where).lower(*structs).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3


def test_refused():
    q, k = jnp.zeros((1, 4, 8, 16)), jnp.zeros((1, 2, 8, 16))
    at = jnp.zeros((1, 8), jnp.int32)
    call = lambda q=q, k=k, v=k, **options: flash(q, k, v, **{"q_pos": at, "k_pos": at, "impl": "interpret"} | options)
    for match, options in {
        "impl is 'fast'": {"impl": "fast"},
        "no multiple of 2 KV heads": {"q": q[:, :3]},
        "q is float32; all must be": {"k": k.astype("bfloat16")},
        "window is 0": {"window": 0},
        "block_q is 24; a block is": {"block_q": 24},
        "softcap is -1": {"softcap": -1.0},
        "scale is inf": {"scale": float("inf")},
        "come together": {"q_segment": at},
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**options)
    with pytest.raises(NotImplementedError, match="float16 on TPUs"):
        call(q.astype("float16"), k.astype("float16"), k.astype("float16"), impl="pallas_tpu")
    for match, options in {  # what the shapes in the signature would find first in a test run
        "k must be": {"k": k[..., :8]},
        "all but the last axis": {"v": k[:, :, :7]},
        "q_pos is int32": {"q_pos": at[:, :3]},
        "bias is float32": {"bias": jnp.zeros((1, 1, 8))},
    }.items():
        with pytest.raises(ValueError, match=match):
            check(**{"q": q, "k": k, "q_pos": at, "k_pos": at} | options)
    out, lse, count = call(k=k[:, :, :0], v=k[:, :, :0], k_pos=at[:, :0], count=True)
    assert not out.any() and (lse == -jnp.inf).all() and not count.any()
