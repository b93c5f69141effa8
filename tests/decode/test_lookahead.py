"""The look-ahead: evidence of the joint pass, the limit of a perfect draft, full budget, positions; what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.decode import generate, prefill, prefill_lookahead
from jaxtok.decode.lookahead import look_ahead
from jaxtok.methods import H2O, AdaKV, SnapKV, SpecKV
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, N, near, world

DRAFT = dataclasses.replace(CFG, layers=1)
LOOK = 3


@pytest.fixture(scope="module")
def models():
    params, ids, _ = world()
    return params, blocks.init(DRAFT, jax.random.key(5), jnp.float32, embed_std=1.0), ids, jnp.asarray(LIVE)


def run(models, cache, draft, look=LOOK, new=4, keep=None):
    params, _, ids, live = models
    return jax.jit(lambda keep: prefill_lookahead(CFG, params, ids, live, Recipe(cache=cache), draft, look=look, new=new, keep=keep))(keep)


def test_keeps_what_the_draft_looks_at(models):
    """Rows of a pass over prompt and draft together; the draft and the last token are not in what is compressed, the last token is there."""
    params, small, ids, live = models
    window, capacity = 2, 5
    out = run(models, SpecKV(capacity=capacity, window=window, look=LOOK, pool=1), (DRAFT, small))
    for b in range(len(LENGTHS)):
        length = int(LENGTHS[b])
        text = [*np.asarray(ids)[b, N - length :].tolist(), *np.asarray(out.draft)[b].tolist()]
        assert min(text) >= 0
        tokens = decoder.embed(CFG, params, jnp.asarray([text], jnp.int32))
        for i, p in enumerate(params["layers"]):
            rows_needed = min(window + LOOK + 1, len(text))
            tokens, ((_, seen),) = decoder.cached.attend_rows(
                CFG, p, i, tokens, None, Recipe(), Needs(rows=rows_needed), False, None, "auto"
            )
            for g in range(CFG.kv_heads):
                score = np.asarray(seen.rows)[0, 2 * g : 2 * g + 2].max((0, 1))
                safe = set(range(max(length - 1 - window, 0), length - 1))
                best = sorted(range(max(length - 1 - window, 0)), key=lambda j: -score[j])[: max(min(capacity, length - 1) - len(safe), 0)]
                kept = {int(x) for x in out.layers[i][0].kv.pos[b, g] if x >= 0}
                assert kept == safe | set(best) | {length - 1}, (b, i, g)


def test_crop_and_positions(models):
    """The card's check: C slots of the prompt, of which the last is token n - 2; then the last prompt token and room for what follows."""
    out = run(models, SpecKV(capacity=5, window=2, look=LOOK), (DRAFT, models[1]))
    for (part,) in out.layers:
        assert part.kv.k.shape[2] == 5 + 1 + 4 and part.kv.seen.tolist() == LENGTHS.tolist() and int(part.kv.cursor) == 6
        pos = np.asarray(part.kv.pos)
        assert ((pos[:, :, :5] >= 0).sum(-1) == np.minimum(5, LENGTHS - 1)[:, None]).all() and not part.kv.lost.any()
        assert (pos[:, :, 4] == LENGTHS[:, None] - 2).all() and (pos[:, :, 5] == LENGTHS[:, None] - 1).all()


def test_a_draft_that_is_the_target_sees_the_true_continuation(models):
    params, _, ids, live = models
    out = run(models, SpecKV(capacity=6, window=2, look=LOOK), (CFG, params))
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=LOOK)
    np.testing.assert_array_equal(out.draft, generate(CFG, params, tokens, layers, new=LOOK).ids)


def test_full_budget_is_the_plain_model(models):
    params, small, ids, live = models
    out = run(models, SpecKV(capacity=N, window=2, look=LOOK), (DRAFT, small))
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=4)
    near(out.tokens.x[:, -1], tokens.x[:, -1], 1e-5, "the last row")
    mine, plain = generate(CFG, params, out.tokens, out.layers, new=4, eos=()), generate(CFG, params, tokens, layers, new=4, eos=())
    np.testing.assert_array_equal(mine.ids, plain.ids)


def test_without_a_look_it_is_snapkv(models):
    """look=0, mean, no pooling: SnapKV of a window and a capacity one larger, slot for slot."""
    params, small, ids, live = models
    out = run(models, SpecKV(capacity=5, window=2, look=0, pool=1, over="mean"), (DRAFT, small), look=0)
    recipe = Recipe(cache=SnapKV(capacity=6, window=3, pool=1))
    _, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=4)
    assert out.draft.shape == (4, 0)
    np.testing.assert_array_equal(out.layers[0][0].kv.pos, layers[0][0].kv.pos)
    live = np.asarray(layers[0][0].kv.pos)[..., None] >= 0
    near(np.where(live, out.layers[0][0].kv.k, 0), np.where(live, layers[0][0].kv.k, 0), 1e-5, "keys of the first layer")


def test_a_short_draft_looks_at_nothing(models):
    """A draft that ends at once leaves only the prompt's own queries."""
    params, small, ids, live = models
    first = look_ahead(DRAFT, small, ids, live, look=1)
    ends = dataclasses.replace(DRAFT, eos=tuple(sorted({int(x) for x in first[:, 0]})))
    assert (np.asarray(look_ahead(ends, small, ids, live, look=LOOK))[:, 1:] == -1).all()
    one, three = (run(models, SpecKV(capacity=5, window=2, look=look, pool=1), (ends, small), look=look) for look in (1, LOOK))
    for (a,), (b,) in zip(one.layers, three.layers, strict=True):
        np.testing.assert_array_equal(a.kv.pos, b.kv.pos)


def test_the_one_entry(models):
    """`prefill` runs the look-ahead that the recipe asks for, another prefill where it asks for none, and asks for a draft."""
    params, small, ids, live = models
    recipe = Recipe(cache=SpecKV(capacity=5, window=2, look=LOOK))
    want = run(models, recipe.cache, (DRAFT, small))
    tokens, layers = jax.jit(lambda: prefill(CFG, params, ids, live, recipe, new=4, draft=(DRAFT, small)))()
    near(tokens.x[:, -1], want.tokens.x[:, -1], 1e-5, "the last row")
    for (a,), (b,) in zip(layers, want.layers, strict=True):
        np.testing.assert_array_equal(a.kv.pos, b.kv.pos)
    assert Recipe(cache=AdaKV(base=recipe.cache)).look == LOOK and Recipe(cache=SnapKV(capacity=6, window=2)).look is None
    plain = jax.jit(lambda: prefill(CFG, params, ids, live, Recipe(), new=4)[0].x)()
    alone = jax.jit(lambda: decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=4)[0].x)()
    near(plain, alone, 1e-6, "the plain prefill")
    with pytest.raises(ValueError, match=r"speckv needs a draft model with the same token ids; give draft=\(cfg, params\)"):
        prefill(CFG, params, ids, live, recipe, new=4)
    with pytest.raises(ValueError, match="the draft has 9 token ids and the model 32"):
        prefill(CFG, params, ids, live, recipe, new=4, draft=(dataclasses.replace(DRAFT, vocab=9), small))


def test_a_continuation_that_is_known(models):
    """Given the draft's own tokens, nothing changes; given others, what they look at is kept. Their shape is checked."""
    params, small, ids, live = models
    cache = SpecKV(capacity=5, window=2, look=LOOK, pool=1)
    want = run(models, cache, (DRAFT, small))
    recipe, options = Recipe(cache=cache), dict(look=LOOK, new=4)
    given = jax.jit(lambda ahead: prefill_lookahead(CFG, params, ids, live, recipe, (DRAFT, small), ahead=ahead, **options).layers)
    same, other = given(want.draft), given((want.draft + 7) % CFG.vocab)
    sets = lambda layers: np.concatenate([np.asarray(part.kv.pos) for (part,) in layers])
    np.testing.assert_array_equal(sets(same), sets(want.layers))
    assert (sets(other) != sets(same)).any()
    with pytest.raises(ValueError, match=r"ahead is \[4, 2\] for 4 prompts and a look of 3"):
        given(want.draft[:, :2])


def test_traced_budgets_and_wrappers(models):
    keep = {"cache": jnp.array([5, 4, 3, 2], jnp.int32)}
    cache = SpecKV(capacity=6, window=2, look=LOOK)
    out = run(models, cache, (DRAFT, models[1]), keep=keep)
    assert (np.asarray(out.layers[0][0].kv.pos >= 0).sum(-1) == np.minimum([5, 4, 3, 2], LENGTHS - 1)[:, None] + 1).all()
    ada = jax.eval_shape(lambda: run(models, AdaKV(base=cache), (DRAFT, models[1])))
    assert ada.layers[0][0].kv.k.shape[2] == 9 + 1 + 4


def test_refused(models):
    params, small, ids, live = models
    other = dataclasses.replace(DRAFT, vocab=9)
    for match, recipe, draft, look in (
        ("takes a recipe with a method at site cache", Recipe(), (DRAFT, small), 2),
        ("no pruning, step policy", Recipe(cache=SpecKV(capacity=6, window=2), policy=H2O(capacity=9)), (DRAFT, small), 2),
        ("the draft has 9 token ids and the model 32", Recipe(cache=SpecKV(capacity=6, window=2)), (other, small), 2),
        ("more than 34 of them", Recipe(cache=SnapKV(capacity=6, window=2)), (DRAFT, small), 33),
    ):
        with pytest.raises(ValueError, match=match):
            prefill_lookahead(CFG, params, ids, live, recipe, draft, look=look, new=1)
