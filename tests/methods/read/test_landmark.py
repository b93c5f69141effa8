import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill_chunked, replay
from jaxtok.methods import Landmark
from jaxtok.testing.world import CFG, LIVE, world
from tests.methods import toys

small = lambda capacity: Landmark(top_k=max(capacity // 4, 1), block=4)


@functools.cache
def attender(method):
    return jax.jit(lambda q, pos, kv, freqs: method.attend({}, 0, (), None, q, pos, kv, toys.sight(freqs=freqs))[2:])


def turn(x, at, freqs):
    r = len(freqs)
    angle = np.asarray(at)[..., None] * np.asarray(freqs)
    lo, hi = x[..., :r], x[..., r:]
    return np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)


def calls(method, q, k, v, chunks, off=0, freqs=None):
    """Values [h t d] of each chunk of one sequence: q [h T d], k, v [g T d] unrotated, `off` dead slots in front."""
    pad = lambda x: np.pad(x, ((0, 0), (off, 0), (0, 0)), constant_values=7)[None].astype(np.float32)
    whole, done, out = toys.cache(pad(k), pad(v), (k.shape[1],)), 0, []
    see = jnp.asarray(toys.freqs(q.shape[-1]) if freqs is None else freqs, jnp.float32)
    for t in chunks:
        end = done + t
        kv = whole._replace(
            pos=jnp.where(whole.pos < end, whole.pos, -1), seen=jnp.asarray([end], jnp.int32), cursor=jnp.asarray(off + end, jnp.int32)
        )
        pos = jnp.arange(done, end, dtype=jnp.int32)[None]
        out.append(np.asarray(attender(method)(jnp.asarray(q[None, :, done:end], jnp.float32), pos, kv, see)[0][0]))
        done = end
    return out


def reference(m, q, k, v, chunks, freqs):
    """The card query by query in float64: retrieval, stingy positions, grouped softmax as dictionaries."""
    h, g, B, done, out = q.shape[0], k.shape[0], m.block, 0, []
    for t in chunks:
        n, K = done // B, m.top_k
        base, scores = min(n, K + 1) * B, np.zeros((h, t, n))
        place = lambda i, n=n, K=K: i if n <= K else max(0, i - (n - K) + 1)
        stand = lambda p, n=n, base=base: base + p - n * B
        for head in range(h):
            for a in range(t):
                x = turn(q[head, done + a], stand(done + a), freqs)
                logit = (
                    np.array([x @ turn(k[head * g // h, i * B + B - 1], place(i) * B + B - 1, freqs) for i in range(n)])
                    * q.shape[-1] ** -0.5
                )
                scores[head, a] = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum() if n else logit
        if n and m.share == "heads":
            scores[:] = scores.max(0, keepdims=True)
        if n and m.share == "tokens":
            scores[:] = scores.max(1, keepdims=True)
        value = np.zeros((h, t, v.shape[-1]))
        for head in range(h):
            e = head * g // h
            for a in range(t):
                p = done + a
                x = turn(q[head, p], stand(p), freqs)
                got = sorted(np.argsort(-scores[head, a], kind="stable")[:K].tolist())
                keys = {}  # order -> rotary id
                for j, i in enumerate(got):
                    slot = i if n <= K else j + (i >= n - K)
                    keys |= {i * B + r: slot * B + r for r in range(B)}
                keys |= {j: stand(j) for j in range(n * B, p + 1)}
                logit = {j: x @ turn(k[e, j], at, freqs) * q.shape[-1] ** -0.5 for j, at in keys.items()}
                mine = p // B
                first = {j: np.exp(y) for j, y in logit.items() if (j // B == mine) != (j % B == B - 1)}
                for j, y in first.items():
                    share = y / sum(first.values())
                    if j // B == mine:
                        value[head, a] += share * v[e, j]
                    else:
                        inside = {i: np.exp(logit[i]) for i in range(j - B + 1, j)}
                        value[head, a] += share * sum(w * v[e, i] for i, w in inside.items()) / sum(inside.values())
        out.append(value)
        done += t
    return out


def stream(seed, total=33, h=4, g=2, d=8):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(e, total, d)) * s for e, s in ((h, 1.5), (g, 1.5), (g, 1.0))]


@pytest.mark.parametrize("share", ["token_head", "heads", "tokens"])
def test_equals_numpy(share):
    """h/g > 1, chunks that end inside blocks and cross them, steps, dead slots in front."""
    q, k, v = stream(1)
    method, chunks = Landmark(top_k=2, block=4, share=share), (7, 7, 7, 7, 1, 1, 1, 1, 1)
    want = reference(method, q, k, v, chunks, toys.freqs(8))
    for off in (0, 3):
        for a, b in zip(calls(method, q, k, v, chunks, off), want, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_all_blocks_are_the_whole_landmark_attention():
    """top_k >= n: chunked or at once, the same values, at the text's own positions."""
    q, k, v = stream(2, total=21)
    method = Landmark(top_k=9, block=4)
    once = np.concatenate(calls(method, q, k, v, (21,)), 1)
    pieces = np.concatenate(calls(method, q, k, v, (7, 7, 7)), 1)
    np.testing.assert_allclose(once, pieces, atol=5e-5)
    np.testing.assert_allclose(once, reference(method, q, k, v, (21,), toys.freqs(8))[0], atol=5e-5)
    fewer = np.concatenate(calls(Landmark(top_k=1, block=4), q, k, v, (7, 7, 7)), 1)
    assert np.abs(fewer - once).max() > 1e-2


def test_one_block_is_causal_attention():
    q, k, v = stream(3, total=6)
    got = calls(Landmark(top_k=2, block=51), q, k, v, (6,))[0]
    q, k = turn(q, np.arange(6), toys.freqs(8)), turn(k, np.arange(6), toys.freqs(8))
    logit = np.where(np.tri(6, dtype=bool), np.einsum("hid,hjd->hij", q, np.repeat(k, 2, 0)) * 8**-0.5, -np.inf)
    p = np.exp(logit)
    np.testing.assert_allclose(got, np.einsum("hij,hjd->hid", p / p.sum(-1, keepdims=True), np.repeat(v, 2, 0)), atol=5e-5)


def test_dead_queries_and_bf16():
    q, kv = toys.problem(4, live=(24, 9), junk=1e3)
    kv = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    pos = jnp.asarray([[23], [-1]], jnp.int32)
    kv = kv._replace(pos=kv.pos.at[1].set(-1), seen=jnp.asarray([24, 0], jnp.int32))
    out, lse = attender(Landmark(top_k=2, block=4))(jnp.asarray(q[:, :, -1:], jnp.bfloat16), pos, kv, toys.freqs(8))
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all() and not np.asarray(out, np.float32)[1].any()
    assert (lse[1] == -jnp.inf).all() and np.isfinite(lse[0]).all()


def test_through_the_model():
    """A prompt in chunks of any size and steps after it, with room for all blocks: the same logits."""
    params, ids, force = world()
    recipe = Recipe(reader=Landmark(top_k=9, block=4))

    @functools.partial(jax.jit, static_argnums=0)
    def run(chunk):
        tokens, layers = prefill_chunked(CFG, params, ids, jnp.asarray(LIVE), recipe, chunk=chunk, new=6, read=True)
        return tokens.x[:, -1], replay(CFG, params, tokens, layers, force[:, :6], recipe)[0]

    for a, b in zip(run(4), run(12), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_refuses():
    for bad in ({"top_k": 0}, {"block": 1}, {"share": "all"}, {"raw": False}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Landmark(**bad)


def test_official_outputs(data):
    """epfml/landmark-attention with its cache: four chunks, one block retrieved by the largest score over heads. Its rotary embedding
    pairs neighbouring channels: they are put apart here."""
    z = np.load(data / "golden" / "landmark_cached.npz")
    c = {key.removeprefix("c1_"): z[key] for key in z.files}
    h, count = int(c["n_head"]), int(c["n_chunks"])
    assert str(c["method"]) == "max_over_heads"
    x = np.concatenate([c[f"x{j}"][0] for j in range(count)])
    q, k, v = (y.reshape(len(x), h, -1).swapaxes(0, 1) for y in np.split(x.astype(np.float64) @ c["w_qkv"].T, 3, 1))
    apart = np.concatenate([np.arange(0, q.shape[-1], 2), np.arange(1, q.shape[-1], 2)])
    method = Landmark(top_k=int(c["topk"]), block=int(c["freq"]) + 1, share="heads")
    chunks = [c[f"x{j}"].shape[1] for j in range(count)]
    for j, got in enumerate(calls(method, q[..., apart], k[..., apart], v, chunks, freqs=c["rope_freqs"])):
        np.testing.assert_allclose(got.swapaxes(0, 1).reshape(chunks[j], -1), c[f"out{j}"][0], atol=2e-5)


@pytest.mark.parametrize("share", ["token_head", "heads"])
@pytest.mark.parametrize("dtype, tol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_blocks_read_where_they_lie(share, dtype, tol):
    """A step through the kernel equals the gathered one: ragged rows, blocks that begin anywhere, few and many blocks."""
    method = Landmark(top_k=3, block=4, share=share)
    q, kv = toys.problem(5, live=(24, 9), n=24, junk=1e3)
    kv = kv._replace(k=kv.k.astype(dtype), v=kv.v.astype(dtype))
    step = jnp.asarray(q[:, :, -1:], dtype), toys.newest(kv), kv
    read = lambda *step: [method.attend({}, 0, (), None, *step, toys.sight()._replace(impl=impl))[2:] for impl in ("auto", "interpret")]
    want, got = jax.jit(read)(*step)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tol * 4)
