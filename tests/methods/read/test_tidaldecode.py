import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import TidalDecode
from tests.methods import toys

small = lambda capacity: TidalDecode(top_k=capacity, dense_layers=0, corrections=())


def walk(method, problems):
    """One step through all layers: what each attends to and the choice it hands on, for queries [b h d] and caches."""
    carry, out = None, []
    for layer, (q, kv) in enumerate(problems):
        state = method.start({}, layer, kv, q.shape[1])
        _, carry, value, _ = method.attend({}, layer, state, carry, jnp.asarray(q)[:, :, None], toys.newest(kv), kv, toys.sight())
        out.append((np.asarray(value)[:, :, 0], None if carry is None else np.asarray(carry)))
    return out


def layers(count, seed=0, **options):
    return [(q[:, :, -1], kv) for q, kv in (toys.problem(seed + i, **options) for i in range(count))]


def reference(problems, top_k, dense, corrections, how):
    """The card, layer by layer in numpy: values, and the chosen slots of each query head."""
    chosen, out = None, []
    for layer, (q, kv) in enumerate(problems):
        (b, h, d), g = q.shape, kv.pos.shape[1]
        if layer < dense or layer == dense or layer in corrections:
            out.append(toys.attend_to(q, kv, toys.everything(q, kv)))
        if layer == dense or layer in corrections:
            logit = np.einsum("bhd,bhjd->bhj", q.astype(np.float64), np.repeat(np.asarray(kv.k, np.float64), h // g, 1)) * d**-0.5
            live = np.repeat(np.asarray(kv.pos) >= 0, h // g, 1)
            if how != "none":
                logit = np.repeat(getattr(logit.reshape(b, g, h // g, -1), how)(2), h // g, 1)
            chosen = [
                [{j for j in np.argsort(-np.where(live[i, e], logit[i, e], -np.inf))[:top_k] if live[i, e, j]} for e in range(h)]
                for i in range(b)
            ]
        elif layer > dense:
            out.append(toys.attend_to(q, kv, chosen))
        out[-1] = (out[-1], chosen)
    return out


def test_by_hand():
    """q = 1 in every layer, keys 3 0 2 1, top 2: the choice of layer 0 is slots 0 and 2 whatever the keys of layer 1 are; v = 1 2 3 4."""
    k, v = np.array([3.0, 0, 2, 1], np.float32).reshape(1, 1, 4, 1), np.array([1.0, 2, 3, 4], np.float32).reshape(1, 1, 4, 1)
    q = np.ones((1, 1, 1), np.float32)
    out = walk(
        TidalDecode(top_k=2, dense_layers=0, corrections=(2,)),
        [(q, toys.cache(k, v)), (q, toys.cache(0 * k, v)), (q, toys.cache(-k, v)), (q, toys.cache(0 * k, v))],
    )
    assert [carry[0, 0].tolist() for _, carry in out] == [[0, 2], [0, 2], [1, 3], [1, 3]]
    np.testing.assert_allclose([float(out[1][0].item()), float(out[3][0].item())], [2, 3])


@pytest.mark.parametrize("how", ["max", "mean", "none"])
def test_equals_numpy(how):
    """h/g > 1, ragged, junk in dead slots; the selection layers are exactly full attention."""
    problems = layers(5, live=(24, 5), junk=1e4)
    out = walk(TidalDecode(top_k=7, dense_layers=1, corrections=(3,), group=how), problems)
    want = reference(problems, 7, 1, (3,), how)
    for layer, ((value, carry), (exact, chosen)) in enumerate(zip(out, want, strict=True)):
        np.testing.assert_allclose(value, exact, atol=2e-5)
        if layer:
            spread = np.repeat(carry, 4 // carry.shape[1], 1)
            assert [[{int(j) for j in head if j >= 0} for head in row] for row in spread] == chosen
            assert (np.diff(carry[carry.min(-1) >= 0], axis=-1) > 0).all()
    assert np.abs(out[2][0] - toys.attend_to(*problems[2], toys.everything(*problems[2]))).max() > 1e-3


def test_limits():
    problems = layers(4)
    full = [toys.attend_to(q, kv, toys.everything(q, kv)) for q, kv in problems]
    for method in (TidalDecode(top_k=24, dense_layers=0, corrections=()), TidalDecode(top_k=3, dense_layers=4, corrections=())):
        for (value, _), want in zip(walk(method, problems), full, strict=True):
            np.testing.assert_allclose(value, want, atol=2e-5)
    every = walk(TidalDecode(top_k=5, dense_layers=0, corrections=(1, 2, 3)), problems)  # the oracle's choice at every layer
    for (value, carry), (q, kv), want in zip(every, problems, full, strict=True):
        np.testing.assert_allclose(value, want, atol=2e-5)
        logit = np.einsum("bhd,bhjd->bhj", q, np.repeat(np.asarray(kv.k), 2, 1)).reshape(2, 2, 2, 24).max(2)
        want_slots = [
            [{p + 24 - live for p in head} for head in row] for row, live in zip(toys.top(logit, kv.pos, 5), toys.LIVE, strict=True)
        ]
        assert [[set(head) for head in row] for row in carry.tolist()] == want_slots


def test_several_queries_attend_to_everything():
    q, kv = toys.problem(1)
    method, pos = TidalDecode(top_k=3, dense_layers=0, corrections=()), kv.pos[:, 0, -2:]
    _, carry, out, _ = method.attend({}, 1, (), None, jnp.asarray(q[:, :, -2:]), pos, kv, toys.sight())
    assert carry is None
    np.testing.assert_allclose(out[:, :, 1], toys.attend_to(q[:, :, -1], kv, toys.everything(q, kv)), atol=2e-5)


def test_soft_cap_scale_and_window_reach_the_choice():
    q, kv = toys.problem(2)
    kv = kv._replace(bias=kv.bias.at[0, 0, 3].set(9.0))
    see = toys.sight(softcap=2.0, scale=0.5)
    method = TidalDecode(top_k=4, dense_layers=0, corrections=())
    _, carry, out, lse = method.attend({}, 0, (), None, jnp.asarray(q[:, :, -1:]), toys.newest(kv), kv, see)
    logit = np.einsum("bhd,bhjd->bhj", q[:, :, -1], np.repeat(np.asarray(kv.k), 2, 1)) * 0.5
    logit = 2 * np.tanh(logit / 2) + np.repeat(np.asarray(kv.bias), 2, 1)
    assert 3 in carry[0, 0]
    e = np.exp(logit[0])
    np.testing.assert_allclose(
        out[0, :, 0], (e[..., None] * np.repeat(np.asarray(kv.v[0]), 2, 0)).sum(1) / e.sum(-1, keepdims=True), atol=2e-5
    )
    np.testing.assert_allclose(lse[0, :, 0], np.log(e.sum(-1)), atol=2e-5)


def test_bf16_and_empty_rows():
    q, kv = toys.problem(3)
    kv = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16), pos=kv.pos.at[1].set(-1))
    out = walk(TidalDecode(top_k=4, dense_layers=0, corrections=()), [(jnp.asarray(q[:, :, -1], jnp.bfloat16), kv)] * 2)
    for value, carry in out:
        assert value.dtype == jnp.bfloat16 and not np.asarray(value, np.float32)[1].any()
        assert (carry[1] == -1).all() and (carry[0] >= 0).all()


def test_refuses():
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        TidalDecode(top_k=0)
    with pytest.raises(ValueError, match="group must be one of"):
        TidalDecode(group="min")
    with pytest.raises(ValueError, match="must come after layer 2"):
        TidalDecode(corrections=(2,))


def test_official_outputs(data):
    """DerrickYLJ/TidalDecode: five attention layers over a residual stream (h += attn / 2), five steps after a prompt of 40."""
    z = np.load(data / "golden" / "tidaldecode.npz")
    c = {key.removeprefix("c2_"): z[key] for key in z.files}
    h, g, d, n, count = (int(c[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "n_prefill", "num_layers"))
    total = n + int(c["n_decode"])
    method = TidalDecode(
        top_k=int(c["top_k"]), dense_layers=int(c["sparse_layer_start"]), corrections=(int(c["correction_layer"]),), group="none"
    )
    angle = np.arange(total)[:, None] * 1e4 ** (-np.arange(d // 2) / (d // 2))

    def turn(x, at):  # [e t d] at the positions `at`
        cos, sin = np.cos(angle[at]), np.sin(angle[at])
        lo, hi = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], -1)

    def qkv(x, layer, at):
        split = lambda y, e: y.reshape(len(y), e, d).swapaxes(0, 1)
        q, k, v = (split(x @ c[f"l{layer}_w.{name}_proj.weight"].T, e) for name, e in (("q", h), ("k", g), ("v", g)))
        return turn(q, at), turn(k, at), v

    caches, x = [], c["hidden"][0, :n].astype(np.float64)
    for layer in range(count):
        q, k, v = qkv(x, layer, np.arange(n))
        logit = np.einsum("hid,hjd->hij", q, np.repeat(k, h // g, 0)) * d**-0.5
        e = np.exp(np.where(np.tri(n, dtype=bool), logit, -np.inf) - logit.max(-1, keepdims=True))
        o = (
            np.einsum("hij,hjd->ihd", e / e.sum(-1, keepdims=True), np.repeat(v, h // g, 0)).reshape(n, -1)
            @ c[f"l{layer}_w.o_proj.weight"].T
        )
        caches.append((k, v))
        x = x + o / 2
    np.testing.assert_allclose(x, c["s0_h"][0], atol=1e-4)
    step = jax.jit(lambda layer, carry, q, pos, kv: method.attend({}, layer, (), carry, q, pos, kv, toys.sight())[1:3], static_argnums=0)
    for t in range(total - n):
        x, at, carry = c["hidden"][0, n + t][None].astype(np.float64), np.array([n + t]), None
        for layer in range(count):
            q, k, v = qkv(x, layer, at)
            caches[layer] = tuple(np.concatenate([a, b], 1) for a, b in zip(caches[layer], (k, v), strict=True))
            padded = (np.pad(a, ((0, 0), (0, total - a.shape[1]), (0, 0)))[None] for a in caches[layer])
            kv = toys.cache(*padded)
            kv = kv._replace(pos=jnp.where(kv.pos <= n + t, kv.pos, -1))
            carry, out = step(layer, carry, jnp.asarray(q, jnp.float32)[None], jnp.asarray(at, jnp.int32)[None], kv)
            o = np.asarray(out)[0, :, 0].reshape(1, -1) @ c[f"l{layer}_w.o_proj.weight"].T
            np.testing.assert_allclose(o, c[f"s{t + 1}_l{layer}_out"][0], atol=1e-4)
            if carry is not None:
                want = [set(np.flatnonzero(row).tolist()) for row in c[f"s{t + 1}_l{layer}_mask"]]
                assert [set(row.tolist()) for row in carry[0]] == want
            x = x + o / 2
        np.testing.assert_allclose(x, c[f"s{t + 1}_h"][0], atol=1e-4)
