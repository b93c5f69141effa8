"""MustDrop's stages against their formulas, the official outputs and their limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence, Needs
from jaxtok.methods import MustDropLayers, MustDropSelect, MustDropVit
from jaxtok.methods.vision.mustdrop import key_set, mustdrop
from jaxtok.models import blocks, decoder
from jaxtok.testing.rows import AT, TEXT, world
from tests.methods.golden import cases
from tests.methods.vision import numpyllama
from tests.methods.vision.test_fastv import pictured
from tests.methods.vision.toyrows import do, grouped, normal, reduced, rows, unit

small = {
    "mustdrop.select": lambda n: MustDropSelect(),
    "mustdrop.layers": lambda n: MustDropLayers(capacity=n, images=16, total=0.0 if n == 16 else 0.06, peak=1.0, trim=1),
    "mustdrop.layers:top": lambda n: MustDropLayers(capacity=n, images=16, total=0.0),
    "mustdrop.vit": lambda n: MustDropVit(window=2, most=(16 - n) // 3),
    "mustdrop.vit:threshold": lambda n: MustDropVit(window=2, threshold=2.0 if n == 16 else 0.2),
}


@functools.partial(jax.jit, static_argnums=0)
def merged(method, tokens):
    _, plan = method.plan({}, method.start({}, tokens), tokens, Evidence())
    return reduced(plan, tokens)


def reference(x, side, window, chosen, special=1):
    """`chosen`(similarities by window) -> the windows that merge; -> for each row its place in the output."""
    u, members = unit(x), {}
    for j in range(side * side):
        members.setdefault((j // side // window, j % side // window), []).append(special + j)
    members = {w: m for w, m in members.items() if len(m) == window**2}
    like = {w: np.mean([u[i] @ u[j] for i in m for j in m if i != j]) for w, m in members.items()}
    merge = sorted(chosen(like), key=lambda w: -like[w])
    inside = {i: w for w in merge for i in members[w]}
    order = list(range(special)) + merge + [i for i in range(special, len(x)) if i not in inside]
    return np.array([order.index(inside.get(i, i)) for i in range(len(x))])


@pytest.mark.parametrize("side, window", [(6, 3), (6, 2), (7, 3)])
def test_reference(side, window):
    x = 0.7 * normal(1, 2, 1 + side**2, 4) + normal(2, 1, 1, 4)
    size = np.random.default_rng(3).integers(1, 4, x.shape[:2])
    for method, chosen in (
        (MustDropVit(threshold=0.6, window=window), lambda like: [w for w in like if like[w] >= 0.6]),
        (MustDropVit(most=2, window=window), lambda like: sorted(like, key=lambda w: -like[w])[:2]),
    ):
        out = merged(method, rows(x, size=size, grid=(side, side)))
        assert out.x.shape[1] == method.count(1 + side**2, side**2)
        for i in range(2):
            source = reference(x[i], side, window, chosen)
            want, total = grouped(x[i], size[i], source)
            dead = out.x.shape[1] - len(want)
            assert (np.asarray(out.source[i]) - dead == source).all() and (np.asarray(out.pos[i])[:dead] == -1).all()
            np.testing.assert_allclose(out.x[i][dead:], want, atol=1e-5)
            np.testing.assert_allclose(out.size[i][dead:], total)


def test_limits():
    x = normal(4, 1, 17, 3)
    np.testing.assert_array_equal(merged(MustDropVit(threshold=1.5, window=2), rows(x, grid=(4, 4))).x, x)
    out = merged(MustDropVit(threshold=0.9, window=2), rows(np.ones((1, 17, 3)), grid=(4, 4)))
    assert np.asarray(out.size)[0][-5:].tolist() == [1, 4, 4, 4, 4] and (np.asarray(out.pos) >= 0).sum() == 5


def test_official_outputs(data):
    """Merged windows by falling similarity, the rest in raster order; in a batch the official code merges the smallest number of all."""
    for case in cases(data, "mustdrop_vit"):
        x, side, window = case["x_with_cls"], int(case["grid_side"]), int(case["window"])
        number = int(case["n_merged_windows"])
        tokens = rows(x, grid=(side, side))
        threshold = merged(MustDropVit(threshold=float(case["threshold"]), window=window), tokens)
        alike = (np.asarray(threshold.size) == window**2).sum(1)
        assert alike.min() == number
        out = merged(MustDropVit(most=number, window=window), tokens)
        np.testing.assert_allclose(out.x, case["merged_with_cls"], atol=2e-5)
        np.testing.assert_allclose(out.size, case["sizes"][..., 0])
        if (alike == number).all():
            np.testing.assert_allclose(np.asarray(threshold.x)[:, -out.x.shape[1] :], out.x, atol=1e-6)
        if "layer23_cls_attn" in case:
            seen = case["layer23_cls_attn"]
            kept = key_set(jnp.asarray(seen), rows(np.zeros((*seen.shape[::2], 1))), float(case["key_rate"]))
            want = case["key_set_unsorted"]
            for i in range(len(want)):
                found = np.flatnonzero(np.asarray(kept[i]))
                assert set(found - 1) == set(want[i].tolist())  # official indices start behind the class row


def test_key_set():
    seen = normal(5, 2, 3, 37) ** 2
    kept = np.asarray(key_set(jnp.asarray(seen), rows(np.zeros((2, 37, 1)))))
    for i in range(2):
        assert set(np.flatnonzero(kept[i])) == set((1 + np.argsort(-seen[i].mean(0)[1:]))[: math.ceil(0.08 * 36)].tolist())
    assert key_set(jnp.ones((1, 1, 577)), rows(np.zeros((1, 577, 1)))).sum() == 47


def test_bad_input():
    for bad in ({"window": 1}, {"most": -1}):
        with pytest.raises(ValueError):
            MustDropVit(**bad)


# --- between the layers of the decoder -------------------------------------------------------------------------------------


def asked(a, images, text):
    """Evidence of attention a [h t images] of `text` rows behind the images, in a prompt of one row, the images, the text."""
    seen = np.zeros((1, len(a), text, 1 + images + text), np.float32)
    seen[0, :, :, 1 : 1 + images] = a
    return Evidence(rows=jnp.asarray(seen))


def test_a_stage_by_hand():
    """Two questions about four rows, sums .5 .1 .1 .3 of 1: the third is low in all (.1 < .15) and in each (.05 < .08); the second has .09."""
    a = np.array([[[0.3, 0.09, 0.05, 0.1], [0.2, 0.01, 0.05, 0.2]]])
    stay = lambda tokens, **more: (
        do(MustDropLayers(capacity=4, images=4, **more), "plan", {}, Held(), tokens, asked(a, 4, 2))[1].assign[0, 1:5] >= 0
    ).tolist()
    tokens = pictured(7, 4)
    assert stay(tokens, total=0.15, peak=0.08) == [True, True, False, True]
    assert stay(tokens, total=0.15, peak=0.1) == [True, False, False, True]
    assert stay(tokens, total=0.05, peak=0.1) == [True] * 4
    assert stay(tokens, total=0.0, peak=0.0) == [True] * 4
    marked = tokens._replace(score=jnp.zeros((1, 7)).at[0, 2].set(1.0))
    assert stay(marked, total=0.15, peak=0.1) == [True, True, False, True]
    assert stay(marked, total=9.0, peak=9.0) == [False, True, False, False]
    few = do(MustDropLayers(capacity=2, images=4, total=0.0), "plan", {}, Held(), marked, asked(a, 4, 2))[1]
    assert few.index.tolist() == [[0, 1, 2, 5, 6]]  # the key set, then the largest sum


def drops(total, peak):
    def choose(x, image, before, own, keys):
        a = before.mean(0)[np.flatnonzero(image)[-1] + 1 :]
        each = a.sum(0)
        low = image & (each < total * each[image].sum()) & (a.max(0) < peak)
        return x[~low], np.flatnonzero(~low)

    return choose


@functools.partial(jax.jit, static_argnums=0)
def through(recipe, params, tokens):
    return decoder.prefill(TEXT, params, tokens, recipe, new=1)


def test_a_stage_against_the_reference():
    """Grouped key heads, a ragged batch with padding."""
    params, tokens = world("layers")
    for total, peak in ((0.05, 0.04), (0.06, 1.0)):
        method = MustDropLayers(capacity=16, images=16, total=total, peak=peak)
        out, _ = through(Recipe(layers=((AT, method),)), params, tokens)
        for b in range(3):
            want = numpyllama.twice(params, *numpyllama.rows_of(tokens, b), drops(total, peak))
            assert 6 < len(want) < (np.asarray(tokens.pos[b]) >= 0).sum()
            np.testing.assert_allclose(np.asarray(out.x[b])[np.asarray(out.pos[b]) >= 0], want, atol=2e-5)


def test_official_outputs_of_the_decoder(data):
    """Four stages: the rows that stay, the key set among them, and which of each stage's rows the caches hold in the end."""
    for case in cases(data, "mustdrop_llm"):
        n, before, behind = (int(case[name]) for name in ("n_image", "pre", "text_after"))
        method = MustDropLayers(capacity=n, images=n, total=float(case["global_thr"]), peak=float(case["individual_thr"]))
        tokens = pictured(before + n + behind, n, before)
        score = np.zeros((1, before + n + behind), np.float32)
        score[0, before + case["key_set_initial"]] = 1
        tokens, entered = tokens._replace(score=jnp.asarray(score)), []
        for s in range(sum(name.endswith("kept_rel") for name in case)):
            a = case[f"stage{s}_attn_text_to_image"]
            live = np.flatnonzero(np.asarray(tokens.pos[0]) >= 0)
            image = live[before : len(live) - behind]
            seen = np.zeros((1, a.shape[0], behind, tokens.pos.shape[1]), np.float32)
            seen[0][:, :, image] = a
            entered.append(np.asarray(tokens.pos[0])[live])
            _, plan = do(method, "plan", {}, Held(), tokens, Evidence(rows=jnp.asarray(seen)))
            np.testing.assert_array_equal(np.flatnonzero(np.asarray(plan.assign[0])[image] >= 0), case[f"stage{s}_kept_rel"])
            tokens = reduced(plan, tokens, method.positions)
            live = np.asarray(tokens.pos[0]) >= 0
            np.testing.assert_array_equal(tokens.pos[0][live], case[f"stage{s}_kept_original"])
            np.testing.assert_array_equal(tokens.rope[0, live, 0], case[f"stage{s}_position_ids"][0])
            image = live & (np.asarray(tokens.kind[0]) == 1)
            np.testing.assert_array_equal(np.flatnonzero(np.asarray(tokens.score[0])[image] > 0), np.sort(case[f"stage{s}_key_set_rel"]))
        end = np.asarray(tokens.pos[0])[np.asarray(tokens.pos[0]) >= 0]
        for s, rows_in in enumerate(entered):
            np.testing.assert_array_equal(np.flatnonzero(np.isin(rows_in, end)), case[f"kv_gather_after_stage{s}"])


def test_the_decode_stage():
    """Caches from layer `trim` on: the rows of the end; a step then is that of caches whose other slots are dead, at the next id of the rest."""
    params, tokens = world("layers")
    make = lambda trim: Recipe(layers=((AT, MustDropLayers(capacity=16, images=16, total=0.06, peak=1.0, trim=trim)),))
    end, cut = through(make(0), params, tokens)
    _, whole = through(make(None), params, tokens)
    step = jax.jit(
        lambda layers: decoder.step(TEXT, params, blocks.embed(TEXT, params, jnp.full((3, 1), 5)), jnp.ones((3, 1), bool), layers)
    )
    kv, there = whole[0][0].kv, np.asarray(end.pos)
    alive = np.stack([np.isin(np.asarray(kv.pos[b]), there[b][there[b] >= 0]) for b in range(3)])
    dead = kv._replace(pos=jnp.where(alive, kv.pos, -1), delta=jnp.asarray(alive[:, 0].sum(-1), jnp.int32) - kv.seen)
    assert (there >= 0).sum() < (np.asarray(kv.pos[:, 0]) >= 0).sum()
    for b in range(3):
        slots = np.asarray(cut[0][0].kv.pos[b, 0])
        assert slots[slots >= 0].tolist() == there[b][there[b] >= 0].tolist()
    np.testing.assert_allclose(step(cut)[0], step(((whole[0][0]._replace(kv=dead),), whole[1]))[0], atol=2e-5)


def test_the_mark_goes_to_the_decoder():
    method = MustDropSelect(rate=0.2)
    tokens, seen = rows(np.zeros((2, 11, 1))), jnp.asarray(normal(6, 2, 3, 11) ** 2)
    mark = method.mark({}, Held(), tokens, Evidence(cls=seen))
    np.testing.assert_array_equal(mark, key_set(seen, tokens, 0.2).astype(jnp.float32))
    assert mark.sum() == 4 and method.needs == Needs(cls=True, own=True)


def test_the_papers_recipe():
    recipe = mustdrop(576, (0.011, 0.01), capacities=(300, 200, 100, 50))
    assert [(k, m.images, m.capacity, m.total, m.trim) for k, m in recipe.layers] == [
        (3, 576, 300, 0.011, None),
        (7, 300, 200, 0.011, None),
        (11, 200, 100, 0.011, None),
        (15, 100, 50, 0.011, 2),
    ]
    assert recipe.vit == ((1, MustDropVit(threshold=0.8, window=3)),) and recipe.select == MustDropSelect(rate=0.08)
    assert [m.capacity for _, m in mustdrop(576).layers] == [576] * 4
    with pytest.raises(ValueError, match="must ascend"):
        mustdrop(576, layers=(7, 3))
    for bad in ({"total": -1.0}, {"asks": 0}, {"trim": -1}):
        with pytest.raises(ValueError):
            MustDropLayers(capacity=1, images=4, **bad)
