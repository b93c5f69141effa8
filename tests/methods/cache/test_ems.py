"""EMS: a merge by hand, the card in plain numpy over ragged rows, and every check of the card."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.compose import dense
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Protect
from jaxtok.methods import EMS, H2O, KeyRerotation, Merging
from jaxtok.testing.world import CFG
from tests.methods import toys

small = {
    "ems": lambda capacity: EMS(capacity=capacity, window=2, tau=0.2),
    "ems-count": lambda capacity: EMS(capacity=capacity, window=3, tau=0.1, combine="sum", count=True),
    "ems-evict": lambda capacity: EMS(capacity=capacity, window=2, tau=1.1),
}


def score_of(q, kv, window, combine):
    """The card's score for each KV head, float64; nan where dead."""
    rows = toys.softmax_rows(q, kv.k, kv.pos)
    (b, h, n, _), g = rows.shape, kv.k.shape[1]
    out = np.full((b, g, n), np.nan)
    for i, e in np.ndindex(b, g):
        a = rows[i, e * (h // g) : (e + 1) * (h // g)].mean(0)
        live = range(n - int(kv.seen[i]), n)
        far = {j: sum(a[x, j] for x in live if x >= j) / (n - j) for j in live}
        last = [x for x in live if x >= n - window]
        near = {j: sum(a[x, j] for x in last if x >= j) / len([x for x in last if x >= j]) for j in live}
        scale = lambda x: {j: y / np.mean(list(x.values())) for j, y in x.items()}
        far, near = scale(far), scale(near)
        for j in live:
            out[i, e, j] = max(far[j], near[j]) if combine == "max" else far[j] + near[j]
    return out


def reference(score, kv, keep, many, tau, safe=lambda p, seen: False):
    """{(sequence, head, position of the centre): (k, v, tokens it stands for)}, float64."""
    k, v, pos = (np.asarray(x, np.float64) for x in (kv.k, kv.v, kv.pos))
    out = {}
    for i, e in np.ndindex(*pos.shape[:2]):
        live = [j for j in range(pos.shape[2]) if pos[i, e, j] >= 0]
        first = [j for j in live if safe(pos[i, e, j], int(kv.seen[i]))]
        rest = sorted((j for j in live if j not in first), key=lambda j: (-score[i, e, j], j))
        centres, between = first + rest[: keep - len(first)], rest[keep - len(first) :][:many]
        members = {c: [c] for c in centres}
        for j in between:
            cos = {c: k[i, e, j] @ k[i, e, c] / np.linalg.norm(k[i, e, j]) / np.linalg.norm(k[i, e, c]) for c in sorted(centres)}
            best = max(cos, key=cos.get)
            if cos[best] >= tau:
                members[best].append(j)
        for c, group in members.items():
            w = score[i, e, group] / score[i, e, group].sum()
            out[i, e, int(pos[i, e, c])] = w @ k[i, e, group], w @ v[i, e, group], len(group)
    return out


def agrees(out, want, count, tol=1e-5):
    at = {(i, e, int(p)): j for (i, e, j), p in np.ndenumerate(np.asarray(out.pos)) if p >= 0}
    assert at.keys() == want.keys()
    for key, (k, v, tokens) in want.items():
        slot = (*key[:2], at[key])
        np.testing.assert_allclose(out.k[slot], k, atol=tol, rtol=tol)
        np.testing.assert_allclose(out.v[slot], v, atol=tol, rtol=tol)
        np.testing.assert_allclose(out.bias[slot], np.log(tokens) if count else 0.0, atol=1e-6)


def by_hand(**options):
    """Six tokens, two centres, two to be merged. One query has looked at all: attention .32 .2 .16 .12 .1 .1, and so has the window."""
    k = np.array([[2.0, 0], [0, 1], [4, 1], [1, 4], [9, 9], [9, 9]])
    kv = toys.cache(k[None, None], 10 * k[None, None])._replace(seen=jnp.array([99]))
    a = jnp.array([[[0.32, 0.2, 0.16, 0.12, 0.1, 0.1]]])
    method = EMS(capacity=2, window=1, **options)
    return toys.run(method, kv, Evidence(rows=a[:, :, None], received=a))


def test_by_hand():
    """(4, 1) joins (2, 0) with weight 1 / 3, (1, 4) joins (0, 1) with weight 3 / 8, the (9, 9) are evicted."""
    out = by_hand()
    np.testing.assert_allclose(out.k[0, 0], [[2 * 2 / 3 + 4 / 3, 1 / 3], [3 / 8, 5 / 8 + 4 * 3 / 8]], rtol=1e-6)
    np.testing.assert_allclose(out.v, 10 * out.k, rtol=1e-6)
    assert out.pos[0, 0].tolist() == [0, 1] and not np.asarray(out.bias).any()
    np.testing.assert_allclose(by_hand(count=True).bias[0, 0], np.log([2, 2]), rtol=1e-6)
    # half as many candidates: (1, 4) is evicted; a threshold between the similarities .970 of both: nothing joins
    np.testing.assert_allclose(by_hand(merge=0.5).k[0, 0, 1], [0, 1])
    np.testing.assert_allclose(by_hand(tau=0.98).k[0, 0], [[2, 0], [0, 1]])


@pytest.mark.parametrize(
    "combine, tau, merge, count", [("max", 0.2, 1.0, False), ("sum", 0.0, 0.5, True), ("max", -1.0, 3.0, True), ("sum", 0.4, 0.0, False)]
)
def test_equals_numpy(combine, tau, merge, count):
    q, kv = toys.problem(2, live=(24, 15), junk=1e4)
    method = EMS(capacity=7, window=4, tau=tau, merge=merge, combine=combine, count=count)
    evidence = toys.look(q, kv, 6)
    want = score_of(q, kv, 4, combine)
    got = np.asarray(toys.scorer(method)(kv, evidence))
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=2e-5)
    half_up = lambda keep: int(merge * keep + 0.5)
    agrees(toys.run(method, kv, evidence), reference(want, kv, 7, half_up(7), tau), count)
    agrees(toys.run(method, kv, evidence, jnp.array([5, 5])), reference(want, kv, 5, half_up(5), tau), count)


def test_protected_tokens_are_centres():
    q, kv = toys.problem(3, live=(24, 15))
    method = EMS(capacity=7, window=4, tau=0.1, protect=Protect(sinks=1, recent=3))
    want = reference(score_of(q, kv, 4, "max"), kv, 7, 7, 0.1, safe=lambda p, seen: p < 1 or p >= seen - 3)
    agrees(toys.run(method, kv, toys.look(q, kv, 4)), want, False)


# --- the card's checks --------------------------------------------------------------------------------------------------


def evicted(q, kv, keep, window=4):
    return toys.top(np.nan_to_num(score_of(q, kv, window, "max")), kv.pos, keep)


@pytest.mark.parametrize("options", [{"tau": 1.01}, {"merge": 0.0, "tau": -1.0}], ids=["tau over 1", "nothing to be merged"])
def test_it_is_eviction(options):
    """tau > 1, and M = 0: the best by the score, untouched."""
    q, kv = toys.problem(4)
    out = toys.run(EMS(capacity=9, window=4, **options), kv, toys.look(q, kv, 4))
    assert toys.kept(out) == evicted(q, kv, 9)
    at = np.asarray(out.pos) + (toys.N - np.asarray(toys.LIVE))[:, None, None]
    for name in ("k", "v"):
        np.testing.assert_array_equal(getattr(out, name), np.take_along_axis(np.asarray(getattr(kv, name)), at[..., None], 2))


def test_duplicates_of_a_centre_leave_it_exactly():
    """Every key is there three times: the mean of equals, and log 3 where it is counted."""
    rng = np.random.default_rng(5)
    k, v = (np.repeat(rng.normal(size=(1, 2, 6, 8)), 3, 2).astype(np.float32) for _ in range(2))
    kv = toys.cache(k, v)
    received = np.tile([9.0, 2.0, 1.0], 6)[None, None] * np.ones((1, 2, 1))
    seen = Evidence(rows=jnp.asarray(received[:, :, None], jnp.float32), received=jnp.asarray(received, jnp.float32))
    kv = kv._replace(seen=jnp.array([9999]))
    method = EMS(capacity=6, window=1, merge=2.0, tau=0.99)
    out, counted = (toys.run(dataclasses.replace(method, count=count), kv, seen) for count in (False, True))
    assert out.pos[0].tolist() == [list(range(0, 18, 3))] * 2
    np.testing.assert_allclose(out.k, k[:, :, ::3], rtol=1e-6)
    np.testing.assert_allclose(out.v, v[:, :, ::3], rtol=1e-6)
    np.testing.assert_array_equal(counted.k, out.k)
    np.testing.assert_allclose(counted.bias, np.log(3.0), rtol=1e-6)
    assert not np.asarray(out.bias).any()


def test_weights_of_a_class_sum_to_one():
    q, kv = toys.problem(6)
    method = EMS(capacity=6, window=4, tau=0.0, merge=2.0)
    plan = jax.jit(lambda kv, seen: method.plan({}, kv, seen))(kv, toys.look(q, kv, 4))
    w = np.asarray(dense(plan).w)
    np.testing.assert_allclose(w.sum(-1), 1.0, rtol=1e-6)
    assert (w > 0).sum(-1).max() > 1 and ((w > 0).sum(-2) <= 1).all()
    assert (np.asarray(plan.assign) < 0).any(), "nothing fell to the zero class: a weak case"


def test_permuting_the_heads_permutes_the_result():
    q, kv = toys.problem(7)
    method, evidence = EMS(capacity=6, window=4, tau=0.1), toys.look(q, kv, 4)
    swap = kv._replace(k=kv.k[:, ::-1], v=kv.v[:, ::-1])
    query = np.array([2, 3, 0, 1])
    other = Evidence(rows=evidence.rows[:, query], received=evidence.received[:, query])
    a, b = toys.run(method, kv, evidence), toys.run(method, swap, other)
    for name in ("k", "v", "pos", "bias"):
        np.testing.assert_array_equal(np.asarray(getattr(a, name))[:, ::-1], getattr(b, name))


def test_how_many_see_a_key_is_divided_out():
    """Queries that look alike at all they see: the first key's column sum is 90 times that of the last, its score not four times."""
    q, kv = toys.problem(8)
    evidence = toys.look(np.zeros_like(q), kv, 4)
    score = np.asarray(toys.scorer(EMS(capacity=6, window=4))(kv, evidence))[0, 0]
    sums = np.asarray(evidence.received)[0, 0]
    assert sums[0] > 90 * sums[-1] and score.max() < 4 * score.min()
    np.testing.assert_allclose(score, score_of(np.zeros_like(q), kv, 4, "max")[0, 0], rtol=1e-5)


def test_what_it_says_of_itself():
    for match, options in {
        "window must be >= 1": dict(window=0),
        "merge must be from 0.0 to 64.0": dict(merge=-0.5),
        "tau must be from -1.0 to 2.0": dict(tau=3.0),
        "combine must be one of max, sum": dict(combine="mean"),
        "capacity=4 has no room for the 5": dict(protect=Protect(recent=5)),
    }.items():
        with pytest.raises(ValueError, match=match):
            EMS(capacity=4, **options)
    with pytest.raises(ValueError, match="ems changes what stays and h2o takes a plan"):
        Recipe(cache=EMS(capacity=9), policy=H2O(capacity=9)).validate(CFG)
    Recipe(cache=EMS(capacity=9, count=True), policy=H2O(capacity=9)).validate(CFG)
    assert KeyRerotation(base=EMS(capacity=9)).edits
    with pytest.raises(ValueError, match="ems changes what it keeps; put merging inside"):
        Merging(base=EMS(capacity=9))
    _, kv = toys.problem()
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        EMS(capacity=8).plan({}, kv, Evidence())
    assert EMS(capacity=24).compress({}, kv, Evidence())[0] is kv
