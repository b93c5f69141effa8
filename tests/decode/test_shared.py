"""Shared prefixes: the planner against brute force, and rows behind one copy against prompts by themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate, prefill, prefill_shared, prefix_groups
from jaxtok.methods import H2O, KeyDiff, SnapKV, ThinK
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, near, world

# --- the planner --------------------------------------------------------------------------------------------------------


def brute_force(prompts):
    """The most tokens saved by any choice of prefixes of which none begins another; a prompt keeps its last token."""
    nodes = {p[:i] for p in prompts for i in range(1, len(p))}
    leaves = {node: [i for i, p in enumerate(prompts) if len(p) > len(node) and p[: len(node)] == node] for node in nodes}
    worth = [n for n in nodes if len(leaves[n]) > 1]
    best = 0
    for size in range(len(worth) + 1):
        for some in itertools.combinations(worth, size):
            used = [i for n in some for i in leaves[n]]
            if len(used) == len(set(used)):
                best = max(best, sum((len(leaves[n]) - 1) * len(n) for n in some))
    return best


def check(prompts, found, new=None):
    assert sorted(found.order.tolist()) == list(range(len(prompts)))  # a permutation
    numbers = found.group[found.order]
    assert (np.diff(numbers) >= 0).all() and numbers[0] == 0 and numbers[-1] == len(found.length) - 1  # groups stand together
    saved, ratios = 0, []
    for number, length in enumerate(found.length.tolist()):
        mine = [prompts[i] for i in np.flatnonzero(found.group == number)]
        assert len({tuple(p[:length]) for p in mine}) == 1 and all(len(p) > length for p in mine)
        assert length > 0 or len(mine) == 1
        saved += (len(mine) - 1) * length
        made = [1 if new is None else new[i] for i in np.flatnonzero(found.group == number)]
        ratios.append(sum(made) / (length + sum(len(p) - length for p in mine)))
    assert saved == found.saved and (np.diff(ratios) <= 1e-12).all()


def test_planner_by_hand():
    """Four that share three tokens, two of which share six: 3 * 3 > 1 * 6; with longer deep prefixes the two go by themselves."""
    head = [1, 2, 3]
    prompts = [[*head, 4, 4, 4, 9], [*head, 5], [7, 7], [*head, 4, 4, 4, 8], [*head, 6, 6]]
    found = prefix_groups(prompts)
    check(prompts, found)
    assert found.saved == 9 and found.group[[0, 1, 3, 4]].tolist() == [found.group[0]] * 4
    deep = [[*head, *[4] * 9, 9], [*head, 5], [*head, *[4] * 9, 8]]
    found = prefix_groups(deep)
    check(deep, found)
    assert found.saved == 12 and found.group[0] == found.group[2] != found.group[1] and found.length[found.group[1]] == 0
    assert prefix_groups([[1], [1]]).saved == 0  # the last token is a prompt's own
    assert prefix_groups([[1, 2, 3], [1, 2, 4]], least=3).saved == 0
    first = prefix_groups([[1, 2, 3, 4], [5, 6]], new=[1, 8])
    assert first.order.tolist() == [1, 0]  # more to generate for what there is to read
    for wrong, message in (([], "there must be a prompt"), ([[1], []], "at least one token")):
        with pytest.raises(ValueError, match=message):
            prefix_groups(wrong)
    with pytest.raises(ValueError, match="new has 1 entries for 2 prompts"):
        prefix_groups([[1], [2]], new=[1])


def test_planner_against_brute_force():
    """The card: no single-level choice saves more, on random small trees of up to eight prompts."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        prompts = [tuple(rng.integers(0, 2, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 9))]
        new = rng.integers(1, 9, len(prompts)).tolist()
        found = prefix_groups(prompts, new=new)
        check(prompts, found, new)
        nodes = {p[:i] for p in prompts for i in range(1, len(p))}
        if len([n for n in nodes if sum(p[: len(n)] == n and len(p) > len(n) for p in prompts) > 1]) <= 10:
            assert found.saved == brute_force(prompts), prompts


def test_planner_on_many():
    """A thousand prompts that begin with one of ten prefixes of 200 tokens."""
    rng = np.random.default_rng(1)
    heads = rng.integers(0, 9, (10, 200)).tolist()
    prompts = [[*heads[i % 10], *rng.integers(0, 9, 5).tolist()] for i in range(1000)]
    found = prefix_groups(prompts)
    assert found.saved >= 10 * 99 * 200 and len(found.length) == 10 and (found.length >= 200).all()


# --- one copy -----------------------------------------------------------------------------------------------------------

P, N, NEW = 9, 6, 5
LENGTHS = np.array([6, 3, 1])


@pytest.fixture(scope="module")
def batch():
    params, _, _ = world()
    prefix = jax.random.randint(jax.random.key(5), (1, P), 0, CFG.vocab)
    ids = jax.random.randint(jax.random.key(6), (3, N), 0, CFG.vocab)
    return params, prefix, ids, jnp.arange(N)[None] >= N - jnp.asarray(LENGTHS)[:, None]


def whole(prefix, ids, live):
    """The prompts by themselves."""
    return jnp.concatenate([jnp.broadcast_to(prefix, (3, P)), ids], 1), jnp.concatenate([jnp.ones((3, P), bool), live], 1)


def continued(params, tokens, layers):
    out = generate(CFG, params, tokens, layers, new=NEW, eos=())
    return out.ids, decoder.logits(CFG, params, tokens.x[:, -1:]), out.layers


@pytest.mark.parametrize("padded", [0, 4])
def test_one_copy_is_each_by_itself(batch, padded):
    """Prefill of prefix and suffixes and decoding after it equal the plain model; padding of the prefix is no token."""
    params, prefix, ids, live = batch

    def shared(params):
        there = jnp.arange(P + padded)[None] >= padded
        text = jnp.pad(prefix, ((0, 0), (padded, 0)))
        return continued(params, *prefill_shared(CFG, params, text, ids, live, new=NEW, prefix_live=there))

    plain = lambda params: continued(params, *prefill(CFG, params, *whole(prefix, ids, live), Recipe(), new=NEW))
    (a, x, layers), (b, y, _) = jax.jit(shared)(params), jax.jit(plain)(params)
    np.testing.assert_array_equal(a, b)
    near(x, y, 2e-5, "logits")
    for (part,) in layers:
        assert part.frozen.kv.k.shape[0] == 1 and part.frozen.kv.k.shape[2] == P + padded  # one copy
        assert part.kv.k.shape[2] == N + NEW and part.kv.seen.tolist() == (P + LENGTHS + NEW - 1).tolist()
        assert not part.kv.lost.any()


def test_an_empty_prefix_is_plain(batch):
    params, prefix, ids, live = batch
    nothing = jnp.zeros((1, P), bool)
    run = lambda params: continued(params, *prefill_shared(CFG, params, prefix, ids, live, new=NEW, prefix_live=nothing))[:2]
    plain = lambda params: continued(params, *prefill(CFG, params, ids, live, Recipe(), new=NEW))[:2]
    (a, x), (b, y) = jax.jit(run)(params), jax.jit(plain)(params)
    np.testing.assert_array_equal(a, b)
    near(x, y, 2e-5, "logits")


def test_a_compressed_prefix(batch):
    """KeyDiff on the prefix, then the rows: as the prefix compressed in a batch of copies, and the rows after it."""
    params, prefix, ids, live = batch
    recipe = Recipe(cache=KeyDiff(capacity=4))
    shared = lambda params: continued(params, *prefill_shared(CFG, params, prefix, ids, live, recipe, new=NEW))[:2]

    def copies(params):
        tokens = decoder.embed(CFG, params, jnp.broadcast_to(prefix, (3, P)))
        _, layers = decoder.prefill(CFG, params, tokens, recipe, new=0)
        return continued(params, *decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=NEW, layers=layers))[:2]

    (a, x), (b, y) = jax.jit(shared)(params), jax.jit(copies)(params)
    np.testing.assert_array_equal(a, b)
    near(x, y, 2e-5, "logits")


def test_refused(batch):
    params, prefix, ids, live = batch
    for recipe, message in (
        (Recipe(cache=SnapKV(capacity=6, window=2)), "snapkv looks at queries"),
        (Recipe(policy=H2O(capacity=9)), "a method at site cache, or none, and nothing else"),
        (Recipe(cache=ThinK(ratio=0.5, window=2, recent=2)), "think"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda recipe=recipe: prefill_shared(CFG, params, prefix, ids, live, recipe, new=1))
    with pytest.raises(ValueError, match=r"prefix is \[2, 9\]; it must be \[1 p\]"):
        prefill_shared(CFG, params, jnp.zeros((2, P), jnp.int32), ids, live, new=1)
