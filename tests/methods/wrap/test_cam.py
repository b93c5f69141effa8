"""CaM: shares by hand, a plain-Python reference of the mean draw, coins that fall as often as they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.core.vacate import vacate
from jaxtok.methods import H2O, TOVA, CaM, CaMPolicy, Decoding, KeyRerotation, SnapKV, StreamingLLM
from jaxtok.testing.world import CFG
from tests.methods import toys
from tests.methods.wrap.given import Given, cache, kept, run

small = {
    "cam.policy": lambda capacity: CaMPolicy(base=H2O(capacity=capacity), window=2),
    "cam.policy:mean": lambda capacity: CaMPolicy(base=StreamingLLM(capacity=capacity, sinks=1), sample=False),
    "cam": lambda capacity: CaM(base=SnapKV(capacity=capacity, window=2, pool=3), window=2),
    "cam-mean": lambda capacity: CaM(base=SnapKV(capacity=capacity, window=2, pool=3), sample=False),
}


class ByKey(Given):
    """The score of a slot is the first channel of its key."""

    def score(self, params, kv, evidence):
        return kv.k[..., 0]


def received(a) -> Evidence:
    return Evidence(received=jnp.asarray(a, jnp.float32))


def reference(kv, a, stay, window):
    """{(sequence, head, position): value} with every chance itself as its coin; a [b h n]."""
    v, pos = np.asarray(kv.v, np.float64), np.asarray(kv.pos)
    out = {}
    for b, row in enumerate(stay):
        for g, keep in enumerate(row):
            slot = {int(p): j for j, p in enumerate(pos[b, g]) if p >= 0}
            group = a.shape[1] // len(row)
            mean = a[b, g * group : (g + 1) * group].mean(0)
            value = {q: v[b, g, slot[q]].copy() for q in keep}
            for p in set(slot) - set(keep):
                targets = [q for q in sorted(keep) if q > p][:window]
                if targets:
                    level = np.mean([mean[slot[q]] for q in targets])
                    for q in targets:
                        value[q] += min(1.0, mean[slot[p]] / level) * v[b, g, slot[p]] / len(targets)
            out |= {(b, g, q): x for q, x in value.items()}
    return out


def test_by_hand():
    """Attention 1 4 2 2 8: the first token goes to the next two kept with chance 1 / 3, the third to the last with 1 / 4."""
    kv = cache([[[0.0] * 5]])
    kv = kv._replace(k=jnp.asarray([0.0, 1, 0, 1, 1])[None, None, :, None] * jnp.ones((1, 1, 1, 4)))
    v = jnp.asarray(np.array([[12.0], [1], [8], [2], [3]]) * np.ones((1, 4)), jnp.float32)[None, None]
    seen = received([[[1.0, 4, 2, 2, 8]]])
    (out,) = run((CaM(base=ByKey(capacity=3), window=2, sample=False), kv._replace(v=v), None, seen))
    # tokens 1, 3, 4 stay; token 0: level (4 + 2) / 2 = 3; token 2: targets 3 and 4, level 5, chance 2 / 5
    np.testing.assert_allclose(out.v[0, 0, :, 0], [1 + 2, 2 + 2 + 1.6, 3 + 1.6], rtol=1e-6)
    assert kept(out) == [[[1, 3, 4]]]


@pytest.mark.parametrize("window", [1, 3, 40])
def test_against_the_reference(window):
    rng = np.random.default_rng(1)
    kv, a = cache(rng.normal(size=(3, 2, 15)), [15, 8, 2]), rng.random((3, 4, 15))
    method = CaM(base=Given(capacity=5), window=window, sample=False)
    out, alone = run((method, kv, None, received(a)), (method.base, kv))
    want = reference(kv, np.float32(a), kept(alone), window)
    assert kept(out) == kept(alone)
    for (b, g, j), p in np.ndenumerate(np.asarray(out.pos)):
        if p >= 0:
            np.testing.assert_allclose(out.v[b, g, j], want[b, g, int(p)], rtol=2e-5, atol=1e-5)


def test_coins():
    """Averaged over draws the values are those of the mean; each draw adds a share or nothing; the draw is the position's."""
    rng = np.random.default_rng(2)
    kv, seen = cache(rng.normal(size=(1, 2, 12))), received(rng.random((1, 2, 12)))
    coin, mean = CaM(base=Given(capacity=4), window=2), CaM(base=Given(capacity=4), window=2, sample=False)
    draw = jax.jit(jax.vmap(lambda key: coin.compress({}, kv, seen._replace(key=key))[0].v))
    values = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    (want,) = run((mean, kv, None, seen))
    np.testing.assert_allclose(values.mean(0), want.v, atol=0.06)
    assert values.std(0).max() > 0.1
    again = functools.partial(run, (coin, kv, None, seen))
    np.testing.assert_array_equal(again()[0].v, again()[0].v)


def test_certain_and_impossible():
    """More attention than its targets have: always; none at all, or nobody behind: never."""
    kv = cache([[[-1.0, 5.0, -1.0, 4.0, -1.0]]])
    out, none, alone = run(
        (CaM(base=Given(capacity=2), window=1), kv, None, received([[[9.0, 1, 9, 1, 9]]])),
        (CaM(base=Given(capacity=2), window=1), kv, None, received([[[0.0, 1, 0, 1, 9]]])),
        (Given(capacity=2), kv),
    )
    np.testing.assert_allclose(out.v[0, 0], kv.v[0, 0, [1, 3]] + kv.v[0, 0, [0, 2]], rtol=1e-6)
    np.testing.assert_array_equal(none.v, alone.v)


def test_what_it_says_of_itself():
    method = CaM(base=SnapKV(capacity=90, window=9))
    assert method.edits and method.needs.rows == 9 and method.needs.received and method.slots == 90 and method.resize(70).capacity == 70
    with pytest.raises(ValueError, match="window must be >= 1"):
        CaM(base=Given(capacity=4), window=0)
    with pytest.raises(ValueError, match="key_rerotation changes what it keeps"):
        CaM(base=KeyRerotation(base=Given(capacity=4)))
    with pytest.raises(ValueError, match="cam changes what stays and h2o takes a plan"):
        Recipe(cache=method, policy=H2O(capacity=99)).validate(CFG)
    with pytest.raises(ValueError, match=r"evidence\.received is missing"):
        CaM(base=Given(capacity=2)).compress({}, cache(np.ones((1, 1, 5))), Evidence())


# --- while generating ---------------------------------------------------------------------------------------------------


def steps(q, k, v, prefill, window, stays):
    """One sequence in numpy, float64, all chances their own coins: (live positions, {(KV head, position): value}, outputs [h d]) after
    the prefill and after each step. `stays(e, live, A)`: which of the live tokens of KV head e stay, capacity of them."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (h, n, d), g = q.shape, k.shape[0]
    values, total = {(e, j): v[e, j].copy() for e in range(g) for j in range(n)}, np.zeros((g, n))
    live = [list(range(prefill)) for _ in range(g)]

    def attend(i, e):
        out = np.zeros((h // g, d))
        for x in range(h // g):
            at = [j for j in live[e] if j <= i]
            a = np.exp(k[e][at] @ q[e * h // g + x, i] / d**0.5)
            total[e, at] += a / a.sum() / (h // g)
            out[x] = a / a.sum() @ np.array([values[e, j] for j in at])
        return out

    def shrink(e):
        stay = stays(e, live[e], total[e])
        before = {(e, j): values[e, j].copy() for j in live[e]}
        for j in sorted(set(live[e]) - set(stay)):
            targets = [i for i in sorted(stay) if i > j][:window]
            if targets:
                level = np.mean([total[e, i] for i in targets])
                for i in targets:
                    values[e, i] += min(1.0, total[e, j] / level) * before[e, j] / len(targets)
        live[e] = sorted(stay)

    for e in range(g):
        for i in range(prefill):
            attend(i, e)
        shrink(e)
    yield [list(x) for x in live], dict(values), None
    for i in range(prefill, n):
        outs = []
        for e in range(g):
            live[e].append(i)
            outs.append(attend(i, e))
            shrink(e)
        yield [list(x) for x in live], {key: x.copy() for key, x in values.items()}, np.concatenate(outs)


def recent(capacity):
    return lambda e, live, total: live[:1] + live[1:][-(capacity - 1) :] if len(live) > capacity else live


def heavy(capacity):
    def stays(e, live, total):
        if len(live) <= capacity:
            return live
        newest = live[-((capacity + 1) // 2) :]
        rest = sorted((j for j in live if j not in newest), key=lambda j: (-total[j], j))
        return sorted([*newest, *rest[: capacity - len(newest)]])

    return stays


@pytest.mark.parametrize("window", [2, 40])
@pytest.mark.parametrize("base, stays", [(StreamingLLM(capacity=6, sinks=1, compact=False), recent(6)), (H2O(capacity=6), heavy(6))])
def test_steps_by_numpy(base, stays, window):
    """Values and outputs of every step: what a step reads are the values that were passed on before it."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.normal(size=(1, e, 24, 8)).astype(np.float32) * 1.5 for e in (4, 2, 2))
    policy = CaMPolicy(base=base, window=window, sample=False)
    want = steps(q[0], k[0], v[0], 9, window, stays)
    plain = [kept(kv) for kv, *_ in toys.drive(base, q, k, v, (9,), 9)]
    for t, (kv, _, out, _) in enumerate(toys.drive(policy, q, k, v, (9,), 9)):
        live, values, outs = next(want)
        assert [sorted(x) for x in kept(kv)[0]] == live and kept(kv) == plain[t], "another choice than the base's"
        for (_, e, j), p in np.ndenumerate(np.asarray(kv.pos)):
            if p >= 0:
                np.testing.assert_allclose(kv.v[0, e, j], values[e, int(p)], rtol=2e-4, atol=1e-4)
        if out is not None:
            np.testing.assert_allclose(out[0, :, 0], outs, atol=2e-4)


def test_a_step_by_hand():
    """Four live slots out of order of age, room for three. Attention so far 2 1 3 5 of positions 2 0 1 3; position 0 goes, its value 8 in
    equal parts to the next two, 1 and 2, with chance 1 / 2.5; with a window of 1 all of it to 1 with chance 1 / 3."""
    pos = jnp.array([[[2, 0, 1, 3]]])
    v = jnp.array([20.0, 8.0, 10.0, 30.0])[None, None, :, None] * jnp.ones((1, 1, 1, 4))
    kv = cache(np.zeros((1, 1, 4)))._replace(pos=pos, v=v, seen=jnp.array([4]))
    kv = kv._replace(cursor=jnp.full((), 4, jnp.int32))
    look = received([[[2.0, 1.0, 3.0, 5.0]]])
    for window, want in ((2, [20 + 1.6, 30, 10 + 1.6]), (1, [20, 30, 10 + 8 / 3])):
        policy = CaMPolicy(base=StreamingLLM(capacity=3, sinks=0), window=window, sample=False)

        def step(kv, policy=policy):
            state = policy.start({}, kv, look)
            return vacate(policy, {}, state, kv, None, look)

        out, state, slot = jax.jit(step)(kv)
        assert slot.tolist() == [[1]] and out.pos[0, 0].tolist() == [2, 3, 1, -1]
        np.testing.assert_allclose(out.v[0, 0, :3, 0], want, rtol=1e-6)
        assert state.slots[1][0, 0].tolist() == [2, 5, 3, 0]


def test_each_step_tosses_one_coin():
    """Averaged over keys a step's values are those of the mean; one toss a victim, by the model's key."""
    pos = jnp.array([[[0, 1, 2, 3]] * 2])
    kv = cache(np.zeros((1, 2, 4)))._replace(pos=pos, seen=jnp.array([4]))
    look = received([[[1.0, 2.0, 3.0, 5.0], [2.0, 2.0, 9.0, 5.0]]])

    def step(policy, key):
        seen = look._replace(key=key)
        return vacate(policy, {}, policy.start({}, kv, seen), kv, None, seen)[0].v

    policy = CaMPolicy(base=StreamingLLM(capacity=3, sinks=0), window=2)
    values = np.asarray(jax.jit(jax.vmap(functools.partial(step, policy)))(jax.random.split(jax.random.key(1), 3000)))
    mean = np.asarray(step(CaMPolicy(base=policy.base, window=2, sample=False), jax.random.key(0)))
    np.testing.assert_allclose(values.mean(0), mean, atol=0.06)
    assert all(len(np.unique(values[:, 0, g, 1, 1])) == 2 for g in range(2))


def test_the_policy_says():
    policy = CaMPolicy(base=TOVA(capacity=9), window=4)
    assert policy.aligned and policy.capacity == policy.slots == 9 and policy.step_needs.rows == 1 and policy.step_needs.received
    assert CaMPolicy(base=StreamingLLM(capacity=9)).raw and policy.layer(0, 2) == policy.head_group(0) == policy
    with pytest.raises(ValueError, match="put cam inside decoding"):
        CaMPolicy(base=Decoding(base=SnapKV(capacity=99)))
    with pytest.raises(ValueError, match="window must be >= 1"):
        CaMPolicy(base=H2O(capacity=4), window=0)
    with pytest.raises(ValueError, match=r"evidence\.received is missing"):
        policy.start({}, cache(np.ones((1, 1, 5))), Evidence(rows=jnp.ones((1, 1, 1, 5))))
