"""attention and merge against float64 numpy written from the definition, in blocks far smaller than the inputs."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtok.ops import _chunked
from jaxtok.ops.attention import attention, merge

FLOATS = ("q", "k", "v", "bias")


@pytest.fixture
def small(monkeypatch):
    """Blocks of 8 x 8."""
    monkeypatch.setattr(_chunked, "CHUNK", 8)
    monkeypatch.setattr(_chunked, "LOGITS", 64)


@pytest.fixture
def untyped():
    """Without the annotations' check, so that the function's own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def dense(q, k, v, q_pos, k_pos, bias=None, causal=True, window=None, softcap=None, scale=None):
    """out, lse, query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, h, t, d), g = q.shape, k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for n, head, i in np.ndindex(b, h, t):
        kv, at = head // (h // g), q_pos[n, i]
        where = k_pos[n] if k_pos.ndim == 2 else k_pos[n, kv]
        see = [j for j, p in enumerate(where) if at >= 0 and p >= 0 and (p <= at or not causal) and (window is None or at - p < window)]
        if see:
            y = k[n, kv, see] @ q[n, head, i] * (d**-0.5 if scale is None else scale)
            y = y if softcap is None else softcap * np.tanh(y / softcap)
            y = y if bias is None else y + bias[n, kv, see]
            w = np.exp(y - y.max())
            out[n, head, i], lse[n, head, i] = w @ v[n, kv, see] / w.sum(), np.log(w.sum()) + y.max()
    return out, lse


def dense_jax(q, k, v, q_pos, k_pos, bias=None, causal=True, window=None, softcap=None, scale=None):
    """The same in jnp with K and V repeated, for gradients."""
    r = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, r, 1), jnp.repeat(v, r, 1)
    i, j = q_pos[:, None, :, None], (k_pos[:, None] if k_pos.ndim == 2 else jnp.repeat(k_pos, r, 1))[:, :, None]
    see = (i >= 0) & (j >= 0) & ((j <= i) | (not causal)) & (True if window is None else i - j < window)
    y = q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    y = y if softcap is None else softcap * jnp.tanh(y / softcap)
    y = y if bias is None else y + jnp.repeat(bias, r, 1)[:, :, None]
    y = jnp.where(see, y, -1e30)
    some = see.any(-1)
    lse = jax.nn.logsumexp(y, -1)
    p = jnp.where(see, jnp.exp(y - lse[..., None]), 0)
    return p @ v, jnp.where(some, lse, -jnp.inf)


def make(h, g, t, s, *, seed=0, bias=False, heads=False, dead=(0, 9), b=2, d=6):
    """Random operands. The keys stand at 0..s-1 less the row's dead ones (left padding), the queries at the last t of them.

    `heads`: a cache in which each head has lost other keys and the slots are in no order.
    """
    rng = np.random.default_rng(seed)
    pos = np.stack([np.maximum(np.arange(s) - n, -1) for n in dead[:b]]).astype(np.int32)
    x = {"q": rng.normal(size=(b, h, t, d)), "k": rng.normal(size=(b, g, s, d)), "v": rng.normal(size=(b, g, s, d))}
    x |= {"bias": rng.normal(size=(b, g, s))} if bias else {}
    x = {name: a.astype(np.float32) for name, a in x.items()} | {"q_pos": pos[:, s - t :], "k_pos": pos}
    if heads:
        k_pos = np.where(rng.random((b, g, s)) < 0.4, -1, pos[:, None])
        x["k_pos"] = rng.permuted(k_pos, axis=2)
    return x


# name: operands, static arguments, the window where it is passed as a traced scalar
CASES = {
    "mha": (make(3, 3, 20, 20), {"diagonal": 0}, None),
    "gqa": (make(4, 2, 20, 20, bias=True), {"diagonal": 0, "softcap": 1.5, "scale": 0.7}, None),
    "mqa_window": (make(4, 1, 21, 21), {"diagonal": 0, "window": 6}, None),
    "prefix": (make(4, 2, 12, 28, bias=True, dead=(0, 20)), {"diagonal": 16}, None),
    "cache": (make(4, 2, 12, 28, bias=True, heads=True, dead=(0, 20)), {}, None),
    "cache_window": (make(4, 2, 12, 28, bias=True, heads=True), {"softcap": 2.0}, 7),
    "two_sided": (make(4, 2, 17, 23), {"causal": False}, None),
    "two_sided_window": (make(2, 2, 16, 16, bias=True), {"causal": False, "window": 5}, None),
    "decode": (make(4, 2, 1, 28, bias=True, heads=True), {"window": 20}, None),
    "short": (make(4, 1, 3, 5, dead=(0, 4)), {}, None),
}


def jitted(attend, static, weights):
    """(out, lse) and the gradients of a random functional of both that does not look at lse = -inf."""

    def loss(floats, rest):
        out, lse = attend(**floats, **rest, **static)
        some = jnp.isfinite(lse)
        return jnp.sum(out.astype(jnp.float32) * weights[0]) + jnp.sum(jnp.where(some, lse, 0) * weights[1]), (out, lse)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def split(x, window=None):
    rest = {name: jnp.asarray(a) for name, a in x.items() if name not in FLOATS}
    rest |= {} if window is None else {"window": jnp.int32(window)}
    return {name: jnp.asarray(a) for name, a in x.items() if name in FLOATS}, rest


@pytest.mark.parametrize("name", CASES)
def test_equals_definition_and_its_gradients(name, small):
    x, static, window = CASES[name]
    rng = np.random.default_rng(1)
    weights = rng.normal(size=x["q"].shape), rng.normal(size=x["q"].shape[:3])
    floats, rest = split(x, window)
    w32 = [a.astype(np.float32) for a in weights]
    (_, (out, lse)), grads = jitted(attention, static, w32)(floats, rest)
    arguments = {key: a for key, a in static.items() if key != "diagonal"} | ({} if window is None else {"window": window})
    ref = functools.partial(dense, q_pos=x["q_pos"], k_pos=x["k_pos"], **arguments)
    expected = ref(**{key: x[key] for key in floats})
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=4e-6)
    assert not np.isnan(lse).any() and (np.asarray(out)[np.isneginf(lse)] == 0).all()

    if name == "cache_window":
        without = {key: a for key, a in static.items() if key != "diagonal"}
        _, reference = jitted(dense_jax, without, w32)(floats, rest)
        for key in floats:
            np.testing.assert_allclose(grads[key], reference[key], atol=2e-5, err_msg=key)

    # Each operand along random directions, by finite differences of the float64 definition.
    def functional(**moved):
        out, lse = ref(**{key: x[key] for key in floats} | moved)
        return (out * weights[0]).sum() + (np.where(np.isfinite(lse), lse, 0) * weights[1]).sum()

    for key in [*floats, *floats]:
        direction = rng.normal(size=x[key].shape)
        slope = (functional(**{key: x[key] + 1e-5 * direction}) - functional(**{key: x[key] - 1e-5 * direction})) / 2e-5
        ours = (np.asarray(grads[key], np.float64) * direction).sum()
        np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4, err_msg=key)


def test_one_block_equals_many(small, monkeypatch):
    x, static, _ = CASES["gqa"]
    floats, rest = split(x)
    many = jax.jit(functools.partial(attention, **static))(**floats, **rest)
    monkeypatch.setattr(_chunked, "CHUNK", 256)
    monkeypatch.setattr(_chunked, "LOGITS", 2**17)
    for a, b in zip(many, jax.jit(functools.partial(attention, **static))(**floats, **rest), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(("t", "s"), [(8, 16), (9, 17), (24, 7)])
def test_block_boundaries(t, s, small):
    """Sizes at, above and below whole blocks; two-sided, so that every key counts."""
    x = make(2, 1, min(t, s), s, dead=(0, 2))
    x["q"] = np.random.default_rng(2).normal(size=(2, 2, t, 6)).astype(np.float32)
    x["q_pos"] = np.stack([np.arange(t), np.maximum(np.arange(t) - 3, -1)]).astype(np.int32)
    floats, rest = split(x)
    out, lse = jax.jit(functools.partial(attention, causal=False))(**floats, **rest)
    expected = dense(**x, causal=False)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=4e-6)


def test_bfloat16(small):
    x, static, _ = CASES["gqa"]
    x = {key: np.array(jnp.asarray(a, jnp.bfloat16), np.float32) if key in "qkv" else a for key, a in x.items()}
    floats, rest = split(x)
    floats = {key: a.astype(jnp.bfloat16) if key in "qkv" else a for key, a in floats.items()}
    weights = np.ones(x["q"].shape, np.float32), np.ones(x["q"].shape[:3], np.float32)
    (_, (out, lse)), grads = jitted(attention, static, weights)(floats, rest)
    expected = dense(**x, softcap=static["softcap"], scale=static["scale"])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)  # the logits are float32 sums
    np.testing.assert_allclose(out.astype(jnp.float32), expected[0], atol=2e-2)
    exact = jax.jit(functools.partial(attention, **static, out_dtype=jnp.float32))(**floats, **rest)[0]
    assert exact.dtype == jnp.float32
    np.testing.assert_allclose(exact, expected[0], atol=6e-3)
    _, reference = jitted(dense_jax, {"softcap": 1.5, "scale": 0.7}, weights)(split(x)[0], rest)
    assert {key: a.dtype for key, a in grads.items()} == {key: a.dtype for key, a in floats.items()}
    for key in floats:
        np.testing.assert_allclose(grads[key].astype(jnp.float32), reference[key], atol=8e-2, err_msg=key)


def test_dead_rows_neither_matter_nor_learn(small):
    """1e4 in dead keys, values, biases and queries changes nothing; a batch row with nothing live is 0, -inf and without gradient, even
    when the caller's cotangents are NaN there."""
    x = make(4, 2, 20, 20, bias=True, dead=(6, 20))
    floats, rest = split(x)

    def loss(floats):
        out, lse = attention(**floats, **rest, diagonal=0)
        return jnp.sum(jnp.sqrt(jnp.sum(out * out, -1))) + jnp.sum(jnp.exp(lse)), (out, lse)  # sqrt'(0) = inf: inf * 0

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (out, lse)), grads = run(floats)
    junk = {key: a.copy() for key, a in x.items() if key in FLOATS}
    for key, a in junk.items():
        a[:, :, :6] = 1e4 if key != "q" else -1e4
        a[1] = 1e4
    (_, (out_junk, lse_junk)), grads_junk = run({key: jnp.asarray(a) for key, a in junk.items()})
    np.testing.assert_array_equal(out, out_junk)
    np.testing.assert_array_equal(lse, lse_junk)
    assert not np.asarray(out)[1].any() and np.isneginf(np.asarray(lse)[1]).all()
    for key in floats:
        grad = np.asarray(grads[key])
        assert np.isfinite(grad).all() and (grad[1] == 0).all() and (grad[:, :, :6] == 0).all() and np.abs(grad[0]).max() > 0
        np.testing.assert_array_equal(grad, grads_junk[key])


def test_no_keys_and_no_queries():
    x, _, _ = CASES["short"]
    floats, rest = split(x)
    empty = {"k": floats["k"][:, :, :0], "v": floats["v"][:, :, :0]}
    out, lse = attention(q=floats["q"], **empty, q_pos=rest["q_pos"], k_pos=rest["k_pos"][:, :0])
    assert not np.any(out) and np.isneginf(lse).all()
    out, lse = attention(**(floats | {"q": floats["q"][:, :, :0]}), q_pos=rest["q_pos"][:, :0], k_pos=rest["k_pos"])
    assert out.shape == (2, 4, 0, 6) and lse.shape == (2, 4, 0)


def test_transformations_compose(small):
    """jit, vmap, grad, checkpoint and scan, with a traced window, equal the plain calls."""
    x, _, _ = CASES["cache_window"]
    floats, rest = split(x)

    def loss(floats, window):
        out, lse = attention(**floats, **rest, window=window, softcap=2.0)
        return jnp.sum(out * out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    windows, factors = jnp.asarray([3, 7, 2**31 - 1], jnp.int32), jnp.asarray([1.0, 0.5], jnp.float32)

    def one(factor, window):
        return jax.grad(jax.checkpoint(lambda f: loss(jax.tree.map(lambda a: a * factor, f), window)))(floats)

    nested = jax.jit(lambda: jax.lax.scan(lambda _, w: (None, jax.vmap(lambda f: one(f, w))(factors)), None, windows)[1])()
    plain = jax.jit(one)
    for i, j in np.ndindex(3, 2):
        for key, a in plain(factors[j], windows[i]).items():
            np.testing.assert_allclose(nested[key][i, j], a, atol=1e-5, err_msg=key)


def test_shard_map(small):
    """Queries or keys vary over the mesh and the other does not, forward and backward, with JAX's check of it on."""
    x, _, _ = CASES["cache"]
    floats, rest = split(x, window=9)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    whole, part = PartitionSpec(), PartitionSpec(None, None, "x")

    def loss(floats):
        out, lse = attention(**floats, **rest)
        return jnp.sum(out * out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    def summed(floats):
        return jax.lax.psum(loss(floats), "x")

    expected = jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(floats))
    for vary in ("q", ("k", "v", "bias")):
        specs = {key: part if key in vary else whole for key in floats}
        mapped = jax.shard_map(summed, mesh=mesh, in_specs=(specs,), out_specs=whole)
        for a, b in zip(jax.tree.leaves(jax.jit(jax.value_and_grad(mapped))(floats)), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def _loop_lengths(**static):
    p = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 2, 64, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x, p: attention(x, x, x, q_pos=p, k_pos=p, **static))(x, p)
    return [word for word in str(jaxpr).split() if word.startswith("length=")]


def test_diagonal_leaves_out_blocks(small):
    assert _loop_lengths() == ["length=64"]  # 8 x 8 blocks
    assert _loop_lengths(diagonal=0) == ["length=36"]
    assert _loop_lengths(diagonal=8) == ["length=43"]
    assert _loop_lengths(diagonal=-64) == []


def test_memory_is_linear():
    """Temporary memory at 8,192 tokens over that at 2,048."""

    def temp(n, backward):
        x, kv = (jax.ShapeDtypeStruct((1, heads, n, 8), jnp.float32) for heads in (2, 1))
        p = jax.ShapeDtypeStruct((1, n), jnp.int32)
        f = lambda q, k, v, p: jnp.sum(attention(q, k, v, q_pos=p, k_pos=p, diagonal=0)[0])
        return jax.jit(jax.grad(f, (0, 1, 2)) if backward else f).lower(x, kv, kv, p).compile().memory_analysis().temp_size_in_bytes

    for backward in (False, True):
        assert temp(8192, backward) <= 4.4 * temp(2048, backward)


def test_merge_joins_parts_of_the_keys():
    """Three parts of the keys, the middle one all dead, in both associations and in any order; the empty part is the identity."""
    x = make(4, 2, 12, 27, bias=True, heads=True, dead=(0, 20))
    x["k_pos"][:, :, 9:18] = -1
    floats, rest = split(x)
    expected = dense(**x)
    attend, join = jax.jit(attention), jax.jit(merge)
    part = lambda at: {key: (floats | rest)[key][:, :, at : at + 9] for key in ("k", "v", "bias", "k_pos")}
    a, b, c = (attend(q=floats["q"], q_pos=rest["q_pos"], **part(at)) for at in (0, 9, 18))
    assert np.isneginf(np.asarray(b[1])).all() and np.isneginf(expected[1]).any()
    for joined in (join(*join(*a, *b), *c), join(*a, *join(*b, *c)), join(*join(*c, *a), *b)):
        np.testing.assert_allclose(joined[0], expected[0], atol=2e-6)
        np.testing.assert_allclose(joined[1], expected[1], atol=4e-6)
    for same in (join(*a, *b), join(*b, *a), join(a[0], a[1], jnp.full_like(a[0], jnp.nan), b[1])):
        np.testing.assert_allclose(same[0], a[0], rtol=1e-6)
        np.testing.assert_allclose(same[1], a[1], rtol=1e-6)


def test_merge_by_hand_and_its_gradients():
    """exp(lse) = 1 and 3: out = a/4 + 3b/4, lse = log 4.  d lse/d lse_a = 1/4, d out/d lse_a = (1/4)(3/4)(a - b)."""
    out_a, out_b = jnp.asarray([[8.0], [5.0], [0.0]]), jnp.asarray([[4.0], [0.0], [0.0]])
    lse_a, lse_b = jnp.asarray([0.0, 2.0, -jnp.inf]), jnp.asarray([np.log(3.0), -np.inf, -np.inf], jnp.float32)
    args = out_a, lse_a, out_b, lse_b
    out, lse = merge(*args)
    np.testing.assert_allclose(out[:, 0], [5.0, 5.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(lse, [np.log(4.0), 2.0, -np.inf], rtol=1e-6)

    def total(which, *args):
        value = merge(*args)[which]
        return jnp.sum(jnp.where(jnp.isfinite(value), value, 0))

    by_out, by_lse = jax.jit(lambda *args: [jax.grad(functools.partial(total, which), (0, 1, 2, 3))(*args) for which in (0, 1)])(*args)
    np.testing.assert_allclose(by_out[0][:, 0], [0.25, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(by_out[1], [0.75, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(by_out[2][:, 0], [0.75, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(by_out[3], [-0.75, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(by_lse[1], [0.25, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(by_lse[3], [0.75, 0, 0], rtol=1e-6)


def test_gradient_through_merge(small):
    """Split over keys and merged = whole: the parts' lse carry gradient."""
    x, static, _ = CASES["prefix"]
    floats, rest = split(x)

    def halves(floats):
        sides = []
        for cut in (slice(0, 13), slice(13, 28)):
            k, v, bias = (floats[key][:, :, cut] for key in ("k", "v", "bias"))
            sides += attention(floats["q"], k, v, q_pos=rest["q_pos"], k_pos=rest["k_pos"][:, cut], bias=bias)
        return jnp.sum(merge(*sides)[0] ** 3)

    def whole(floats):
        return jnp.sum(attention(**floats, **rest, **static)[0] ** 3)

    got, expected = (jax.jit(jax.grad(f))(floats) for f in (halves, whole))
    for key in floats:
        np.testing.assert_allclose(got[key], expected[key], atol=2e-5, err_msg=key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((2, 3, 5, 6), np.float32), "v": np.zeros((2, 3, 5, 6), np.float32)}, "4 query heads are no multiple of 3 KV heads"),
        ({"k": np.zeros((2, 1, 5, 8), np.float32)}, r"q is \[2, 4, 3, 6\] and k is \[2, 1, 5, 8\]"),
        ({"v": np.zeros((2, 1, 4, 6), np.float32)}, r"k is \[2, 1, 5, 6\] and v is \[2, 1, 4, 6\]"),
        ({"v": np.zeros((2, 1, 5, 6), jnp.bfloat16)}, "q is float32 and v is bfloat16; cast them"),
        ({"q": np.zeros((2, 4, 3, 6), np.int32)}, "q is int32"),
        ({"q_pos": np.zeros((2, 3), np.int16)}, "q_pos is int16; positions must be int32"),
        ({"k_pos": np.zeros((2, 2, 5), np.int32)}, r"k_pos is \[2, 2, 5\]; it must be \[2, 5\] or \[2, 1, 5\]"),
        ({"bias": np.zeros((2, 1, 4), np.float32)}, r"bias is float32 \[2, 1, 4\]; it must be float32 \[2, 1, 5\]"),
        ({"bias": np.zeros((2, 1, 5), jnp.bfloat16)}, "bias is bfloat16"),
        ({"window": 0}, "window is 0"),
        ({"window": np.zeros(2, np.int32)}, r"window is int32 \[2\]"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"diagonal": 1.5}, "diagonal is 1.5"),
        ({"out_dtype": jnp.int32}, "out_dtype is int32"),
        ({"impl": "fast"}, "impl is 'fast'; it must be one of auto, xla"),
    ],
)
def test_wrong_arguments(change, message, untyped):
    x = make(4, 1, 3, 5, dead=(0, 4)) | change
    arrays = {key: jnp.asarray(a) if isinstance(a, np.ndarray) else a for key, a in x.items()}
    with pytest.raises(ValueError, match=message):
        attention(**arrays)


def test_wrong_merges(untyped):
    out, lse = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"both sides must be \[... d\] and \[...\]"):
        merge(out, lse, out[:1], lse[:1])
    with pytest.raises(ValueError, match="out_a is float32 and out_b is bfloat16"):
        merge(out, lse, out.astype(jnp.bfloat16), lse)


def test_kernels_by_name():
    """The kernel gives what XLA gives, in the dtype asked for; a traced window is not for it."""
    floats, rest = split(CASES["gqa"][0])
    static = CASES["gqa"][1]
    found, want = (
        jax.jit(functools.partial(attention, **static, out_dtype=jnp.float32, impl=i))(**floats, **rest) for i in ("interpret", "xla")
    )
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    with pytest.raises(NotImplementedError, match="impl='pallas_tpu': its window is a static int or None, not an array; use impl='xla'"):
        attention(**floats, **rest, window=jnp.int32(3), impl="pallas_tpu")


def test_segments():
    """Packed sequences are what they are alone; dense by the definition, gradients too."""
    x, segment = make(4, 2, 20, 20, bias=True, dead=(0, 3)), np.sort(np.random.default_rng(5).integers(0, 3, (2, 20)), 1).astype(np.int32)
    floats, rest = split(x)
    given = {"q_segment": jnp.asarray(segment), "k_segment": jnp.asarray(segment)}
    loss = lambda floats, rest, more: jnp.sum(attention(**floats, **rest, **more)[0] ** 2)
    run = jax.jit(jax.value_and_grad(loss))
    value, grads = run(floats, rest, given)
    parts = []
    for j in range(3):
        alone = rest | {name: jnp.where(given["q_segment"] == j, rest[name], -1) for name in ("q_pos", "k_pos")}
        parts.append(run(floats, alone, {}))
    np.testing.assert_allclose(value, sum(v for v, _ in parts), rtol=1e-5)
    for name, g in grads.items():
        np.testing.assert_allclose(g, sum(p[name] for _, p in parts), atol=2e-5, err_msg=name)
    with pytest.raises(ValueError, match="come together"):
        attention(**floats, **rest, q_segment=given["q_segment"])
