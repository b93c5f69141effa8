"""Vision-language models: transformers' logits, and what the sites between pictures and text leave."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, TEXT
from jaxtok.decode import generate
from jaxtok.methods import DivPrune, FasterVLM, SnapKV, ToMe, VisionDropSelect
from jaxtok.models import decoder, load, vlm
from jaxtok.models.vlm import VlmConfig
from tests.golden import make_vlm


@pytest.fixture(scope="module", params=list(make_vlm.CASES))
def golden(request):
    folder = make_vlm.FOLDER / request.param
    cfg, params, _ = load.load_vlm(folder, dtype=jnp.float32)
    return cfg, params, dict(np.load(folder / "case.npz"))


@pytest.fixture(scope="module")
def llava():
    folder = make_vlm.FOLDER / "llava"
    cfg, params, _ = load.load_vlm(folder, dtype=jnp.float32)
    case = dict(np.load(folder / "case.npz"))
    return cfg, params, jnp.asarray(case["pixels"]), jnp.asarray(case["ids"]), jnp.asarray(case["live"])


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, *inputs):
    tokens = vlm.embed(cfg, params, *inputs)
    out, _ = decoder.prefill(cfg.text, params, tokens, new=0)
    return decoder.logits(cfg.text, params, out.x), tokens.source


embed = jax.jit(vlm.embed, static_argnums=(0, 5), static_argnames=("rows",))


def logits_of(cfg, params, case) -> np.ndarray:
    """f32 [b n vocab] by the place of each id; 0 where padded."""
    logits, source = map(np.asarray, _logits(cfg, params, case["pixels"], case["ids"], case["live"]))
    rows = np.take_along_axis(logits, np.maximum(source, 0)[..., None], 1)
    return np.where(case["live"][..., None], rows, 0)


def test_logits_equal_transformers(golden):
    cfg, params, case = golden
    want = np.where(case["live"][..., None], case["logits"], 0)
    assert np.abs(logits_of(cfg, params, case) - want).max() <= 1e-4 and want.std() > 0.3


@pytest.mark.parametrize("name", list(make_vlm.CASES))
def test_logits_equal_transformers_live(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make_vlm.write(name, tmp_path, 7)
    cfg, params, _ = load.load_vlm(tmp_path, dtype=jnp.float32)
    case = dict(np.load(tmp_path / "case.npz"))
    want = np.where(case["live"][..., None], case["logits"], 0)
    assert np.abs(logits_of(cfg, params, case) - want).max() <= 1e-4


def test_golden_files_are_small():
    assert sum(p.stat().st_size for p in pathlib.Path(make_vlm.FOLDER).rglob("*") if p.is_file()) < 0.4e6


def test_a_recipe_that_keeps_all_changes_nothing(llava):
    cfg, params, *inputs = llava
    want = embed(cfg, params, *inputs)
    got = embed(cfg, params, *inputs, Recipe(vit=((0, ToMe(remove=0)),), select=FasterVLM(capacity=cfg.patches)))
    assert want.score is got.score is None
    for name, a, b in zip(want._fields, want._replace(score=0), got._replace(score=0), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("positions", ["repack", "keep"])
def test_what_select_leaves_stands_where_the_picture_stood(llava, positions):
    cfg, params, pixels, ids, live = llava
    recipe = Recipe(select=DivPrune(capacity=4, positions=positions))
    whole, few = embed(cfg, params, pixels, ids, live), embed(cfg, params, pixels, ids, live, recipe)
    assert few.x.shape[1] == ids.shape[1] - 2 * (cfg.patches - 4)
    source = np.asarray(few.source)
    for b in range(2):
        kept = np.flatnonzero(source[b] >= 0)
        rows = source[b, kept]
        assert (np.diff(rows) > 0).all() and rows[-1] == few.x.shape[1] - 1, "order of ids"
        np.testing.assert_allclose(few.x[b, rows], whole.x[b, np.asarray(whole.source)[b, kept]], atol=1e-5)
        assert (np.asarray(few.kind)[b, rows] == np.where(np.asarray(ids)[b, kept] == cfg.image_token, IMAGE, TEXT)).all()
        text = np.asarray(ids)[b, kept] != cfg.image_token
        assert text.sum() == (np.asarray(live)[b] & (np.asarray(ids)[b] != cfg.image_token)).sum(), "no text is lost"
        rope, order = np.asarray(few.rope)[b, rows, 0], np.asarray(whole.pos)[b, np.asarray(whole.source)[b, kept]]
        assert (rope == (np.arange(len(rows)) if positions == "repack" else order)).all()
    assert (np.asarray(few.seen) == np.asarray(whole.seen)).all()
    assert (np.asarray(few.delta) == (-2 * (cfg.patches - 4) if positions == "repack" else 0)).all()


def test_a_merged_tower_in_one_program_with_a_compressed_cache(llava):
    cfg, params, pixels, ids, live = llava
    recipe = Recipe(vit=((0, ToMe(remove=2)), (1, ToMe(remove=2))), select=FasterVLM(capacity=4), cache=SnapKV(capacity=8, window=4))
    traces = []

    @jax.jit
    def answer(params, pixels, ids, live, keep):
        traces.append(0)
        tokens = vlm.embed(cfg, params, pixels, ids, live, recipe, keep={"select": keep}, proportional=True)
        tokens, layers = decoder.prefill(cfg.text, params, tokens, recipe, new=4)
        return tokens, layers, generate(cfg.text, params, tokens, layers, recipe, new=4).ids

    tokens, layers, said = answer(params, pixels, ids, live, jnp.asarray([5, 5]))
    assert said.shape == (2, 4) and layers[0][0].kv.k.shape[2] == 12 and (tokens.lost == 0).all()
    fewer, *_ = answer(params, pixels, ids, live, jnp.asarray([5, 3]))
    alive = lambda t: (np.asarray(t.pos) >= 0).sum(1)
    assert (alive(tokens) - alive(fewer)).tolist() == [0, 4] and len(traces) == 1


def test_a_prompt_with_fewer_pictures(llava):
    """Pictures without placeholders are ignored."""
    cfg, params, pixels, ids, live = llava
    first = np.cumsum(np.asarray(ids) == cfg.image_token, 1) <= cfg.patches
    one = jnp.asarray(np.where(first, ids, 7))
    changed = pixels.at[:, 1].set(9.0)
    a, b = (embed(cfg, params, x, one, live, Recipe(select=FasterVLM(capacity=4)), rows=30) for x in (pixels, changed))
    assert ((np.asarray(a.kind) == IMAGE) & (np.asarray(a.pos) >= 0)).sum(1).tolist() == [4, 4]
    assert (np.asarray(a.lost) == 0).all()
    short = embed(cfg, params, pixels, one, live, Recipe(select=FasterVLM(capacity=4)))
    assert short.lost.tolist() == [5, 1], "what finds no room is counted"
    np.testing.assert_array_equal(np.where(np.asarray(a.pos)[..., None] >= 0, a.x, 0), np.where(np.asarray(b.pos)[..., None] >= 0, b.x, 0))


def test_a_class_row_that_is_read_is_a_row_of_the_picture(llava):
    cfg, params, pixels, ids, live = llava
    tokens = embed(cfg, params, pixels, ids, live, Recipe(select=VisionDropSelect(capacity=4, contextual=1)))
    assert set(np.asarray(tokens.kind)[np.asarray(tokens.pos) >= 0].tolist()) == {TEXT, IMAGE}
    pictures = (np.asarray(ids) == cfg.image_token).sum(1) // cfg.patches
    assert ((np.asarray(tokens.kind) == IMAGE) & (np.asarray(tokens.pos) >= 0)).sum(1).tolist() == (5 * pictures).tolist()


def test_placeholders_of_no_whole_picture_are_counted(llava):
    """One too few, or some too many: dropped, and told."""
    cfg, params, pixels, ids, live = llava
    at = np.flatnonzero(np.asarray(ids)[0] == cfg.image_token)
    fewer, more = ids.at[0, at[-1]].set(7), ids.at[0, 0].set(cfg.image_token)
    few, many = (vlm.embed(cfg, params, pixels, x, live, rows=30) for x in (fewer, more))
    assert few.lost.tolist() == [cfg.patches - 1, 0] and many.lost.tolist() == [1, 0]
    assert ((np.asarray(few.kind) == IMAGE) & (np.asarray(few.pos) >= 0)).sum(1).tolist() == [cfg.patches, 2 * cfg.patches]
    live_rows = np.asarray(few.pos)[0][np.asarray(few.pos)[0] >= 0]
    assert len(set(live_rows.tolist())) == len(live_rows), "an order stands twice"


def test_refused(llava):
    cfg, params, pixels, ids, live = llava
    with pytest.raises(ValueError, match=r"pictures of \(8, 12\) pixels; the placeholders are those of \(12, 12\)"):
        vlm.embed(cfg, params, pixels[:, :, :8], ids, live)
    with pytest.raises(ValueError, match="keep has 'cache'; here budgets go by vit and select"):
        vlm.embed(cfg, params, pixels, ids, live, keep={"cache": 3})
    with pytest.raises(ValueError, match="do not fit into 9 ids"):
        vlm.embed(cfg, params, pixels, ids[:, :9])
    with pytest.raises(ValueError, match="until=4; the tower has 3 layers"):
        VlmConfig(vision=cfg.vision, text=cfg.text, until=4, image_token=0)


def test_saved_and_loaded_again(golden, tmp_path):
    cfg, params, _ = golden
    load.save(tmp_path, cfg, params)
    back, again, _ = load.load_vlm(tmp_path)
    assert back == cfg and jax.tree.structure(again) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_what_its_family_cannot_express_is_not_saved(llava, tmp_path):
    cfg, params = llava[:2]
    with pytest.raises(ValueError, match="cannot express"):
        load.save(tmp_path, dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, layer_scale=True)), params)
