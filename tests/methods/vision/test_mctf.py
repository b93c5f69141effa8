"""MCTF against its formulas, the official outputs (of the fusion and of whole blocks) and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import move, reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import MCTF, ToMe
from jaxtok.methods.vision.mctf import schedule
from jaxtok.models import vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.toyrows import grouped, normal, rows, unit

small = {
    "mctf": lambda n: MCTF(remove=16 - n),
    "mctf:recompute": lambda n: MCTF(remove=16 - n, when="recompute", pooling="size"),
    "mctf:behind": lambda n: MCTF(remove=16 - n, when="behind", both=False),
}


@functools.partial(jax.jit, static_argnums=0)
def fused(method, tokens, probs, keep=None):
    evidence = Evidence(probs=probs)
    _, plan = method.plan({}, method.start({}, tokens), tokens, evidence, keep)
    return reduce(plan, tokens), move(plan, evidence).probs


def attention(seed, b, h, n):
    e = np.exp(normal(seed, b, h, n, n))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def reference(x, probs, size, r, taus, both, special):
    """Loops over pairs -> for each row its place in the output, and the weights."""
    n, u = len(x), unit(x)
    got = probs.mean((0, 1))
    inv, small_ = 1 / got, 1 / size
    inv, small_ = inv / inv.max(), small_ / small_.max()
    a, b = list(range(0, n, 2)), list(range(1, n, 2))

    def w(i, j):
        if i < special or j < special:
            return -np.inf
        sim = ((u[i] @ u[j] + 1) / 2) ** (1 / taus[0]) if taus[0] else 1.0
        return sim * ((inv[i] * inv[j]) ** (1 / taus[1]) if taus[1] else 1) * ((small_[i] * small_[j]) ** (1 / taus[2]) if taus[2] else 1)

    into = {i: i for i in range(n)}
    first = r // 2 if both else r
    gone = sorted(a, key=lambda i: -max(w(i, j) for j in b))[:first]
    for i in gone:
        into[i] = max(b, key=lambda j: w(i, j))
    left = [i for i in a if i not in gone]
    back = sorted(b, key=lambda j: -max(w(i, j) for i in left))
    order = (left if special else sorted(left, key=lambda i: -max(w(i, j) for j in b))) + (back[r - first :] if both else b)
    for j in back[: r - first] if both else ():
        into[j] = max(left, key=lambda i: w(i, j))
    into = {i: into[into[i]] for i in into}
    return np.array([order.index(into[i]) for i in range(n)]), got * size


@pytest.mark.parametrize(
    "special, both, taus, pooling",
    [(1, True, (1.0, 20.0, 40.0), "attention"), (1, False, (2.0, 5.0, 0.0), "size"), (0, True, (1.0, 0.0, 3.0), "mean")],
)
def test_reference(special, both, taus, pooling):
    n = 15
    x, probs, size = normal(1, 2, n, 4), attention(2, 2, 3, n), np.random.default_rng(3).integers(1, 5, (2, n)).astype(np.float64)
    method = MCTF(remove=5, tau_sim=taus[0], tau_info=taus[1], tau_size=taus[2], both=both, pooling=pooling, special=special)
    out, matrix = fused(method, rows(x, special, size=size), jnp.asarray(probs))
    for i in range(2):
        source, weight = reference(x[i], probs[i].astype(np.float64), size[i], 5, taus, both, special)
        weight = {"attention": weight, "size": size[i], "mean": np.ones(n)}[pooling]
        want, total = grouped(x[i], weight, source)
        assert (np.asarray(out.source[i]) == source).all()
        np.testing.assert_allclose(out.x[i], want, atol=1e-5)
        np.testing.assert_allclose(out.size[i], np.bincount(source, size[i]))
        member = np.eye(10)[source]
        np.testing.assert_allclose(
            matrix[i], np.einsum("nm,hnk,kl->hml", member * (weight[:, None] / total[source][:, None]), probs[i], member), atol=1e-5
        )


def test_limits():
    """Off in all but the similarity and one way only it is ToMe on hidden rows; fused rows of attention sum to 1; sizes stay."""
    x, probs = normal(4, 2, 15, 5), attention(5, 2, 2, 15)
    plain = MCTF(remove=4, tau_info=0.0, tau_size=0.0, both=False, pooling="size")
    out, matrix = fused(plain, rows(x), jnp.asarray(probs))
    tome = ToMe(remove=4)
    merge = jax.jit(lambda t: reduce(tome.plan({}, tome.start({}, t), t, Evidence(keys=t.x[:, None]))[1], t))
    want = merge(rows(x))
    np.testing.assert_array_equal(out.source, want.source)
    np.testing.assert_allclose(out.x, want.x, atol=1e-6)
    out, matrix = fused(MCTF(remove=5), rows(x), jnp.asarray(probs))
    np.testing.assert_allclose(jnp.sum(matrix, -1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out.size).sum(1), 15)


def test_counts():
    assert MCTF(remove=16).count(197, 196) == 181 and MCTF(remove=20).count(26, 25) == 14
    assert MCTF(remove=4).count(12, 11) == 10 and MCTF(remove=4).count(8, 7) == 8
    assert [k for k, _ in schedule(16, 12)] == list(range(1, 12)) and [k for k, _ in schedule(60, 12, fast=True)] == [3, 6, 9]


POOLING = {0: "size", 1: "attention", 3: "mean"}


def test_official_fusion(data):
    """Rows, sizes, attention and places after one fusion and a second; max pooling is not offered."""
    for case in cases(data, "mctf"):
        special, source = int(case["num_protected"]), None
        for step in (1, 2):
            if f"x_in{step}" not in case or int(case["pooling_type"]) not in POOLING:
                continue
            x = case[f"x_in{step}"]
            n, r = x.shape[1], float(case["r"])
            size = case[f"size_in{step}"][..., 0] if f"size_in{step}" in case else np.ones(x.shape[:2])
            method = MCTF(
                remove=int(case[f"r_eff{step}"]) if r < 1 else int(r),  # a ratio: so many rows, whatever is left
                least=0 if r < 1 else 10,
                **{f"tau_{name}": float(case[f"tau_{name}"]) for name in ("sim", "info", "size")},
                both=bool(case["bidirection"]),
                pooling=POOLING[int(case["pooling_type"])],
                special=special,
            )
            out, matrix = fused(method, rows(x, special, size=size), jnp.asarray(case[f"attn{step}"]))
            assert out.x.shape[1] == n - int(case[f"r_eff{step}"])
            source = np.asarray(out.source) if source is None else np.take_along_axis(np.asarray(out.source), source, 1)
            assert (source == case[f"assign{step}"]).all()
            np.testing.assert_allclose(out.x, case[f"x_out{step}"], atol=3e-5)
            np.testing.assert_allclose(out.size, case[f"size_out{step}"][..., 0], atol=1e-5)
            if f"attn_out{step}" in case and case[f"attn_out{step}"].ndim == 4:
                np.testing.assert_allclose(matrix, case[f"attn_out{step}"], atol=3e-5)


def test_official_blocks(data):
    """One block, and the same block applied twice, by the encoder with this method at its place."""
    for case in cases(data, "mctf_block"):
        x, step = case["x"], int(case["one_step_ahead"])
        c = x.shape[-1]
        w = {name[2:]: value for name, value in case.items() if name.startswith("w_")}
        q, k, v = np.split(w["attn.qkv.weight"].T, 3, 1)
        bias = np.split(w["attn.qkv.bias"], 3) if "attn.qkv.bias" in w else [np.zeros(c, np.float32)] * 3
        layer = {"q": q, "k": k, "v": v} | dict(zip(("q_bias", "k_bias", "v_bias"), bias, strict=True))
        for ours, theirs in (("o", "attn.proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2"), ("norm1", "norm1"), ("norm2", "norm2")):
            layer |= {ours: w[theirs + ".weight"].T, ours + "_bias": w[theirs + ".bias"]}
        layer = jax.tree.map(jnp.asarray, layer)
        method = MCTF(
            remove=int(case["r"]),
            **{f"tau_{name}": float(case[f"tau_{name}"]) for name in ("sim", "info", "size")},
            both=bool(case["bidirection"]),
            pooling=POOLING[int(case["pooling_type"])],
            when=("behind", "ahead", "recompute")[step],
            special=int(case["num_protected"]),
        )
        for layers in (1, 2):
            at = range(layers) if step else range(1, layers + 1)
            # "behind" a block is before the next one: one layer more, whose input is what we compare
            cfg = EncoderConfig(
                width=c, layers=layers + (not step), heads=int(case["num_heads"]), hidden=layer["up"].shape[1], norm_eps=_eps(case)
            )
            blocks = (layer,) * layers
            if not step:
                zero = {name: jnp.zeros_like(a) if name in ("o", "o_bias", "down", "down_bias") else a for name, a in layer.items()}
                blocks += (zero,)  # writes nothing
            recipe = Recipe(vit=tuple((i, method) for i in at))
            run = jax.jit(functools.partial(vit.encode, cfg, recipe=recipe, proportional=bool(case["prop_attn"])))
            out = run(params={"layers": blocks}, tokens=rows(x, method.special)).tokens
            np.testing.assert_allclose(out.x, case[f"y{layers}"], atol=1e-4)
            np.testing.assert_allclose(out.size, case[f"size{layers}"][..., 0], atol=1e-5)
        assert (np.asarray(out.source) == case["assign"]).all()


def _eps(case) -> float:
    return float(case["norm_eps"]) if "norm_eps" in case else 1e-6


def test_bad_input():
    for bad in ({"remove": -1}, {"remove": 1, "when": "later"}, {"remove": 1, "pooling": "max"}, {"remove": 1, "tau_sim": -1.0}):
        with pytest.raises(ValueError):
            MCTF(**bad)
    with pytest.raises(ValueError):
        schedule([1, 2], 12)
