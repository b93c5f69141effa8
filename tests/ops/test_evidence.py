"""Evidence against the dense attention matrix in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxtok.ops import _chunked
from jaxtok.ops.attention import attention
from jaxtok.ops.evidence import perturbed, ranked, received, rows
from jaxtok.ops.noise import gumbel, words


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


def matrix(q, k, q_pos, k_pos, bias=None, causal=True, window=None, softcap=None):
    """The attention matrix [b h t s], entry by entry; rows that see nothing are zero."""
    r = q.shape[1] // k.shape[1]
    p = np.zeros((*q.shape[:3], k.shape[2]))
    for n, h, i, j in np.ndindex(p.shape):
        at, where = q_pos[n, i], k_pos[n, j] if k_pos.ndim == 2 else k_pos[n, h // r, j]
        if at >= 0 and where >= 0 and (where <= at or not causal) and (window is None or at - where < window):
            y = np.dot(q[n, h, i].astype(np.float64), k[n, h // r, j].astype(np.float64)) * q.shape[3] ** -0.5
            y = y if softcap is None else softcap * np.tanh(y / softcap)
            p[n, h, i, j] = np.exp(y + (0 if bias is None else bias[n, h // r, j]))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total > 0, total, 1)


def make(h, g, t, s, *, bias=False, heads=False, dead=(0, 13), d=6):
    rng = np.random.default_rng(3)
    pos = np.stack([np.maximum(np.arange(s) - n, -1) for n in dead]).astype(np.int32)
    x = {"q": rng.normal(size=(2, h, t, d)).astype(np.float32), "k": rng.normal(size=(2, g, s, d)).astype(np.float32)}
    x |= {"q_pos": pos[:, s - t :], "k_pos": pos}
    x |= {"bias": rng.normal(size=(2, g, s)).astype(np.float32)} if bias else {}
    if heads:
        x["k_pos"] = rng.permuted(np.where(rng.random((2, g, s)) < 0.4, -1, pos[:, None]), axis=2)
    return x


CASES = {
    "mha": (make(2, 2, 20, 20), {"diagonal": 0}, None),
    "gqa": (make(4, 2, 20, 20, bias=True), {"diagonal": 0, "softcap": 1.5, "window": 9}, None),
    "cache": (make(4, 1, 12, 21, bias=True, heads=True), {}, 7),
    "two_sided": (make(4, 2, 17, 23), {"causal": False}, None),
}
LAST = 5


def everything(q, k, rest, static):
    """lse, attention received, the last rows."""
    lse = attention(q, k, k, **rest, **static)[1]
    last = {key: a for key, a in static.items() if key != "diagonal"}
    tail = rows(q[:, :, -LAST:], k, lse[..., -LAST:], **rest | {"q_pos": rest["q_pos"][:, -LAST:]}, **last)
    return lse, received(q, k, lse, **rest, **static), tail


def split(x, window):
    rest = {name: jnp.asarray(a) for name, a in x.items() if name not in "qk"}
    return jnp.asarray(x["q"]), jnp.asarray(x["k"]), rest | ({} if window is None else {"window": jnp.int32(window)})


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_matrix(name, small):
    x, static, window = CASES[name]
    lse, columns, tail = jax.jit(functools.partial(everything, static=static))(*split(x, window))
    window = {} if window is None else {"window": window}
    p = matrix(**x, **{key: a for key, a in static.items() if key != "diagonal"}, **window)
    assert columns.dtype == tail.dtype == jnp.float32
    np.testing.assert_allclose(columns, p.sum(2), atol=5e-6)
    np.testing.assert_allclose(tail, p[:, :, -LAST:], atol=2e-6)
    # What all keys receive is the number of queries that see something.
    np.testing.assert_allclose(columns.sum(-1), np.isfinite(lse).sum(-1), rtol=1e-5)
    k_pos = x["k_pos"][:, None] if x["k_pos"].ndim == 2 else np.repeat(x["k_pos"], x["q"].shape[1] // x["k"].shape[1], 1)
    dead = np.broadcast_to(k_pos < 0, columns.shape)
    assert dead.any() and (np.asarray(columns)[dead] == 0).all() and (np.moveaxis(np.asarray(tail), 2, 0)[:, dead] == 0).all()


RANKED = {
    "mha": (make(2, 2, 20, 20), {"diagonal": 0}),
    "gqa": (make(4, 2, 20, 20, bias=True), {"diagonal": 0, "softcap": 1.5, "window": 9}),
    "asks_unseen": (make(4, 1, 20, 20, heads=True), {}),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks(name, small):
    """Rounds of rank <- rank @ matrix, with the logits divided by tau; rows that ask and are not seen count in the first."""
    x, static = RANKED[name]
    tau, window = 0.3, static.get("window")
    fixed = {key: a for key, a in static.items() if key != "window"}
    q, k, rest = split(x, window)
    found = [jax.jit(functools.partial(ranked, tau=tau, rounds=n, **fixed))(q, k, **rest) for n in (0, 1, 3)]
    dense = {"softcap": static.get("softcap"), "window": window}
    live = x["q_pos"] >= 0
    p = tempered(x, tau, **dense)
    rank = np.broadcast_to((live / np.maximum(live.sum(-1, keepdims=True), 1))[:, None], found[0].shape)
    for n in range(4):
        if n in (0, 1, 3):
            np.testing.assert_allclose(found[(0, 1, None, 2)[n]], rank, atol=2e-6)
        rank = np.einsum("bhi,bhij->bhj", rank, p)


def tempered(x, tau, **dense):
    """The attention matrix of logits over tau."""
    p = matrix(**x, **dense)
    log = np.log(np.where(p > 0, p, 1)) / tau
    log = np.where(p > 0, log, -np.inf)
    top = np.where(np.isfinite(log.max(-1, keepdims=True)), log.max(-1, keepdims=True), 0)
    e = np.exp(log - top)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def test_ranks_in_limits():
    """Rows that see themselves alone keep a uniform rank; the mass stays one; nothing live is nothing; bad input is refused."""
    pos = jnp.asarray([[-1, 0, 1, 2], [-1, -1, -1, -1]], jnp.int32)
    eye = jnp.broadcast_to(100 * jnp.eye(4), (2, 1, 4, 4))
    run = jax.jit(lambda q: ranked(q, eye, q_pos=pos, k_pos=pos, tau=0.1, rounds=5))
    np.testing.assert_allclose(run(eye)[:, 0], [[0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 0]], atol=1e-6)
    other = run(jax.random.normal(jax.random.key(0), (2, 1, 4, 4)))
    np.testing.assert_allclose(other.sum(-1)[:, 0], [1, 0], atol=1e-6)
    for bad, match in (({"tau": 0.0}, "tau is 0.0"), ({"rounds": -1}, "rounds is -1")):
        with pytest.raises(ValueError, match=match):
            ranked(eye, eye, q_pos=pos, k_pos=pos, **bad)


def test_by_hand():
    """All logits equal: query i gives 1/(i+1) to each of its keys; key 0 receives 1 + 1/2 + 1/3."""
    q, k, pos = jnp.zeros((1, 1, 3, 2)), jnp.ones((1, 1, 3, 2)), jnp.arange(3, dtype=jnp.int32)[None]
    lse = jnp.asarray(np.log([[[1, 2, 3]]]), jnp.float32)
    np.testing.assert_allclose(jax.jit(received)(q, k, lse, q_pos=pos, k_pos=pos)[0, 0], [11 / 6, 5 / 6, 1 / 3], rtol=1e-6)
    tail = jax.jit(rows)(q[:, :, 1:], k, lse[..., 1:], q_pos=pos[:, 1:], k_pos=pos)
    np.testing.assert_allclose(tail[0, 0], [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def test_nothing_live_and_junk(small):
    """A row with nothing live gets zeros; 1e4 in dead rows changes nothing; gradients are finite and zero there."""
    x = make(2, 1, 16, 16, bias=True, dead=(7, 16))
    q, k, rest = split(x, None)

    def loss(q, k, bias):
        _, columns, tail = everything(q, k, rest | {"bias": bias}, {"diagonal": 0})
        return jnp.sum(columns**2) + jnp.sum(tail**2), (columns, tail)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, clean), grads = run(q, k, rest["bias"])
    junk = [a.at[0, :, :7].set(1e4).at[1].set(-1e4) for a in (q, k, rest["bias"])]
    (_, dirty), grads_junk = run(*junk)
    for a, b in zip((*clean, *grads), (*dirty, *grads_junk), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all() and (a[1] == 0).all() and np.abs(a[0]).max() > 0


def test_gradient_is_that_of_the_matrix(small):
    """Through lse as well: received differentiates like the column sums of a softmax."""
    x, static, window = CASES["cache"]
    q, k, rest = split(x, window)
    weight = np.random.default_rng(4).normal(size=(2, 4, 21))
    grads = jax.jit(jax.grad(lambda q, k: jnp.sum(everything(q, k, rest, static)[1] * weight.astype(np.float32)), (0, 1)))(q, k)
    rng = np.random.default_rng(5)
    for at, name in enumerate("qk"):
        direction = rng.normal(size=x[name].shape)
        up, down = ((matrix(**x | {name: x[name] + e * direction}, window=window).sum(2) * weight).sum() for e in (1e-5, -1e-5))
        np.testing.assert_allclose((np.asarray(grads[at], np.float64) * direction).sum(), (up - down) / 2e-5, rtol=1e-4, atol=1e-4)


def test_bfloat16_keys_give_float32_scores(small):
    x, static, window = CASES["gqa"]
    x = {key: np.array(jnp.asarray(a, jnp.bfloat16), np.float32) if key in "qk" else a for key, a in x.items()}
    q, k, rest = split(x, window)
    _, columns, tail = jax.jit(functools.partial(everything, static=static))(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), rest)
    p = matrix(**x, softcap=1.5, window=9)
    assert columns.dtype == tail.dtype == jnp.float32
    np.testing.assert_allclose(columns, p.sum(2), atol=2e-5)
    np.testing.assert_allclose(tail, p[:, :, -LAST:], atol=1e-5)


def test_memory_is_linear():
    """Temporary memory of value and gradient at 8,192 tokens over that at 2,048."""

    def temp(n):
        x, p = jax.ShapeDtypeStruct((1, 1, n, 8), jnp.float32), jax.ShapeDtypeStruct((1, n), jnp.int32)
        f = lambda q, k, p: jnp.sum(received(q, k, q[..., 0], q_pos=p, k_pos=p, diagonal=0) ** 2)
        return jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, x, p).compile().memory_analysis().temp_size_in_bytes

    assert temp(8192) <= 4.4 * temp(2048)


def disturbed(x, drawn, tau, **static):
    """The perturbed attention matrix of numpy with the noise of `gumbel`, whole: its column sums [b h s]."""
    k_pos = x["k_pos"][:, None] if x["k_pos"].ndim == 2 else x["k_pos"]
    z = 0.0 if drawn is None else np.asarray(gumbel(drawn, jnp.asarray(x["q_pos"]), jnp.asarray(k_pos), x["q"].shape[1]), np.float64)
    p = matrix(**x, **static)
    y = np.where(p > 0, (np.log(np.where(p > 0, p, 1)) + z) / tau, -np.inf)
    e = np.where(p > 0, np.exp(y - y.max(-1, keepdims=True, initial=-1e9)), 0)
    return (e / np.maximum(e.sum(-1, keepdims=True), 1e-300)).sum(2)


@pytest.mark.parametrize("name, tau, seed", [("mha", 1.0, 0), ("gqa", 1.7, 1), ("cache", 0.5, 2), ("two_sided", 3.0, None)])
def test_perturbed_equals_the_dense_matrix(name, tau, seed, small):
    """In blocks of 8 x 8; every query that sees something gives 1; rows in other places of the call change nothing."""
    x, static, window = CASES[name]
    q, k, rest = split(x, window)
    drawn, fn = words(None, seed, 0), jax.jit(functools.partial(perturbed, **static))
    got = fn(q, k, words=drawn, tau=jnp.float32(tau), **rest)
    want = disturbed(
        x, drawn, tau, **{key: a for key, a in static.items() if key != "diagonal"}, **({} if window is None else {"window": window})
    )
    np.testing.assert_allclose(got, want, atol=5e-6)
    np.testing.assert_allclose(got.sum(-1), np.isfinite(attention(q, k, k, **rest, **static)[1]).sum(-1), rtol=1e-5)
    if name == "cache":  # the slots in another order
        order = np.random.default_rng(0).permutation(k.shape[2])
        moved = fn(q, k[:, :, order], words=drawn, tau=jnp.float32(tau), **rest | {n: rest[n][:, :, order] for n in ("k_pos", "bias")})
        np.testing.assert_allclose(moved, got[..., order], atol=5e-6)


def test_perturbed_without_noise_is_received(small):
    x, static, window = CASES["gqa"]
    q, k, rest = split(x, window)
    calm = jax.jit(functools.partial(perturbed, words=None, tau=1.0, **static))(q, k, **rest)
    np.testing.assert_allclose(calm, everything(q, k, rest, static)[1], atol=2e-6)
    hot = perturbed(q, k, words=None, tau=1e9, **rest, **static)  # no end of heat: each key that is seen gets as much
    np.testing.assert_allclose(hot, disturbed(x, None, 1e9, softcap=1.5, window=9), atol=2e-6)
    grad = jax.grad(lambda q: jnp.sum(perturbed(q, k, words=words(None, 0, 0), tau=2.0, **rest, **static)))(q)
    assert not np.asarray(grad).any()  # a choice is made of it


def test_perturbed_needs_no_matrix():
    """Temporary memory at 8,192 tokens over that at 2,048, with noise."""

    def temp(n):
        x, p = jax.ShapeDtypeStruct((1, 1, n, 8), jnp.float32), jax.ShapeDtypeStruct((1, n), jnp.int32)
        f = lambda q, k, p: perturbed(q, k, words=words(None, 0, 0), tau=1.5, q_pos=p, k_pos=p, diagonal=0)
        return jax.jit(f).lower(x, x, p).compile().memory_analysis().temp_size_in_bytes

    assert temp(8192) <= 4.4 * temp(2048)


def test_wrong_arguments(untyped):
    x, y = jnp.zeros((1, 2, 4, 3)), jnp.zeros((1, 2, 4))
    pos = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"lse is float32 \[1, 2, 3\]; it must be float32 \[1, 2, 4\]"):
        received(x, x, y[..., :3], q_pos=pos, k_pos=pos)
    with pytest.raises(ValueError, match="q is float32 and k is bfloat16"):
        rows(x, x.astype(jnp.bfloat16), y, q_pos=pos, k_pos=pos)
    with pytest.raises(ValueError, match="window is 0"):
        rows(x, x, y, q_pos=pos, k_pos=pos, window=0)
    for tau in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a temperature must be positive and finite"):
            perturbed(x, x, words=None, tau=tau, q_pos=pos, k_pos=pos)
