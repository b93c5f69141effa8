"""ChunkKV: chunks by hand, the base where a chunk is one token, a plain-Python reference, kvpress's rule."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Protect
from jaxtok.methods import ChunkKV, PerLayer, SnapKV
from tests.methods.wrap.given import Given, cache, kept, run

small = {
    "chunkkv": lambda capacity: ChunkKV(base=SnapKV(capacity=capacity, window=2, pool=3), chunk=3),
    "chunkkv-one": lambda capacity: ChunkKV(base=SnapKV(capacity=capacity, window=2, pool=3), chunk=1, variant="kvpress"),
}


def reference(scores, length, keep, size, protect, variant):
    """Kept positions of one sequence: scores [g n], of which the last `length` slots are live."""
    x = np.asarray(scores, np.float64)[:, scores.shape[1] - length :]
    safe = {p for p in range(length) if p < protect.sinks or p >= length - protect.recent}
    chunks = [list(range(i, min(i + size, length))) for i in range(0, length, size)]
    if variant == "kvpress":
        if safe:
            x[:, sorted(safe)] = np.delete(x, sorted(safe), 1).max(initial=-1) + 1 if len(safe) < length else 1
        total = x.sum(0)
        if length < size:
            return sorted(sorted(range(length), key=lambda p: (-total[p], p))[:keep])
        order = sorted(range(len(chunks)), key=lambda c: (-total[chunks[c]].mean(), c))
        return sorted(p for c in order[: max(1, len(chunks) * keep // length)] for p in chunks[c])
    total, room, out = x.sum(0), max(keep - len(safe), 0), set(safe)
    chunks = [c for c in ([p for p in chunk if p not in safe] for chunk in chunks) if c]
    for c in sorted(chunks, key=lambda c: (-total[c].mean(), c)):
        taken = sorted(c, key=lambda p: (-total[p], p))[:room]
        out, room = out | set(taken), room - len(taken)
    return sorted(out)


def test_by_hand():
    # summed over the heads: (1 1 10) (4 5 3) (9): means 4, 4, 9
    kv = cache([[[0.0, 0, 9, 4, 1, 3, 0], [1, 1, 1, 0, 4, 0, 9]]])
    make = lambda capacity, **options: ChunkKV(base=Given(capacity=capacity), chunk=3, **options)
    outs = run(*((make(c), kv) for c in (4, 6, 1)), *((make(c, variant="kvpress"), kv) for c in (4, 6, 1)))
    want = [[0, 1, 2, 6], [0, 1, 2, 3, 4, 6], [6], [6], [0, 1, 2, 6], [6]]  # 3 chunks * 4 / 7 = 1, * 6 / 7 = 2
    assert [kept(out) for out in outs] == [[[w, w]] for w in want], "of equal chunks the older, and of a cut chunk the best"
    assert [out.k.shape[2] for out in outs] == [4, 6, 1, 6, 7, 3] and not any(out.lost.any() for out in outs)


def test_protected_tokens():
    # without the newest: (9 2) (5 5) (0): 5.5, 5; kvpress gives the newest 9 + 1, so that its chunk has mean 5
    kv = cache([[[9.0, 2.0, 4.0, 5.0, 0.0, -7.0]]])
    base = Given(capacity=4, protect=Protect(recent=1))
    ours, theirs = run((ChunkKV(base=base, chunk=2), kv), (ChunkKV(base=base, chunk=2, variant="kvpress"), kv))
    assert kept(ours) == [[[0, 1, 3, 5]]] and kept(theirs) == [[[0, 1, 4, 5]]]


@pytest.mark.parametrize("variant", ["paper", "kvpress"])
def test_against_the_reference(variant):
    rng = np.random.default_rng(3)
    scores, lengths = rng.random((4, 3, 23)).astype(np.float32), [23, 14, 5, 2]
    kv = cache(scores, lengths)
    table = [(4, Protect(recent=3), 9), (6, Protect(), 11), (5, Protect(sinks=1, recent=2), 7), (23, Protect(), 8), (1, Protect(), 8)]
    outs = run(*((ChunkKV(base=Given(capacity=c, protect=p), chunk=size, variant=variant), kv, c) for size, p, c in table))
    for (size, protect, capacity), out in zip(table, outs, strict=True):
        for b, length in enumerate(lengths):
            want = reference(scores[b], length, min(capacity, length), size, protect, variant)
            assert kept(out)[b] == [want] * 3 and not out.lost.any(), (size, b)


def test_a_chunk_of_one_token_is_the_base_with_one_choice_for_all_heads():
    one = np.random.default_rng(1).random((2, 1, 12))
    kv = cache(np.repeat(one, 2, 1), [12, 7])
    base = Given(capacity=5, protect=Protect(sinks=1))
    by_token, whole, alone = run((ChunkKV(base=base, chunk=1), kv), (ChunkKV(base=base, chunk=99), kv), (base, kv))
    assert kept(by_token) == kept(whole) == kept(alone)


def test_traced_budgets_and_bf16():
    kv = cache(np.random.default_rng(2).random((2, 2, 12)), [12, 7])
    method = ChunkKV(base=Given(capacity=6), chunk=4)
    half = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    traced, fewer, low, high = run(
        (method, kv, jnp.array([4, 4])),
        (ChunkKV(base=Given(capacity=4), chunk=4), kv),
        (method, half),
        (method, half._replace(k=half.k.astype(jnp.float32), v=half.v.astype(jnp.float32))),
    )
    assert kept(traced) == kept(fewer) and kept(low) == kept(high) and low.k.dtype == jnp.bfloat16
    assert all(heads[0] == heads[1] for heads in kept(traced))


def test_what_it_says_of_itself():
    method = ChunkKV(base=SnapKV(capacity=90, window=9))
    assert method.chunk == 20 and method.slots == method.capacity == 90 and method.needs.rows == 9 and method.aligned
    assert ChunkKV(base=SnapKV(capacity=90), variant="kvpress").slots == 109 and method.resize(70).base.capacity == 70
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        ChunkKV(base=Given(capacity=4), chunk=0)
    with pytest.raises(ValueError, match="variant must be one of paper, kvpress"):
        ChunkKV(base=Given(capacity=4), variant="official")
    bare = object.__new__(ChunkKV)
    object.__setattr__(bare, "base", PerLayer(base=Given(capacity=2), capacities=(2,)))
    with pytest.raises(TypeError, match="Put other wrappers around"):
        bare.__post_init__()
