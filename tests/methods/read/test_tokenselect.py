import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill_chunked, replay
from jaxtok.methods import TokenSelect
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, LIVE, world
from tests.methods import toys

small = {
    "tokenselect": lambda capacity: TokenSelect(top_k=capacity, n_init=1, n_local=2, threshold=0.5),
    "tokenselect:pages": lambda capacity: TokenSelect(top_k=capacity - 3, n_init=1, n_local=2, block=2, threshold=None),
}


@functools.cache
def reader(method):
    def read(state, q, pos, kv):
        state, _, index = method.read({}, 0, state, None, q, pos, kv, toys.sight(q.shape[-1]))
        return state, index

    return jax.jit(read)


def queries(kv, t):
    """Positions [b t] of the newest t tokens."""
    return jnp.maximum(kv.seen[:, None] - t + jnp.arange(t, dtype=jnp.int32)[None], -1)


def read(method, q, kv, state=None, pos=None):
    """(state, KeyIndex) of a call with queries [b h t d] whose keys are the newest in `kv`."""
    state = toys.begin(method, 0, kv, q.shape[1]) if state is None else state
    return reader(method)(state, jnp.asarray(q), queries(kv, q.shape[2]) if pos is None else pos, kv)


def turn(x, at):
    r = x.shape[-1] // 2
    angle = np.asarray(at)[..., None] * 1e4 ** (-np.arange(r) / r)
    lo, hi = x[..., :r], x[..., r:]
    return np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)


def reference(q, kv, top_k, n_init, n_local, kernel=1):
    """The card, one sequence after another: positions read, ascending, and the votes of the middle."""
    out, votes = [], []
    for i in range(q.shape[0]):
        n, live = int(kv.seen[i]), np.flatnonzero(np.asarray(kv.pos)[i, 0] >= 0)
        k = np.repeat(np.asarray(kv.k, np.float64)[i][:, live], q.shape[1] // kv.k.shape[1], 0)
        if n_init + top_k + n_local >= n:
            out.append(list(range(n)))
            votes.append(None)
            continue
        t = q.shape[2]
        probe = turn(np.asarray(q[i], np.float64), n_local + np.arange(t)).mean(1)
        logit = np.einsum("hd,hjd->hj", probe, k[:, n_init : n - n_local])
        p = np.exp(logit - logit.max(-1, keepdims=True))
        vote = (p / p.sum(-1, keepdims=True)).sum(0)
        half = kernel // 2
        vote = np.array([vote[max(0, j - half) : j + half + 1].max() for j in range(len(vote))])
        best = np.sort(np.argsort(-vote, kind="stable")[:top_k]) + n_init
        out.append([*range(n_init), *best.tolist(), *range(n - n_local, n)])
        votes.append(vote)
    return out, votes


def positions(index, kv, block=1):
    slots = [[p * block + r for p in row if p >= 0 for r in range(block)] for row in np.asarray(index.index)[:, 0].tolist()]
    return [[int(x) for x in np.asarray(kv.pos)[i, 0, row] if x >= 0] for i, row in enumerate(slots)]


def test_by_hand():
    """One head, d = 2 (one frequency, 1), q = (1, 0), n_local = 1: the probe is q turned by 1 = (cos 1, sin 1) = (.54, .84). Keys by
    position: 0: (9 9), 1: (1 0) -> .54, 2: (0 1) -> .84, 3: (-1 -1) -> -1.4, 4: (1 1) -> 1.4, 5 (own): (0 0). Top 2 of 1-4: 2 and 4.
    Read 0 2 4 5 at positions 0 1 2 3; the query stands at 3."""
    k = np.array([[9, 9], [1, 0], [0, 1], [-1, -1], [1, 1], [0, 0]], np.float32)[None, None]
    kv = toys.cache(k, k)
    state, index = read(TokenSelect(top_k=2, n_init=1, n_local=1), np.array([1, 0], np.float32).reshape(1, 1, 1, 2), kv)
    np.testing.assert_array_equal(index.index, [[[0, 2, 4, 5]]])
    np.testing.assert_array_equal(index.rope, [[[0, 1, 2, 3]]])
    np.testing.assert_array_equal(index.query, [[[3]]])
    np.testing.assert_allclose(state.query[0, 0], [np.cos(1), np.sin(1)], atol=1e-6)
    assert sorted(state.pages[0].tolist()) == [2, 4]


@pytest.mark.parametrize("t, kernel", [(1, 1), (3, 1), (1, 3)])
def test_equals_numpy(t, kernel):
    """g > 1, h/g > 1, ragged, junk in dead slots, several queries; every head reads the same."""
    q, kv = toys.problem(1, live=(24, 11), junk=1e3)
    method = TokenSelect(top_k=5, n_init=2, n_local=4, kernel=kernel)
    _, index = read(method, q[:, :, -t:], kv)
    want, votes = reference(q[:, :, -t:], kv, 5, 2, 4, kernel)
    got = positions(index, kv)
    assert got[1] == want[1] and want[1] == list(range(11))
    if kernel == 1:
        assert got[0] == want[0]
    else:  # pooling ties: compare votes
        at = [p - 2 for p in got[0][2:-4]]
        np.testing.assert_allclose(sorted(votes[0][at]), sorted(votes[0])[-5:], rtol=1e-5)
    assert (np.asarray(index.index) == np.asarray(index.index)[:, :1]).all()
    for i in range(2):
        live = np.asarray(index.index)[i, 0] >= 0
        np.testing.assert_array_equal(np.asarray(index.rope)[i, 0][live], np.arange(live.sum()))
        np.testing.assert_array_equal(index.query[i, 0], np.arange(live.sum() - t, live.sum()))


def test_votes_of_equal_heads_add_up():
    """Equal heads: the vote is h times that of one."""
    q, kv = toys.problem(2)
    same = kv._replace(k=jnp.repeat(kv.k[:, :1], 2, 1))
    method, probe = TokenSelect(), jnp.asarray(q[:, :1, 0])
    middle = (kv.pos[:, 0] >= 3) & (kv.pos[:, 0] < 12)
    four = method.vote(jnp.repeat(probe, 4, 1), same.k, middle)
    one = method.vote(probe, same.k[:, :1], middle)
    np.testing.assert_allclose(four, jnp.where(middle, 4 * one, -1), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(jnp.where(middle, four, 0), -1), [4, 4], rtol=1e-5)


def test_a_hit_reads_the_stale_selection_with_the_new_edges():
    q, kv = toys.problem(3, live=(23, 20))
    kv = kv._replace(pos=jnp.where(jnp.arange(24)[None, None] == 23, -1, kv.pos), seen=kv.seen - 1)  # the last slot is yet to come
    method, one = TokenSelect(top_k=4, n_init=2, n_local=3, threshold=0.9), q[:, :, -2:-1]
    state, first = read(method, one, kv)
    assert state.made.all()
    grown = toys.problem(3, live=(23, 20))[1]
    near, far = one * 1.5 + 0.01, -one
    stale, hit = read(method, near, grown, state)
    np.testing.assert_array_equal(stale.pages, state.pages)
    np.testing.assert_array_equal(stale.query, state.query)
    for i, (old, new) in enumerate(zip(positions(first, kv), positions(hit, grown), strict=True)):
        n = int(grown.seen[i])
        middle = [int(grown.pos[i, 0, p]) for p in np.asarray(state.pages)[i]]
        assert new == sorted({0, 1, *middle, n - 3, n - 2, n - 1}) and old[:6] == new[:6]
    fresh, miss = read(method, far, grown, state)
    assert positions(miss, grown) == reference(far, grown, 4, 2, 3)[0]
    # each sequence hits or misses for itself, and what it reads does not depend on the other
    mixed, both = read(method, np.concatenate([near[:1], far[1:]]), grown, state)
    assert positions(both, grown) == [positions(hit, grown)[0], positions(miss, grown)[1]]
    np.testing.assert_array_equal(mixed.query, np.stack([stale.query[0], fresh.query[1]]))
    always, _ = read(TokenSelect(top_k=4, n_init=2, n_local=3, threshold=None), near, grown, state)
    assert np.abs(np.asarray(always.query) - np.asarray(state.query)).max() > 0.1


def test_what_the_budget_covers_is_read_whole_whatever_was_selected():
    """Nine live tokens, a budget of nine: no vote is held, and the next token, one too many, holds the first."""
    q, kv = toys.problem(4, live=(9, 24))
    method = TokenSelect(top_k=4, n_init=2, n_local=3)
    state, index = read(method, q[:, :, -1:], kv)
    assert positions(index, kv)[0] == list(range(9)) and state.made.tolist() == [False, True]


def test_pages():
    """Pages of four slots: those of the edges, and the page of most votes among the others."""
    q, kv = toys.problem(5)
    method = TokenSelect(top_k=4, n_init=2, n_local=3, block=4, threshold=None)
    _, index = read(method, q[:, :, -1:], kv)
    assert method.sizes == (1, 5) and index.index.shape == (2, 2, 5)
    _, votes = reference(q[:, :, -1:], kv, 1, 2, 3)
    for i, live in enumerate(toys.LIVE):
        start = 24 - live
        edge = {p // 4 for p in (start, start + 1, 21, 22, 23)}
        mass = {
            p: sum(votes[i][j - start - 2] for j in range(4 * p, 4 * p + 4) if start + 2 <= j < 21)
            for p in range(start // 4, 6)
            if p not in edge
        }
        assert set(np.asarray(index.index)[i, 0].tolist()) - {-1} == edge | {max(mass, key=mass.get)}


@pytest.mark.parametrize("name", ["shard_map", "jit"])
def test_heads_on_two_devices_vote_together(name):
    q, kv = toys.problem(6)
    plain = TokenSelect(top_k=5, n_init=1, n_local=2)
    _, want = read(plain, q[:, :, -1:], kv)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda a: jax.P() if a.ndim < 2 or a.shape[1] not in (2, 4) else jax.P(None, "x")
    args = (plain.start({}, 0, kv, 4), jnp.asarray(q[:, :, -1:]), queries(kv, 1), kv)
    specs = jax.tree.map(spec, args)
    if name == "jit":
        args = jax.tree.map(lambda a, s: jax.device_put(a, jax.sharding.NamedSharding(mesh, s)), args, specs)
        got = reader(plain)(*args)[1].index
    else:
        method = TokenSelect(top_k=5, n_init=1, n_local=2, axis="x")
        run = lambda *args: reader(method)(*args)[1].index
        got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=jax.P(None, "x"), check_vma=False))(*args)
    np.testing.assert_array_equal(got, want.index)


def test_prefill_in_chunks_and_decode():
    """A budget that covers the cache: the plain model, in chunks and in steps. A small one: every prompt length in one program, no NaN."""
    params, ids, force = world()

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, live):
        recipe = Recipe(reader=method)
        tokens, layers = prefill_chunked(CFG, params, ids, live, recipe, chunk=4, new=6, read=True)
        return tokens.x[:, -1], replay(CFG, params, tokens, layers, force[:, :6], recipe)[0]

    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, jnp.asarray(LIVE)), new=6)
    want = tokens.x[:, -1], replay(CFG, params, tokens, layers, force[:, :6])[0]
    for a, b in zip(run(TokenSelect(top_k=99, n_init=2, n_local=4), jnp.asarray(LIVE)), want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    # 18 slots, 17 read, 18 live at the last step only: everything through the gather
    most = run(TokenSelect(top_k=11, n_init=2, n_local=4), jnp.asarray(LIVE))
    np.testing.assert_allclose(most[0], want[0], atol=3e-5)
    np.testing.assert_allclose(most[1][:5], want[1][:5], atol=3e-5)
    few = run(TokenSelect(top_k=3, n_init=2, n_local=4), jnp.asarray(LIVE))
    assert np.isfinite(few[1]).all() and np.abs(few[1] - want[1])[:, 0].max() > 1e-3
    np.testing.assert_allclose(few[0][3], want[0][3], atol=3e-5)  # three tokens: all read
    # distances stay within what is read: no rotary id beyond it
    q, kv = toys.problem(7)
    assert int(read(TokenSelect(top_k=3, n_init=2, n_local=4), q[:, :, -1:], kv)[1].rope.max()) == 8


def test_bf16_scores_are_float32():
    q, kv = toys.problem(8)
    half = kv._replace(k=kv.k.astype(jnp.bfloat16))
    wide = half._replace(k=half.k.astype(jnp.float32))
    method, one = TokenSelect(top_k=4, n_init=1, n_local=2), jnp.asarray(q[:, :, -1:], jnp.bfloat16)
    np.testing.assert_array_equal(read(method, one, half)[1].index, read(method, one.astype(jnp.float32), wide)[1].index)


def test_refuses():
    for bad in ({"top_k": 0}, {"n_local": 0}, {"kernel": 2}, {"raw": False}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TokenSelect(**bad)
    q, kv = toys.problem()
    with pytest.raises(ValueError, match="does not fit into n_local=2"):
        read(TokenSelect(top_k=3, n_init=1, n_local=2), q[:, :, -3:], kv)
    with pytest.raises(ValueError, match="pages of 5 slots, but the cache has 24"):
        TokenSelect(top_k=5, block=5).start({}, 0, kv, 4)


@pytest.mark.parametrize("name", ["tokenselect", "tokenselect_bf16"])
def test_official_outputs(data, name):
    """pzs19/TokenSelect with query head i on KV head i // (h/g): 60 tokens, a budget of 72: everything is read."""
    z = np.load(data / "golden" / f"{name}.npz")
    method = TokenSelect(**{key: int(z[f"c4_{key}"]) for key in ("top_k", "n_init", "n_local")})
    k = np.swapaxes(z["c4_k"], 0, 1)[None]
    kv, q = toys.cache(k, k), np.swapaxes(z["c4_q"], 0, 1)[None]
    assert bool(z["c4_group_read_all"]) and read(method, q, kv)[1] is None
    padded = np.pad(k, ((0, 0), (0, 0), (40, 0), (0, 0)))  # a longer cache: the same tokens, through the gather
    kv = toys.cache(padded, padded, (60,))
    assert positions(read(method, q, kv)[1], kv) == [z["c4_group_indices"].tolist()]
