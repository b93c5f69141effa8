import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import Finch, SnapKV
from tests.methods import toys

small = {
    "finch": lambda capacity: Finch(capacity=capacity, window=2),
    "finch-chunk": lambda capacity: Finch(capacity=capacity, window=2, chunk=4),
}


def reference(q, kv, window, normalize, variant):
    """The card's score for each KV head, numpy float64; nan outside the candidates."""
    rows = toys.softmax_rows(q, kv.k, kv.pos)
    (b, h, n, _), g = rows.shape, kv.k.shape[1]
    out = np.full((b, g, n), np.nan)
    for i in range(b):
        live = int(kv.seen[i])
        for e in range(g):
            for j in range(n - live, n - window):
                total = 0.0
                for head in range(e * (h // g), (e + 1) * (h // g)):
                    for t in range(n - window, n):
                        sees = t - (n - live) + 1
                        total += rows[i, head, t, j] * ((sees - (variant == "kvpress")) if normalize else 1)
                out[i, e, j] = total / (h // g) / window
    return out


def shared_out(score, live, keep, window, size):
    """Kept positions of one head with `chunk`: scores of the live tokens by order."""
    runs = [list(range(i, min(i + size, live))) for i in range(0, live, size)]
    safe = {p for p in range(live) if p >= live - window}
    ideal = [Fraction(len(run) * keep, live) for run in runs]
    count = [math.floor(x) for x in ideal]
    for c in sorted(range(len(runs)), key=lambda c: (count[c] - ideal[c], c))[: keep - sum(count)]:
        count[c] += 1
    mine = set()
    for run, c in zip(runs, count, strict=True):
        free = sorted(set(run) - safe, key=lambda p: (-score[p], p))
        mine |= set(free[: max(c - len(safe & set(run)), 0)])
    return safe | set(sorted(mine, key=lambda p: (-score[p], p))[: max(keep - len(safe), 0)])


def test_by_hand():
    """Five tokens, a question of two: its queries see 4 and 5 keys. .5 * 4 + .1 * 5 = 2.5 against .2 * 4 + .4 * 5 = 2.8."""
    rows = jnp.asarray([[[[0.5, 0.2, 0.1, 0.2, 0.0], [0.1, 0.4, 0.1, 0.1, 0.3]]]])
    kv = toys.cache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2)))
    run = lambda **options: np.asarray(toys.scorer(Finch(capacity=3, window=2, **options))(kv, Evidence(rows=rows)))[0, 0, :3]
    np.testing.assert_allclose(run(), [1.25, 1.4, 0.45], rtol=1e-6)
    np.testing.assert_allclose(run(variant="kvpress"), [0.95, 1.1, 0.35], rtol=1e-6)
    np.testing.assert_allclose(run(normalize=False), [0.3, 0.3, 0.1], rtol=1e-6)
    assert toys.kept(toys.run(Finch(capacity=3, window=2), kv, Evidence(rows=rows))) == [[{1, 3, 4}]]


@pytest.mark.parametrize("normalize, variant", [(True, "paper"), (True, "kvpress"), (False, "paper")])
def test_equals_numpy(normalize, variant):
    q, kv = toys.problem(2, junk=1e4)
    method = Finch(capacity=9, window=4, normalize=normalize, variant=variant)
    want = reference(q, kv, 4, normalize, variant)
    got = np.asarray(toys.scorer(method)(kv, toys.look(q, kv, 6)))
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=2e-5)
    best = toys.top(np.nan_to_num(want), kv.pos, 9, lambda p, seen: p >= seen - 4)
    assert toys.kept(toys.run(method, kv, toys.look(q, kv, 6))) == best


def test_without_the_counts_it_is_snapkv_without_pooling():
    q, kv = toys.problem(3)
    seen = toys.look(q, kv, 4)
    assert toys.kept(toys.run(Finch(capacity=9, window=4, normalize=False), kv, seen)) == toys.kept(
        toys.run(SnapKV(capacity=9, window=4, pool=1), kv, seen)
    )
    one = toys.look(q, kv, 1)  # one query: its count is the same for all keys
    assert toys.kept(toys.run(Finch(capacity=9, window=1), kv, one)) == toys.kept(toys.run(SnapKV(capacity=9, window=1, pool=1), kv, one))


@pytest.mark.parametrize("size, capacity", [(5, 11), (8, 9), (24, 10), (3, 24)])
def test_shares_of_chunks(size, capacity):
    q, kv = toys.problem(4, live=(24, 13))
    want, out = (
        reference(q, kv, 3, True, "paper"),
        toys.kept(toys.run(Finch(capacity=capacity, window=3, chunk=size), kv, toys.look(q, kv, 3))),
    )
    for b, live in enumerate((24, 13)):
        for g in range(2):
            assert out[b][g] == shared_out(want[b, g, 24 - live :], live, min(capacity, live), 3, size)


def test_one_chunk_is_no_chunk():
    q, kv = toys.problem(5)
    seen = toys.look(q, kv, 4)
    a, b = (toys.kept(toys.run(Finch(capacity=9, window=4, chunk=chunk), kv, seen)) for chunk in (None, 99))
    assert a == b


def test_checks_of_a_scorer():
    make = lambda capacity: Finch(capacity=capacity, window=5)
    toys.check_scorer(make, lambda q, kv: toys.look(q, kv, 5), protected=lambda p, seen: p >= seen - 5)
    for match, options in {
        "capacity=8 has no room for the 9": dict(capacity=8, window=9),
        "window must be >= 1": dict(capacity=80, window=0),
        "chunk must be >= 1": dict(capacity=80, chunk=0),
        "variant must be one of": dict(capacity=80, variant="official"),
    }.items():
        with pytest.raises(ValueError, match=match):
            Finch(**options)
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        Finch(capacity=8, window=4).score({}, toys.problem()[1], Evidence())
