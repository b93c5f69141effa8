"""Head groups, frozen slots, probing: what one layer's caches can be besides one array a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import CacheCompressor, CachePolicy
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import KV, Frozen, Needs
from jaxtok.methods import H2O, Quest, SnapKV, StreamingLLM
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, LIVE, near, tokens_of, world

STEPS = 5


def run(recipe, cut=lambda layers: layers):
    """(prompt logits, logits of forced steps, final layers)."""
    params, ids, force = world()

    def go(tokens, force):
        tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=STEPS)

        def one(layers, i):
            x, layers = decoder.step(
                CFG, params, decoder.blocks.embed(CFG, params, i[:, None]), jnp.ones(i.shape, bool)[:, None], layers, recipe
            )
            return layers, decoder.logits(CFG, params, x)[:, 0]

        first = decoder.logits(CFG, params, tokens.x[:, -1:])
        layers, out = jax.lax.scan(one, cut(layers), force[:, :STEPS].T)
        return first, out, layers

    return jax.jit(go)(tokens_of(params, ids), force)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstWhole(CachePolicy):
    """Group 0 keeps everything, group 1 the last tokens."""

    capacity: int
    groups = 2
    name = "first_whole"

    def head_group(self, j):
        return None if j == 0 else StreamingLLM(capacity=self.capacity, sinks=1, compact=False)


@pytest.fixture(scope="module")
def plain():
    return run(Recipe())


def test_head_groups_change_nothing_by_themselves(plain):
    for heads in (((1, 1), (1, 1)), ((2, 0), (0, 2))):
        out = run(Recipe(heads=heads))
        assert [[part.kv.k.shape[1] for part in layer] for layer in out[2]] == [list(sizes) for sizes in heads]
        near(out[0], plain[0], 1e-5, "first logits")
        near(out[1], plain[1], 2e-5, "logits of steps")


def test_each_group_has_slots_of_its_own(plain):
    out = run(Recipe(heads=((1, 1), (2, 0)), policy=FirstWhole(capacity=4)))
    n = LIVE.shape[1]
    assert [[part.kv.k.shape[1:3] for part in layer] for layer in out[2]] == [[(1, n + STEPS), (1, 5)], [(2, n + STEPS), (0, n)]]
    seen = LIVE.sum(1) + STEPS
    for kv in (part.kv for layer in out[2] for part in layer):
        assert kv.seen.tolist() == seen.tolist()
    recent = np.asarray(out[2][0][1].kv.pos[0, 0])
    assert sorted(recent[recent >= 0].tolist()) == [0, *range(seen[0] - 3, seen[0])]
    assert np.abs(out[1] - plain[1]).max() > 1e-3, "the streaming head forgot nothing"


def test_a_policy_in_every_group_is_the_policy(plain):
    policy = H2O(capacity=6)
    one, two = run(Recipe(policy=policy)), run(Recipe(policy=policy, heads=((1, 1), (1, 1))))
    near(one[1], two[1], 2e-5, "logits")


def test_compressor_by_group():
    method = SnapKV(capacity=6, window=2, pool=3)
    one, two = run(Recipe(cache=method)), run(Recipe(cache=method, heads=((1, 1), (1, 1))))
    near(one[1], two[1], 2e-5, "logits")


def test_refused():
    for recipe, match in {
        Recipe(heads=((1, 1),)): "groups for 1 layers; the model has 2",
        Recipe(heads=((1, 2), (1, 1))): r"heads\[0\] = \(1, 2\): the groups of each layer",
        Recipe(policy=FirstWhole(capacity=4)): "first_whole tells 2 head groups apart; Recipe.heads says 1",
        Recipe(heads=((1, 1), (1, 1)), reader=Quest(pages=4)): "quest reads caches of one head group",
    }.items():
        with pytest.raises(ValueError, match=match):
            recipe.validate(CFG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeOld(CacheCompressor):
    """All but the last slots are frozen, with their channels in another order."""

    capacity: int = 99
    last: int = 3
    name = "freeze_old"

    def freeze(self, params, kv: KV, evidence):
        n, d = kv.k.shape[2:]
        part = lambda a, b: kv._replace(k=kv.k[:, :, a:b], v=kv.v[:, :, a:b], pos=kv.pos[:, :, a:b], bias=kv.bias[:, :, a:b])
        old, rest = part(0, n - self.last), part(n - self.last, n)
        channels = jnp.broadcast_to(jnp.arange(d - 1, -1, -1, dtype=jnp.int32), (*kv.k.shape[:2], d))
        old = old._replace(k=jnp.take_along_axis(old.k, channels[:, :, None], 3))
        return rest._replace(cursor=jnp.full((), self.last, jnp.int32)), Frozen(old, channels)


def test_frozen_slots_are_read(plain):
    out = run(Recipe(cache=FreezeOld()))
    assert out[2][0][0].kv.k.shape[2] == 3 + STEPS and out[2][0][0].frozen.kv.k.shape[2] == LIVE.shape[1] - 3
    near(out[0], plain[0], 1e-5, "first logits")
    near(out[1], plain[1], 2e-5, "logits of steps")


def test_frozen_channels_can_be_left_out(plain):
    def thin(layers):
        drop = lambda f: Frozen(f.kv._replace(k=f.kv.k[..., :-2]), f.channels[..., :-2])
        return tuple((parts[0]._replace(frozen=drop(parts[0].frozen)),) for parts in layers)

    zero = lambda layers: tuple(
        (parts[0]._replace(frozen=parts[0].frozen._replace(kv=parts[0].frozen.kv._replace(k=parts[0].frozen.kv.k.at[..., -2:].set(0)))),)
        for parts in layers
    )
    a, b = run(Recipe(cache=FreezeOld()), thin), run(Recipe(cache=FreezeOld()), zero)
    near(a[1], b[1], 2e-5, "gathered channels against channels of zero")


def test_one_frozen_copy_serves_the_batch():
    params, ids, force = world()
    same = jnp.repeat(ids[:1], ids.shape[0], 0)

    def go(share):
        tokens, layers = decoder.prefill(CFG, params, tokens_of(params, same, np.ones(same.shape, bool)), Recipe(cache=FreezeOld()), new=2)
        if share:
            first = lambda kv: kv._replace(**{name: getattr(kv, name)[:1] for name in ("k", "v", "pos", "bias", "seen", "delta", "lost")})
            layers = tuple((p[0]._replace(frozen=Frozen(first(p[0].frozen.kv), p[0].frozen.channels)),) for p in layers)
        x = decoder.blocks.embed(CFG, params, force[:, :2])
        return decoder.logits(CFG, params, decoder.step(CFG, params, x, jnp.ones(x.shape[:2], bool), layers)[0])

    near(go(False), go(True), 2e-5, "one copy against one each")


def test_probing_is_the_evidence_of_a_longer_prompt():
    """What further rows make of a cache is what the joint pass says about the first rows; compressing on it is the query-aware choice."""
    params, ids, force = world()
    extra, needs = force[:, :3], Needs(rows=3, received=True, peak=True)
    n = ids.shape[1]
    both = jnp.concatenate([ids, extra], 1)
    live = np.concatenate([LIVE, np.ones(extra.shape, bool)], 1)

    @jax.jit
    def look():
        _, layers = decoder.prefill(CFG, params, tokens_of(params, ids), new=0)
        after = decoder.embed(CFG, params, extra)
        seen = decoder.probe(CFG, params, after, layers, needs)
        small = decoder.compress(CFG, params, layers, seen, Recipe(cache=SnapKV(capacity=5, window=3, pool=1)), new=2)
        return seen, layers, small

    @jax.jit
    def joint(live):
        tokens = decoder.embed(CFG, params, both, live)
        found = []
        for i, p in enumerate(params["layers"]):
            tokens, each = decoder.cached.attend_rows(CFG, p, i, tokens, None, Recipe(), needs, False, None, "auto")
            found.append(each[0])
        return found

    seen, layers, small = look()
    # joint: dead rows first, so slots of the prompt are the same
    for (kv, whole), (got,), (part,), (before,) in zip(joint(live), seen, small, layers, strict=True):
        np.testing.assert_array_equal(kv.pos[:, :, :n], before.kv.pos)
        near(got.rows, whole.rows[..., :n], 2e-6, "rows")
        assert got.received.shape[-1] == got.peak.shape[-1] == n
        near(got.peak, np.asarray(whole.rows).max(2)[..., :n], 2e-6, "peak")
        near(got.received, np.asarray(whole.rows).sum(2)[..., :n], 2e-6, "received")
        assert part.kv.k.shape[2] == 5 + 2 and part.kv.seen.tolist() == before.kv.seen.tolist()
