"""FlowCut's parts in the encoder and in the decoder against its formulas, the official outputs and its limits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, Evidence
from jaxtok.methods import FlowCutLayers, FlowCutVit
from jaxtok.methods.vision.flowcut import flowcut, schedule
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision import places
from tests.methods.vision.toyrows import do, normal, rows

small = {
    "flowcut.vit": lambda n: FlowCutVit(capacity=n, last=1),
    "flowcut.vit:mean": lambda n: FlowCutVit(capacity=n, query="mean", last=1),
    "flowcut.layers": lambda n: FlowCutLayers(capacity=n, images=16),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def planned(method, state, tokens, evidence, keep=None):
    state, plan = method.plan({}, state, tokens, evidence, keep)
    return state, plan, method.flow(tokens, evidence)


@pytest.mark.parametrize("left", [0, 1, 2, 4])
def test_reference(left):
    """One place by loops: the three signals, the carried score, how many go and which."""
    n, capacity = 15, 5
    v, cls, before = normal(1, 2, 3, n, 4), softmax(3 * normal(2, 2, 3, n)).astype(np.float32), np.abs(normal(3, 2, n))
    method, tokens = FlowCutVit(capacity=capacity, left=left), rows(normal(4, 2, n, 6))
    state = do(method, "start", {}, tokens)._replace(slots=jnp.asarray(before), rest=jnp.ones((), bool))
    state, plan, _ = planned(method, state, tokens, Evidence(cls=jnp.asarray(cls), values=jnp.asarray(v)))
    for i in range(2):
        c = cls[i].mean(0)[1:]
        s = np.mean([softmax(np.array([v[i, h, 0] @ v[i, h, j] for j in range(n)])) for h in range(3)], 0)[1:]
        w = np.abs(v[i].mean(0)).sum(-1)[1:]
        total = 0.5 * before[i, 1:] + 0.5 * (c / c.sum() + s / s.sum()) * w
        np.testing.assert_allclose(state.slots[i, 1:], total, atol=1e-5)
        stay = n - 1
        if left == 0:
            stay = capacity
        elif left % 2 == 0:
            p = c / c.sum()
            stay = max(stay - round((n - 1 - capacity) / np.sqrt(left) * (1 - (-(p * np.log(p)).sum() / np.log(n - 1)) ** 2)), capacity)
        kept = [0, *sorted(1 + np.argsort(-total)[:stay])]
        assert [j for j in np.asarray(plan.index[i]) if j >= 0] == kept


def test_mean_query_reference():
    n, v, k, q = 12, normal(5, 1, 2, 12, 4), normal(6, 1, 2, 12, 4), normal(7, 1, 2, 4)
    method, tokens = FlowCutVit(capacity=4, query="mean", left=2, special=0), rows(normal(8, 1, n, 6), 0)
    evidence = Evidence(keys=jnp.asarray(k), values=jnp.asarray(v), queries=(jnp.asarray(q), jnp.zeros((1, 2, 4, 4))))
    _, plan, flow = planned(method, do(method, "start", {}, tokens), tokens, evidence)
    c = np.mean([softmax(k[0, h] @ q[0, h] / 2) for h in range(2)], 0)
    score = c * np.abs(v[0].mean(0)).sum(-1)
    np.testing.assert_allclose(flow.score[0], score, atol=1e-6)
    r = round((n - 4) / np.sqrt(2) * (1 - (-(c * np.log(c + 1e-7)).sum() / np.log(n)) ** 2))
    assert [j for j in np.asarray(plan.index[0]) if j >= 0] == sorted(np.argsort(-score)[: max(n - r, 4)])


def test_uniform_attention_drops_nothing_before_the_last_place():
    method, tokens = FlowCutVit(capacity=3, left=2), rows(normal(9, 1, 12, 4))
    evidence = Evidence(cls=jnp.full((1, 2, 12), 1 / 12), values=jnp.asarray(normal(10, 1, 2, 12, 4)))
    assert (np.asarray(planned(method, do(method, "start", {}, tokens), tokens, evidence)[1].index) >= 0).all()


def model(layers, c=8, heads=2, **more) -> tuple[EncoderConfig, Any]:
    cfg = EncoderConfig(width=c, layers=layers, heads=heads, hidden=12, image=(8, 8), patch=(2, 2), channels=3, final_norm=False, **more)
    params = encoder.init(cfg, jax.random.key(0))
    params["layers"] = tuple(p | {"q": p["q"] * 5, "k": p["k"] * 5} for p in params["layers"])
    return cfg, params


def test_exactly_the_capacity_is_left():
    """After all places; a capacity of all rows is the plain encoder. The features are those of the second to last layer."""
    cfg, params = model(5)
    tokens = vit.embed(cfg, params, jax.random.normal(jax.random.key(1), (2, 8, 8, 3)))
    run = lambda entries: jax.jit(lambda t: vit.encode(cfg, params, t, Recipe(vit=entries), until=4).tokens)(tokens)
    out = run(schedule(6, 5))
    assert out.x.shape[1] == 7 and (np.asarray(out.pos) >= 0).all() and [k for k, _ in schedule(6, 6)] == [1, 2, 3, 4]
    np.testing.assert_allclose(run(schedule(16, 5)).x, run(()).x, atol=1e-6)


def weights(case, name):
    w = {key[2:]: jnp.asarray(a) for key, a in case.items() if key.startswith("w.")}
    layers = []
    for i in range(1 + max(int(key.split(".")[1]) for key in w)):
        get = lambda part, i=i: (w[f"{name}.{i}.{part}.weight"], w[f"{name}.{i}.{part}.bias"])
        if name == "layers":
            p = {x: get(f"self_attn.{x}_proj") for x in "qkv"}
            p |= {"o": get("self_attn.out_proj"), "norm1": get("layer_norm1"), "norm2": get("layer_norm2")}
        else:
            a, b = get("attn.qkv")
            p = {x: (a[j * len(a) // 3 : (j + 1) * len(a) // 3], b[j * len(a) // 3 : (j + 1) * len(a) // 3]) for j, x in enumerate("qkv")}
            p |= {"o": get("attn.proj"), "norm1": get("norm1"), "norm2": get("norm2")}
        p |= {"up": get("mlp.0"), "down": get("mlp.2")}
        layers.append({k: (a.T if a.ndim == 2 else a) for k, (a, _) in p.items()} | {k + "_bias": b for k, (_, b) in p.items()})
    return tuple(layers)


def test_official_clip(data):
    """Which rows are left at the end, how many enter each layer, and the features."""
    for case in cases(data, "flowcut_clip"):
        x, layers, k = case["inputs_embeds"], weights(case, "layers"), int(case["target_num"])
        n, c = x.shape[1] - 1, x.shape[2]
        cfg = EncoderConfig(
            width=c, layers=len(layers), heads=int(case["num_heads"]), hidden=layers[0]["up"].shape[1], norm_eps=1e-5, act="quick_gelu"
        )
        assert int(case["select_layer"]) == len(layers) - 2
        entries, tokens = schedule(k, len(layers), variant="official"), rows(x)
        for until in range(1, len(layers)):
            part = tuple(e for e in entries if e[0] < until or e[0] == until == len(layers) - 1)
            run = functools.partial(vit.encode, cfg, recipe=Recipe(vit=part), until=until)
            if until < len(layers) - 1 and "patches_entering_each_layer" not in case:
                continue
            out = jax.jit(run)(params={"layers": layers}, tokens=tokens).tokens
            entering = int((np.asarray(out.pos[0]) >= 0).sum()) - 1
            assert entering == int(np.ravel(case["patches_entering_each_layer"])[until - 1])
        keep = case["keep_indices"]
        for i in range(len(x)):
            want = range(n) if k >= n else keep[i]  # the official list is one too long where nothing is pruned
            assert (np.asarray(out.pos[i])[-len(list(want)) :] - 1).tolist() == list(want)
        np.testing.assert_allclose(np.asarray(out.x)[:, -min(k, n) :], case["features_layer_minus2"], atol=2e-4)


def test_official_qwen(data):
    """How many rows enter each block, and what enters the merger."""
    for case in cases(data, "flowcut_qwen_vit"):
        x, layers, k = case["tokens"][None], weights(case, "blocks"), int(case["vit_target_unmerged"])
        c = x.shape[2]
        cfg = EncoderConfig(width=c, layers=len(layers), heads=int(case["num_heads"]), hidden=layers[0]["up"].shape[1], norm_eps=1e-6)
        entries, counts = schedule(k, len(layers), "mean", special=0), case["tokens_entering_each_block"]
        for until in range(1, len(layers) + 1):
            part = tuple(e for e in entries if e[0] < until or e[0] == until == len(layers))
            out = jax.jit(functools.partial(vit.encode, cfg, recipe=Recipe(vit=part), until=until))(
                params={"layers": layers}, tokens=rows(x, 0)
            ).tokens
            live = np.asarray(out.pos[0]) >= 0
            if until < len(layers):
                assert live.sum() == counts[until - 1]
        np.testing.assert_allclose(np.asarray(out.x[0])[live], case["out_before_merger"], atol=2e-4)


def test_a_traced_budget():
    method, tokens = FlowCutVit(capacity=6), rows(normal(11, 2, 12, 4))
    evidence = Evidence(cls=jnp.asarray(softmax(normal(12, 2, 2, 12))), values=jnp.asarray(normal(13, 2, 2, 12, 4)))
    plan = planned(method, method.start({}, tokens), tokens, evidence, jnp.asarray([3, 99]))[1]
    assert (np.asarray(plan.index) >= 0).sum(1).tolist() == [3, 7]


def test_bad_input():
    for bad in ({"capacity": 0}, {"capacity": 2, "query": "all"}, {"capacity": 2, "variant": "mine"}, {"capacity": 2, "last": 0}):
        with pytest.raises(ValueError):
            FlowCutVit(**bad)


# --- between the decoder's layers -----------------------------------------------------------------------------------------


def flow(q, k, v, image):
    """The score of the image rows of one sequence: q [h d] of the last row, k and v [h n d]."""
    c, s = np.zeros(len(image)), np.zeros(len(image))
    for h in range(len(q)):
        c += softmax(k[h, image] @ q[h] * q.shape[-1] ** -0.5) / len(q)
        s += softmax(v[h, image] @ v[h, -1] * q.shape[-1] ** -0.5) / len(q)
    return (c / c.sum() + s / s.sum()) * np.abs(v.mean(0)[image]).sum(-1)


def of_last(q, k):
    """The attention row [b h 1 n] of queries [b h d] that see every key [b h n d]."""
    return softmax(np.einsum("bhd,bhnd->bhn", q, k) * q.shape[-1] ** -0.5)[:, :, None].astype(np.float32)


def test_inside_the_decoder():
    """Two sequences, four query heads on two KV heads, rows of text on both sides."""
    q, k, v = normal(1, 2, 4, 4), normal(2, 2, 2, 9, 4), normal(3, 2, 2, 9, 4)
    tokens = rows(normal(4, 2, 9, 3), special=0)
    tokens = tokens._replace(kind=jnp.asarray([[0, 0, *[IMAGE] * 5, 0, 0]] * 2, jnp.int8))
    method, wide = FlowCutLayers(capacity=2, images=5), [np.repeat(x, 2, 1) for x in (k, v)]
    evidence = Evidence(rows=jnp.asarray(of_last(q, wide[0])), values=jnp.asarray(v))
    score, plan = places.planned(method, tokens, evidence)
    for i in range(2):
        want = flow(q[i].astype(np.float64), wide[0][i].astype(np.float64), wide[1][i].astype(np.float64), range(2, 7))
        np.testing.assert_allclose(score[i, 2:7], want, atol=1e-5)
        assert plan.index[i].tolist() == [0, 1, *sorted(2 + np.argsort(-want)[:2]), 7, 8]


def test_official_inside_the_decoder(data):
    """What stands behind the last row of the instruction is no part of the prompt here."""
    for case in cases(data, "flowcut_llm"):
        n, first, many = int(case["last_instruct_pos"]), int(case["visual_start"]), int(case["visual_num"])
        q, k, v = (case[name][:, :, :n] for name in ("q", "k", "v"))
        b, capacity = len(q), int(case["target_num"])
        tokens = rows(np.ones((b, n, 2)), special=0)
        kind = np.where((np.arange(n) >= first) & (np.arange(n) < first + many), IMAGE, 0).astype(np.int8)
        tokens = tokens._replace(kind=jnp.broadcast_to(jnp.asarray(kind), (b, n)))
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
        evidence = Evidence(rows=jnp.asarray(of_last(q[:, :, -1], k)), values=jnp.asarray(v))
        method = FlowCutLayers(capacity=capacity, images=many)
        score, plan = places.planned(method, tokens, evidence)
        np.testing.assert_allclose(score[:, first : first + many], case["score"], atol=1e-5)
        for i in range(b):
            kept = np.asarray([j for j in plan.index[i].tolist() if j >= 0 and kind[j] == IMAGE]) - first
            np.testing.assert_array_equal(kept, np.asarray(case["keep_sorted"]).reshape(b, -1)[i])


def test_the_papers_recipes():
    """LLaVA-1.5: all in the tower. Five crops: 64 each, then 128 in all. Qwen2-VL: 1024 single patches, 256 rows, 128."""
    one, five, qwen = flowcut(128), flowcut(128, crops=5), flowcut(128, query="mean", layers=32, special=0)
    assert one.layers == () and one.vit[0][1].capacity == 128 and [k for k, _ in one.vit] == list(range(1, 23))
    assert [(r.vit[0][1].capacity, r.layers[0][0], r.layers[0][1].images, r.layers[0][1].capacity) for r in (five, qwen)] == [
        (64, 2, 320, 128),
        (1024, 2, 256, 128),
    ]
    assert five.layers[0][1].positions == "repack"
