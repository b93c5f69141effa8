"""Qwen2.5-VL: transformers' logits, rotary ids and steps; what the sites between pictures and text leave; a tower in windows."""

import dataclasses
import functools
import json
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.reducer import Reducer
from jaxtok.core.select import identity, pack
from jaxtok.core.types import IMAGE, TEXT, Evidence, Needs, Tokens
from jaxtok.methods import DivPrune, FastV, HiPrune, HoloV, KeyRerotation, SnapKV, StreamingLLM, ToMe
from jaxtok.methods.vision import flowcut
from jaxtok.models import blocks, decoder, encoder, hf_qwen_vl, load, qwen_vl, vit
from jaxtok.models.config import EncoderConfig
from jaxtok.models.qwen_vl import QwenVlConfig
from jaxtok.models.smart_resize import padded
from tests.golden import make_qwen_vl

PICTURES, MOST = [2, 1], 72  # pictures a prompt, patches
embed = jax.jit(qwen_vl.embed, static_argnums=(0, 6), static_argnames=("rows", "positions"))


def inputs(case, most=MOST):
    """(images, grid, ids, live) for `embed`."""
    return *map(jnp.asarray, padded(case["pixels"], case["grid"], PICTURES, most)), jnp.asarray(case["ids"]), jnp.asarray(case["live"])


@functools.cache
def world(name="qwen"):
    folder = make_qwen_vl.FOLDER / name
    cfg, params, _ = load.load_vlm(folder, dtype=jnp.float32)
    return cfg, params, dict(np.load(folder / "case.npz"))


@pytest.fixture(params=list(make_qwen_vl.CASES))
def golden(request):
    return world(request.param)


@functools.partial(jax.jit, static_argnums=0)
def prefill(cfg, params, tokens, layers=None):
    tokens, layers = decoder.prefill(cfg.text, params, tokens, new=4, layers=layers)
    return decoder.logits(cfg.text, params, tokens.x), layers


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, params, ids, layers):
    x, layers = decoder.step(cfg.text, params, blocks.embed(cfg.text, params, ids), jnp.ones(ids.shape, bool), layers)
    return decoder.logits(cfg.text, params, x), layers


def run(cfg, params, case) -> tuple[Tokens, dict[str, float]]:
    """max |difference| to transformers by output; logits by the place of each id."""
    tokens = embed(cfg, params, *inputs(case))
    logits, layers = prefill(cfg, params, tokens)
    steps = []
    for t in range(4):
        one, layers = step(cfg, params, jnp.asarray(case["more"][:, t : t + 1]), layers)
        steps.append(one)
    at, live = np.maximum(np.asarray(tokens.source), 0), case["live"]
    by_id = np.take_along_axis(np.asarray(logits), at[..., None], 1)
    rope = np.take_along_axis(np.asarray(tokens.rope), at[..., None], 1).transpose(2, 0, 1)
    return tokens, {
        "logits": np.abs(by_id - case["logits"])[live].max(),
        "steps": np.abs(np.concatenate(steps, 1) - case["steps"]).max(),
        "rope": np.abs(rope - case["rope"])[:, live].max(),
        "delta": np.abs(np.asarray(tokens.delta + tokens.seen) - case["delta"] - live.sum(1)).max(),
    }


def test_logits_ids_and_steps_equal_transformers(golden):
    """Two prompts, padded, with two pictures and one, all of other sizes; four steps from the cache."""
    cfg, params, case = golden
    tokens, off = run(cfg, params, case)
    print({k: f"{v:.1e}" for k, v in off.items()})
    assert max(off["logits"], off["steps"]) <= 1e-4 and off["rope"] == off["delta"] == 0
    assert case["logits"][case["live"]].std() > 0.3 and (tokens.lost == 0).all()
    assert ((np.asarray(tokens.kind) == IMAGE).sum(1) == [19, 7]).all()


@pytest.mark.parametrize("name", list(make_qwen_vl.CASES))
def test_logits_equal_transformers_live(name, tmp_path):
    """Other weights; and what is saved here, transformers reads."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make_qwen_vl.write(name, tmp_path / "theirs", 7)
    cfg, params, _ = load.load_vlm(tmp_path / "theirs", dtype=jnp.float32)
    case = dict(np.load(tmp_path / "theirs" / "case.npz"))
    _, off = run(cfg, params, case)
    print({k: f"{v:.1e}" for k, v in off.items()})
    assert max(off["logits"], off["steps"]) <= 1e-4 and off["rope"] == off["delta"] == 0
    load.save(tmp_path / "ours", cfg, params)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    again = make_qwen_vl.case(model.to(torch.float32), 7)
    assert np.abs(again["logits"] - case["logits"])[case["live"]].max() <= 1e-4


def test_golden_files_are_small():
    assert sum(p.stat().st_size for p in pathlib.Path(make_qwen_vl.FOLDER).rglob("*") if p.is_file()) < 0.35e6


# --- the tower ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask(Reducer):
    """Evidence, and nothing is selected."""

    name = "ask"
    asked: Needs

    @property
    def needs(self):
        return self.asked


@functools.partial(jax.jit, static_argnums=(0, 4))
def look(cfg, params, images, grid, recipe):
    laid = qwen_vl.lay(cfg, images, grid)
    rows = qwen_vl.tower_rows(cfg, params, laid)
    found = vit.encode(cfg.vision, params["vision"], rows, recipe)
    return rows, qwen_vl.join(cfg, params, found, bool(recipe.select and recipe.select.needs.layers))


ASK = Recipe(select=Ask(asked=Needs(received=True, cls=True, keys=True, layers=(0, 1))))


def test_evidence_about_merged_rows_is_what_hiprune_reads(golden):
    """received: mean over heads and over a unit's patches, sum over queries, of each layer, by rows of units; cls: the mean over queries."""
    cfg, params, case = golden
    images, grid, *_ = inputs(case)
    rows, (tokens, seen) = look(cfg, params, images, grid, ASK)
    units = [h * w // 4 for h, w in make_qwen_vl.GRIDS]
    want = np.split(case["received"], np.cumsum(units)[:-1], 1)
    for picture, (one, (h, w)) in enumerate(zip(want, make_qwen_vl.GRIDS, strict=True)):
        n = one.shape[1]
        got = np.asarray(seen.received)[:, picture].mean(1)  # pictures 0, 1 are the first prompt's, 2 the second's
        np.testing.assert_allclose(got[:, -n:], one, atol=2e-5)
        assert (got[:, :-n] == 0).all()
        np.testing.assert_allclose(np.asarray(seen.cls)[:, picture].mean(1)[:, -n:], one / (4 * n), atol=1e-6)
        assert np.asarray(tokens.cell)[picture, -n:].tolist() == [[r, c] for r in range(h // 2) for c in range(w // 2)]
        assert (np.asarray(tokens.cell)[picture, :-n] == -1).all() and (np.asarray(tokens.pos)[picture, -n:] == np.arange(n)).all()
    keys = np.asarray(seen.keys)
    assert keys.shape == (2, 4, cfg.vision.heads, MOST // 4, cfg.vision.head_dim)
    assert keys[:, 1, :, -4:].any() and not keys[:, 3].any(), "no picture"


def test_rows_stand_window_by_window():
    """6 x 10 patches in windows of 4: the order of units that the loops of the definition give."""
    cfg, params, case = world()
    images, grid, *_ = inputs(case)
    rows, _ = look(cfg, params, images, grid, ASK)
    want = [
        (2 * r + a, 2 * c + b)
        for top in range(0, 3, 2) for left in range(0, 5, 2)
        for r in range(top, min(top + 2, 3)) for c in range(left, min(left + 2, 5))
        for a in range(2) for b in range(2)
    ]  # fmt: skip
    assert [tuple(x) for x in np.asarray(rows.cell)[0, -60:].tolist()] == want
    window = np.asarray(encoder.windows(cfg.vision, rows))[0]
    assert (window[:-60] == -1).all() and (np.diff(window) >= 0).all() and len(set(window[-60:].tolist())) == 6


def test_one_program_for_all_sizes_and_junk_does_not_matter():
    """Other grids, another cap of patches, anything in dead patches, pictures as pixels."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    want = embed(cfg, params, images, grid, ids, live)
    compiled = embed._cache_size()
    dead = np.arange(MOST)[None, None] >= np.asarray(grid).prod(-1)[..., None]
    junk = embed(cfg, params, jnp.where(dead[..., None], 1e3, images), grid, ids, live)
    assert_same(want, junk)
    other = embed(cfg, params, images, grid.at[0, 0].set(jnp.asarray([1, 10, 6])), ids, live)
    assert embed._cache_size() == compiled
    rope = np.asarray(other.rope)[0, np.asarray(other.source)[0, np.asarray(ids)[0] == make_qwen_vl.IMAGE][:15]]
    assert (rope - rope[0])[:, 1:].tolist() == [[r, c] for r in range(5) for c in range(3)]


@functools.partial(jax.jit, static_argnums=0)
def short(cfg, params, images, grid, ids, live, gone):
    """`embed` without the layers of the tower, `gone` [b*i n] bool: patches that are dropped in their place."""
    laid = qwen_vl.lay(cfg, images, grid)
    rows = qwen_vl.tower_rows(cfg, params, laid)
    merged = qwen_vl.join(cfg, params, vit.Encoded(reduce(pack((rows.pos >= 0) & ~gone), rows), Evidence())).tokens
    joined = qwen_vl.place(cfg, decoder.embed(cfg.text, params, ids, live), pack(live).index, ids, laid, merged)
    return rows, merged, qwen_vl.arrange(joined, ids.shape[1], "keep_mrope")


def test_pictures_as_pixels():
    """In the upper left corner of a canvas of 8 x 14 patches, noise around them; and without a grid."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    side = cfg.vision.patch[0]
    canvas = np.random.default_rng(0).normal(size=(2, 2, 8 * side, 14 * side, 3)).astype(np.float32)
    for b in range(2):
        for i in range(PICTURES[b]):
            _, h, w = np.asarray(grid)[b, i]
            cut = np.asarray(images)[b, i, : h * w].reshape(h // 2, w // 2, 2, 2, 3, 2, side, side)[:, :, :, :, :, 0]
            canvas[b, i, : h * side, : w * side] = cut.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * side, w * side, 3)
    none = lambda n: jnp.zeros((4, n), bool)
    want = short(cfg, params, images, grid, ids, live, none(MOST))
    got = short(cfg, params, jnp.asarray(canvas), grid[..., 1:], ids, live, none(8 * 14))
    for picture, (h, w) in enumerate(make_qwen_vl.GRIDS):
        for name in ("x", "cell", "pos"):
            np.testing.assert_allclose(getattr(got[0], name)[picture, -h * w :], getattr(want[0], name)[picture, -h * w :], atol=1e-5)
    assert_same(want[2], got[2])
    whole = qwen_vl.lay(cfg, jnp.asarray(canvas), None)
    assert whole.live.all() and (np.asarray(whole.units) == [4, 7]).all()


def assert_same(a: Tokens, b: Tokens):
    """All that is about live rows."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        if x is not None:
            by_row = x.shape[:2] == a.pos.shape and name not in ("source", "pos")
            live = (np.asarray(a.pos) >= 0).reshape(a.pos.shape + (1,) * (x.ndim - 2)) if by_row else True
            np.testing.assert_allclose(np.where(live, x, 0), np.where(live, y, 0), atol=1e-5, err_msg=name)


# --- sites -------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_keeps_all_changes_nothing():
    cfg, params, case = world()
    want = embed(cfg, params, *inputs(case))
    select = HiPrune(capacity=MOST // 4, special=0, layers=(0, -1), variant="qwen")
    got = embed(cfg, params, *inputs(case), Recipe(select=select, vit=((0, Same()), (1, Same()))))
    assert_same(want, got)


choose = jax.jit(lambda tokens, seen, recipe: vit.select({}, vit.Encoded(tokens, seen), recipe), static_argnums=2)


@functools.partial(jax.jit, static_argnums=0)
def place(cfg, params, images, grid, ids, live, seen):
    text = decoder.embed(cfg.text, params, ids, live)
    return qwen_vl.place(cfg, text, pack(live).index, ids, qwen_vl.lay(cfg, images, grid), seen)


arrange = jax.jit(qwen_vl.arrange, static_argnums=(1, 2))


@pytest.mark.parametrize("positions", ["keep_mrope", "keep", "repack"])
def test_what_select_leaves_keeps_its_three_ids(positions):
    """Behind the text that follows a picture as behind a picture that ends the prompt: the next id is the largest one + 1."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    ids, live = ids.at[1].set(jnp.roll(ids[1], 6)), live.at[1].set(jnp.roll(live[1], 6).at[:6].set(False))
    assert ids[1, -1] == make_qwen_vl.IMAGE, "the second prompt ends with its picture"
    recipe = Recipe(select=DivPrune(capacity=3, special=0))
    whole = embed(cfg, params, images, grid, ids, live)
    joined = place(cfg, params, images, grid, ids, live, choose(*look(cfg, params, images, grid, ASK)[1], recipe))
    few = arrange(joined, 21, positions)
    assert few.x.shape[1] == 21 and (few.lost == 0).all() and arrange(joined, 15, positions).lost.tolist() == [4, 0]
    for b, left in enumerate((2 * 3, 3)):
        now = np.asarray(few.source)[b]
        kept = np.flatnonzero(now >= 0)
        rows, old = now[kept], np.asarray(whole.source)[b, kept]
        assert (np.diff(rows) > 0).all() and rows[-1] == 20, "order of ids"
        np.testing.assert_allclose(few.x[b, rows], whole.x[b, old], atol=1e-5)
        pictured = np.asarray(ids)[b, kept] == make_qwen_vl.IMAGE
        assert (np.asarray(few.kind)[b, rows] == np.where(pictured, IMAGE, TEXT)).all() and pictured.sum() == left
        np.testing.assert_array_equal(np.asarray(few.cell)[b, rows], np.asarray(whole.cell)[b, old])
        rope, following = np.asarray(few.rope)[b, rows], int((few.seen + few.delta)[b])
        if positions == "repack":
            assert (rope == np.arange(len(rows))[:, None]).all() and following == len(rows)
        else:
            assert (rope == np.asarray(whole.rope)[b, old]).all()
            after = int((whole.seen + whole.delta)[b])
            assert following == (after if positions == "keep" else rope.max() + 1)
    assert (np.asarray(few.seen) == np.asarray(whole.seen)).all()


def test_selectors_without_a_class_row():
    """HiPrune's and HoloV's rows are those that a choice by hand on the evidence of the golden file leaves."""
    cfg, params, case = world()
    images, grid, *_ = inputs(case)
    _, (tokens, seen) = look(cfg, params, images, grid, ASK)
    want = np.split(case["received"][1], [15, 19])
    last = jax.tree.map(lambda x: x[1], seen)
    for select, evidence in (
        (HiPrune(capacity=4, special=0, alpha=0.0, layers=(0, -1), variant="qwen"), seen),
        (HoloV(capacity=4, special=0, runs=1), last),
    ):
        few = choose(tokens, evidence, Recipe(select=select))
        for picture, (one, (_, w)) in enumerate(zip(want, make_qwen_vl.GRIDS, strict=True)):
            best = np.sort(np.argsort(-one)[:4]).tolist()
            assert np.asarray(few.cell)[picture].tolist() == [[i // (w // 2), i % (w // 2)] for i in best]


def test_all_sites_in_one_program():
    """FlowCut drops single patches, DivPrune merged rows, FastV rows between layers, SnapKV slots; two budgets, one trace."""
    cfg, params, case = world()
    recipe = Recipe(
        vit=flowcut.schedule(16, cfg.vision.layers, query="mean", special=0),
        select=DivPrune(capacity=3, special=0),
        layers=((1, FastV(capacity=3, images=6, positions="keep_mrope")),),
        cache=SnapKV(capacity=8, window=4),
    )
    traces = []

    @jax.jit
    def answer(params, images, grid, ids, live, keep):
        traces.append(0)
        before = qwen_vl.embed(cfg, params, images, grid, ids, live, recipe, keep={"select": keep}, rows=21)
        return before, *decoder.prefill(cfg.text, params, before, recipe, new=4)

    images, grid, ids, live = inputs(case)
    before, tokens, layers = answer(params, images, grid, ids, live, jnp.asarray([3, 3]))
    assert [parts[0].kv.k.shape[2] for parts in layers] == [12, 12] and tokens.pos.shape == (2, 18)
    assert (tokens.lost == 0).all()
    rows = lambda t, b: {tuple(x) for x in np.concatenate([np.asarray(t.pos)[b, :, None], np.asarray(t.rope)[b]], 1).tolist() if x[0] >= 0}
    for b in range(2):
        assert rows(tokens, b) <= rows(before, b), "the rows that are left keep their three ids"
        assert int((layers[1][0].kv.seen + layers[1][0].kv.delta)[b]) == case["rope"][:, b].max() + 1
    assert ((np.asarray(tokens.kind) == IMAGE) & (np.asarray(tokens.pos) >= 0)).sum(1).tolist() == [3, 3]
    fewer, *_ = answer(params, images, grid.at[0, 0].set(jnp.asarray([1, 10, 6])), ids, live, jnp.asarray([3, 1]))
    alive = lambda t: (np.asarray(t.pos) >= 0).sum(1)
    assert (alive(before) - alive(fewer)).tolist() == [0, 2] and len(traces) == 1


def test_four_survivors_in_a_row_are_merged():
    """Of one window of 4 x 4 patches three of unit 0 and two of unit 2 go: eleven are left, the first three fill no unit."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    numbers = [0, 1, 2, 8, 9]
    gone = jnp.zeros((4, MOST), bool).at[1, MOST - 16 + np.array(numbers)].set(True)
    rows, tokens, out = short(cfg, params, images, grid, ids, live, gone)
    left = [i for i in range(16) if i not in numbers][3:]
    cell = np.asarray(rows.cell)[1, -16:]
    assert np.asarray(tokens.cell)[1, -2:].tolist() == [(cell[left[i]] // 2).tolist() for i in (0, 4)]
    assert tokens.lost.tolist() == [0, 3, 0, 0] and out.lost.tolist() == [3, 0] and (np.asarray(tokens.pos)[1, :-2] == -1).all()
    assert np.asarray(tokens.source)[1, :4].tolist() == [-1, 16, 16, 17], "where the patches of each unit are now"


def test_a_second_prompt_goes_on_with_the_ids_of_the_first():
    """Text, a picture, text; then, on its cache, text, a picture, text: as in one prompt."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    cut = 3 + 2 + 15 + 1  # of the first prompt: up to the word behind its first picture; the second prompt as a whole, and a word
    begin = np.argmax(np.asarray(live), 1)
    early = live & (jnp.arange(ids.shape[1])[None] < jnp.asarray([[begin[0] + cut], [ids.shape[1] - 1]]))
    later = jnp.roll(images, -1, 1).at[1].set(0), jnp.roll(grid, -1, 1).at[1].set(0)
    _, layers = prefill(cfg, params, embed(cfg, params, images, grid.at[0, 1].set(0), ids, early))
    second = embed(cfg, params, later[0], later[1].at[0, 1].set(0), ids, live & ~early)
    logits, layers = prefill(cfg, params, second, layers)
    for b, n in ((0, int(live[0].sum()) - cut), (1, 1)):
        np.testing.assert_allclose(logits[b, -n:], case["logits"][b, -n:], atol=1e-4)
    assert (layers[0][0].kv.seen + layers[0][0].kv.delta).tolist() == [case["rope"][:, b].max() + 1 for b in range(2)]


# --- what does not fit -------------------------------------------------------------------------------------------------


def test_placeholders_of_no_whole_picture_are_counted():
    """One too few, one too many, a grid too large for its patches, no second picture."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    at = np.flatnonzero(np.asarray(ids)[0] == make_qwen_vl.IMAGE)
    pictured = lambda t: ((np.asarray(t.kind) == IMAGE) & (np.asarray(t.pos) >= 0)).sum(1).tolist()
    for changed, size, lost, left in (
        (ids.at[0, at[-1]].set(7), grid, 3, 15),
        (ids.at[0, at[-1] + 1].set(make_qwen_vl.IMAGE), grid, 1, 19),
        (ids, grid.at[0, 1].set(jnp.asarray([1, 16, 16])), 4, 15),
        (ids, grid.at[0, 1].set(0), 4, 15),
        (ids, grid.at[0, 1].set(jnp.asarray([2, 4, 4])), 4, 15),
    ):
        got = embed(cfg, params, images, size, changed, live)
        assert got.lost.tolist() == [lost, 0] and pictured(got) == [left, 7]
        alive = np.asarray(got.pos)[0][np.asarray(got.pos)[0] >= 0]
        assert len(set(alive.tolist())) == len(alive), "an order stands twice"


def test_refused():
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    ask = lambda **options: jax.eval_shape(lambda: ask_now(**options))
    ask_now = lambda **options: qwen_vl.embed(
        cfg, params, *(options.pop(k, v) for k, v in dict(images=images, grid=grid, ids=ids, live=live).items()), **options
    )
    wrong = [
        (dict(images=images[..., :-1]), r"patches are \[2, 2, 72, 23\], .*give \[b i r 24\]"),
        (dict(images=images[:, :, :-1]), "r a multiple of 4"),
        (dict(grid=None), "and a grid"),
        (dict(grid=jnp.zeros((2, 2, 4), jnp.int32)), r"grid is \[2, 2, 4\] for 2 x 2 pictures"),
        (dict(images=jnp.zeros((2, 2, 6, 8, 3)), grid=None), "sides must be multiples of 4, channels 3"),
        (dict(positions="mrope"), "positions"),
        (dict(keep={"cache": 3}), "keep has 'cache'; here budgets go by vit and select"),
        (dict(rows=0), "rows=0; give 1 to"),
        (dict(recipe=Recipe(vit=((0, ToMe(remove=2)),))), "tome acts at 'attn' and merges"),
        (dict(recipe=Recipe(vit=flowcut.schedule(16, 4, special=0)[:1])), "looks at the class row, which this tower has not"),
        (dict(recipe=Recipe(select=Ask(asked=Needs(rows=2)))), "ask needs rows of the tower"),
    ]
    for options, match in wrong:
        with pytest.raises(ValueError, match=match):
            ask(**options)
    with pytest.raises(ValueError, match="merge_two merges rows; this tower joins 2 x 2 patches itself"):
        ask(recipe=Recipe(vit=((0, MergeTwo()),)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeTwo(Reducer):
    name = "merge_two"
    needs: ClassVar[Needs] = Needs()

    def plan(self, params, state, tokens, evidence, keep=None):
        return state, identity(tokens.pos.shape)._replace(weight=jnp.ones(tokens.pos.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Same(Reducer):
    name = "same"
    needs: ClassVar[Needs] = Needs()

    def plan(self, params, state, tokens, evidence, keep=None):
        return state, identity(tokens.pos.shape)


def test_configurations():
    cfg, *_ = world()
    with pytest.raises(ValueError, match=r"mrope=\(1, 1, 1\) must share out the 4 frequencies"):
        dataclasses.replace(cfg.text, mrope=(1, 1, 1))
    with pytest.raises(ValueError, match="window=3 needs rope_theta and must be a multiple of merge=2"):
        dataclasses.replace(cfg.vision, window=3)
    with pytest.raises(ValueError, match="text has one rotary axis"):
        QwenVlConfig(vision=cfg.vision, text=dataclasses.replace(cfg.text, mrope=()), image_token=0)
    with pytest.raises(ValueError, match="vision is no tower of any picture size"):
        QwenVlConfig(vision=EncoderConfig(width=8, layers=1, heads=2, hidden=8), text=cfg.text, image_token=0)
    for recipe in (Recipe(policy=StreamingLLM(capacity=8)), Recipe(cache=KeyRerotation(base=SnapKV(capacity=8, window=4)))):
        with pytest.raises(ValueError, match="one rotary id, but a picture's rows have three"):
            recipe.validate(cfg.text)
    Recipe(policy=StreamingLLM(capacity=8, compact=False)).validate(cfg.text)
    assert cfg.text.axes == (0, 1, 2, 2) and hash(cfg) is not None
    shapes = jax.tree.map(jnp.shape, world()[1])
    fresh = jax.eval_shape(lambda key: qwen_vl.init(cfg, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == shapes


def test_three_ids_on_a_model_of_one():
    cfg, params, case = world()
    tokens, plain = embed(cfg, params, *inputs(case)), dataclasses.replace(cfg.text, mrope=())
    with pytest.raises(ValueError, match=r"tokens have 3 rotary ids a row; a model with mrope=\(\) takes 1"):
        jax.eval_shape(lambda: decoder.prefill(plain, params, tokens, new=0))


def test_text_alone_needs_one_id():
    """The plain decoder's rows on this model are those of a prompt without pictures."""
    cfg, params, case = world()
    images, grid, ids, live = inputs(case)
    words = jnp.where(ids == make_qwen_vl.IMAGE, 5, ids)
    want, _ = prefill(cfg, params, embed(cfg, params, images, 0 * grid, words, live))
    got, _ = prefill(cfg, params, decoder.embed(cfg.text, params, words, live))
    np.testing.assert_allclose(got[live], want[live], atol=1e-5)


# --- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path, golden):
    cfg, params, _ = golden
    load.save(tmp_path, cfg, params)
    back, again, _ = load.load_vlm(tmp_path)
    assert back == cfg
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


RAW = json.loads((make_qwen_vl.FOLDER / "qwen" / "config.json").read_text())


def test_the_hubs_flat_config():
    """Qwen2.5-VL-3B-Instruct: the text's fields stand beside the tower's, rope_scaling is old."""
    raw = {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "image_token_id": 151655,
        "bos_token_id": 151643, "eos_token_id": 151645, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
                          "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
                          "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    cfg = hf_qwen_vl.config_from_hf(raw)
    assert cfg.text.mrope == (16, 24, 24) and cfg.text.tied and cfg.text.window is None and cfg.text.head_dim == 128 and cfg.text.qkv_bias
    assert cfg.vision.window == 8 and cfg.vision.whole == (7, 15, 23, 31) and cfg.patch == 1176 and cfg.vision.head_dim == 80
    count = sum(int(np.prod(x)) for x in jax.tree.leaves(qwen_vl.shapes(cfg), is_leaf=blocks.is_shape))
    assert count == 3_754_622_976, "the parameters that the hub tells"
    assert hf_qwen_vl.config_from_hf(hf_qwen_vl.config_to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    "where, changes, match",
    [
        ("", dict(model_type="qwen2_vl"), "model_type 'qwen2_vl' is not supported; supported: qwen2_5_vl"),
        ("", dict(quantization_config={"bits": 4}), "quantization_config is not supported"),
        ("", dict(image_token_id="x"), "image_token_id='x' should be int"),
        ("text_config", dict(rope_parameters={"mrope_section": [1, 2]}), r"mrope_section=\[1, 2\] should be three numbers"),
        ("text_config", dict(rope_parameters={"mrope_section": [1, 2, 3]}), r"mrope=\(1, 2, 3\) must share out the 4 frequencies"),
        (
            "text_config",
            dict(rope_scaling={"rope_type": "yarn", "factor": 2, "mrope_section": [1, 1, 2]}),
            "rope scaling 'yarn' is not supported",
        ),
        ("text_config", dict(head_dim=4), "head_dim=4, but the code splits hidden_size=32 into 4 heads"),
        ("vision_config", dict(out_hidden_size=16), "out_hidden_size=16 must be the text's hidden_size=32"),
        ("vision_config", dict(fullatt_block_indexes=[5]), r"fullatt_block_indexes=\[5\] should be layers of 2"),
        ("vision_config", dict(hidden_act="gelu"), "hidden_act='gelu' of the tower is not supported"),
        ("vision_config", dict(window_size=3), "window_size=3 has no room"),
        ("vision_config", dict(num_heads=8), "head_dim=2 a multiple of 4"),
        ("vision_config", dict(depth=10**6), "depth=1000000 is absurd"),
    ],
)
def test_wrong_configs(where, changes, match):
    raw = RAW | (changes if not where else {where: RAW[where] | changes})
    with pytest.raises(ValueError, match=match) as e:
        hf_qwen_vl.config_from_hf(raw)
    assert str(e.value).startswith("config.json") and "\n" not in str(e.value)


def test_a_cache_that_cannot_say_so(tmp_path):
    cfg, params, _ = world()
    with pytest.raises(ValueError, match="a qwen2 checkpoint cannot express mrope"):
        load.save(tmp_path, cfg.text, params)
    with pytest.raises(ValueError, match="cannot express norm_eps"):
        hf_qwen_vl.config_to_hf(dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, norm_eps=1e-5)))
