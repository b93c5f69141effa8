"""The score kernels against their references, what they mean, their lowering, and what they refuse."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels import scores
from jaxtok_kernels.scores import cases, reference


@functools.cache
def wanted(case):
    wide = {k: x.astype(jnp.float32) if case.fn != "low_bit" and x.dtype == "bfloat16" else x for k, x in case.arrays().items()}
    return jax.jit(lambda a: getattr(reference, case.fn)(**a, **case.keywords()))(wide)


def compare(case, got):
    tol = 2e-6 if case.dtype == "float32" or case.fn == "low_bit" else 2e-2
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, wanted(case)))
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape and x.dtype == (case.dtype if i else "float32")
        x, y = np.float32(x), np.float32(y)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        some = np.isfinite(y) & (np.abs(y) < 1e29)
        np.testing.assert_allclose(np.where(some, x, 0), np.where(some, y, 0), atol=tol * max(1, np.abs(y[some]).max(initial=0)))


def call(case, given, impl):
    return jax.jit(lambda a: getattr(scores, case.fn)(**a, **case.keywords(), impl=impl))(given)


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_reference(name):
    case = cases.CASES[name]
    given = case.arrays()
    if "live" in given:  # junk in dead rows
        given["x"] = jnp.where(given["live"][..., None], given["x"], 1e30)
    if "k_pos" in given:
        given["k"] = jnp.where(given["k_pos"][..., None] >= 0, given["k"], 1e30)
    compare(case, call(case, given, "interpret"))


def test_bounds_hold_every_key_of_the_page():
    """Pages of a cache: min and max from `chunk_means`, and no key's logit lies above its page's bound."""
    rng = np.random.default_rng(1)
    k, live = jnp.asarray(rng.standard_normal((1, 2, 64, 8)), jnp.float32), jnp.asarray(rng.random((1, 2, 64)) < 0.5)
    q = jnp.asarray(rng.standard_normal((1, 4, 8)), jnp.float32)
    mean, low, high = scores.chunk_means(k, live, chunk=16, bounds=True, impl="interpret")
    bound = scores.page_bounds(q, low, high, impl="interpret")
    logit = jnp.where(live[:, :, None], jnp.einsum("bgqd,bgsd->bgqs", q.reshape(1, 2, 2, 8), k), -jnp.inf)
    assert (jnp.max(logit.reshape(1, 2, 2, 4, 16), (2, 4)) <= bound + 1e-5).all()
    assert ((low <= mean) & (mean <= high)).all()
    by_hand = scores.page_bounds(jnp.array([[[2.0, -1.0]]]), jnp.array([[[[0.0, -3.0]]]]), jnp.array([[[[1.0, 5.0]]]]), impl="interpret")
    np.testing.assert_array_equal(by_hand, [[[2 * 1 + 1 * 3]]])


def test_low_bits_by_hand_and_their_error():
    """Against a numpy account of the card's formula, and against the exact logits within the bound from the steps."""
    case = cases.Case("low_bit", b=1, h=2, g=1, t=32, s=64, d=8, dead=0.0, options=(("block_q", 16), ("block_k", 16)))
    given = case.arrays()
    q, k = np.float64(given["q"][0]), np.float64(given["k"][0, 0])
    q_pos, lse = np.array(given["q_pos"][0]), np.float64(given["lse"][0])
    lse[np.isinf(lse)] = -1e30
    out = np.float64(call(case, given, "interpret"))[0]
    scale, centred_k = 8**-0.5, k - k.mean(0)
    for h in range(2):
        mean = q[h][q_pos >= 0].mean(0)
        centred = np.where(q_pos[:, None] >= 0, q[h] - mean, 0)
        for x in range(2):
            for y in range(4):
                rows, keys = slice(16 * x, 16 * x + 16), slice(16 * y, 16 * y + 16)
                dq, dk = np.abs(centred[rows]).max() / 7, np.abs(centred_k[keys]).max() / 7
                dot = np.rint(centred[rows] / dq) @ np.rint(centred_k[keys] / dk).T * dq * dk
                logit = scale * (dot + (mean @ centred_k[keys].T)[None] + (q[h][rows] @ k.mean(0))[:, None])
                exact = scale * q[h][rows] @ k[keys].T
                wrong = np.abs(centred[rows]).sum(1)[:, None] * dk / 2 + np.abs(centred_k[keys]).sum(1) * dq / 2 + 8 * dq * dk / 4
                live = (q_pos[rows, None] >= 0) & (np.arange(64)[keys] <= q_pos[rows, None])
                assert (np.abs(logit - exact) <= scale * wrong + 1e-9)[live].all()
                want = np.max(np.where(live, logit - lse[h][rows, None], -np.inf))
                np.testing.assert_allclose(out[h, x, y], want, rtol=2e-6, atol=4e-6)


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_tpu(name):
    case = cases.LARGE[name]
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    fn = jax.jit(lambda a: getattr(scores, case.fn)(**a, **case.keywords(), impl="pallas_tpu"))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(fn, platforms=["tpu"])(case.structs())
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.LARGE)
def test_lowers_for_gpu(name):
    case = cases.LARGE[name]
    if case.dtype == "float32" or dict(case.options).get("bounds"):
        pytest.skip("GPUs take 16-bit rows and make no bounds")
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in ("mosaic_gpu", "mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(
            jax.jit(lambda a: getattr(scores, case.fn)(**a, **case.keywords(), impl="pallas_gpu")),
            platforms=["cuda"],
            disabled_checks=checks,
        )(case.structs())
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.py312
@pytest.mark.parametrize("name", cases.GPU)
def test_gpu_kernel_equals_the_reference(name):
    if not hasattr(pytest.importorskip("jax.experimental.pallas.mosaic_gpu"), "InterpretGPUParams"):
        pytest.skip("needs the GPU interpreter of jax >= 0.11.2")
    case = cases.GPU[name]
    compare(case, call(case, case.arrays(), "interpret_gpu"))


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
    fn = lambda a: getattr(scores, case.fn)(**a, **case.keywords(), impl="pallas_tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(fn, in_shardings=where, out_shardings=where).lower(case.structs()).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_refused():
    q, low = jnp.zeros((1, 4, 8)), jnp.zeros((1, 2, 3, 8))
    x, live, at = jnp.zeros((1, 2, 6, 8)), jnp.ones((1, 2, 6), bool), jnp.zeros((1, 6), jnp.int32)
    k_pos = jnp.zeros((1, 2, 6), jnp.int32)
    refused = {
        "impl is 'fast'": lambda: scores.page_bounds(q, low, low, impl="fast"),
        "group must be one of": lambda: scores.page_bounds(q, low, low, group="min", impl="interpret"),
        "h a multiple of g": lambda: scores.page_bounds(q[:, :3], low, low, impl="interpret"),
        "chunk must be at least 1": lambda: scores.chunk_means(x, live, chunk=0, impl="interpret"),
        "bits must be in 2 to 8, got 9": lambda: scores.low_bit(x, x, at, k_pos, bits=9, scale=1.0, impl="interpret"),
        "block_k must be in": lambda: scores.low_bit(x, x, at, k_pos, block_k=0, scale=1.0, impl="interpret"),
    }
    for match, fn in refused.items():
        with pytest.raises(ValueError, match=match):
            fn()
    with pytest.raises(NotImplementedError, match="256 at most"):
        scores.chunk_means(x, live, chunk=300, bounds=True, impl="interpret")
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    with pytest.raises(NotImplementedError, match="all are bfloat16 or all float16"):
        scores.page_bounds(q, low, low, impl="pallas_gpu")
    assert scores.chunk_means(x[:, :, :0], live[:, :, :0], chunk=4, impl="interpret").shape == (1, 2, 0, 8)
    assert (scores.low_bit(x, x[:, :, :0], at, k_pos[:, :, :0], scale=1.0, impl="interpret").shape) == (1, 2, 1, 0)
