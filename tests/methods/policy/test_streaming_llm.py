import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import grow_kv
from jaxtok.core.types import Evidence
from jaxtok.methods import StreamingLLM
from jaxtok.ops.attention import attention
from jaxtok.ops.cache import append, place
from tests.methods import toys

small = {
    "streaming_llm": lambda capacity: StreamingLLM(capacity=capacity, sinks=2, compact=False),
    "streaming_llm:compact": lambda capacity: StreamingLLM(capacity=capacity, sinks=2),
}


def test_by_hand():
    """Capacity 4 with 1 sink: after a prompt of 5 and four steps."""
    x = np.zeros((1, 1, 9, 2), np.float32)
    sets = [toys.kept(kv)[0][0] for kv, *_ in toys.drive(StreamingLLM(capacity=4, sinks=1), x, x, x, (5,), 5)]
    assert sets == [{0, 2, 3, 4}, {0, 3, 4, 5}, {0, 4, 5, 6}, {0, 5, 6, 7}, {0, 6, 7, 8}]


def test_checks_of_a_policy():
    make = lambda capacity: StreamingLLM(capacity=capacity, sinks=3)
    toys.check_policy(make, protected=lambda p, seen: p < 3 or p >= seen - 3)


@pytest.mark.parametrize("sinks", [0, 3])
def test_equals_the_list(sinks):
    """The first `sinks` and the newest others, written as a list that drops its oldest; 3 x capacity steps. Without sinks, a window."""
    x = np.random.default_rng(0).normal(size=(1, 1, 30, 4)).astype(np.float32)
    want = list(range(6))
    for kv, *_ in toys.drive(StreamingLLM(capacity=8, sinks=sinks), x, x, x, (6,), 6):
        assert toys.kept(kv)[0][0] == set(want)
        want.append(max(want) + 1)
        if len(want) > 8:
            del want[sinks]


def test_raw_keys_placed_by_rank_are_turned_keys_turned_back():
    """R(rank) k = R(rank - position) R(position) k at every step past the capacity, so a cache of turned keys that are turned on by one place
    with each eviction gives the same attention."""
    rng, f = np.random.default_rng(5), np.asarray(toys.freqs(8), np.float64)
    q, k, v = (rng.normal(size=(1, 2, 21, 8)).astype(np.float32) for _ in range(3))

    def turn(x, at):
        lo, hi, angle = x[..., :4], x[..., 4:], np.asarray(at)[..., None] * f
        return np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)

    held = {p: turn(k[0, :, p].astype(np.float64), p) for p in range(6)}  # turned, one by one, wherever they stand now
    for t, (kv, _, out, _) in enumerate(toys.drive(StreamingLLM(capacity=6, sinks=2), q, k, v, (6,), 6)):
        if out is None:
            continue
        p = 5 + t
        rank = len(held)
        held[p] = turn(k[0, :, p].astype(np.float64), rank)
        logit = np.einsum("hd,phd->hp", turn(q[0, :, p].astype(np.float64), rank), np.stack(list(held.values()))) * 8**-0.5
        weight = np.exp(logit - logit.max(-1, keepdims=True))
        want = np.einsum("hp,hpd->hd", weight / weight.sum(-1, keepdims=True), v[0][:, list(held)])
        np.testing.assert_allclose(out[0, :, 0], want, atol=1e-5)
        del held[list(held)[2]]
        held = {p: x if i < 2 else turn(x, -1) for i, (p, x) in enumerate(held.items())}
        assert toys.kept(kv)[0] == [set(held)] * 2


def test_only_the_paper_stores_raw_keys():
    assert StreamingLLM(capacity=9).raw and not StreamingLLM(capacity=9, compact=False).raw
    assert StreamingLLM(capacity=9).needs.rows == 0 and not StreamingLLM(capacity=9).step_needs.received


def test_no_float_is_asked_to_tell_far_positions_apart():
    """20 million tokens on, neighbours are still told apart: float32 alone rounds there."""
    kv = toys.cache(np.zeros((1, 1, 6, 2)), np.zeros((1, 1, 6, 2)))
    far = 20_000_001
    kv = kv._replace(pos=jnp.asarray([[[0, far - 1, far, far + 1, far + 2, far + 3]]]), seen=jnp.asarray([far + 4]))
    _, plan = toys.fit(StreamingLLM(capacity=4, sinks=1), kv, Evidence())
    np.testing.assert_array_equal(plan.index[0, 0], [0, 3, 4, 5])


def test_refuses():
    with pytest.raises(ValueError, match="capacity=4 has no room for the 5"):
        StreamingLLM(capacity=4)
    with pytest.raises(ValueError, match="sinks must be >= 0"):
        StreamingLLM(capacity=4, sinks=-1)


def test_official_outputs(data):
    """mit-han-lab/streaming-llm, one GQA layer: what is attended to and kept at every step, and the layer's output at compact positions.

    Then a turn of three tokens, for which the official code makes room beforehand: `refit` with a budget smaller by three.
    """
    z = np.load(data / "golden" / "streaming_llm.npz")
    get = lambda name: z[f"c2_{name}"]
    h, g, d, start, n = (int(get(x)) for x in ("num_heads", "num_kv_heads", "head_dim", "start_size", "n_prefill"))
    heads = lambda x, e: x.reshape(1, -1, e, d).swapaxes(1, 2)
    q, k, v = (heads(get("hidden") @ get(f"w.{x}_proj.weight").T, e) for x, e in (("q", h), ("k", g), ("v", g)))
    steps = int(get("n_decode"))
    policy = StreamingLLM(capacity=start + int(get("recent_size")), sinks=start)
    trace = toys.drive(policy, *(x[:, :, : n + steps] for x in (q, k, v)), (n,), n)
    before, last = [], np.zeros(0)
    for t, (kv, _, out, row) in enumerate(trace):
        assert toys.kept(kv)[0] == [set(get(f"s{t}_kept_after").tolist())] * g
        if out is not None:
            assert [*before, n + t - 1] == get(f"s{t}_attended").tolist()
            slots = np.argsort(np.where(last < 0, 99, last))[: len(before)]
            np.testing.assert_allclose(np.asarray(row)[0, :, 0][:, [*slots, policy.capacity]], get(f"s{t}_attn")[0, :, 0], atol=2e-6)
            flat = np.asarray(out)[0, :, 0].reshape(-1) @ get("w.o_proj.weight").T
            np.testing.assert_allclose(flat, get(f"s{t}_out")[0, 0], atol=2e-6)
        last = np.asarray(kv.pos)[0, 0]
        before = sorted(toys.kept(kv)[0][0])
    turn = int(get("n_turn"))
    fewer = np.full((1,), policy.capacity - turn, np.int32)
    kv, _ = jax.jit(lambda kv: policy.refit({}, policy.start({}, kv, Evidence()), kv, Evidence(), fewer))(kv)
    assert toys.kept(kv)[0] == [set(get("turn_kept_before").tolist())] * g
    rows = [jnp.asarray(x[:, :, n + steps :]) for x in (q, k, v)]
    at = jnp.arange(n + steps, n + steps + turn, dtype=jnp.int32)[None]
    first = kv.cursor
    room, none = kv.pos.shape[-1] + turn, jnp.zeros((1, g, turn))
    kv = jax.jit(lambda kv: append(grow_kv(kv, room), rows[1], rows[2], at, none))(kv)
    assert toys.kept(kv)[0] == [set(get("turn_attended").tolist())] * g
    placed, keys = jax.jit(place)(rows[0], kv, first, toys.freqs(d))
    out, _ = attention(placed, keys, kv.v, q_pos=at, k_pos=kv.pos)
    flat = np.asarray(out[0]).swapaxes(0, 1).reshape(turn, -1) @ get("w.o_proj.weight").T
    np.testing.assert_allclose(flat, get("turn_out")[0], atol=2e-6)
