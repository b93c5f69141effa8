import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import RecycledAttention
from tests.methods import toys

small = {
    "recycled": lambda capacity: RecycledAttention(top_k=capacity, stride=4),
    "recycled:threshold": lambda capacity: RecycledAttention(top_k=capacity, stride=5, threshold=0.3),
}
STEPS, S = 11, 32


@functools.cache
def stepper(method):
    def step(state, q, pos, kv):
        state, _, out, _ = method.attend({}, 0, state, None, q, pos, kv, toys.sight())
        return state, out[:, :, 0]

    return jax.jit(step)


def stream(seed=0, junk=0.0, alike=0.0):
    """Queries of steps [t b h d] and the cache after each: two sequences of 20 and 9 tokens grow in 32 slots. `alike` in [0, 1): how
    much of a query all steps share."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(2, 2, S, 8)).astype(np.float32) * x for x in (2, 1))
    q = rng.normal(size=(STEPS, 2, 4, 8)).astype(np.float32) * 2
    q = alike * q[:1] + (1 - alike) * q
    kvs = []
    for t in range(STEPS):
        kv, end = toys.cache(k, v), 21 + t
        slot = np.arange(S)
        pos = np.stack([np.where((slot < end) & (slot >= start), slot - start, -1) for start in (0, 11)])
        pos = np.repeat(pos[:, None], 2, 1).astype(np.int32)
        keep = lambda x, pos=pos: jnp.asarray(np.where(pos[..., None] >= 0, x, junk), jnp.float32)
        kvs.append(
            kv._replace(
                k=keep(k), v=keep(v), pos=jnp.asarray(pos), cursor=jnp.asarray(end, jnp.int32), seen=jnp.asarray(pos.max((1, 2)) + 1)
            )
        )
    return q, kvs


def run(method, q, kvs, live=True):
    kv = kvs[0]._replace(cursor=jnp.asarray(20, jnp.int32))
    state, out = toys.begin(method, 0, kv, q.shape[2]), []
    for x, kv in zip(q, kvs, strict=True):
        pos = toys.newest(kv)
        state, y = stepper(method)(state, jnp.asarray(x)[:, :, None], jnp.where(jnp.asarray(live), pos, -1), kv)
        out.append((np.asarray(y), state))
    return out


def reference(q, kvs, top_k, stride, threshold=None, how="max"):
    """The card in numpy, each sequence for itself: values [b h d] of every step and whether it was full [b]."""
    alone = []
    for i in range(q.shape[1]):
        steps, since, chosen, then, edge = [], None, None, None, 0
        for row, kv in zip(q[:, i : i + 1], kvs, strict=True):
            kv = kv._replace(**{name: getattr(kv, name)[i : i + 1] for name in ("k", "v", "pos", "bias")})
            alike = None if then is None else row.ravel() @ then.ravel() / np.linalg.norm(row) / np.linalg.norm(then)
            if since is None or since + 1 >= stride or (threshold is not None and alike < threshold):
                steps.append((toys.attend_to(row, kv, toys.everything(row, kv))[0], True))
                logit = np.einsum("hd,hjd->hj", row[0].astype(np.float64), np.repeat(np.asarray(kv.k[0], np.float64), 2, 0)) * 8**-0.5
                e = np.exp(np.where(np.repeat(np.asarray(kv.pos[0]) >= 0, 2, 0), logit, -np.inf))
                share = getattr((e / e.sum(-1, keepdims=True)).reshape(2, 2, -1), how)(1)
                chosen = [{int(j) for j in np.argsort(-share[head // 2])[:top_k] if kv.pos[0, head // 2, j] >= 0} for head in range(4)]
                since, then, edge = 0, row, int(kv.cursor)
            else:
                tail = set(range(edge, int(kv.cursor)))
                steps.append((toys.attend_to(row, kv, [[head | tail for head in chosen]])[0], False))
                since += 1
        alone.append(steps)
    return [(np.stack([out for out, _ in each]), [full for _, full in each]) for each in zip(*alone, strict=True)]


def test_by_hand():
    """q = 1, keys 0 2 1 then 3 and 0, top 1, stride 3. Full: all three, the choice is slot 1. Step 2: slots 1 and 3. Step 3: full."""
    k = np.array([0.0, 2, 1, 3, 0], np.float32).reshape(1, 1, 5, 1)
    whole = toys.cache(k, np.arange(5, dtype=np.float32).reshape(1, 1, 5, 1))
    upto = lambda n: whole._replace(pos=jnp.where(whole.pos < n, whole.pos, -1), cursor=jnp.asarray(n, jnp.int32))
    method, q = RecycledAttention(top_k=1, stride=3), jnp.ones((1, 1, 1, 1))
    state, ages = method.start({}, 0, upto(2), 1), []
    for n in (3, 4, 5, 5):
        state, _, out, _ = method.attend({}, 0, state, None, q, jnp.full((1, 1), n - 1), upto(n), toys.sight())
        ages.append((state.age.item(), state.slots.item()))
        if n == 4:
            np.testing.assert_allclose(out.item(), (np.e**2 * 1 + np.e**3 * 3) / (np.e**2 + np.e**3), rtol=1e-5)
    assert ages == [(0, 1), (1, 1), (2, 1), (0, 3)]


@pytest.mark.parametrize("how, threshold", [("max", None), ("mean", None), ("max", 0.7)])
def test_equals_numpy(how, threshold):
    """h/g > 1, ragged, junk in dead slots; full steps at the stride and where a sequence's queries turned away, in that sequence alone."""
    q, kvs = stream(1, junk=1e3, alike=0.0 if threshold is None else 0.62)
    got = run(RecycledAttention(top_k=5, stride=4, threshold=threshold, group=how), q, kvs)
    want = reference(q, kvs, 5, 4, threshold, how)
    assert [(state.age == 0).tolist() for _, state in got] == [full for _, full in want]
    for (out, _), (exact, _) in zip(got, want, strict=True):
        np.testing.assert_allclose(out, exact, atol=2e-5)
    full = np.array([full for _, full in want])
    assert (
        (full.sum(0) == 3).all() if threshold is None else (3 < full.sum(0)).all() and (full[:, 0] != full[:, 1]).any() and not full.all()
    )


def test_limits():
    """Stride 1, or a threshold no cosine reaches: full attention. A threshold below all cosines: the stride alone. top_k >= slots: full."""
    q, kvs = stream(2)
    full = [toys.attend_to(x, kv, toys.everything(x, kv)) for x, kv in zip(q, kvs, strict=True)]
    for method in (
        RecycledAttention(top_k=2, stride=1),
        RecycledAttention(top_k=2, stride=9, threshold=1.1),
        RecycledAttention(top_k=S, stride=9),
    ):
        for (out, _), want in zip(run(method, q, kvs), full, strict=True):
            np.testing.assert_allclose(out, want, atol=2e-5)
    plain, never = (run(RecycledAttention(top_k=3, stride=5, threshold=x), q, kvs) for x in (None, -1.1))
    for (a, _), (b, _) in zip(plain, never, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(plain[1][0] - full[1]).max() > 1e-3


def test_between_full_steps_only_the_choice_and_the_tail_matter():
    q, kvs = stream(3)
    method = RecycledAttention(top_k=4, stride=6)
    base = run(method, q[:1], kvs[:1])[0][1]
    kv = kvs[2]
    step = lambda kv: stepper(method)(base, jnp.asarray(q[2])[:, :, None], toys.newest(kv), kv)[1]
    read = jnp.zeros((2, 2, S), bool).at[jnp.arange(2)[:, None, None], jnp.arange(2)[None, :, None], base.slots].set(True)
    read = read | (jnp.arange(S) >= 21)[None, None]
    loud = kv._replace(k=jnp.where(read[..., None], kv.k, 50.0), v=jnp.where(read[..., None], kv.v, -70.0))
    np.testing.assert_array_equal(step(kv), step(loud))
    quiet = kv._replace(v=kv.v.at[:, :, 21].set(9.0))
    assert np.abs(np.asarray(step(kv)) - np.asarray(step(quiet))).max() > 1e-3, "the tail is read"


def test_several_queries_attend_to_everything_and_the_next_step_is_full():
    q, kv = toys.problem(4)
    method = RecycledAttention(top_k=3, stride=5)
    state = method.start({}, 0, kv, 4)._replace(age=jnp.zeros((2,), jnp.int32))
    state, _, out, _ = method.attend({}, 0, state, None, jnp.asarray(q[:, :, -2:]), kv.pos[:, 0, -2:], kv, toys.sight())
    np.testing.assert_allclose(out[:, :, 1], toys.attend_to(q[:, :, -1], kv, toys.everything(q, kv)), atol=2e-5)
    assert method.due(state, jnp.asarray(q[:, :, 0])).all()


def test_a_finished_sequence_asks_for_nothing():
    """The dynamic rule heeds live queries only, and a full step of one sequence is none of another's."""
    q, kvs = stream(5, alike=0.95)
    q[1:, 1] *= -1.0  # the second sequence turns around
    method = RecycledAttention(top_k=4, stride=99, threshold=0.5)
    assert [state.age.tolist() for _, state in run(method, q[:4], kvs[:4])] == [[0, 0], [1, 0], [2, 1], [3, 2]]
    assert [state.age.tolist() for _, state in run(method, q[:4], kvs[:4], live=[[True], [False]])][1:] == [[1, 1], [2, 2], [3, 3]]


def test_bf16():
    q, kvs = stream(6)
    kvs = [kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16)) for kv in kvs[:3]]
    for out, state in run(RecycledAttention(top_k=4, stride=3), jnp.asarray(q[:3], jnp.bfloat16), kvs):
        assert out.dtype == jnp.bfloat16 and (state.slots >= 0).all()


def test_refuses():
    for bad in ({"top_k": 0}, {"stride": 0}, {"group": "min"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RecycledAttention(**bad)
