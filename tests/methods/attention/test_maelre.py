"""MAELRE (our reading of its abstract) against the card's formulas, its limits, its cost; its merge against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import SPECIAL, Evidence
from jaxtok.methods import MAELRE, MAELREMerge
from jaxtok.methods.attention.maelre import approximate, inverse, landmark_of, maelre
from jaxtok.models import encoder, vit
from tests.methods.attention.layers import config, exponent, full, gradients, mix, normal, softmax
from tests.methods.vision.toyrows import do, reduced, rows

small = {
    "maelre.attention": lambda n: MAELRE(switch=4, landmarks=3, kind="nystrom"),
    "maelre.attention:pooled": lambda n: MAELRE(switch=4, landmarks=3, kind="pooled"),
    "maelre.attention:linear": lambda n: MAELRE(switch=4, kind="linear"),
    "maelre.vit": lambda n: MAELREMerge(ratio=max(n / 16, 0.5), special=1),
}
approx = jax.jit(approximate, static_argnames=("kind", "landmarks", "rounds"))


def parts(n, m):
    """The segments of n live rows, lists of ranks."""
    return [[i for i in range(n) if (i if n <= m else i * m // n) == j] for j in range(min(n, m))]


def reference(q, k, v, size, kind, landmarks):
    """One sequence of live rows [h n d], float64; nystrom with numpy's pseudo-inverse."""
    h, n, d = q.shape
    out = np.zeros((h, n, d))
    if kind == "linear":
        f = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
        for i in range(h):
            w = f(q[i]) @ f(k[i]).T * size
            out[i] = w / w.sum(1, keepdims=True) @ v[i]
        return out
    cut = parts(n, landmarks)
    total = np.array([size[p].sum() for p in cut])
    for i in range(h):
        mean = lambda x, i=i: np.stack([(size[p, None] * x[i, p]).sum(0) / size[p].sum() for p in cut])
        soft = lambda a, b, s: softmax(a @ b.T / np.sqrt(d) + np.log(s))
        if kind == "pooled":
            out[i] = soft(q[i], mean(k), total) @ mean(v)
        else:
            middle = np.linalg.pinv(soft(mean(q), mean(k), total))
            out[i] = soft(q[i], mean(k), total) @ middle @ soft(mean(q), k[i], size) @ v[i]
    return out


@pytest.mark.parametrize("kind, scale", [("pooled", 1.0), ("linear", 1.0), ("nystrom", 3.0)])
def test_reference(kind, scale):
    """Ragged rows of sizes 1 to 3. The inverse is run until it has converged (its matrix is well conditioned: queries are sharp)."""
    b, h, n, d, m = 3, 2, 14, 6, 4
    base = normal(0, b, h, n, d) * scale
    q, k, v = base, base + 0.1 * normal(1, b, h, n, d), normal(2, b, h, n, d)
    live = np.arange(n) >= np.array([0, 3, 12])[:, None]
    size = np.where(live, np.random.default_rng(3).integers(1, 4, (b, n)), 0).astype(np.float32)
    got = np.asarray(approx(*map(jnp.asarray, (q, k, v, size)), kind=kind, landmarks=m, rounds=40))
    assert not got[~np.broadcast_to(live[:, None, :], (b, h, n))].any()
    for i in range(b):
        there = live[i]
        want = reference(*(x[i][:, there].astype(np.float64) for x in (q, k, v)), size[i][there].astype(np.float64), kind, m)
        np.testing.assert_allclose(got[i][:, there], want, atol=2e-3 if kind == "nystrom" else 1e-5)


def test_segments_by_hand():
    live = jnp.asarray([[False, True, True, True, True, True], [False, False, False, False, True, True], [False] * 6])
    assert landmark_of(live, 3).tolist() == [[-1, 0, 0, 1, 1, 2], [-1, -1, -1, -1, 0, 1], [-1] * 6]


@pytest.mark.parametrize("kind", ["pooled", "nystrom"])
def test_as_many_landmarks_as_rows_are_exact(kind):
    """m = N: exact attention, sizes as the log bias; nystrom as far as the inverse has converged."""
    b, h, n, d = 2, 2, 8, 6
    q = 3 * normal(0, b, h, n, d)
    k, v = q + 0.1 * normal(1, b, h, n, d), normal(2, b, h, n, d)
    live = np.arange(n) >= np.array([[0], [3]])
    size = np.where(live, np.arange(1, n + 1) % 3 + 1.0, 0).astype(np.float32)
    method = MAELRE(switch=0, landmarks=n, kind=kind, rounds=40)
    got = mix(method, {}, q, k, v, live=live, size=np.maximum(size, 1))
    np.testing.assert_allclose(got, full(q, k, v, live, np.maximum(size, 1)), atol=1e-4 if kind == "pooled" else 2e-3)


def test_short_sequences_get_their_own_attention():
    """The switch is the width where nothing else is said."""
    q, k, v = (normal(i, 1, 2, 9, 4) for i in range(3))
    one = lambda switch: mix(MAELRE(switch=switch, landmarks=2), {}, q, k, v)
    np.testing.assert_allclose(one(9), full(q, k, v), atol=1e-5)
    assert np.abs(np.asarray(one(8)) - full(q, k, v)).max() > 1e-3
    np.testing.assert_allclose(one(None), one(8), atol=0)  # nine rows, eight channels


def test_inverse():
    a = softmax(4 * np.eye(5) + normal(0, 2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(inverse(jnp.asarray(a), 20), np.linalg.pinv(a), atol=1e-3)


@pytest.mark.parametrize("kind", ["nystrom", "pooled", "linear"])
def test_gradients(kind):
    q, k, v = (normal(i, 2, 2, 9, 4) for i in range(3))
    size = jnp.asarray(np.where(np.arange(9) >= np.array([[0], [4]]), 1.0, 0.0), jnp.float32)
    fn = lambda *a: approximate(*a, size, kind=kind, landmarks=3)
    assert not any(g[1, :, :4].any() for g in gradients(fn, q, k, v))


# --- the merge ----------------------------------------------------------------------------------------------------------------


def merged(metric, x, size, ratio):
    """Half-up share of the rows stays: the even rows most like an odd one join it."""
    n = len(x)
    go = n - int(np.floor(ratio * n + 0.5))
    if ratio == 1:  # rows stay where they are
        return x, size
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    best = {i: max((unit[i] @ unit[j], -j) for j in range(1, n, 2)) for i in range(0, n, 2)}
    gone = sorted(best, key=lambda i: (-best[i][0], i))[:go]
    order = [i for i in range(0, n, 2) if i not in gone] + list(range(1, n, 2))
    into = {i: -best[i][1] if i in gone else i for i in range(n)}
    out, total = np.zeros((len(order), x.shape[1])), np.zeros(len(order))
    for i in range(n):
        out[order.index(into[i])] += size[i] * x[i]
        total[order.index(into[i])] += size[i]
    return out / total[:, None], total


@pytest.mark.parametrize("ratio, n", [(0.5, 12), (0.5, 13), (0.7, 11), (1.0, 6)])
def test_merge(ratio, n):
    metric, x = normal(0, 2, n, 5), normal(1, 2, n, 3)
    live = np.arange(n) >= np.array([[0], [n - 5]])  # each sequence by its own number of rows
    tokens = rows(x, special=0, live=live, size=np.random.default_rng(0).integers(1, 4, (2, n)))
    method = MAELREMerge(ratio=ratio)
    plan = do(method, "plan", {}, method.start({}, tokens), tokens, Evidence(keys=jnp.asarray(metric)[:, None]))[1]
    out = reduced(plan, tokens, "keep")
    assert out.x.shape[1] == method.count(n, n)
    np.testing.assert_allclose(out.size.sum(1), tokens.size.sum(1))
    for i in range(2):
        want, size = merged(metric[i][live[i]], x[i][live[i]], np.asarray(tokens.size)[i][live[i]], ratio)
        np.testing.assert_allclose(out.x[i][-len(want) :], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i][-len(want) :], size)


def test_special_rows_stay():
    tokens = rows(normal(0, 1, 9, 4), special=1)
    method = MAELREMerge(special=1)
    plan = do(method, "plan", {}, method.start({}, tokens), tokens, Evidence(keys=jnp.asarray(normal(1, 1, 1, 9, 4))))[1]
    out = reduced(plan, tokens, "keep")
    assert out.x.shape[1] == 5 and (np.asarray(out.kind) == SPECIAL).sum() == 1


# --- in an encoder ------------------------------------------------------------------------------------------------------------

CFG = config(2, 4, layers=4)


@functools.cache
def world():
    return encoder.init(CFG, jax.random.key(0)), jnp.asarray(normal(5, 2, 8, 8, 3))


def encoded(recipe):
    params, images = world()
    return jax.jit(lambda p, x: vit.encode(CFG, p, vit.embed(CFG, p, x), recipe, proportional=True).tokens)(params, images)


def test_nothing_merged_and_a_high_switch_are_the_plain_encoder():
    np.testing.assert_allclose(encoded(maelre(4, ratio=1.0, switch=2**31 - 1)).x, encoded(vit.PLAIN).x, atol=1e-5)


def test_stages():
    """16 rows become 8 and then 4; their sizes sum to 16."""
    recipe = maelre(4, stages=3, switch=8, landmarks=4)
    assert [k for k, _ in recipe.vit] == [1, 2]
    out = encoded(recipe)
    assert out.x.shape[1] == 4 and np.isfinite(out.x).all()
    np.testing.assert_allclose(out.size.sum(1), 16.0)


@pytest.mark.parametrize("kind", ["nystrom", "pooled", "linear"])
def test_cost(kind):
    assert exponent(lambda n: (MAELRE(kind=kind), {}, None)) <= 1.1


@pytest.mark.parametrize("given", [dict(switch=-1), dict(landmarks=0), dict(kind="x"), dict(rounds=0)])
def test_refuses(given):
    with pytest.raises(ValueError):
        MAELRE(**given)


@pytest.mark.parametrize("given", [dict(ratio=0.4), dict(ratio=1.1), dict(special=-1)])
def test_merge_refuses(given):
    with pytest.raises(ValueError):
        MAELREMerge(**given)
    with pytest.raises(ValueError):
        maelre(4, stages=5)
