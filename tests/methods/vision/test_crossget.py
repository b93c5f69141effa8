"""CrossGET against its formulas, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.types import SPECIAL, Evidence
from jaxtok.methods import CrossGET
from jaxtok.methods.vision.crossget import js_loss
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.toyrows import grouped, normal, rows, unit

small = {
    "crossget": lambda n: CrossGET(remove=16 - n, cross=False, special=1),
    "crossget:llava": lambda n: CrossGET(remove=16 - n, cross=False, special=1, mode="llava"),
    "crossget:cross": lambda n: CrossGET(remove=16 - n),
}


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens, evidence, keep=None):
    _, plan = method.plan({}, method.start({}, tokens), tokens, evidence, keep)
    return plan, reduce(plan, tokens), method.importance(tokens, evidence)


def placed(x, size=None, protected=()):
    """Rows whose first, last and `protected` (one a sequence) are SPECIAL."""
    tokens = rows(x, 1, size=size)
    kind = np.array(tokens.kind)
    kind[:, -1] = SPECIAL
    if len(protected):
        kind[np.arange(len(kind)), protected] = SPECIAL
    return tokens._replace(kind=jnp.asarray(kind))


def reference(k, importance, x, size, r, protected):
    """Loops -> (rows, sizes, source) of one sequence."""
    n, u = len(k), unit(k)
    free = [i for i in range(n) if i not in protected]
    like = {(i, j): u[i] @ u[j] for i in free for j in free if i != j}
    order = sorted(free, key=lambda i: -max(like[i, j] for j in free if j != i))
    key = {i: importance[i] - max((like[i, j] for j in order[a + 1 :]), default=-np.inf) for a, i in enumerate(order)}
    source = sorted(free, key=lambda i: key[i])[:r]
    stay = [i for i in range(n) if i not in source]
    into = {i: max((j for j in stay if j in free), key=lambda j: like[i, j]) for i in source}
    out, total = {i: size[i] * x[i] for i in stay}, {i: size[i] for i in stay}
    for s, d in into.items():
        e = np.exp([importance[s], importance[d]])
        ws, wd = 2 * e / e.sum()
        out[d] = out[d] + ws * size[s] * x[s] + (wd - 1) * size[d] * x[d]
        total[d] += size[s]
    return np.array([out[i] / total[i] for i in stay]), np.array([total[i] for i in stay]), [stay.index(into.get(i, i)) for i in range(n)]


def split(k, heads=2):
    return jnp.asarray(k.reshape(*k.shape[:2], heads, -1).swapaxes(1, 2))


@pytest.mark.parametrize("mode", ["image", "text", "llava"])
def test_reference(mode):
    n = 15
    x, k, q, size = normal(1, 2, n, 4), normal(2, 2, n, 6), normal(3, 2, n, 6), np.random.default_rng(4).integers(1, 4, (2, n))
    probs = np.exp(normal(5, 2, 2, n, n))
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    eot = np.array([9, 12])
    evidence = Evidence(
        keys=split(k),
        turned=split(q) if mode == "text" else split(q)[:, :, -1:],
        received=jnp.asarray(probs.sum(2)),
        rows=jnp.asarray(probs[:, :, -1:]),
    )
    text = mode == "text"
    method = CrossGET(remove=5, mode=mode, special=2 + text)
    _, out, found = merged(method, placed(x, size, eot if text else ()), evidence)
    for i in range(2):
        if mode == "llava":
            a, metric = probs[i].mean(0), k[i].reshape(n, 2, 3).mean(1)
            importance = a[:-1].mean(0) + a[-1]
        else:
            metric, importance = k[i], unit(k[i]) @ unit(q[i, eot[i] if text else -1])
        np.testing.assert_allclose(found[i], importance, atol=1e-5)
        want, total, source = reference(metric, importance, x[i], size[i], 5, {0, n - 1, *([eot[i]] if text else [])})
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], total)
        assert np.asarray(out.source[i]).tolist() == source


def test_equal_importance_weighs_by_size():
    """Without a preference the rows are size-weighted means; no source is a destination; r = 0 changes nothing."""
    x, k, size = normal(6, 2, 13, 4), normal(7, 2, 13, 6), np.random.default_rng(8).integers(1, 4, (2, 13))
    evidence = Evidence(keys=split(k), received=jnp.ones((2, 2, 13)), rows=jnp.ones((2, 2, 1, 13)))
    method = CrossGET(remove=5, mode="llava")
    plan, out, _ = merged(method, placed(x, size), evidence)
    for i in range(2):
        want, total = grouped(x[i], size[i], np.asarray(out.source[i]))
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        stay = set(np.asarray(plan.index[i]).tolist())
        assert len(stay) == 8 and all(int(plan.index[i][g]) in stay for g in np.asarray(plan.assign[i]))
    np.testing.assert_allclose(merged(CrossGET(remove=0, mode="llava"), placed(x), evidence)[1].x, x, atol=1e-6)


def compare(case, suffix=""):
    mode = str(case["mode"]) if str(case["mode"]) == "llava" else "text" if "token_id" in case else "image"
    x, n = case["x"], case["x"].shape[1]
    eot = case["token_id"].argmax(-1) if mode == "text" else ()
    method = CrossGET(remove=int(case["r"]), mode=mode, special=(2 + (mode == "text")) * bool(case["class_token"]))
    one = lambda a: jnp.asarray(a)[:, None]
    if mode == "llava":
        probs = case["attn_mean_heads"]
        evidence = Evidence(keys=one(case["k"]), received=one(probs.sum(1)), rows=jnp.asarray(probs[:, None, -1:]))
    else:
        evidence = Evidence(keys=one(case["k"]), turned=one(case["q"] if mode == "text" else case["q"][:, -1:]))
    some = bool(case["class_token"])
    tokens = placed(x, case["token_size"][..., 0], eot) if some else rows(x, 0, size=case["token_size"][..., 0])
    plan, out, importance = merged(method, tokens, evidence)
    assert out.x.shape[1] == n - int(case["r_eff"])
    np.testing.assert_allclose(importance, case["importance"], atol=2e-6)
    into = np.take_along_axis(np.asarray(plan.index), np.asarray(plan.assign), 1)
    for i in range(len(x)):
        gone = {int(s): int(d) for s, d in zip(case["src_idx" + suffix][i], case["dst_idx" + suffix][i], strict=True)}
        assert {j: int(into[i, j]) for j in range(n) if into[i, j] != j} == gone
    np.testing.assert_allclose(out.x, case["x_out" + suffix], atol=3e-5)
    np.testing.assert_allclose(out.size, case["token_size_out" + suffix][..., 0], atol=1e-5)
    if mode == "text":
        ids = reduce(
            plan._replace(w=jnp.swapaxes(jax.nn.one_hot(plan.assign, plan.w.shape[1]), 1, 2)),
            tokens._replace(x=jnp.asarray(case["token_id"])[..., None] * tokens.size[..., None]),
        ).x
        np.testing.assert_allclose(ids[..., 0] / out.size, case["token_id_out" + suffix], rtol=1e-4)


def test_official_image(data):
    for case in cases(data, "crossget_clip_image"):
        compare(case)


def test_official_text(data):
    for case in cases(data, "crossget_clip_text"):
        compare(case)


def test_official_llava(data):
    """The stable outputs: those shipped hang on rounding where two rows are each other's nearest."""
    for case in cases(data, "crossget_llava"):
        compare(case, "_stable")


CFG = EncoderConfig(width=8, layers=3, heads=2, hidden=12, image=(8, 8), patch=(2, 2), channels=3)


def test_cross_token_in_an_encoder():
    """By hand: a row behind the others, its input of a layer is what it was (held) plus the layer's vector; it is gone at the end."""
    method = CrossGET(remove=0, stays=True)
    recipe = Recipe(vit=((0, method), (1, method)))
    params = encoder.init(CFG, jax.random.key(0))
    params["methods"] = recipe.init_params(jax.random.key(1), CFG)
    tokens = vit.embed(CFG, params, jax.random.normal(jax.random.key(2), (2, 8, 8, 3)))
    plain = lambda t, first, last: vit.encode(CFG, params | {"layers": params["layers"][first:last] * 3}, t, until=1).tokens
    c0, c1 = (entry["cross"] for entry in params["methods"]["vit"])

    @jax.jit
    def by_hand(t):
        x = method.begin({}, t)
        x = plain(x._replace(x=x.x.at[:, -1].set(c0[None])), 0, 1)
        return plain(x._replace(x=x.x.at[:, -1].add(c1[None])), 1, 2).x

    found = jax.jit(lambda p, t: vit.encode(CFG, p, t, recipe, until=2).tokens)(params, tokens)
    np.testing.assert_allclose(found.x, by_hand(tokens), atol=1e-5)
    assert (np.asarray(found.kind[:, -1]) == SPECIAL).all()
    away = Recipe(vit=tuple((k, CrossGET(remove=4)) for k in range(3)), select=None)
    params["methods"] = away.init_params(jax.random.key(1), CFG)
    loss = lambda p: (lambda out: (jnp.sum(out.x[:, 0] ** 2), out))(vit.encode(CFG, p, tokens, away, proportional=True).tokens)
    grad, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert out.x.shape[1] == 17 - 12 and (np.asarray(out.size).sum(1) == 17).all()
    grad = grad["methods"]["vit"]
    assert all(float(jnp.abs(g["cross"]).max()) > 0 for g in grad[:3]), "the class row reads the cross token in every layer"


def test_text_tower():
    """The end-of-text row survives and is what the tower returns; its query decides."""
    cfg = EncoderConfig(width=8, layers=2, heads=2, hidden=12, image=None, vocab=20, context=12, causal=True, pool="eos")
    recipe = Recipe(vit=tuple((k, CrossGET(remove=2, mode="text", special=3)) for k in range(2)))
    params = encoder.init(cfg, jax.random.key(0))
    params["methods"] = recipe.init_params(jax.random.key(1), cfg)
    live = np.arange(12)[None] < np.array([[12], [8]])
    tokens = vit.embed_text(cfg, params, jax.random.randint(jax.random.key(2), (2, 12), 0, 20), jnp.asarray(live))
    out = jax.jit(lambda t: vit.encode(cfg, params, t, recipe, proportional=True).tokens)(tokens)
    assert (np.asarray(out.pos).max(1) == [11, 7]).all() and (np.asarray(out.size).sum(1) == [12, 8]).all()
    assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [8, 4]
    np.testing.assert_allclose(vit.head(cfg, params, out).shape, (2, 8))


def test_js_loss():
    a, b = normal(9, 3, 5), normal(10, 3, 5)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    m = (p + q) / 2
    want = ((m * np.log(m / p)).sum(-1) + (m * np.log(m / q)).sum(-1)).mean() / 2
    np.testing.assert_allclose(js_loss(jnp.asarray(a), jnp.asarray(b)), want, rtol=1e-5)
    assert abs(float(js_loss(jnp.asarray(a), jnp.asarray(a)))) < 1e-6


def test_bad_input():
    for bad in ({"remove": -1}, {"remove": 1, "mode": "audio"}, {"remove": 1, "special": -1}):
        with pytest.raises(ValueError):
            CrossGET(**bad)
