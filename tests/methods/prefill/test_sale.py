import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.scores import reference as scores

from jaxtok.core.recipe import Recipe
from jaxtok.methods import SALE
from jaxtok.models.config import Config
from tests.methods.prefill import views

HOW = dict(local=4, segment=4, least=0, block_q=4, block_k=2, tile=2)
small = lambda capacity: SALE(tau=0.0 if capacity >= 64 else 0.2, **HOW)


def near(n, bq, bk, local, segment):
    """bool [n n]: the pairs of the first pass: the first block, and a window that leaves whole segments between."""
    out = np.zeros((n, n), bool)
    for i in range(n):
        edge = i // bq * bq - local
        begin = bk + int(np.floor((edge - bk) / segment)) * segment
        for j in range(n):
            out[i, j] = j < bk or (j // bk + 1) * bk > begin
    return out


def reference(method, x, exact=False):
    """(bool [b h n n] of what is read, true softmax [b h n n], tau) block by block in float64."""
    q, k, pos = (np.asarray(a, np.float64) for a in (x.q, x.k, x.pos))
    (b, h, n), g, scale = q.shape[:3], k.shape[1], q.shape[-1] ** -0.5
    seen, first = views.seen(x), near(n, method.block_q, method.block_k, method.local, method.segment)
    logit = scale * np.einsum("bhtd,bhsd->bhts", q, np.repeat(k, h // g, 1))
    estimate = logit.copy()
    levels = 2 ** (method.bits - 1) - 1
    for i in () if exact else range(b):
        live = pos[i] >= 0
        for e in range(h):
            mine, theirs = q[i, e], k[i, e * g // h]
            mean_q, mean_k = mine[live].mean(0), theirs[live].mean(0)
            rest_q, rest_k = np.where(live[:, None], mine - mean_q, 0), np.where(live[:, None], theirs - mean_k, 0)

            def coded(rest, size):
                out = np.zeros_like(rest)
                for s in range(0, n, size):
                    step = np.abs(rest[s : s + size]).max() / levels
                    out[s : s + size] = np.round(rest[s : s + size] / step) * step if step else 0
                return out

            near_q, near_k = coded(rest_q, method.tile), coded(rest_k, method.block_k)
            estimate[i, e] = scale * (near_q @ near_k.T + (rest_k @ mean_q)[None] + (mine @ mean_k)[:, None])
    out = np.zeros((b, h, n, n), bool)
    for i, e in np.ndindex(b, h):
        for r in range(0, n, method.block_q):
            for c in range(0, n, method.block_k):
                best = -np.inf
                for t in range(r, min(r + method.block_q, n)):
                    keys = [j for j in range(n) if seen[i, t, j] and first[t, j]]
                    if keys:
                        z = np.log(np.exp(logit[i, e, t, keys]).sum())
                        pairs = [j for j in range(c, min(c + method.block_k, n)) if seen[i, t, j]]
                        best = max([best, *(estimate[i, e, t, j] - z for j in pairs)])
                rows = slice(r, r + method.block_q)
                out[i, e, rows, c : c + method.block_k] = first[r, c] or np.exp(best) > method.tau
    mass = np.exp(np.where(seen[:, None], logit, -np.inf))
    return out & seen[:, None], mass / np.maximum(mass.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("tau, bits", [(0.1, 4), (0.5, 4), (0.2, 8)])
def test_equals_numpy(tau, bits):
    x = views.view(1, junk=1e3)
    x = x._replace(q=x.q * 0.5)
    method = SALE(tau=tau, bits=bits, **HOW)
    want, _ = reference(method, x)
    got = views.tokens(method, x)
    assert 0 < want.sum() < views.seen(x).sum() * 4
    np.testing.assert_array_equal(got, want)


def test_no_threshold_is_dense_and_an_endless_one_sinks_and_window():
    x = views.view(2)
    full = np.broadcast_to(views.seen(x)[:, None], (2, 4, 24, 24))
    np.testing.assert_array_equal(views.tokens(SALE(tau=0.0, **HOW), x), full)
    np.testing.assert_array_equal(views.tokens(SALE(tau=float("inf"), **HOW), x), full & near(24, 4, 2, 4, 4))
    assert SALE(least=24).whole(24) and not SALE(least=23).whole(24)


def test_what_is_dropped_weighs_at_most_tau():
    """With 8 bits in place of exact logits, up to their error; the exact rule in numpy without."""
    x = views.view(3)
    for tau in (0.05, 0.3):
        method = SALE(tau=tau, bits=8, **HOW)
        read, p = reference(method, x, exact=True)
        assert (p[~read] <= tau).all() and (~read & (p > 0)).any()
        assert (p[~views.tokens(method, x)] <= tau * 1.3).all()


def test_the_estimate_is_within_its_bound():
    """|error| <= scale ((|q'|_1 dk + |k'|_1 dq) / 2 + d dq dk / 4), for every pair."""
    x = views.view(4, live=(24, 24))
    pos = jnp.broadcast_to(x.pos[:, None], (2, 2, 24))
    code = scores.quantised(x.q, x.k, x.pos, pos, block_k=2, tile=2, bits=4)
    wide = lambda a: np.repeat(np.asarray(a, np.float64), 2, 1)
    q, k = np.asarray(x.q, np.float64), wide(x.k)
    dot = np.einsum("bhtd,bhsd->bhts", np.asarray(code.q, np.float64), wide(code.k))
    dq, dk = np.asarray(code.dq, np.float64)[..., None], wide(code.dk)[:, :, None]
    error = np.abs(dot * dq * dk + np.asarray(code.qk)[:, :, None] + np.asarray(code.kq)[..., None] - np.einsum("bhtd,bhsd->bhts", q, k))
    lengths = lambda a: np.abs(a - a.mean(2, keepdims=True)).sum(-1)
    bound = (lengths(q)[..., None] * dk + lengths(k)[:, :, None] * dq) / 2 + 8 * dq * dk / 4
    assert (error <= bound + 1e-3).all() and error.max() > 0.01


def test_thresholds_by_head_and_layer():
    x = views.view(5, layer=1)
    tau = jnp.asarray([[9.0] * 4, [0.0, 0.3, 0.0, 9.0]], jnp.float32)
    got = views.tokens(SALE(tau=9.0, **HOW), x, {"tau": tau})
    for head, value in enumerate([0.0, 0.3, 0.0, 9.0]):
        np.testing.assert_array_equal(got[:, head], views.tokens(SALE(tau=value, **HOW), x)[:, head])
    with pytest.raises(ValueError, match="must be \\[layers, 4\\]"):
        views.tokens(SALE(**HOW), x, {"tau": tau[:, :2]})
    cfg = Config(vocab=8, width=8, layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8)
    assert SALE(tau=0.5).init_params(jax.random.key(0), cfg)["tau"].shape == (3, 4)


def test_a_capacity_keeps_the_best_and_counts_the_rest():
    x = views.view(6)
    cap = SALE(tau=0.0, capacity=16, **HOW)
    table = views.table(cap, x)
    assert table.index.shape[-1] == 8 and int(np.asarray(table.count).max()) == 8
    assert (np.asarray(table.count + table.lost) == np.asarray(views.table(SALE(tau=0.0, **HOW), x).count)).all()
    got = views.tokens(cap, x)
    assert (got | ~(views.seen(x)[:, None] & near(24, 4, 2, 4, 4))).all()


def test_refuses():
    with pytest.raises(ValueError, match="no room for the sinks and the window"):
        SALE(capacity=64)
    with pytest.raises(ValueError, match="tau must be >= 0"):
        SALE(tau=-1.0)
    cfg = Config(vocab=8, width=8, layers=1, heads=4, kv_heads=2, head_dim=4, hidden=8, softcap=5.0)
    with pytest.raises(ValueError, match="without a soft cap"):
        Recipe(sparsify=SALE()).validate(cfg)
