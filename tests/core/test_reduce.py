"""Gathers, merges and what moves along, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import reduce as red
from jaxtok.core.compose import compose, lift
from jaxtok.core.types import KV, DensePlan, Evidence, Plan, Tokens

LOST = jnp.zeros((1,), jnp.int32)
move, reduce_kv = jax.jit(red.move), jax.jit(red.reduce_kv, static_argnames="count")  # op by op is slower to compile


def i32(x):
    return jnp.asarray(x, jnp.int32)


def selection(index, n):
    index = np.asarray(index)
    assign = np.full((*index.shape[:-1], n), -1)
    for at in np.ndindex(*index.shape):
        if index[at] >= 0:
            assign[(*at[:-1], index[at])] = at[-1]
    return Plan(i32(index), i32(assign), None, jnp.zeros(index.shape[:-1], jnp.int32))


# 6 rows to 4: row 0 dead, {1, 3} to group 2 named by 3, {2, 5} to group 3 named by 2, row 4 dropped, groups 0 and 1 empty
MERGE = Plan(i32([[-1, -1, 3, 2]]), i32([[-1, 2, 3, 2, -1, 3]]), jnp.array([[9.0, 1.0, 2.0, 3.0, 5.0, 0.0]]), LOST)
SELECT = selection([[-1, 1, 4]], 6)
DENSE = DensePlan(jnp.array([[[0.0] * 6, [0.0, 0.5, 0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25, 0.25, 0.25]]]))


def tokens(n=6, a=1):
    pos = i32([[-1, 0, 2, 3, 5, 6]])
    x = np.random.default_rng(0).normal(size=(1, n, 3)).astype(np.float32)
    x[0, 0] = np.nan  # a dead row may hold anything
    return Tokens(
        x=jnp.asarray(x),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None] + jnp.arange(a, dtype=jnp.int32)[None, None],
        size=jnp.array([[0.0, 1.0, 2.0, 1.0, 1.0, 1.0]]),
        kind=jnp.array([[0, 1, 1, 1, 0, 0]], jnp.int8),
        segment=i32([[-1, 0, 0, 1, -1, -1]]),
        cell=i32([[[-1, -1], [0, 0], [0, 1], [1, 0], [-1, -1], [-1, -1]]]),
        source=i32([[1, -1, 2, 2, 3, 4, 5]]),
        seen=i32([7]),
        delta=i32([0]),
        lost=i32([0]),
    )


def test_gather_of_empty_rows_is_zero_on_any_axis_after_the_rows():
    x = jnp.arange(24.0).reshape(2, 3, 4) + 1
    got = red.gather(x, i32([[2, -1], [0, 1]]))
    np.testing.assert_array_equal(got, [[x[0, 2], [0] * 4], [x[1, 0], x[1, 1]]])
    assert red.gather(i32([[3, 4]]), i32([[-1, 1]])).tolist() == [[0, 4]]


def test_segment_sum():
    x = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    np.testing.assert_array_equal(red.segment_sum(x, i32([[1, -1, 1], [0, 2, 2]]), 3), [[0, 5, 0], [8, 0, 48]])
    deep = red.segment_sum(jnp.ones((2, 3, 2)), i32([[1, -1, 1], [0, 2, 2]]), 3)
    np.testing.assert_array_equal(deep[..., 1], [[0, 2, 0], [1, 0, 2]])


def test_a_selection_gathers_and_a_merge_averages():
    x = tokens().x
    np.testing.assert_array_equal(red.apply(SELECT, x), [[[0] * 3, x[0, 1], x[0, 4]]])
    got = red.apply(MERGE, x)
    np.testing.assert_array_equal(got[0, :2], np.zeros((2, 3)))
    np.testing.assert_allclose(got[0, 2], (x[0, 1] + 3 * x[0, 3]) / 4, rtol=1e-6)
    np.testing.assert_allclose(got[0, 3], x[0, 2], rtol=1e-6)
    clean = jnp.nan_to_num(x)
    np.testing.assert_allclose(red.apply(DENSE, clean)[0], np.asarray(DENSE.w[0]) @ np.asarray(clean[0]), atol=1e-6)
    for plan in (SELECT, MERGE, DENSE):
        assert red.apply(plan, clean.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_merging_bf16_is_summed_in_float32():
    x = jnp.full((1, 300, 1), 1.0, jnp.bfloat16)
    plan = Plan(i32([[0]]), i32(np.zeros((1, 300))), jnp.ones((1, 300)), LOST)
    assert float(red.apply(plan, x)[0, 0, 0]) == 1.0 and float(red.total(plan, x.astype(jnp.float32))[0, 0, 0]) == 300.0


def test_counts_are_summed_and_never_weighted():
    size = tokens().size
    np.testing.assert_array_equal(red.total(MERGE, size), [[0.0, 0.0, 2.0, 3.0]])
    np.testing.assert_array_equal(red.total(SELECT, size), [[0.0, 1.0, 1.0]])
    spread = red.total(DENSE, size)  # row 3 (size 1) feeds groups 1 and 2 with 0.5 and 0.25: two thirds and one third of it
    np.testing.assert_allclose(spread, [[0.0, 1 + 2 / 3, 2 + 1 / 3 + 2]], rtol=1e-6)
    assert float(spread.sum()) == pytest.approx(float(size.sum()))


def test_reduce_moves_every_field_of_a_merge():
    t = tokens()
    out = red.reduce(MERGE, t)
    assert out.pos.tolist() == [[-1, -1, 3, 2]]
    assert out.rope.tolist() == [[[0], [0], [3], [2]]]
    assert out.size.tolist() == [[0.0, 0.0, 2.0, 3.0]]
    assert out.kind.tolist() == [[0, 0, 1, 1]] and out.kind.dtype == jnp.int8
    assert out.segment.tolist() == [[-1, -1, 1, 0]]
    assert out.cell.tolist() == [[[-1, -1], [-1, -1], [1, 0], [0, 1]]]
    # original tokens 0..6 stood in rows 1, dropped, 2, 2, 3, 4, 5; row 4 is dropped
    assert out.source.tolist() == [[2, -1, 3, 3, 2, -1, 3]]
    assert (out.seen.tolist(), out.delta.tolist(), out.lost.tolist()) == ([7], [0], [0])


def test_merging_by_size_conserves_the_weighted_sum():
    t = tokens()
    plan = MERGE._replace(assign=i32([[-1, 2, 3, 2, 3, 3]]), weight=t.size)
    out = red.reduce(plan, t)
    assert float(out.size.sum()) == float(t.size.sum())
    before = np.nansum(np.asarray(t.x[0]) * np.asarray(t.size[0])[:, None], 0)
    np.testing.assert_allclose((out.x[0] * out.size[0][:, None]).sum(0), before, rtol=1e-5)


def test_reduce_by_a_selection_counts_lost_rows():
    t = tokens()
    out = red.reduce(SELECT._replace(lost=i32([2])), t._replace(lost=i32([1])))
    assert out.pos.tolist() == [[-1, 0, 5]] and out.lost.tolist() == [3]
    assert out.source.tolist() == [[1, -1, -1, -1, -1, 2, -1]]


def test_reduce_by_a_dense_map_takes_the_heaviest_row():
    t = tokens()
    out = red.reduce(DENSE, t._replace(x=jnp.nan_to_num(t.x)))
    assert out.pos.tolist() == [[-1, 0, 2]] and out.source.tolist() == [[1, -1, 2, 2, 1, 2, 2]]


def test_positions():
    t = tokens(a=3)
    keep, repack, mrope = (red.reduce(SELECT, t, p) for p in red.POSITIONS)
    assert keep.rope.tolist() == [[[0] * 3, [0, 1, 2], [5, 6, 7]]] and keep.delta.tolist() == [0]
    assert repack.rope.tolist() == [[[0] * 3, [0] * 3, [1] * 3]] and repack.delta.tolist() == [2 - 7]
    assert mrope.rope.tolist() == keep.rope.tolist() and mrope.delta.tolist() == [7 + 1 - 7]
    for out in (keep, repack, mrope):
        assert out.pos.tolist() == [[-1, 0, 5]] and out.seen.tolist() == [7], "order stays, whatever the rotary ids"
    with pytest.raises(ValueError, match="keep, repack, keep_mrope, got 'compact'"):
        red.reduce(SELECT, t, "compact")


def cache(g=2, s=4, d=3, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    pos = i32([[[-1, 1, 4, 5], [0, 2, 4, 5]]])
    return KV(
        k=jnp.asarray(rng.normal(size=(1, g, s, d)), dtype),
        v=jnp.asarray(rng.normal(size=(1, g, s, d)), dtype),
        pos=pos,
        bias=jnp.log(jnp.array([[[77.0, 1.0, 2.0, 1.0], [3.0, 1.0, 1.0, 2.0]]])),
        seen=i32([6]),
        delta=i32([-1]),
        cursor=i32(4),
        lost=i32([[1, 0]]),
    )


def test_reduce_kv_by_a_selection():
    kv = cache()
    plan = selection([[[-1, 1, 3], [0, 2, 3]]], 4)._replace(lost=i32([[0, 2]]))
    out = reduce_kv(plan, kv)
    assert out.pos.tolist() == [[[-1, 1, 5], [0, 4, 5]]] and out.lost.tolist() == [[1, 2]]
    assert int(out.cursor) == 3 and out.seen.tolist() == [6] and out.delta.tolist() == [-1]
    np.testing.assert_array_equal(out.k[0, 1], np.asarray(kv.k)[0, 1, [0, 2, 3]])
    np.testing.assert_array_equal(out.v[0, 0, 1:], np.asarray(kv.v)[0, 0, [1, 3]])
    np.testing.assert_allclose(jnp.exp(out.bias), [[[1, 1, 1], [3, 1, 2]]], rtol=1e-6)
    twin = red.masked_kv(plan, kv)
    assert twin.pos.tolist() == [[[-1, 1, -1, 5], [0, -1, 4, 5]]] and twin.lost.tolist() == [[1, 2]]


def test_reduce_kv_by_a_merge_sums_the_counts_of_live_slots():
    kv = cache()
    plan = Plan(
        i32([[[-1, 2], [0, 3]]]), i32([[[1, 1, 1, -1], [0, 0, 1, 1]]]), jnp.array([[[0.0, 1.0, 2.0, 1.0], [1.0] * 4]]), i32([[0, 0]])
    )
    out = reduce_kv(plan, kv)
    np.testing.assert_allclose(jnp.exp(out.bias), [[[1, 3], [4, 3]]], rtol=1e-6)  # the dead slot's 77 does not count
    assert out.pos.tolist() == [[[-1, 4], [0, 5]]]
    np.testing.assert_allclose(out.k[0, 0, 1], (kv.k[0, 0, 1] + 2 * kv.k[0, 0, 2]) / 3, rtol=1e-5)
    kept = reduce_kv(plan, kv, count=False)
    np.testing.assert_allclose(jnp.exp(kept.bias), [[[1, 2], [3, 2]]], rtol=1e-6)
    assert bool(jnp.isfinite(out.bias).all())


def test_reduce_kv_by_a_dense_map():
    kv = cache()
    w = jnp.array([[[[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]])
    out = reduce_kv(DensePlan(w), kv)
    np.testing.assert_allclose(out.k, jnp.einsum("bgmn,bgnd->bgmd", w, kv.k), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(out.bias), [[[3, 1], [3, 3]]], rtol=1e-6)
    assert out.pos.tolist() == [[[1, 5], [0, 4]]] and int(out.cursor) == 2 and out.lost.tolist() == [[1, 0]]


def test_a_dense_map_may_name_its_rows():
    """`index` says whose pos a group takes, whatever weighs most; a row that is one source alone stays as it is, to the bit."""
    w = jnp.array([[[[0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]]]])
    plan = DensePlan(w, jnp.array([[[-1, 2, 3]]], jnp.int32))
    x = jax.random.normal(jax.random.key(0), (1, 1, 4, 3)).astype(jnp.bfloat16)
    kv = KV(
        k=x, v=x, pos=jnp.array([[[0, 4, 6, 9]]], jnp.int32), bias=jnp.array([[[0.0, 0.0, 1.0, 2.0]]]), seen=jnp.array([10], jnp.int32),
        delta=jnp.array([0], jnp.int32), cursor=jnp.int32(4), lost=jnp.zeros((1, 1), jnp.int32),
    )  # fmt: skip
    out = reduce_kv(plan, kv, count=False)
    assert out.pos.tolist() == [[[-1, 6, 9]]] and out.bias.tolist() == [[[0.0, 1.0, 2.0]]] and int(out.cursor) == 3
    assert (out.k[0, 0, 2] == x[0, 0, 3]).all() and out.k.dtype == jnp.bfloat16
    both = compose(plan, DensePlan(jnp.array([[[[0.0, 0.6, 0.4]]]])))  # names go along: the heavier of 6 and 9
    assert both.index is not None and both.index.tolist() == [[[2]]]
    assert compose(DensePlan(w), DensePlan(jnp.array([[[[0.0, 0.6, 0.4]]]]))).index is None


def test_a_dense_map_may_say_where_rows_count():
    """Weights that are no shares (0, below 0): sizes, sources, lifting and composition go by `assign`."""
    w = jnp.array([[[0.0] * 6, [0.0, 1.5, 0.0, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]]])
    plan = DensePlan(w, i32([[-1, 1, 5]]), i32([[-1, 1, 2, 1, -1, 2]]))
    before = tokens()
    out = red.reduce(plan, before._replace(x=jnp.where(before.pos[..., None] < 0, 0.0, before.x)))
    np.testing.assert_allclose(out.x[0, 1], 1.5 * before.x[0, 1] - 0.5 * before.x[0, 3], rtol=1e-5)
    size = np.asarray(before.size)[0]
    np.testing.assert_allclose(out.size[0], [0, size[1] + size[3], size[2] + size[5]])
    assert (np.asarray(out.source) == np.take_along_axis(np.asarray(plan.assign), np.maximum(np.asarray(before.source), 0), 1))[
        np.asarray(before.source) >= 0
    ].all()
    np.testing.assert_array_equal(lift(plan, out.x)[0, [1, 2, 3, 5]], out.x[0, [1, 2, 1, 2]])
    both = compose(plan, DensePlan(jnp.array([[[0.0, 1.0, 0.0]]]), i32([[1]]), i32([[-1, 0, -1]])))
    assert np.asarray(both.assign)[0].tolist() == [-1, 0, -1, 0, -1, -1]


def test_evidence_moves_with_a_plan_per_head():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)
    ev = Evidence(
        rows=draw(1, 4, 2, 4),
        received=draw(1, 4, 4),
        cls=draw(1, 4, 4),
        keys=draw(1, 2, 4, 3),
        hidden=draw(1, 4, 5),
        queries=(draw(1, 4, 3), draw(1, 4, 3, 3)),
        freqs=draw(1),
        layer=i32(3),
    )
    plan = selection([[[-1, 1, 3], [0, 2, 3]]], 4)
    out = move(plan, ev)
    for h, rows in enumerate(([1, 3], [1, 3], [0, 2, 3], [0, 2, 3])):
        m = len(rows)
        np.testing.assert_array_equal(out.rows[0, h][:, -m:], np.asarray(ev.rows)[0, h][:, rows])
        np.testing.assert_array_equal(out.received[0, h, -m:], np.asarray(ev.received)[0, h, rows])
        np.testing.assert_array_equal(out.cls[0, h, -m:], np.asarray(ev.cls)[0, h, rows])
        assert m == 3 or (float(out.received[0, h, 0]) == 0 and not np.any(out.rows[0, h, :, 0]))
    np.testing.assert_array_equal(out.keys[0, 1], np.asarray(ev.keys)[0, 1, [0, 2, 3]])
    assert out.hidden is None, "rows of the sequence have no head axis"
    for same in ("queries", "freqs", "layer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(out, same), getattr(ev, same))

    merge = Plan(i32([[[1, 3], [0, 3]]]), i32([[[-1, 0, 0, 1], [0, 0, 1, 1]]]), jnp.ones((1, 2, 4)), i32([[0, 0]]))
    out = move(merge, ev)
    np.testing.assert_allclose(out.rows[0, 0, :, 0], ev.rows[0, 0, :, 1] + ev.rows[0, 0, :, 2], rtol=1e-6)
    np.testing.assert_allclose(out.received[0, 3], [ev.received[0, 3, :2].sum(), ev.received[0, 3, 2:].sum()], rtol=1e-6)
    np.testing.assert_allclose(out.keys[0, 0, 0], (ev.keys[0, 0, 1] + ev.keys[0, 0, 2]) / 2, rtol=1e-6)

    matrix = DensePlan(jnp.array([[[[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]]))
    for a, b in zip(jax.tree.leaves(move(matrix, ev)), jax.tree.leaves(out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_evidence_moves_with_a_plan_of_the_sequence():
    rng = np.random.default_rng(3)
    ev = Evidence(received=jnp.asarray(rng.random((1, 4, 6)), jnp.float32), hidden=jnp.asarray(rng.random((1, 6, 5)), jnp.float32))
    out = move(SELECT, ev)
    np.testing.assert_array_equal(out.received[0, :, 1:], np.asarray(ev.received)[0][:, [1, 4]])
    np.testing.assert_array_equal(out.hidden[0, 1:], np.asarray(ev.hidden)[0, [1, 4]])
    assert out.rows is None and out.cls is None and out.keys is None


def test_grow_kv():
    kv = cache()
    out = red.grow_kv(kv, 6)
    assert out.pos.tolist() == [[[-1, 1, 4, 5, -1, -1], [0, 2, 4, 5, -1, -1]]] and int(out.cursor) == 4
    np.testing.assert_array_equal(out.k[:, :, :4], kv.k)
    assert not np.any(out.k[:, :, 4:]) and not np.any(out.v[:, :, 4:]) and not np.any(out.bias[:, :, 4:])
    with pytest.raises(ValueError, match="4 slots to 3"):
        red.grow_kv(kv, 3)


def test_ranks_whatever_the_order_of_the_slots():
    rng = np.random.default_rng(4)
    pos = np.stack([rng.permutation([-1, -1, 3, 0, 9, 7]) for _ in range(6)]).reshape(2, 3, 6)
    want = [[[sum(0 <= p < q for p in row) if q >= 0 else 0 for q in row] for row in heads] for heads in pos]
    np.testing.assert_array_equal(red.ranks(i32(pos)), want)
    assert red.ranks(i32([[-1, -1]])).tolist() == [[0, 0]]


def test_oldest_first_packs_live_rows_to_the_front_and_ranks_take_them_back():
    rng = np.random.default_rng(4)
    pos = np.stack([rng.permutation([-1, -1, 3, 0, 9, 7]) for _ in range(6)]).reshape(2, 3, 6)
    slot = red.oldest_first(i32(pos))
    np.testing.assert_array_equal(np.take_along_axis(pos, np.maximum(slot, 0), -1)[..., :4], np.broadcast_to([0, 3, 7, 9], (2, 3, 4)))
    assert (np.asarray(slot)[..., 4:] == -1).all() and red.oldest_first(i32([[-1, -1]])).tolist() == [[-1, -1]]
    back = red.gather(red.gather(i32(pos), slot), red.ranks(i32(pos)))
    np.testing.assert_array_equal(np.asarray(back)[pos >= 0], pos[pos >= 0])


def test_gradients_pass_through_a_merge_and_not_from_dropped_rows():
    x = tokens().x
    grad = jax.grad(lambda x: jnp.sum(red.apply(MERGE, x)))(x)
    np.testing.assert_allclose(grad[0, :, 0], [0.0, 0.25, 1.0, 0.75, 0.0, 0.0])
