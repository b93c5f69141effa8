"""Scores to masks and masks to plans, against plain Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.core import select

FEW = settings(max_examples=60, deadline=None, derandomize=True)
LOW = float(np.finfo(np.float32).min)
N = 7
SCORE = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.0, 1.0, 1.0, 3.0, np.inf, np.nan])
rows = st.lists(st.tuples(SCORE, st.booleans(), st.booleans()), min_size=N, max_size=N)

choose = jax.jit(select.choose, static_argnames="most")
choose_static = jax.jit(select.choose, static_argnums=2)
pack = jax.jit(select.pack, static_argnums=1)  # compiled whole: op by op is slower


def reference_choose(score, live, keep, protect):
    best = sorted(
        (j for j in range(len(score)) if live[j] and not protect[j]), key=lambda j: (-np.nan_to_num(score[j], nan=LOW, neginf=LOW), j)
    )
    return [bool(live[j] and (protect[j] or j in best[: max(keep, 0)])) for j in range(len(score))]


def reference_pack(mask, cap, score=None):
    """(index, assign, lost) of one row."""
    chosen = [j for j in range(len(mask)) if mask[j]]
    lost = max(0, len(chosen) - cap)
    if score is None:
        gone = chosen[:lost]
    else:
        gone = sorted(chosen, key=lambda j: (np.nan_to_num(score[j], nan=LOW, neginf=LOW, posinf=np.inf), j))[:lost]
    stay = [j for j in chosen if j not in gone]
    index = [-1] * (cap - len(stay)) + stay
    assign = [index.index(j) if j in stay else -1 for j in range(len(mask))]
    return index, assign, lost


@FEW
@given(rows, st.integers(-1, N + 2))
def test_choose(row, keep):
    score, live, protect = (np.array(x) for x in zip(*row, strict=True))
    score = score.astype(np.float32)
    want = reference_choose(score, live, keep, protect)
    args = jnp.asarray(score)[None], jnp.asarray(live)[None]
    traced = choose(*args, jnp.array([keep], jnp.int32), jnp.asarray(protect)[None])
    np.testing.assert_array_equal(traced[0], want)
    if keep in (1, 4):
        np.testing.assert_array_equal(choose(*args, jnp.array([keep], jnp.int32), jnp.asarray(protect)[None], most=keep)[0], want)
    if keep in (0, 2, N + 2):
        np.testing.assert_array_equal(choose_static(*args, keep, jnp.asarray(protect)[None])[0], want)
    if keep == 3:
        np.testing.assert_array_equal(choose_static(*args, keep)[0], reference_choose(score, live, keep, np.zeros(N, bool)))


def test_choose_by_hand():
    score = jnp.array([[5.0, 1.0, 5.0, jnp.nan, 2.0, 9.0]])
    live = jnp.array([[True, True, True, True, True, False]])
    assert choose_static(score, live, 1)[0].tolist() == [True] + [False] * 5, "of equal scores the older stays, dead rows never"
    assert choose_static(score, live, 4)[0].tolist() == [True, True, True, False, True, False], "NaN is the lowest"
    assert choose_static(score, live, 5)[0].tolist() == live[0].tolist(), "but before a dead row"
    low = jnp.full_like(score, -jnp.inf)
    assert choose_static(low, live, 6)[0].tolist() == live[0].tolist()
    safe = jnp.array([[False, True, False, False, False, True]])
    assert choose_static(score, live, 0, safe)[0].tolist() == [False, True, False, False, False, False]


def test_choose_per_head_and_unbatched():
    score = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    live = jnp.ones(score.shape, bool)
    keep = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    got = choose(score, live, keep)
    for b in range(2):
        for g in range(3):
            want = reference_choose(np.asarray(score[b, g]), np.ones(5, bool), int(keep[b, g]), np.zeros(5, bool))
            np.testing.assert_array_equal(got[b, g], want)
    np.testing.assert_array_equal(
        choose_static(score[0, 0], live[0, 0], 2), reference_choose(np.asarray(score[0, 0]), live[0, 0], 2, [False] * 5)
    )


def test_bf16_scores_are_ranked_as_float32():
    score = jnp.array([[1.0, 1.0078125, 1.0]], jnp.bfloat16)
    assert select.choose(score, jnp.ones((1, 3), bool), 1)[0].tolist() == [False, True, False]
    assert select.finite(score).dtype == jnp.float32


@FEW
@given(rows, st.sampled_from([1, 3, 4, N + 1]))
def test_pack(row, cap):
    score, mask, _ = (np.array(x) for x in zip(*row, strict=True))
    score = score.astype(np.float32)
    for s in (None, score):
        plan = pack(jnp.asarray(mask)[None], cap, None if s is None else jnp.asarray(s)[None])
        index, assign, lost = reference_pack(mask, min(cap, N), s)
        np.testing.assert_array_equal(plan.index[0], index)
        np.testing.assert_array_equal(plan.assign[0], assign)
        assert int(plan.lost[0]) == lost and plan.weight is None


def test_pack_by_hand():
    mask = jnp.array([[True, False, True, True, True, True]])
    plan = pack(mask, 3, jnp.array([[jnp.inf, 9.0, 1.0, 1.0, 4.0, 2.0]]))
    assert plan.index.tolist() == [[0, 4, 5]] and plan.lost.tolist() == [2]
    plan = pack(mask, 4, jnp.array([[jnp.inf, 9.0, 1.0, 1.0, 4.0, 2.0]]))
    assert plan.index.tolist() == [[0, 3, 4, 5]], "of equal scores the older goes"
    plan = pack(mask)
    assert plan.index.tolist() == [[-1, 0, 2, 3, 4, 5]] and plan.lost.tolist() == [0]
    assert plan.assign.tolist() == [[1, -1, 2, 3, 4, 5]]


def test_pack_per_head():
    rng = np.random.default_rng(1)
    mask, score = jnp.asarray(rng.random((2, 3, 6)) < 0.6), jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    plan = pack(mask, 3, score)
    for b in range(2):
        for g in range(3):
            index, assign, lost = reference_pack(np.asarray(mask[b, g]), 3, np.asarray(score[b, g]))
            assert plan.index[b, g].tolist() == index and plan.assign[b, g].tolist() == assign and int(plan.lost[b, g]) == lost


def test_mark_ignores_entries_outside():
    got = select.mark(jnp.array([[0, 2, -1, 9], [5, 4, 4, -3]], jnp.int32), 5)
    assert got.tolist() == [[True, False, True, False, False], [False, False, False, False, True]]


def test_from_index_and_identity():
    plan = select.from_index(jnp.array([[3, -1, 0]], jnp.int32), 5)
    assert plan.assign.tolist() == [[2, -1, -1, 0, -1]] and plan.index.tolist() == [[3, -1, 0]] and plan.lost.tolist() == [0]
    same = select.identity((2, 3, 4))
    np.testing.assert_array_equal(same.index, np.broadcast_to(np.arange(4), (2, 3, 4)))
    np.testing.assert_array_equal(same.assign, same.index)
    assert same.weight is None and same.lost.shape == (2, 3)


def test_one_compilation_serves_every_budget():
    traces = []

    @jax.jit
    def f(score, live, keep):
        traces.append(1)
        return select.choose(score, live, keep, most=4).sum(-1)

    score, live = jnp.arange(6.0)[None], jnp.ones((1, 6), bool)
    assert [int(f(score, live, jnp.array([k], jnp.int32))[0]) for k in range(7)] == [0, 1, 2, 3, 4, 4, 4]
    assert len(traces) == 1


@pytest.mark.parametrize("keep", [0, 3])
def test_nothing_live(keep):
    got = choose_static(jnp.full((1, 4), jnp.nan), jnp.zeros((1, 4), bool), keep)
    plan = pack(got, 2)
    assert not got.any() and plan.index.tolist() == [[-1, -1]] and plan.assign.tolist() == [[-1] * 4]
