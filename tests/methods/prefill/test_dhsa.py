import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.sparsifier import View
from jaxtok.methods import DHSA, BlockTopK
from jaxtok.models.config import Config
from jaxtok.ops.boundaries import boundary_logits
from tests.methods.prefill import views

HOW = dict(local=1, sinks=2, apart=1, block_q=4, block_k=2, tail=0, room=9.0)
small = {
    "dhsa": lambda capacity: DHSA(capacity=max(capacity, 8), chunks=5, **(HOW | {"block_q": 2, "tail": 1})),
    "dhsa:predicted": lambda capacity: DHSA(capacity=max(capacity, 8), chunks=5, predicted=True, width=2, hidden=6, **HOW),
    **{
        f"dhsa:{name}": lambda capacity, name=name: DHSA(capacity=max(capacity, 8), variant=name, block_q=4, block_k=2, tail=0)
        for name in ("topk", "a", "vs", "vsb")
    },
}


def chunk_scores(mean_q, mean_k, start, block):
    """[nq c] of the card, from queries and keys averaged over heads."""
    keys = [mean_k[a:z].mean(0) * np.sqrt(z - a) for a, z in itertools.pairwise(start)]
    queries = [mean_q[r : r + block].mean(0) * np.sqrt(len(mean_q[r : r + block])) for r in range(0, len(mean_q), block)]
    return np.array(queries) @ np.array(keys).T


def chunked(method, x, begins):
    """bool [b n n] token by token: forced keys, then the tokens of the best chunks, older first."""
    q, k, pos = (np.asarray(a, np.float64) for a in (x.q, x.k, x.pos))
    b, n = pos.shape
    out = np.zeros((b, n, n), bool)
    for i in range(b):
        length = int((pos[i] >= 0).sum())
        start = [*begins[i], length]
        scores = chunk_scores(q[i].mean(0)[:length], k[i].mean(0), start, method.block_q)
        for r in range(0, length, method.block_q):
            last = min(r + method.block_q, length)
            edge = 0 if x.window is None else r - x.window + 1
            forced = {j for j in range(last) if j >= edge and (j < method.sinks or j >= r - method.local)}
            left = method.capacity - len(forced)
            for c in sorted(range(len(start) - 1), key=lambda c: -scores[r // method.block_q, c]):
                free = [j for j in range(start[c], start[c + 1]) if j not in forced and edge <= j < last]
                forced |= set(free[: max(left, 0)])
                left -= len(free)
            out[i, r:last] = np.isin(np.arange(n), sorted(forced))[None]
    return out & views.seen(x)


def test_chunks_of_a_sliding_layer_equal_numpy():
    """Keys behind the window take no place."""
    x = views.view(1, window=9)
    method = DHSA(capacity=9, chunks=5, **HOW)
    got, want = views.tokens(method, x), chunked(method, x, uniform(x, 5))
    row = np.arange(24)
    seen = row[:, None] - row[None] < 9
    np.testing.assert_array_equal(got & seen, np.broadcast_to(want[:, None], got.shape) & seen)
    assert not np.array_equal(want & seen, chunked(method, x._replace(window=None), uniform(x, 5)) & seen)


def uniform(x, chunks):
    length = np.asarray(x.length)
    return [list(range(0, n, -(-n // (chunks + 1)))) for n in length]


@pytest.mark.parametrize("chunks, capacity, bq, bk", [(5, 11, 4, 2), (4, 9, 3, 4), (8, 16, 4, 3), (30, 12, 4, 2)])
def test_chunks_equal_numpy(chunks, capacity, bq, bk):
    x = views.view(1, junk=1e3)
    method = DHSA(capacity=capacity, chunks=chunks, **(HOW | {"block_q": bq, "block_k": bk}))
    got, want = views.tokens(method, x), chunked(method, x, uniform(x, chunks))
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None], got.shape))
    assert (np.asarray(views.table(method, x).lost) == 0).all()


def nms(logit, length, count, apart, width):
    left, found = {j: v for j, v in enumerate(logit[:length]) if width <= j <= length - width}, [0]
    while left and len(found) <= count:
        best = max(left, key=lambda j: (left[j], -j))
        found.append(best)
        left = {j: v for j, v in left.items() if abs(j - best) > apart}
    return sorted(found)


def logits(p, keys, w):
    """The predictor of the card on keys [n c] of one sequence, zeros past the ends."""
    p = {name: np.asarray(a, np.float64) for name, a in p.items()}
    n = len(keys)
    row = lambda j: keys[j] if 0 <= j < n else np.zeros(keys.shape[1])
    mixed = lambda rows: np.maximum(sum(r * p["depth"][i] for i, r in enumerate(rows)) + p["depth_bias"], 0)
    encode = lambda rows: np.maximum(mixed(rows) @ p["point"] + p["point_bias"], 0)
    out = []
    for j in range(n):
        left, right = encode([row(i) for i in range(j - w, j)]), encode([row(i) for i in range(j, j + w)])
        cos = left @ right / max(np.linalg.norm(left) * np.linalg.norm(right), 1e-8)
        y = np.concatenate([left, right, np.abs(left - right), left * right, [cos]])
        out.append((np.maximum(y @ p["into"] + p["into_bias"], 0) @ p["out"] + p["out_bias"])[0])
    return np.array(out)


def test_predicted_boundaries_equal_numpy():
    x = views.view(2, junk=1e3)
    method = DHSA(capacity=11, chunks=5, predicted=True, width=2, hidden=6, **(HOW | {"apart": 2}))
    cfg = Config(vocab=8, width=8, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=8)
    params = method.init_params(jax.random.key(0), cfg)
    got = np.asarray(boundary_logits(params["predictor"], x.k, x.pos >= 0))
    begins = []
    for i, length in enumerate(np.asarray(x.length)):
        keys = np.moveaxis(np.asarray(x.k[i], np.float64), 0, 1).reshape(24, -1)
        keys[length:] = 0
        want = logits(params["predictor"], keys, 2)
        np.testing.assert_allclose(got[i, :length], want[:length], atol=1e-4)
        begins.append(nms(want, length, 5, 2, 2))
        found = np.asarray(method.boundaries(jnp.asarray(got), x.length))[i]
        assert np.flatnonzero(found).tolist() == begins[-1]
    mask = views.tokens(method, x, params)
    np.testing.assert_array_equal(mask, np.broadcast_to(chunked(method, x, begins)[:, None], mask.shape))


def test_nms_by_hand():
    """Logits 9 1 5 6 0 4 among 6 rows, two boundaries, none within 1: row 3 (6), then 5 (4): 2 is too near, 0 begins anyway."""
    logit = jnp.asarray([[9.0, 1, 5, 6, 0, 4]])
    got = DHSA(capacity=300, chunks=2, apart=1, width=1).boundaries(logit, jnp.asarray([6]))
    assert np.flatnonzero(np.asarray(got)[0]).tolist() == [0, 3, 5]
    short = DHSA(capacity=300, chunks=9, apart=1, width=1).boundaries(logit, jnp.asarray([3]))
    assert np.flatnonzero(np.asarray(short)[0]).tolist() == [0, 2]
    wide = DHSA(capacity=300, chunks=2, apart=1, width=3).boundaries(logit, jnp.asarray([6]))
    assert np.flatnonzero(np.asarray(wide)[0]).tolist() == [0, 3], "three keys on both sides"
    high = DHSA(capacity=300, chunks=9, apart=1, width=1, theta=5.0).boundaries(logit, jnp.asarray([6]))
    assert np.flatnonzero(np.asarray(high)[0]).tolist() == [0, 3], "only logits above theta"


def test_boundaries_every_block_rank_as_block_topk():
    """24 rows in chunks of 4, one head: chunks chosen = block top-k's blocks, as sqrt(4) is common to all."""
    x = views.view(3, live=(24,), h=1, g=1)
    how = {"block_q": 4, "block_k": 4}
    mine = views.tokens(DHSA(capacity=12, chunks=5, **(HOW | how | {"local": 0, "sinks": 0})), x)
    np.testing.assert_array_equal(mine, views.tokens(BlockTopK(capacity=12, **how), x))


def test_a_budget_of_all_is_dense():
    x = views.view(4)
    for variant in ("chunks", "a", "topk"):
        got = views.tokens(DHSA(capacity=24, variant=variant, chunks=4, **HOW), x)
        np.testing.assert_array_equal(got, np.broadcast_to(views.seen(x)[:, None], got.shape))
    assert DHSA(capacity=256).whole(256) and not DHSA(capacity=256).whole(257)


def test_length_normalised_scores_have_one_variance():
    """i.i.d. keys: the variance of q . mean(keys) sqrt(len) does not depend on len; without the root it falls as 1 / len."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=16)
    score = lambda length: rng.normal(size=(4000, length, 16)).mean(1) @ q * np.sqrt(length)
    got = [score(length).var() / (q @ q) for length in (1, 4, 25)]
    np.testing.assert_allclose(got, 1.0, atol=0.1)
    x = views.view(5, live=(24,))
    method = DHSA(capacity=10, chunks=3, **HOW)
    long = x._replace(k=x.k.at[:, :, 6:12].set(x.k[:, :, 6:7]))  # six equal keys: sqrt(6) times one
    np.testing.assert_array_equal(views.tokens(method, long)[:, 0], chunked(method, long, uniform(long, 3)))


def test_second_version_counts():
    """a: each row reads min(k, its causal blocks) blocks, the first and the newest among them; topk spends blocks on the future."""
    x = views.view(6, live=(24,))
    a, free = (DHSA(capacity=8, variant=v, block_q=4, block_k=2, tail=0) for v in ("a", "topk"))
    for row in views.blocks(a, x)[0]:
        assert [len(s) for s in row] == [min(4, 2 * (i + 1)) for i in range(6)]
        assert all({0, 2 * i + 1} <= s for i, s in enumerate(row))
    rows = views.blocks(free, x)[0]
    assert all(len(s) == 4 for row in rows for s in row) and any(max(s) > 1 for s in (row[0] for row in rows))


def blockwise(method, x):
    """The lists of the second version's causal variants, block by block."""
    q, k, pos = (np.asarray(a, np.float64) for a in (x.q, x.k, x.pos))
    (b, h, n, d), g, bq, bk = q.shape, k.shape[1], method.block_q, method.block_k
    most, out = method.capacity // bk, []
    for i in range(b):
        length, heads = int((pos[i] >= 0).sum()), []
        for e in range(h):
            mine, keys = q[i, e, :length], k[i, e * g // h, :length]
            mean_q = [mine[r : r + bq].mean(0) for r in range(0, length, bq)]
            mean_k = np.array([keys[r : r + bk].mean(0) for r in range(0, length, bk)])
            logit = np.where(np.arange(length)[:, None] >= np.arange(length), mine @ keys.T * d**-0.5, -np.inf)
            p = np.exp(logit - logit.max(1, keepdims=True))
            p = (p / p.sum(1, keepdims=True))[-bq:]
            best = lambda score, many: np.argsort(-np.asarray(score), kind="stable")[:many]
            budget = most * bk if method.variant == "vs" else most
            column = p.sum(0) if method.variant == "vs" else mean_k @ mean_q[-1]
            away = [sum(p[r, length - len(p) + r - o] for r in range(len(p)) if length - len(p) + r >= o) for o in range(length)]
            away = away if method.variant == "vs" else column[::-1]
            lines, distances = best(column, budget // 2), best(away if method.variant == "vs" else column, budget - budget // 2)
            distances = distances if method.variant == "vs" else [len(column) - 1 - y for y in distances]
            rows = []
            for x0 in range(0, n, bq):
                last = min(x0 + bq, length) - 1
                if x0 > last:
                    rows.append(set())
                    continue
                near = range(x0 // bk, last // bk + 1)
                forced = {0, last // bk} if method.variant != "vsb" else {0, *near}
                score = {}
                for y in range(last // bk + 1):
                    if method.variant == "a":
                        score[y] = mean_q[x0 // bq] @ mean_k[y]
                    elif method.variant == "vs":
                        key = range(y * bk, y * bk + bk)
                        meets = [o for o in distances if x0 - key[-1] <= o <= x0 + bq - 1 - key[0]]
                        score[y] = sum(column[j] for j in lines if j in key) + sum(away[o] for o in meets)
                    else:
                        meets = [o for o in distances if x0 // bk - y <= o <= (x0 + bq - 1) // bk - y]
                        score[y] = sum((1 + 1e-5 * np.sign(column[j])) * column[j] for j in lines if j == y) + sum(away[o] for o in meets)
                others = sorted((y for y in score if y not in forced), key=lambda y: -score[y])
                rows.append(forced | set(others[: max(most - len(forced), 0)]))
            heads.append(rows)
        out.append(heads)
    return out


@pytest.mark.parametrize("variant, bq, bk, most", [("a", 6, 2, 4), ("vs", 4, 2, 4), ("vs", 3, 4, 3), ("vsb", 4, 2, 5), ("vsb", 6, 3, 4)])
def test_second_version_equals_numpy(variant, bq, bk, most):
    x = views.view(7, junk=1e3)
    method = DHSA(capacity=most * bk, variant=variant, block_q=bq, block_k=bk, tail=0)
    assert views.blocks(method, x) == blockwise(method, x)


def test_official_masks(data):
    """xiongsiheng/DHSA, second version, blocks of 32, 3 of 12; the last block of queries of vs and vsb, dense there, is the tail's here."""
    z = np.load(data / "golden" / "dhsa_v2_masks.npz")
    q, k = jnp.asarray(z["c2_q"]), jnp.asarray(z["c2_k"])
    n, bq, bk = q.shape[2], int(z["c2_q_block"]), int(z["c2_k_block"])
    x = View(q, k, jnp.arange(n, dtype=jnp.int32)[None])
    for variant in ("topk", "a", "vs", "vsb"):
        method = DHSA(capacity=int(z["c2_topk_blocks"]) * bk, variant=variant, block_q=bq, block_k=bk, tail=0)
        want = [[set(np.flatnonzero(row).tolist()) for row in head] for head in z[f"c2_{variant}_mask"][0]]
        got = views.blocks(method, x)[0]
        if variant.startswith("vs"):
            assert all(head[-1] == set(range(n // bk)) for head in want)
            got, want = ([head[:-1] for head in x] for x in (got, want))
        assert got == want, variant


def test_official_chunk_scores(data):
    """xiongsiheng/DHSA, first version: besides the last 16 keys, each block of queries takes the 32 causal tokens that score best by chunk here; ties are cut anyhow."""
    z = np.load(data / "golden" / "dhsa_v1.npz")
    mean_q, mean_k = (np.asarray(z[name][0], np.float64).mean(0) for name in ("c2_q", "c2_k"))
    start, block, local = z["c2_label_full_boundaries"].astype(int), int(z["c2_block_size"]), int(z["c2_local_tokens"])
    scores = chunk_scores(mean_q[: len(mean_q) - int(z["c2_instruction_tokens"])], mean_k, start, block)
    tokens = scores[:, np.searchsorted(start, np.arange(len(mean_k)), side="right") - 1]
    for i, theirs in enumerate(z["c2_avgpool_norm_topk_indices"][0]):
        rest = np.arange(min((i + 1) * block, len(mean_k)))[:-local]
        free = np.intersect1d(theirs, rest)
        best = np.sort(tokens[i, rest])[::-1][: int(z["c2_topk_tokens"]) - local]
        np.testing.assert_allclose(np.sort(tokens[i, free])[::-1], best, atol=1e-6)


def test_official_boundaries(data):
    """xiongsiheng/DHSA, first version: the predictor's logits, of the gap behind a row there (its chunk begins at the next); boundaries out of them, one of them forced
    in front of the instruction, behind which there are none."""
    z = np.load(data / "golden" / "dhsa_v1.npz")
    w = {name: z[f"c2_pred_w.{name}"] for name in ("enc.0.weight", "enc.2.weight", "mlp.0.weight", "mlp.2.weight")}
    p = {"depth": w["enc.0.weight"][:, 0].T, "point": w["enc.2.weight"][:, :, 0].T, "into": w["mlp.0.weight"].T, "out": w["mlp.2.weight"].T}
    of = {"depth": "enc.0", "point": "enc.2", "into": "mlp.0", "out": "mlp.2"}
    p |= {f"{name}_bias": z[f"c2_pred_w.{at}.bias"] for name, at in of.items()}
    k, want = jnp.asarray(z["c2_k"]), z["c2_pred_logits"]
    n = k.shape[2]
    got = boundary_logits(jax.tree.map(jnp.asarray, p), k, jnp.ones((1, n), bool))
    width = int(z["c2_pred_boundary_window"])
    np.testing.assert_allclose(got[:, width : n - width + 1], want[:, width - 1 : n - width], atol=1e-4)  # -100 beyond
    edge = n - int(z["c2_instruction_tokens"]) + 1
    logit = jnp.pad(jnp.asarray(want, jnp.float32)[:, :-1], ((0, 0), (1, 0)), constant_values=-100).at[:, edge].set(1e9)
    method = DHSA(capacity=300, chunks=int(z["c2_num_chunks"]), apart=int(z["c2_pred_nms"]), width=1)
    found = np.flatnonzero(np.asarray(method.boundaries(logit, jnp.asarray([edge + 1])))[0]).tolist()
    assert found == sorted({0, *z["c2_pred_boundaries"][0].astype(int).tolist()} - {n})


def test_refuses():
    with pytest.raises(ValueError, match="capacity=100 has no room"):
        DHSA(capacity=100)
    with pytest.raises(ValueError, match="variant must be one of"):
        DHSA(capacity=300, variant="v3")
