import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import budget
from jaxtok.core.types import Evidence
from jaxtok.methods import PyramidKV, SnapKV
from tests.methods import toys

small = lambda capacity: PyramidKV(capacity=capacity, window=2, pool=3, beta=2)


def slots(n, layers, **options):
    """Static slots of each layer of a cache of n, from the shapes alone."""
    method = PyramidKV(**options)
    kv = toys.cache(np.zeros((1, 1, n, 2)), np.zeros((1, 1, n, 2)))
    evidence = Evidence(rows=jnp.zeros((1, 1, method.window, n)))
    each = [jax.eval_shape(lambda kv, i=i: method.layer(i, layers).compress({}, kv, evidence)[0], kv) for i in range(layers)]
    return [x.k.shape[2] for x in each]


def test_by_hand():
    """capacity 40, window 8, beta 20: c = 32, min 1, max 63. In 100 slots: 63 .. 1, plus 8. In 64 the first is cut to 56, the last is 8."""
    long = dict(capacity=40, window=8, beta=20)
    assert slots(100, 3, **long) == [71, 40, 9]
    assert slots(64, 6, **long) == [64, 54, 45, 35, 26, 16]  # 56 46.4 36.8 27.2 17.6 8, rounded
    assert slots(64, 6, **long, variant="official") == [64, 55, 46, 37, 28, 19]  # steps of 48 // 5
    assert slots(41, 3, **long) == [40, 40, 40]  # shorter than 2c: uniform
    assert slots(40, 3, **long) == [40, 40, 40]
    assert slots(30, 3, **long) == [30, 30, 30]
    # kvpress: c = 40, min 2, max 78; 2 < window: uniform. With window 2: 78 .. 2, the window inside
    assert slots(100, 3, **long, variant="kvpress") == [40, 40, 40]
    assert slots(100, 3, capacity=40, window=2, variant="kvpress") == [78, 40, 2]
    assert slots(100, 4, capacity=45, window=2, variant="kvpress") == [88, 59, 31, 2]  # min 2.25, max 87.75: 59.25, 30.75


@pytest.mark.parametrize(
    "capacity, window, beta, n, layers", [(40, 8, 20, 200, 6), (33, 5, 7, 64, 4), (50, 3, 1, 120, 5), (60, 8, 3, 128, 32)]
)
def test_layers_sum_to_the_average(capacity, window, beta, n, layers):
    got = [int(PyramidKV(capacity=capacity, window=window, beta=beta).layer(i, layers).share(capacity, n)) for i in range(layers)]
    c = capacity - window
    assert got == [budget.pyramid(c, i, layers, beta, most=n - window) + window for i in range(layers)]
    assert abs(sum(got) - layers * capacity) <= layers / 2 and got == sorted(got, reverse=True)
    assert beta > 1 or set(got) == {capacity}


def test_uniform_is_snapkv():
    q, kv = toys.problem(1)
    evidence, options = toys.look(q, kv, 4), dict(capacity=9, window=4, pool=3)
    want = toys.kept(toys.run(SnapKV(**options), kv, evidence))
    assert toys.kept(toys.run(PyramidKV(**options, beta=1).layer(1, 3), kv, evidence)) == want
    assert toys.kept(toys.run(PyramidKV(**options), kv, evidence)) == want
    assert toys.kept(toys.run(PyramidKV(**options).layer(0, 1), kv, evidence)) == want


def test_each_layer_keeps_what_snapkv_keeps_in_as_many_slots():
    q, kv = toys.problem(1)
    evidence, options = toys.look(q, kv, 4), dict(window=4, pool=3)
    for i, capacity in enumerate((13, 9, 5)):  # c = 5: max 9, min 1 at beta 5
        got = toys.run(PyramidKV(capacity=9, beta=5, **options).layer(i, 3), kv, evidence)
        assert got.k.shape[2] == capacity
        assert toys.kept(got) == toys.kept(toys.run(SnapKV(capacity=capacity, **options), kv, evidence))


def test_checks_of_a_scorer():
    make = lambda capacity: PyramidKV(capacity=capacity, window=5, pool=3)
    toys.check_scorer(make, lambda q, kv: toys.look(q, kv, 5), protected=lambda p, seen: p >= seen - 5)


@pytest.mark.parametrize("variant", ["paper", "official", "kvpress"])
def test_a_traced_budget_is_the_smaller_capacity_in_every_layer(variant):
    """`keep` is the average layer's, as the capacity is; layers of a traced budget have the smaller pyramid's counts."""
    q, kv = toys.problem(1)
    keep, layers, method = (20, 12, 6, 3), 4, PyramidKV(capacity=20, window=2, pool=1, beta=4, variant=variant)
    want = np.array([slots(24, layers, capacity=x, window=2, pool=1, beta=4, variant=variant) for x in keep])
    for i in (0, 3):
        here = method.layer(i, layers)
        np.testing.assert_array_equal(here.share(jnp.asarray(keep), 24), want[:, i])
    evidence = toys.look(q, kv, 2)
    got = toys.kept(toys.run(here, kv, evidence, jnp.asarray([[12], [6]], jnp.int32)))
    assert [len(head) for row in got for head in row] == [want[1, 3]] * 2 + [want[2, 3]] * 2


def test_slots_is_the_most_that_any_layer_has():
    method = PyramidKV(capacity=40, window=8)
    assert method.slots == method.layer(0, 6).slots == method.layer(0, 6).capacity == 71
    assert method.layer(5, 6).capacity == 9 and method.layer(5, 6).slots == 40  # a short cache is uniform
    assert method.layer(0, 6).resize(12).slots == method.layer(0, 6).resize(12).layer(0, 1).capacity == 12


def test_refuses():
    for match, options in {
        "capacity=8 has no room for the 9": dict(capacity=8, window=9),
        "pool must be odd": dict(capacity=80, pool=4),
        "beta must be >= 1": dict(capacity=80, beta=0),
        "variant must be one of paper, official, kvpress": dict(capacity=80, variant="factory"),
    }.items():
        with pytest.raises(ValueError, match=match):
            PyramidKV(**options)


@pytest.mark.parametrize("v, mode", [(0, "kv"), (1, "kv"), (2, "kv"), (3, "kv"), (0, "q"), (3, "q")])
def test_official_outputs(data, v, mode):
    """KVCache-Factory, six layers, for each KV head and for each query head on repeated keys; where pooling ties, the scores at the kept places."""
    z = np.load(data / "golden" / "pyramidkv_factory.npz")
    q, copies = z["c0_q"], z["c0_q"].shape[1] // z["c0_k"].shape[1] if mode == "q" else 1
    kv = toys.cache(*(np.repeat(z[f"c0_{x}"], copies, 1) for x in "kv"))
    first = f"c0_v{v}_{mode}_l0_"
    method = PyramidKV(
        capacity=int(z[first + "max_capacity_prompt"]),
        window=int(z[first + "window_size"]),
        pool=int(z[first + "kernel_size"]),
        kind=str(z[first + "pooling"])[:3],
        group=str(z[first + "gqa_score_agg"]),
        beta=int(z[first + "beta"]),
        variant="official",
    )
    evidence = toys.look(q, kv, method.window)
    score = np.asarray(toys.scorer(method)(kv, evidence))[0, :, : -method.window]
    whole = dataclasses.replace(method, capacity=64)  # one program: the layers' counts as traced budgets
    for i in range(6):
        get = lambda name, i=i: z[f"c0_v{v}_{mode}_l{i}_{name}"]
        count = int(method.layer(i, 6).share(method.capacity, 64))
        assert count == get("kept").shape[-1]
        out = toys.run(whole, kv, evidence, jnp.asarray([[count]], jnp.int32))
        np.testing.assert_allclose(score, get("scores")[0], atol=2e-6)
        for head, chosen in enumerate(toys.kept(out)[0]):
            official = {int(p) for p in get("kept")[0, head]}
            if f"c0_v{v}_{mode}_l{i}_gap" not in z or get("gap")[0, head] > 1e-6:
                assert chosen == official
            else:
                mine, theirs = (np.sort([score[head, p] for p in keep if p < score.shape[1]]) for keep in (chosen, official))
                np.testing.assert_allclose(mine, theirs, atol=2e-6)
