"""CompressKV: a choice by hand, the card in numpy, every check of the card, the authors' scores and budgets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import CompressKV, Merging, PerLayer, SnapKV
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, tokens_of, world
from tests.methods import toys

small = lambda capacity: CompressKV(capacity=capacity, window=2, pool=3)


@functools.cache
def program(method):
    def run(table, kv, evidence, layer):
        seen, own = evidence._replace(layer=layer), {"heads": table}
        return method.score(own, kv, seen), method.compress(own, kv, seen)[0]

    return jax.jit(run)


def run(method, table, kv, evidence, layer=0):
    """(scores, compressed cache); a table [h] is that of `layer`, all other layers' are others."""
    table = np.asarray(table, np.float32)
    if table.ndim == 1:
        table = np.where(np.arange(3)[:, None] == layer, table, -table)
    return program(method)(jnp.asarray(table), kv, evidence, jnp.int32(layer))


def reference(q, kv, window, width, kind, heads):
    """The score that all KV heads share, float64; nan outside the candidates. `heads`: the query heads that are asked."""
    rows = toys.softmax_rows(q, kv.k, kv.pos)
    b, _, n, _ = rows.shape
    out = np.full((b, n), np.nan)
    for i in range(b):
        at = range(n - int(kv.seen[i]), n - window)
        votes = []
        for j in heads:
            s = {x: rows[i, j, -window:, x].sum() for x in at}
            near = [[s.get(y, 0.0) for y in range(x - width // 2, x + width // 2 + 1)] for x in at]
            votes.append([sum(y) / width if kind == "avg" else max(y) for y in near])
        if len(at):
            out[i, at.start : at.stop] = np.mean(votes, 0)
    return out


def test_by_hand():
    """Six tokens, window 1; the heads look at 0 | 1 | 2 | 3. Heads 1 and 3 retrieve: 1 and 3 stay in both KV heads."""
    kv = toys.cache(np.zeros((1, 2, 6, 2)), np.zeros((1, 2, 6, 2)))
    rows = jnp.asarray(np.eye(4, 6)[None, :, None] * 0.5, jnp.float32)
    method = CompressKV(capacity=3, window=1, pool=1, first_k=2)
    score, out = run(method, [0.1, 0.9, -3.0, 0.7], kv, Evidence(rows=rows), layer=2)
    np.testing.assert_allclose(score[0], [[0, 0.25, 0, 0.25, 0, 0]] * 2)
    assert toys.kept(out) == [[{1, 3, 5}] * 2]
    # pooled by three: 0, 1 and 2 get a third of .25 from 1, and 2 as much from 3 again
    score, _ = run(dataclasses.replace(method, pool=3), [0.1, 0.9, -3.0, 0.7], kv, Evidence(rows=rows))
    np.testing.assert_allclose(score[0, 0, :5], np.array([1, 1, 2, 1, 1]) / 12, rtol=1e-6)


@pytest.mark.parametrize("kind, width, first_k", [("avg", 5, 2), ("max", 3, 3)])
def test_equals_numpy(kind, width, first_k):
    q, kv = toys.problem(2, live=(24, 15), junk=1e4)
    table = np.array([0.3, -1.0, 2.0, 0.5])
    method = CompressKV(capacity=11, window=4, pool=width, kind=kind, first_k=first_k)
    want = reference(q, kv, 4, width, kind, np.argsort(-table)[:first_k])
    score, out = run(method, table, kv, toys.look(q, kv, 6), layer=1)
    for head in range(2):
        np.testing.assert_allclose(np.asarray(score)[:, head][~np.isnan(want)], want[~np.isnan(want)], rtol=2e-5)
    if kind == "avg":
        assert toys.kept(out) == toys.top(np.repeat(want[:, None], 2, 1), kv.pos, 11, lambda p, seen: p >= seen - 4)


def test_junk_short_rows_and_other_rows():
    q, kv = toys.problem(3, live=(24, 3))
    method = CompressKV(capacity=9, window=5, pool=3, first_k=1)
    _, out = run(method, [0.0, 1, 2, 3], kv, toys.look(q, kv, 5))
    assert toys.kept(out)[1] == [{0, 1, 2}] * 2
    loud, dirty = toys.problem(3, live=(24, 3), junk=1e4)
    assert toys.kept(run(method, [0.0, 1, 2, 3], dirty, toys.look(loud, dirty, 5))[1]) == toys.kept(out)
    empty = kv._replace(pos=jnp.full_like(kv.pos, -1), seen=jnp.zeros_like(kv.seen))
    score, out = run(method, [0.0, 1, 2, 3], empty, toys.look(q, kv, 5))
    assert np.isfinite(score).all() and (np.asarray(out.pos) < 0).all()


# --- the card's checks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, first_k", [([0.3, 0.1, 0.4, 0.2], 4), ([0.0] * 4, 1), ([0.0] * 4, 2)], ids=["all", "none", "none of 2"])
def test_all_heads_are_snapkv_of_the_mean_over_all(table, first_k):
    """first_k = h, and a table that was not calibrated."""
    q, kv = toys.problem(4)
    evidence = toys.look(q, kv, 4)
    snap = np.asarray(toys.scorer(SnapKV(capacity=9, window=4, pool=3))(kv, evidence)).mean(1, keepdims=True)
    score, out = run(CompressKV(capacity=9, window=4, pool=3, first_k=first_k), table, kv, evidence)
    inside = np.asarray((kv.pos >= 0) & (kv.pos < kv.seen[:, None, None] - 4))
    np.testing.assert_allclose(np.asarray(score)[inside], np.broadcast_to(snap, score.shape)[inside], rtol=1e-5)
    assert toys.kept(out) == toys.top(np.broadcast_to(snap, score.shape), kv.pos, 9, lambda p, seen: p >= seen - 4)


def test_equal_errors_are_uniform():
    for errors in ((0.3,) * 7, (5e-9,) * 7):
        assert CompressKV(capacity=50, errors=errors).table == (50,) * 7
    assert CompressKV(capacity=50, errors=(0.3,) * 7).slots == CompressKV(capacity=50).slots == 50


def test_budgets_sum_exactly():
    rng = np.random.default_rng(0)
    for k in range(60):
        count, capacity = int(rng.integers(1, 40)), int(rng.integers(32, 400))
        errors = tuple((rng.random(count) ** int(rng.integers(1, 9))).tolist())
        method = CompressKV(capacity=capacity, errors=errors, least=int(rng.integers(8, 33)), most=int(rng.integers(1, 4)))
        table, scaled = np.array(method.table), np.array(errors) / sum(errors)
        assert table.sum() == count * capacity and table.min() >= method.least and table.max() <= method.most * capacity
        ideal = method.least + scaled * count * (capacity - method.least)
        if (ideal <= method.most * capacity).all():
            assert (np.abs(table - ideal) < 2).all()
        assert (np.diff(table[np.argsort(scaled)]) >= -1).all(), "a layer of larger error has fewer slots"
        assert [method.layer(i, count).capacity for i in range(count)] == list(method.table), k


def test_other_heads_do_not_matter():
    """Permuting what the heads that are not asked attend to changes nothing; the others' do."""
    q, kv = toys.problem(5)
    evidence, method = toys.look(q, kv, 4), CompressKV(capacity=9, window=4, pool=3, first_k=2)
    table = [0.9, 0.2, 0.1, 0.8]
    a, b, c = (
        run(method, table, kv, evidence._replace(rows=evidence.rows[:, jnp.array(order)]))
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3])
    )
    np.testing.assert_array_equal(a[0], b[0])
    assert toys.kept(a[1]) == toys.kept(b[1]) and np.abs(np.asarray(a[0] - c[0])).max() > 1e-3


# --- in a model ---------------------------------------------------------------------------------------------------------


def test_each_layer_has_its_share_and_its_heads():
    """Budgets and tables by layer through the decoder; all KV heads keep the same tokens, wrappers pass the table on."""
    params, ids, _ = world()
    method = CompressKV(capacity=6, window=2, pool=1, first_k=1, least=2, errors=(3.0, 1.0))
    tables = [jnp.zeros((2, 4)).at[:, j].set(1.0) for j in (0, 3)]
    recipe = Recipe(cache=method)
    recipe.validate(CFG)
    both = jax.jit(
        lambda table: decoder.prefill(CFG, params | {"methods": {"cache": {"heads": table}}}, tokens_of(params, ids), recipe, new=1)[1]
    )
    a, b = both(tables[0]), both(tables[1])
    assert [parts[0].kv.k.shape[2] for parts in a] == [8 + 1, 4 + 1] and method.slots == 8
    sets = [[toys.kept(parts[0].kv) for parts in layers] for layers in (a, b)]
    assert all(row[0] == row[1] for layers in sets for layer in layers for row in layer) and sets[0] != sets[1]
    assert jax.tree.map(jnp.shape, recipe.init_params(jax.random.key(0), CFG))["cache"] == {"heads": (2, 4)}
    outer = PerLayer(base=Merging(base=CompressKV(capacity=6, window=2)), capacities=(5, 3))
    assert Recipe(cache=outer).init_params(jax.random.key(0), CFG)["cache"]["heads"].shape == (2, 4)


def test_refuses():
    for match, options in {
        "window must be >= 1": dict(window=0),
        "pool must be odd and >= 1": dict(pool=4),
        "kind must be one of avg, max": dict(kind="min"),
        "capacity=40 has no room for the 41": dict(window=41),
        "least=8 has no room for the 9": dict(errors=(1.0,), least=8, window=9),
        "capacity=40 has no room for the 50": dict(errors=(1.0,), least=50),
        r"errors must be finite, >= 0 and not all zero, got \(0.0,\)": dict(errors=(0.0,)),
        r"errors must be finite, >= 0 and not all zero, got \(-1.0, 3.0\)": dict(errors=(-1.0, 3.0)),
    }.items():
        with pytest.raises(ValueError, match=match):
            CompressKV(**{"capacity": 40, **options})
    with pytest.raises(ValueError, match="errors of 3 layers and the model 2 layers"):
        Recipe(cache=CompressKV(capacity=40, errors=(1.0, 2.0, 3.0))).cache.layer(0, 2)
    q, kv = toys.problem()
    seen = toys.look(q, kv, 8)
    with pytest.raises(ValueError, match=r"train\.compresskv\.calibrate_heads, or init_params"):
        CompressKV(capacity=9).score({}, kv, seen._replace(layer=jnp.int32(0)))
    with pytest.raises(ValueError, match=r"table of heads is \[2, 8\] for a layer of 4 query and 2 KV heads"):
        CompressKV(capacity=9).score({"heads": jnp.zeros((2, 8))}, kv, seen._replace(layer=jnp.int32(0)))
    with pytest.raises(ValueError, match=r"evidence\.layer is missing"):
        CompressKV(capacity=9).score({"heads": jnp.zeros((2, 4))}, kv, seen)


# --- the authors' code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", range(3))
def test_official_choices(data, v):
    """TUDa-HWAI/CompressKV, one shared choice a layer; where pooling ties, the scores at the kept places."""
    z = np.load(data / "golden" / "compresskv.npz")
    q, kv = z["c0_q"], toys.cache(z["c0_k"], z["c0_v"])
    n = kv.k.shape[2]
    for layer in range(3):
        get = lambda name, layer=layer: z[f"c0_v{v}_l{layer}_{name}"]
        w, ranked = int(get("window_size")), get("heads")
        method = CompressKV(
            capacity=int(get("capacity")), window=w, pool=int(get("kernel_size")), kind=str(get("pooling"))[:3], first_k=int(get("first_k"))
        )
        table = np.zeros(4)
        table[ranked] = np.arange(4, 0, -1)
        score, out = run(method, table, kv, toys.look(q, kv, w), layer)
        chosen, official = toys.kept(out)[0], get("kept")[0]
        if method.capacity > n:
            assert chosen == [set(range(n))] * 4 and official.shape[-1] == n
            continue
        score = np.asarray(score)[0, 0, :-w]
        np.testing.assert_allclose(score, get("scores")[0], atol=2e-6)
        for head in range(4):
            theirs = {int(p) for p in official[head]}
            if get("gap")[0] > 1e-6:
                assert chosen[head] == theirs
            else:
                mine, other = (np.sort([score[p] for p in keep if p < n - w]) for keep in (chosen[head], theirs))
                np.testing.assert_allclose(mine, other, atol=2e-6)


@pytest.mark.parametrize("i", range(5))
def test_official_budgets(data, i):
    z = np.load(data / "golden" / "compresskv.npz")
    method = CompressKV(capacity=int(z[f"b{i}_C"]), errors=tuple(z[f"b{i}_ratio"].tolist()))
    assert method.table == tuple(z[f"b{i}_budgets"].tolist())
