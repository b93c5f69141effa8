"""ToMeSD against its formulas, the official outputs and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import assignment, gather, reduce
from jaxtok.core.types import Evidence
from jaxtok.methods import ToMeSD
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.toyrows import normal, rows, unit

small = lambda n: ToMeSD(remove=16 - n, special=1)


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens, key=None, keep=None):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence(key=key), keep)
    return plan, reduce(plan, tokens), gather(reduce(plan, tokens).x, assignment(plan))


def reference(x, high, wide, sx, sy, remove):
    """Loops -> for each row the row that its group is named after, and what it finds in its group."""
    target = [y * sy * wide + c * sx for y in range(high // sy) for c in range(wide // sx)]
    like = unit(x) @ unit(x).T
    best = {i: (max(like[i, target]), target[int(np.argmax(like[i, target]))]) for i in range(len(x)) if i not in target}
    gone = sorted(best, key=lambda i: -best[i][0])[:remove]
    into = np.array([best[i][1] if i in gone else i for i in range(len(x))])
    return into, np.stack([x[into == i].mean(0) for i in into])


@pytest.mark.parametrize("high, wide, sx, sy, remove", [(6, 6, 2, 2, 18), (5, 7, 2, 2, 20), (4, 6, 3, 2, 30)])
def test_reference(high, wide, sx, sy, remove):
    x = normal(high, 2, high * wide, 5)
    plan, out, back = merged(ToMeSD(remove=remove, sx=sx, sy=sy, random=False), rows(x, 0, grid=(high, wide)))
    for i in range(2):
        into, want = reference(x[i], high, wide, sx, sy, remove)
        np.testing.assert_allclose(back[i], want, atol=1e-5)
        assert (np.asarray(plan.index[i])[np.asarray(plan.assign[i])] == into).all()
    assert (np.asarray(out.lost) == 0).all()


def test_official_outputs(data):
    """Which rows are destinations, who joins whom, and what each row finds at the end."""
    for case in cases(data, "tomesd"):
        high, wide, metric = int(case["h"]), int(case["w"]), case["metric"]
        method = ToMeSD(remove=int(case["r"]), sx=int(case["sx"]), sy=int(case["sy"]), random=not bool(case["no_rand"]))
        plan, out, _ = merged(method, rows(metric, 0, grid=(high, wide)))
        assert (np.asarray(out.pos) >= 0).sum(1).tolist() == [metric.shape[1] - int(case["r_eff"])] * len(metric)
        where = np.asarray(plan.index)
        name = np.take_along_axis(where, np.asarray(plan.assign), 1)
        for i in range(len(metric)):
            want = case["assign"][i]  # the same partition, named otherwise
            assert len(set(zip(name[i].tolist(), want.tolist(), strict=True))) == len(set(want.tolist())) == len(set(name[i].tolist()))
            assert set(case["b_idx"].tolist()) <= set(name[i].tolist())
        x = rows(case["x"], 0)
        np.testing.assert_allclose(gather(reduce(plan, x).x, plan.assign), case["x_unmerged"], atol=2e-5)


def test_ratio_is_what_is_kept():
    assert ToMeSD().count(64, 64) == 32 and ToMeSD(ratio=0.05).count(64, 64) == 64 - 48 and ToMeSD(ratio=1.0).count(64, 64) == 64


def test_limits():
    """sx = sy = 1 leaves no sources; constants stay; each row finds exactly one group."""
    x = normal(1, 2, 16, 5)
    plan, _, back = merged(ToMeSD(remove=8, sx=1, sy=1), rows(x, 0, grid=(4, 4)))
    np.testing.assert_array_equal(back, x)
    plan, out, back = merged(ToMeSD(remove=8), rows(np.ones_like(x), 0, grid=(4, 4)))
    np.testing.assert_allclose(back, 1.0)
    assert sorted(set(np.asarray(plan.assign[0]).tolist())) == list(range(8)) and (np.asarray(out.size).sum(1) == 16).all()


def test_random_draws_one_destination_a_block():
    x = normal(2, 3, 16, 5)
    seen = set()
    for seed in range(4):
        plan, _, _ = merged(ToMeSD(remove=12), rows(x, 0, grid=(4, 4)), jax.random.key(seed))
        index = np.asarray(plan.index)
        assert (index == index[:1]).all(), "the same for the whole batch"
        assert sorted((i // 4 // 2, i % 4 // 2) for i in index[0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        seen.add(tuple(index[0]))
    assert len(seen) > 1


def test_in_an_encoder():
    """x + unmerge(attention(merge(norm(x)))), by hand; all rows are there at the end."""
    cfg = EncoderConfig(
        width=8, layers=1, heads=2, hidden=8, image=(8, 8), patch=(2, 2), channels=3, cls=False, pool="mean", final_norm=False
    )
    params = encoder.init(cfg, jax.random.key(0))
    tokens, method, p = (
        vit.embed(cfg, params, jax.random.normal(jax.random.key(1), (2, 8, 8, 3))),
        ToMeSD(remove=8, random=False),
        params["layers"][0],
    )
    out = jax.jit(lambda t: vit.encode(cfg, params, t, Recipe(vit=((0, method),))).tokens)(tokens)
    plan, _, _ = merged(method, tokens)
    normed = reduce(plan, tokens._replace(x=encoder.norm(cfg, p, "norm1", tokens.x))).x
    q, k, v = (np.asarray(encoder.heads(cfg, encoder.linear(p, name, normed))) for name in "qkv")
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) / 2
    a = np.exp(logits - logits.max(-1, keepdims=True))
    inner = np.einsum("bhqk,bhkd->bqhd", a / a.sum(-1, keepdims=True), v).reshape(normed.shape)
    block = np.asarray(encoder.linear(p, "o", jnp.asarray(inner)))
    x = tokens.x + np.take_along_axis(block, np.asarray(plan.assign)[..., None], 1)
    want = x + encoder.mlp(cfg, p, encoder.norm(cfg, p, "norm2", x))
    np.testing.assert_allclose(out.x, want, atol=1e-5)


def test_bad_input():
    for bad in ({"ratio": 0.0}, {"sx": 0}, {"remove": -1}, {"ratio": 1.5}):
        with pytest.raises(ValueError):
            ToMeSD(**bad)
