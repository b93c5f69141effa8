"""LLaVA-NeXT: transformers' layout of crops and logits, and what the sites leave of pictures in crops."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import CROP, IMAGE, SPECIAL, TEXT
from jaxtok.methods import FasterVLM, GlobalCom2, HiRED, SnapKV, ToMe, VisionZip
from jaxtok.models import anyres, decoder, hf_vlm, load, vit, vlm
from tests.golden import make_llava_next

PUBLISHED = tuple((y, x) for y, x in make_llava_next.PUBLISHED)
OTHER = np.array([[[90, 11], [24, 24]], [[11, 40], [31, 17]]], np.int32)  # the sizes of the case, turned about
P, N = 5, 9  # sub-images, patches of each
FIFTH = 9  # rows of a picture that stay: 0.2 of its 45 patch rows
RECIPES = {
    "full": Recipe(vit=((1, ToMe(remove=0)),), select=FasterVLM(capacity=P * N, crops=P)),
    "fastervlm": Recipe(select=FasterVLM(capacity=FIFTH, special=0, crops=P, positions="keep")),
    "hired": Recipe(select=HiRED(capacity=FIFTH, special=0, crops=P, layers=(0, -1))),
    "globalcom2": Recipe(select=GlobalCom2(capacity=FIFTH, special=0, crops=P, side=3)),
    "visionzip": Recipe(select=VisionZip(capacity=FIFTH, contextual=3, special=P)),
    "tome": Recipe(vit=((1, ToMe(remove=3)),)),
}
TRACES: list[str] = []


@functools.cache
def model(name="next"):
    cfg, params, _ = load.load_vlm(make_llava_next.FOLDER / name, dtype=jnp.float32)
    with np.load(make_llava_next.FOLDER / name / "case.npz") as npz:
        return cfg, params, dict(npz)


@functools.partial(jax.jit, static_argnums=0)
def plain(cfg, params, pixels, ids, live, sizes):
    TRACES.append(cfg.family)
    tokens = vlm.embed(cfg, params, pixels, ids, live, sizes=sizes, rows=ids.shape[1])
    out, _ = decoder.prefill(cfg.text, params, tokens, new=0)
    return tokens, decoder.logits(cfg.text, params, out.x)


def error(cfg, params, case) -> float:
    tokens, logits = plain(cfg, params, *(case[k] for k in ("pixels", "ids", "live", "sizes")))
    rows = np.take_along_axis(np.asarray(logits), np.maximum(tokens.source, 0)[..., None], 1)
    return float(np.abs(np.where(case["live"][..., None], rows - case["logits"], 0)).max())


@functools.partial(jax.jit, static_argnums=0)
def reduced(name, params, pixels, ids, live, sizes, keep):
    return vlm.embed(model()[0], params, pixels, ids, live, RECIPES[name], sizes=sizes, keep=keep, rows=88)


def embed(name, params, *inputs, keep=None):
    return plain(model()[0], params, *inputs)[0] if name == "plain" else reduced(name, params, *inputs, keep)


@functools.cache
def done(name, turned=False):
    _, params, case = model()
    keep = {"select": np.full((2, 2), FIFTH)} if name == "hired" else None
    return jax.tree.map(np.asarray, embed(name, params, case["pixels"], *prompts(turned), OTHER if turned else case["sizes"], keep=keep))


def prompts(turned=False):
    """ids and live of the case, or of pictures that are turned about."""
    cfg, _, case = model()
    if not turned:
        return case["ids"], case["live"]
    ids, live = np.full((2, 88), 7, np.int32), np.ones((2, 88), bool)
    for row, (one, two) in enumerate(OTHER):
        first, second = cfg.placeholders(one), cfg.placeholders(two)
        ids[row, 3 : 3 + first] = ids[row, 4 + first : 4 + first + second] = cfg.image_token
        live[row, 6 + first + second :] = False
    return ids, live


def by_hand(size):
    """(segment, row, column) of each row of a picture of this size; newlines are -1, -1, -1."""
    y, x = anyres.best(tuple((a, b) for a, b in make_llava_next.PINPOINTS), size)
    lines, wide = y // 4, x // 4
    if size[1] / size[0] > wide / lines:
        pad = (lines - int(round(size[0] * (wide / size[1]), 7))) // 2
        ys, xs = range(pad, lines - pad), range(wide)
    else:
        pad = (wide - int(round(size[1] * (lines / size[0]), 7))) // 2
        ys, xs = range(lines), range(pad, wide - pad)
    out = [(0, j // 3, j % 3) for j in range(N)]
    for i in ys:
        out += [(1 + i // 3 * (x // 12) + j // 3, i % 3, j % 3) for j in xs] + [(-1, -1, -1)]
    return out


# --- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(make_llava_next.CASES))
def test_logits_equal_transformers(name):
    """Two prompts, two pictures of different grids each, padding."""
    cfg, params, case = model(name)
    off = error(cfg, params, case)
    print(f"{name}: max |difference| {off:.1e}")
    assert off <= 1e-4 and case["logits"].std() > 0.3


@pytest.mark.parametrize("name", list(make_llava_next.CASES))
def test_logits_equal_transformers_live(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = np.array([[[50, 50], [9, 100]], [[100, 9], [23, 25]]], np.int32)
    make_llava_next.write(name, tmp_path, 7, sizes)
    cfg, params, _ = load.load_vlm(tmp_path, dtype=jnp.float32)
    case = dict(np.load(tmp_path / "case.npz"))
    off = error(cfg, params, case)
    print(f"{name}: max |difference| {off:.1e}")
    assert off <= 1e-4
    load.save(tmp_path / "saved", cfg, params)
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager").float().eval()
    off = np.abs(make_llava_next.case(theirs, 7, sizes)["logits"] - case["logits"]).max()
    print(f"{name}, saved here, read there: max |difference| {off:.1e}")
    assert off <= 1e-5


def test_as_many_placeholders_as_transformers():
    """Also of sizes where a product of floats falls short of a whole number; on the host and traced."""
    with np.load(make_llava_next.FOLDER / "images.npz") as npz:
        sizes, want = npz["published.sizes"], npz["published.many"]
    assert [anyres.placeholders(PUBLISHED, (336, 336), (24, 24), size) for size in sizes] == want.tolist()
    plan = jax.jit(lambda s: anyres.layout(PUBLISHED, (336, 336), (24, 24), s, P))(sizes)
    assert plan.many.tolist() == want.tolist()
    assert anyres.most(PUBLISHED, (336, 336), (24, 24), P) == (2928, 72) and want.max() <= 2928


def test_products_as_floats_make_them():
    rng, k = np.random.default_rng(0), 200_000
    a, p, q = (rng.integers(1, 2**15, k) for _ in range(3))
    p[: k // 2] = rng.choice([336, 672, 1008], k // 2)
    a[: k // 4], a[k // 2 : 3 * k // 4] = q[: k // 4], (q // np.gcd(p, q))[k // 2 : 3 * k // 4]  # whole products
    want = (a * (p / q)).astype(np.int64)
    got = jax.jit(anyres._scaled)(*(v.astype(np.int32) for v in (a, p, q)))
    np.testing.assert_array_equal(got, want)
    assert (want < a * p // q).sum() > 1000


def test_published_configuration():
    raw = {
        "model_type": "llava_next", "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_grid_pinpoints": make_llava_next.PUBLISHED, "tie_word_embeddings": False,
        "text_config": {"model_type": "mistral", "vocab_size": 32064, "intermediate_size": 14336, "num_key_value_heads": 8,
                        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                          "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
    }  # fmt: skip
    cfg = hf_vlm.config_from_hf(raw)
    assert cfg == hf_vlm.config_from_hf({k: v for k, v in raw.items() if k != "image_grid_pinpoints"})
    assert (cfg.pinpoints, cfg.parts, cfg.patches, cfg.most(5), cfg.most(3)) == (PUBLISHED, 5, 576, (2928, 72), (1776, 48))
    assert cfg.placeholders((1000, 2000)) == 576 + 24 * 49 and cfg.placeholders((480, 640)) == 576 + 36 * 49
    assert vlm.shapes(cfg)["newline"] == (4096,)
    for wrong in ([[336, 300]], [], [336], "x"):
        with pytest.raises(ValueError, match="pinpoint"):
            hf_vlm.config_from_hf(raw | {"image_grid_pinpoints": wrong})
    with pytest.raises(ValueError, match="a picture in crops has no place for class rows"):
        hf_vlm.config_from_hf(raw | {"vision_feature_select_strategy": "full"})


@pytest.mark.parametrize("name", list(make_llava_next.CASES))
def test_saved_and_read_again(name, tmp_path):
    cfg, params, _ = model(name)
    load.save(tmp_path, cfg, params)
    again, other, _ = load.load_vlm(tmp_path)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, other)


def test_new_names_of_tensors(tmp_path):
    cfg, params, _ = model()
    folder = make_llava_next.FOLDER / "next"
    old = safetensors.numpy.load_file(folder / "model.safetensors")
    name = lambda n: "lm_head.weight" if "lm_head" in n else "model." + n.replace("language_model.model.", "language_model.")
    safetensors.numpy.save_file({name(n): x for n, x in old.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again, other, _ = load.load_vlm(tmp_path, dtype=jnp.float32)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, other)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"unexpected: model\.image_newline"):
        load.load_vlm(tmp_path)
    fresh = jax.eval_shape(lambda key: vlm.init(cfg, key), jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, fresh)


# --- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_rows_stand_by_the_joined_raster(turned):
    cfg, params, case = model()
    tokens, (ids, live), sizes = done("plain", turned), prompts(turned), OTHER if turned else case["sizes"]
    for b in range(2):
        rows = tokens.source[b, live[b]]
        assert (rows == np.arange(88 - live[b].sum(), 88)).all() and tokens.lost[b] == 0
        pictured = ids[b, live[b]] == cfg.image_token
        want = np.array([row for size in sizes[b] for row in by_hand(size)])
        got = rows[pictured]
        assert np.column_stack([tokens.segment[b, got], tokens.cell[b, got]]).tolist() == want.tolist()
        assert (tokens.kind[b, got] == np.select([want[:, 0] < 0, want[:, 0] == 0], [SPECIAL, IMAGE], CROP)).all()
        np.testing.assert_array_equal(tokens.x[b, got[want[:, 0] < 0]], np.broadcast_to(params["newline"], ((want[:, 0] < 0).sum(), 24)))
        assert (tokens.kind[b, rows[~pictured]] == TEXT).all() and (tokens.size[b, rows] == 1).all()


def test_one_program_for_pictures_of_all_sizes():
    _, params, case = model()
    run = lambda sizes, turned=False: embed("plain", params, case["pixels"], *prompts(turned), sizes)
    run(case["sizes"])
    before = len(TRACES)
    assert run(OTHER, True).lost.tolist() == [0, 0]
    run(np.full((2, 2, 2), 30, np.int32))
    assert len(TRACES) == before


@pytest.mark.parametrize("name", ["fastervlm", "hired", "globalcom2"])
def test_a_fifth_of_the_rows(name):
    """Through the whole path: what stays is what it was, where it was; newlines and text stay; nothing is lost."""
    cfg, _, case = model()
    whole, few, (ids, live) = done("plain"), done(name), prompts()
    for b in range(2):
        kept = np.flatnonzero(few.source[b] >= 0)
        now, then = few.source[b, kept], whole.source[b, kept]
        for field in ("x", "kind", "segment", "cell", "size"):
            np.testing.assert_allclose(getattr(few, field)[b, now], getattr(whole, field)[b, then], atol=1e-5, err_msg=field)
        assert len(set(now.tolist())) == len(now) == (few.pos[b] >= 0).sum() and (np.sort(now) == np.arange(88 - len(now), 88)).all()
        lines, text = (whole.kind[b] == SPECIAL) & (whole.pos[b] >= 0), live[b] & (ids[b] != cfg.image_token)
        assert (few.kind[b, now] == SPECIAL).sum() == lines.sum() and np.isin(np.flatnonzero(text), kept).all()
        assert few.lost[b] == 0 and few.seen[b] == whole.seen[b]
        for start, size in zip(_starts(ids[b] == cfg.image_token, case["sizes"][b]), case["sizes"][b], strict=True):
            many = cfg.placeholders(size)
            here = [j for j in range(start, start + many) if few.source[b, j] >= 0]
            left = [j for j in here if whole.kind[b, whole.source[b, j]] != SPECIAL]
            assert FIFTH - P <= len(left) <= FIFTH and left[0] < start + N
            stand = few.source[b, [j for j in here if j >= start + N]]
            assert (np.diff(stand) > 0).all(), "crop rows and newlines stand by the joined raster"
        rope = few.rope[b, np.sort(now), 0]
        own = np.sort(whole.pos[b, then])
        assert rope.tolist() == (own.tolist() if name == "fastervlm" else list(range(len(now))))
        assert few.delta[b] == (0 if name == "fastervlm" else len(now) - whole.seen[b])


def _starts(mark, sizes):
    """Where the placeholders of each picture begin."""
    first, one = np.flatnonzero(mark), model()[0].placeholders(sizes[0])
    return first[0], first[one]


def test_the_best_of_each_crop_stay():
    """Against the tower run on each crop by itself."""
    cfg, params, case = model()
    few, (ids, _) = done("fastervlm"), prompts()

    @jax.jit
    def look(pixels):
        own = params["vision"]
        return vit.encode(cfg.vision, own, vit.embed(cfg.vision, own, pixels), RECIPES["fastervlm"], until=cfg.until).evidence.cls

    looked = np.asarray(look(case["pixels"].reshape(-1, 12, 12, 3))).mean(1)[:, 1:].reshape(2, 2, P, N)
    for b in range(2):
        starts = _starts(ids[b] == cfg.image_token, case["sizes"][b])
        for i, size in enumerate(case["sizes"][b]):
            rows = by_hand(size)
            got = {rows[j] for j in range(len(rows)) if few.source[b, starts[i] + j] >= 0 and rows[j][0] >= 0}
            want = set()
            for p in range(P):
                mine = sorted((r for r in rows if r[0] == p), key=lambda r, p=p: -looked[b, i, p, r[1] * 3 + r[2]])
                want |= set(mine[: 2 if p < FIFTH % P else 1])
            assert got == want


def test_the_thumbnail_stands_as_the_method_says():
    few = done("globalcom2")
    for b in range(2):
        first = few.segment[b] == 0
        cells = (few.cell[b, first] @ [3, 1]).tolist()
        assert len(cells) >= 2 and few.pos[b, first].tolist() == sorted(few.pos[b, first].tolist())
    assert any(np.diff(few.cell[b, few.segment[b] == 0] @ [3, 1]).min() < 0 for b in range(2)), "by falling score"


def test_class_rows_may_stay():
    """Those of the sub-images that are there, rows of the picture each at the first place of its own."""
    cfg, _, case = model()
    few, whole = done("visionzip"), done("plain")
    for b in range(2):
        parts = [sorted({row[0] for row in by_hand(size)} - {-1}) for size in case["sizes"][b]]
        alive = np.flatnonzero(few.pos[b] >= 0)
        rows = [j for j in alive if few.kind[b, j] in (IMAGE, CROP) and few.cell[b, j, 0] < 0]
        assert few.segment[b, rows].tolist() == [p for picture in parts for p in picture] and few.lost[b] == 0
        assert (few.kind[b] == SPECIAL).sum() == (whole.kind[b] == SPECIAL).sum() and (np.diff(few.pos[b, alive]) > 0).all()


def test_a_full_budget_is_the_plain_model():
    for name, a, b in zip(done("plain")._fields, done("plain"), done("full"), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def test_a_merged_tower_drops_no_patch_of_a_picture():
    """Also none that was merged into a row of the padding."""
    whole, few, live = done("plain"), done("tome"), prompts()[1]
    assert (few.source[live] >= 0).all() and (few.lost == 0).all()
    for b in range(2):
        rows, count = np.unique(few.source[b, live[b]], return_counts=True)
        assert (few.pos[b, rows] >= 0).all() and len(rows) == (few.pos[b] >= 0).sum() < (whole.pos[b] >= 0).sum()
        assert (few.size[b, rows] >= count - 1e-5).all(), "a row counts its patches, those of the padding too"
        order = few.pos[b, few.pos[b] >= 0]
        assert (np.diff(order) > 0).all()


def test_a_traced_budget():
    """Of each picture; newlines apart."""
    _, params, case = model()
    out = embed("hired", params, case["pixels"], *prompts(), case["sizes"], keep={"select": np.array([[9, 3], [0, 6]])})
    full = done("hired")
    alive = lambda t, b: ((np.asarray(t.kind[b]) == IMAGE) | (np.asarray(t.kind[b]) == CROP)) & (np.asarray(t.pos[b]) >= 0)
    assert [alive(out, b).sum() <= most for b, most in enumerate((12, 6))] == [True, True]
    assert alive(out, 0).sum() < alive(full, 0).sum() and alive(out, 1).sum() < alive(full, 1).sum()
    assert all((out.kind[b] == SPECIAL).sum() == (full.kind[b] == SPECIAL).sum() for b in range(2)) and (out.lost == 0).all()


def test_rows_that_are_saved_and_a_compressed_cache():
    """The program is as long as the text and what is left of the largest pictures."""
    cfg, params, case = model()
    recipe = RECIPES["hired"].replace(cache=SnapKV(capacity=8, window=4))
    ids, live = np.pad(case["ids"], ((0, 0), (20, 0))), np.pad(case["live"], ((0, 0), (20, 0)))

    @jax.jit
    def read(params, pixels, sizes, ids, live):
        tokens = vlm.embed(cfg, params, pixels, ids, live, recipe, sizes=sizes)
        return decoder.prefill(cfg.text, params, tokens, recipe, new=4)

    tokens, layers = read(params, case["pixels"], case["sizes"], ids, live)
    assert tokens.x.shape[1] == 108 - 2 * (51 - 9 - 9), "n less what is taken from each picture"
    assert layers[0][0].kv.k.shape[2] == 12 and (tokens.lost == 0).all() and np.isfinite(tokens.x).all()


# --- what does not fit -------------------------------------------------------------------------------------------------


def test_placeholders_of_no_whole_picture_are_counted():
    cfg, params, case = model()
    (ids, live), pixels, sizes = prompts(), case["pixels"], case["sizes"]
    many = [[cfg.placeholders(size) for size in row] for row in sizes]
    at = np.flatnonzero(ids[0] == cfg.image_token)
    fewer = ids.copy()
    fewer[0, at[-1]] = 7
    few = embed("plain", params, pixels, fewer, live, sizes)
    assert few.lost.tolist() == [many[0][1] - 1, 0]
    assert (few.source[0, at[many[0][0] : -1]] == -1).all() and (few.source[0, at[: many[0][0]]] >= 0).all()
    gone = embed("plain", params, pixels, ids, live, sizes * np.array([[[1], [0]], [[1], [1]]], np.int32))  # no second picture
    assert gone.lost.tolist() == [many[0][1], 0]
    over = embed("plain", params, pixels, ids, live, sizes.clip(max=2**15) + np.array([[[0], [2**15]], [[0], [0]]], np.int32))
    assert over.lost.tolist() == [many[0][1], 0]


def test_a_picture_of_more_crops_than_there_is_room_for():
    """It is none, as one of size 0."""
    cfg, sizes = model()[0], np.array([[31, 17], [11, 40], [90, 11], [0, 9], [9, 2**15]], np.int32)
    plan = jax.jit(lambda s: anyres.layout(cfg.pinpoints, (12, 12), (3, 3), s, 4))(sizes)
    assert plan.many.tolist() == [0, cfg.placeholders((11, 40)), cfg.placeholders((90, 11)), 0, 0]
    assert plan.grid.tolist() == [[0, 0], [1, 3], [3, 1], [0, 0], [0, 0]]


def test_refused():
    cfg, params, case = model()
    ids, live, pixels, sizes = map(jnp.asarray, (*prompts(), case["pixels"], case["sizes"]))
    call = lambda *a, **k: vlm.embed(cfg, params, *a, **k)
    with pytest.raises(ValueError, match=r"llava_next takes \[b i p y x ch\] and sizes \[b i 2\]"):
        call(pixels, ids, live)
    with pytest.raises(ValueError, match="llava_next takes"):
        call(pixels[:, :, 0], ids, live, sizes=sizes)
    with pytest.raises(ValueError, match="2 pictures of 51 placeholders do not fit into 88 ids; pad ids to more"):
        call(pixels, ids, live, sizes=sizes)
    with pytest.raises(ValueError, match="the placeholders are those of"):
        call(pixels[..., :8, :], ids, live, sizes=sizes)
    with pytest.raises(ValueError, match=r"pictures in 2 sub-images; the smallest of .* has more"):
        call(pixels[:, :, :2], ids, live, sizes=sizes)
    with pytest.raises(ValueError, match="keeps class rows, which have no place in a picture in crops"):
        call(pixels, ids, live, Recipe(select=VisionZip(capacity=4, contextual=2, positions="keep")), sizes=sizes, rows=88)
    with pytest.raises(ValueError, match=r"pinpoint \(12, 30\) is no grid of crops of \(12, 12\) pixels"):
        dataclasses.replace(cfg, pinpoints=((12, 30),))
    with pytest.raises(ValueError, match="sides go from 1 to 32767"):
        cfg.placeholders((0, 5))
    plain = dataclasses.replace(cfg, pinpoints=(), family="llava")
    with pytest.raises(ValueError, match=r"llava takes \[b i y x ch\] and no sizes"):
        vlm.embed(plain, params, pixels[:, :, 0], ids, live, sizes=sizes)
