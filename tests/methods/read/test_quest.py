import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import Quest
from jaxtok.methods.read.quest import Pages
from tests.methods import toys

small = lambda capacity: Quest(pages=-(-capacity // 2), block=2, dense_layers=1)


def read(method, q, kv, layer=2):
    """The pages [b g count] that one query [b h 1 d] reads; None = all."""
    state = method.start({}, layer, kv)
    index = method.read({}, layer, state, None, jnp.asarray(q), jnp.zeros((q.shape[0], q.shape[2]), jnp.int32), kv, toys.sight())[2]
    return None if index is None else np.asarray(index.index)


def reference(q, kv, block, count, how):
    """The card's bound, page by page: the set of pages that each KV head reads, and U [b h p] (-inf where nothing lives)."""
    q, k, pos = np.asarray(q, np.float64)[:, :, 0], np.asarray(kv.k, np.float64), np.asarray(kv.pos)
    (b, h, _), (g, s) = q.shape, pos.shape[1:]
    bound = np.full((b, h, s // block), -np.inf)
    for i, head, page in np.ndindex(*bound.shape):
        e = head // (h // g)
        live = [j for j in range(page * block, (page + 1) * block) if pos[i, e, j] >= 0]
        if live:
            keys = k[i, e, live]
            bound[i, head, page] = sum(max(q[i, head, c] * keys[:, c].max(), q[i, head, c] * keys[:, c].min()) for c in range(q.shape[-1]))
    group = bound.reshape(b, g, h // g, -1)
    group = group.max(2) if how == "max" else group.mean(2)
    best = [[{int(p) for p in np.argsort(-x, kind="stable")[:count] if x[p] > -np.inf} for x in row] for row in group]
    return best, bound


def test_by_hand():
    """Pages of two; q = (1, -2). Page 0: keys (1 0) (0 1): high (1 1), low (0 0): U = 1. Page 1: (3 2) (2 3): 3 - 4 = -1.
    Page 2: (0 -2) (-1 0): 0 + 4 = 4. Page 3: (-5 -1) (0 0): 0 + 2 = 2. Page 4: (2 2) (9 9) dead: 2 - 4 = -2. The best three: 0, 2, 3."""
    k = np.array([[1, 0], [0, 1], [3, 2], [2, 3], [0, -2], [-1, 0], [-5, -1], [0, 0], [2, 2], [9, -9]], np.float32)[None, None]
    kv = toys.cache(k, k)
    kv = kv._replace(pos=kv.pos.at[0, 0, 9].set(-1))
    q = np.array([1.0, -2.0], np.float32).reshape(1, 1, 1, 2)
    _, bound = reference(q, kv, 2, 3, "max")
    np.testing.assert_array_equal(bound[0, 0], [1, -1, 4, 2, -2])
    np.testing.assert_array_equal(read(Quest(pages=1, block=2), q, kv)[0, 0], [0, 2, 3])
    state = Quest(pages=1, block=2).start({}, 2, kv)
    np.testing.assert_array_equal(state.high[0, 0], [[1, 1], [3, 3], [0, 0], [0, 0], [2, 2]])
    np.testing.assert_array_equal(state.low[0, 0], [[0, 0], [2, 2], [-1, -2], [-5, -1], [2, 2]])
    np.testing.assert_array_equal(read(Quest(pages=4, block=2), q, kv)[0, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("how", ["max", "mean"])
def test_equals_numpy(how):
    """g > 1, h/g > 1, ragged, junk in dead slots, dead slots in the middle."""
    q, kv = toys.problem(1, live=(24, 9), junk=1e4)
    kv = kv._replace(pos=kv.pos.at[0, 0, 5].set(-1).at[0, 1, 8:12].set(-1), k=kv.k.at[0, 0, 5].set(1e4).at[0, 1, 8:12].set(-1e4))
    best, bound = reference(q[:, :, -1:], kv, 4, 3, how)
    got = read(Quest(pages=3, block=4, group=how), q[:, :, -1:], kv)
    assert [[{int(p) for p in head if p >= 0} for head in row] for row in got] == best
    assert (np.diff(got[got.min(-1) >= 0], axis=-1) > 0).all() and len(best[1][0]) == 3
    logit = np.einsum("bhd,bhjd->bhj", q[:, :, -1], np.repeat(np.asarray(kv.k), 2, 1))
    logit = np.where(np.repeat(np.asarray(kv.pos) >= 0, 2, 1), logit, -np.inf).reshape(2, 4, 6, 4).max(-1)
    assert (bound >= logit - 1e-4)[np.isfinite(logit)].all(), "U bounds the logits of its page"


def test_pages_of_one_key_are_the_exact_top():
    q, kv = toys.problem(2)
    got = read(Quest(pages=5, block=1), q[:, :, -1:], kv)
    logit = np.einsum("bhd,bhjd->bhj", q[:, :, -1], np.repeat(np.asarray(kv.k), 2, 1)).reshape(2, 2, 2, 24).max(2)
    assert [[set(head) for head in row] for row in got.tolist()] == [
        [{j + 24 - live for j in head} for head in row] for row, live in zip(toys.top(logit, kv.pos, 5), toys.LIVE, strict=True)
    ]


def test_reads_all_where_it_should():
    q, kv = toys.problem(3)
    one = q[:, :, -1:]
    assert read(Quest(pages=6, block=4), one, kv) is None  # everything fits
    assert read(Quest(pages=5, block=4), one, kv) is not None
    assert read(Quest(pages=3, block=4), q[:, :, -2:], kv) is None  # several queries
    assert read(Quest(pages=3, block=4), one, kv, layer=1) is None and Quest(pages=3).start({}, 1, kv) == ()
    assert read(Quest(pages=3, block=4, dense_layers=0), one, kv, layer=0) is not None
    few = kv._replace(pos=jnp.where(jnp.arange(24)[None, None] < 16, -1, kv.pos))
    got = read(Quest(pages=5, block=4), one, few)
    assert (got[..., :3] == -1).all() and (got[..., 3:] == [4, 5]).all()  # entries without a page that lives are unused


def test_bounds_follow_appends_and_evictions():
    """After any slot changes, updating equals starting afresh; a page that dies is cleared."""
    _, kv = toys.problem(4)
    method, rng = Quest(pages=3, block=4), np.random.default_rng(0)
    state = method.start({}, 2, kv)
    update = jax.jit(lambda state, kv, slot: method.update({}, state, kv, slot))
    for turn in range(8):
        slot = rng.integers(0, 24, (2, 2)) if turn < 4 else np.full((2, 2), 16 + turn - 4)
        b, g = np.indices((2, 2))
        alive = turn < 4 and turn % 2 == 0
        kv = kv._replace(
            k=kv.k.at[b, g, slot].set(rng.normal(size=(2, 2, 8)).astype(np.float32) * 5 if alive else 1e4),
            pos=kv.pos.at[b, g, slot].set(30 + turn if alive else -1),
        )
        state = update(state, kv, jnp.asarray(slot, jnp.int32))
        jax.tree.map(np.testing.assert_array_equal, state, method.start({}, 2, kv))
    assert not np.asarray(state.high)[:, :, 4].any() and not np.asarray(state.low)[:, :, 4].any()
    assert method.update({}, (), kv, jnp.zeros((2, 2), jnp.int32)) == ()


def test_bf16_bounds_are_exact_and_scored_in_float32():
    q, kv = toys.problem(5)
    half = kv._replace(k=kv.k.astype(jnp.bfloat16))
    wide = half._replace(k=half.k.astype(jnp.float32))
    method, one = Quest(pages=3, block=4), q[:, :, -1:]
    state = method.start({}, 2, half)
    assert isinstance(state, Pages) and state.low.dtype == jnp.bfloat16
    one = jnp.asarray(one, jnp.bfloat16)
    np.testing.assert_array_equal(read(method, one, half), read(method, one.astype(jnp.float32), wide))


def test_a_row_depends_on_itself_and_an_empty_one_reads_nothing():
    q, kv = toys.problem(6)
    one, method = q[:, :, -1:], Quest(pages=3, block=4)
    base = read(method, one, kv)
    other = kv._replace(k=kv.k.at[0].set(7.0), pos=kv.pos.at[0].set(-1))
    got = read(method, one, other)
    np.testing.assert_array_equal(got[1], base[1])
    assert (got[0] == -1).all()


def test_refuses():
    with pytest.raises(ValueError, match="pages must be >= 1"):
        Quest(pages=0)
    with pytest.raises(ValueError, match="group must be one of"):
        Quest(pages=3, group="min")
    with pytest.raises(ValueError, match="pages of 16 slots, but the cache has 24"):
        Quest(pages=3).start({}, 2, toys.problem()[1])


def test_official_outputs(data):
    """mit-han-lab/Quest: bounds, pages that each query head reads, the layer's output. Keys repeated to h heads, since it selects there."""
    z = np.load(data / "golden" / "quest.npz")
    block, q = int(z["c3_page_size"]), z["c3_query"]
    keys = np.concatenate([z["c3_past_k"], z["c3_new_k"]], 2)
    n = keys.shape[2]
    keys = np.pad(np.repeat(keys, 2, 1), ((0, 0), (0, 0), (0, -n % block), (0, 0)), constant_values=1e4)
    kv = toys.cache(keys, keys)
    kv = kv._replace(pos=jnp.where(jnp.arange(keys.shape[2])[None, None] < n, kv.pos, -1))
    got = read(Quest(pages=int(z["c3_token_budget"]) // block, block=block), q, kv)
    want = [{int(p) // block for p in np.flatnonzero(mask)} for mask in z["c3_mask"][0, :, 0]]
    assert [set(head) for head in got[0].tolist()] == want
    _, bound = reference(q, kv, block, 4, "max")
    np.testing.assert_allclose(bound[0][:, np.arange(n) // block], z["c3_token_bound"][0, :, 0], atol=1e-4)
    # from the hidden row: its query, and the output of what is read
    d, h = int(z["c3_head_dim"]), int(z["c3_num_heads"])
    x = (z["c3_hidden"][0, -1].astype(np.float64) @ z["c3_w.q_proj.weight"].T).reshape(h, d)
    angle = int(z["c3_position"]) * 1e4 ** (-np.arange(d // 2) / (d // 2))
    lo, hi = x[:, : d // 2], x[:, d // 2 :]
    turned = np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)
    np.testing.assert_allclose(turned, q[0, :, 0], atol=1e-4)
    new = (z["c3_hidden"][:, -1] @ z["c3_w.v_proj.weight"].T).reshape(1, -1, 1, d)
    values = np.repeat(np.concatenate([z["c3_past_v"], new], 2), 2, 1)
    kv = kv._replace(v=jnp.asarray(np.pad(values, ((0, 0), (0, 0), (0, keys.shape[2] - n), (0, 0)))))
    slots = [[[page * block + r for page in head if page >= 0 for r in range(block)] for head in got[0].tolist()]]
    flat = toys.attend_to(q[:, :, 0], kv, slots).reshape(-1) @ z["c3_w.o_proj.weight"].T
    np.testing.assert_allclose(flat, z["c3_out"].reshape(-1), atol=1e-5)
