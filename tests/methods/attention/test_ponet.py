"""PoNet against loops written from its card, the official outputs, its limits; its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import PoNet
from jaxtok.methods.attention.ponet import globally, local_pool, pool, segment_pool
from tests.methods.attention.layers import config, exponent, gradients, mix, normal, softmax
from tests.methods.golden import cases

small = {"ponet": lambda n: PoNet(segments=4), "ponet:paper": lambda n: PoNet(segments=3, variant="paper")}
run = functools.partial(jax.jit, static_argnames=("segments", "window"))(pool)


def reference(q, k, v, out, segment, local, live, segments, window=3):
    """One sequence, by loops over its live rows: q, k, v [h n d], the others [n c]."""
    h, n, d = q.shape
    rows, size = np.flatnonzero(live), n // segments + 1
    total = np.zeros((n, h * d))
    if not len(rows):
        return total
    whole = []
    for i in range(h):
        share = softmax(np.array([q[i, rows].mean(0) @ k[i, t] for t in rows]) / np.sqrt(d))
        whole.append(sum(s * v[i, t] for s, t in zip(share, rows, strict=True)))
    whole = np.concatenate(whole)
    for rank, t in enumerate(rows):
        same = [r for j, r in enumerate(rows) if j // size == rank // size]
        near = [r for j, r in enumerate(rows) if abs(j - rank) <= window // 2]
        total[t] = (whole + segment[same].max(0)) * out[t] + local[near].max(0)
    return total


@pytest.mark.parametrize("segments, window", [(1, 3), (3, 3), (5, 1), (40, 5)])
def test_reference(segments, window):
    b, h, n, d = 4, 2, 13, 4
    q, k, v = (normal(i, b, h, n, d) for i in range(3))
    out, segment, local = (normal(i, b, n, h * d) for i in range(3, 6))
    live = np.arange(n) >= np.array([0, 4, 12, 13])[:, None]  # all, some, one, none; dead rows first
    live[1] = live[1, ::-1]  # dead rows last
    got = run(*map(jnp.asarray, (q, k, v, out, segment, local, live)), segments=segments, window=window)
    for i in range(b):
        want = reference(*(x[i] for x in (q, k, v, out, segment, local)), live[i], segments, window)
        np.testing.assert_allclose(got[i], want, atol=2e-6)


def test_by_hand():
    """One head of one channel: g = 0 makes G the mean of V; the segments are {0, 1, 2} and {3}."""
    row = lambda *x: jnp.asarray(x, jnp.float32).reshape(1, -1, 1)
    head = lambda *x: row(*x)[:, None]
    live = jnp.ones((1, 4), bool)
    got = pool(head(1, -1, 2, -2), head(5, 1, 2, 3), head(1, 2, 3, 6), row(1, 2, 1, 1), row(0, 5, 1, 2), row(1, 0, 3, 7), live, segments=2)
    assert got[0, :, 0].tolist() == [(3 + 5) * 1 + 1, (3 + 5) * 2 + 3, (3 + 5) * 1 + 7, (3 + 2) * 1 + 7]


def test_one_row_and_a_constant():
    q, k, out, segment, local = normal(0, 1, 2, 1, 3), normal(1, 1, 2, 1, 3), *(normal(i, 1, 1, 6) for i in (2, 3, 4))
    got = run(*map(jnp.asarray, (q, k, k, out, segment, local)), jnp.ones((1, 1), bool), segments=2)
    np.testing.assert_allclose(got, (k.reshape(1, 1, 6) + segment) * out + local, atol=1e-6)
    same = [jnp.broadcast_to(jnp.asarray(x), (*x.shape[:-2], 9, x.shape[-1])) for x in (q, k, k, out, segment, local)]
    many = run(*same, jnp.ones((1, 9), bool), segments=2)
    np.testing.assert_allclose(many, np.broadcast_to(got, many.shape), atol=1e-5)


def test_padding_says_nothing():
    """What lies in dead rows changes nothing, before or behind the live ones, and all stays finite."""
    n, live = 11, np.arange(11) >= 4
    arrays = [normal(i, 1, 2, n, 3) for i in range(3)] + [normal(i, 1, n, 6) for i in range(3, 6)]
    dead = [np.where(live[:, None], x, 1e30).astype(np.float32) for x in arrays]
    one, two = (run(*map(jnp.asarray, x), jnp.asarray(live[None]), segments=3) for x in (arrays, dead))
    assert np.array_equal(one, two) and not np.asarray(one)[0, :4].any()
    short = [x[..., 4:, :] for x in arrays]  # with one segment the number of rows does not matter
    one_segment = [run(*map(jnp.asarray, (*x, there[None])), segments=1) for x, there in ((arrays, live), (short, live[4:]))]
    np.testing.assert_allclose(one_segment[0][0, 4:], one_segment[1][0], atol=1e-6)
    moved = [np.roll(x, -4, -2) for x in arrays]
    behind = run(*map(jnp.asarray, moved), jnp.asarray(np.roll(live, -4)[None]), segments=3)
    np.testing.assert_allclose(behind[0, :7], one[0, 4:], atol=1e-6)


def test_variants():
    """official: the values are K, and the layer's v is not looked at; paper: they are v."""
    q, k, v, x = (*(normal(i, 1, 2, 5, 3) for i in range(3)), normal(3, 1, 5, 6))
    official, paper = PoNet(segments=2), PoNet(segments=2, variant="paper")
    (params,) = official.init_params(jax.random.key(0), config(2, 3))
    assert {name: p.shape for name, p in params.items() if "bias" not in name} == dict.fromkeys(("out", "segment", "local"), (6, 6))
    run = lambda method, values: mix(method, params, q, k, values, x=x)
    np.testing.assert_allclose(run(official, v), run(official, 0 * v), atol=0)
    np.testing.assert_allclose(run(paper, k), run(official, v), atol=1e-6)
    assert np.abs(run(paper, v) - run(official, v)).max() > 0.01


def test_gradients():
    arrays = [normal(i, 2, 2, 7, 3) for i in range(3)] + [normal(i, 2, 7, 6) for i in range(3, 6)]
    live = jnp.asarray(np.arange(7) >= np.array([[0], [3]]))
    fn = lambda *a: pool(*a, live, segments=2)
    assert all(np.any(g) and not g[1][..., :3, :].any() for g in gradients(fn, *arrays))  # dead rows


def test_official_outputs(data):
    for c in cases(data, "ponet"):
        q, k, out = (jnp.asarray(c[name]) for name in "QKO")
        b, h, n, d = q.shape
        local, segment = jnp.asarray(c["local"]), jnp.asarray(c["segment"])
        live = jnp.asarray(c["mask"] > 0) if "mask" in c else jnp.ones((b, n), bool)
        segments = int(c["num_segments"])
        heads = lambda x, to=(b, n, h, d): np.asarray(x).reshape(to).transpose(0, 2, 1, 3)
        here = np.asarray(live)[:, None, :, None]
        np.testing.assert_allclose(globally(q, k, k, live), c["global_vec"].reshape(b, h, d), atol=1e-5)
        for got, name in ((segment_pool(segment, live, segments), "segment_pooled"), (local_pool(local, live, 3), "local_pooled")):
            np.testing.assert_allclose(np.where(here, heads(got), 0), np.where(here, c[name], 0), atol=1e-6)
        flat = out.transpose(0, 2, 1, 3).reshape(b, n, h * d)
        np.testing.assert_allclose(run(q, k, k, flat, segment, local, live, segments=segments), c["out"], atol=1e-5)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_the_cost_is_linear(variant):
    method = PoNet(variant=variant)
    (params,) = jax.eval_shape(lambda: method.init_params(jax.random.key(0), config(4, 16)))
    params = {name: jnp.zeros(p.shape, p.dtype) for name, p in params.items()}
    assert exponent(lambda n: (method, params, None)) <= 1.1


@pytest.mark.parametrize("given", [dict(segments=0), dict(window=2), dict(window=0), dict(variant="kvpress")])
def test_refuses(given):
    with pytest.raises(ValueError):
        PoNet(**given)
