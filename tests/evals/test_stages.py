"""What became of a picture's patches: as the model itself says, for every method of the three sites; and how it is drawn."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from jaxtok import cli
from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.evals import pictures, stages
from jaxtok.methods import DivPrune, FastV, ToMe
from jaxtok.models import decoder, encoder, load, vlm
from jaxtok.models.config import Config, EncoderConfig
from tests.golden import make_vlm

VISION = EncoderConfig(
    family="clip_vision_model", width=16, layers=4, heads=2, hidden=16, image=(24, 24), patch=(4, 4), act="quick_gelu", stem_norm=True, patch_bias=False
)  # fmt: skip
TEXT = Config(vocab=16, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=16)
CFG = vlm.VlmConfig(vision=VISION, text=TEXT, until=3, image_token=15)
SIZES = stages.Sizes.of(CFG)
IDS = [1, 2, *[15] * 36, 3, 4, 5]
EVERY = [name for site in stages.SITES for name in registry.names(site)]
RUN = EVERY if os.environ.get("JAXTOK_FULL") else ["code_merge", "pool_rows"]


@pytest.fixture(scope="module")
def params():
    return vlm.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def image():
    return np.asarray(jax.random.normal(jax.random.key(1), (24, 24, 3)), np.float32)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("sizes", [SIZES, stages.Sizes((24, 24), 1, 23, 32)], ids=["small", "llava"])
def test_every_method_is_built_from_its_fields(name, sizes):
    recipe = stages.recipe_of([name], sizes, sizes.patches // 4)
    site = registry.get(name).site
    made = [(0, recipe.select)] if site == "select" else getattr(recipe, site)
    assert made and all(isinstance(m, registry.get(name)) for _, m in made)
    alone = recipe if name != "vflowopt.layers" else recipe.replace(select=None)  # whose map the tower's method makes
    assert alone == Recipe(**{site: recipe.select if site == "select" else made})
    recipe.validate_encoder(VISION if sizes is SIZES else VISION_L, sizes.tower)
    for place, method in made:
        if hasattr(method, "special") and not getattr(method, "cross", False):
            assert method.special == 1, "the class row"
        assert site == "select" or 0 < place < (sizes.layers if site == "layers" else sizes.tower)


VISION_L = EncoderConfig(family="clip_vision_model", width=16, layers=24, heads=2, hidden=16, image=(336, 336), patch=(14, 14))


@pytest.mark.parametrize("name", RUN)
def test_every_method_runs(name, params, image):
    found = stages.stages(CFG, params, image, IDS, stages.recipe_of([name], SIZES, 9))
    for stage in found:
        assert stage.group.shape == (6, 6) and sum(stage.counts[k] for k in ("kept", "merged", "dropped")) == 36
        assert stage.counts["kept"] + stage.counts["groups"] <= stage.rows, "rows without a patch are rare, the converse cannot be"
    assert found[-1].rows <= 18 or getattr(registry.get(name), "floor", False), "about the budget, where a method has one"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two numberings say which patches are together and which are gone."""
    together = lambda x: (x[:, None] == x[None]) & (x >= 0)[:, None]
    return bool((together(a.reshape(-1)) == together(b.reshape(-1))).all())


def test_stages_are_what_the_model_does(params, image):
    """Each stage equals `source` of a run of the model whose recipe ends there."""
    recipe = stages.recipe_of(["fastv:keep=6", "tome:places=1+2", "divprune:keep=10"], SIZES, 6)
    assert recipe.select == DivPrune(capacity=10) and recipe.layers == ((1, FastV(capacity=6, images=10)),)
    assert [(k, type(m)) for k, m in recipe.vit] == [(1, ToMe), (2, ToMe)]
    found = stages.stages(CFG, params, image, IDS, recipe)
    assert [(s.site, s.place, s.method, s.rows) for s in found[2:]] == [("select", 0, "divprune", 10), ("layers", 1, "fastv", 6)]
    inputs = jnp.asarray(image)[None, None], jnp.asarray([IDS])
    assert "in tower layer 2, behind" in found[1].where and not any(s.untrained for s in found)

    @jax.jit
    def ends(params):
        chosen = vlm.embed(CFG, params, *inputs, recipe=recipe, key=jax.random.key(0), proportional=True)
        last, _ = decoder.prefill(TEXT, params, chosen, recipe, new=0)
        return [t.source[0, 2:38] for t in (chosen, last)]

    for stage, want in zip(found[2:], ends(params), strict=True):
        assert same(stage.group, np.asarray(want)), stage.where
    assert found[0].counts["kept"] + found[0].counts["groups"] == found[0].rows > found[1].rows > 10


def test_inside_of_what_is_undone(params, image):
    """Behind a place inside a reduction that is undone later, a patch is where its group went."""
    specs = ["token_transforming:restore=3,places=1,keep=12", "tome:places=2,keep=9", "divprune:keep=8"]
    outer, inner, chosen = stages.stages(CFG, params, image, IDS, stages.recipe_of(specs, SIZES, 8))
    assert outer.rows == 12 and outer.where.endswith("undone before layer 3") and inner.rows < 12
    for name in range(36):
        mask = outer.group == name
        assert len(set(inner.group[mask].tolist())) <= 1, "a group went to two"
    assert chosen.counts["dropped"] == 28 and chosen.counts["kept"] == 8, "the tower's rows are all there again"


def test_the_number_of_rows_falls_by_equal_factors():
    recipe = stages.recipe_of(["dynamicvit:places=1+2", "random_rows", "fastv"], SIZES, 9)
    left = [m.capacity for _, m in recipe.vit] + [recipe.select.capacity, recipe.layers[0][1].capacity]  # type: ignore[union-attr]
    assert left == [25, 18, 13, 9]
    one = stages.recipe_of(["turbo"], SIZES, 12)
    assert {m for _, m in one.vit} == {one.vit[0][1]} and one.vit[0][1].remove == 12, "a state that goes along: one method"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nope"], "unknown method 'nope'"),
        (["snapkv"], "snapkv acts at site 'cache'; what can be drawn are methods of vit, select, layers"),
        (["divprune", "fopru"], "one method can act at the tower's output, got divprune, fopru"),
        (["divprune:places=2"], "places are layers, as in places=1.3, of methods between layers"),
        (["fastv:query=none"], "query"),
        (["fastv:keep=50"], "50 rows of a picture of 36 patches"),
        ([], "no method; known: code_merge"),
    ],
)
def test_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        stages.recipe_of(specs, SIZES, 9)


def test_an_encoder_alone(image):
    own = encoder.init(VISION, jax.random.key(0))
    sizes = stages.Sizes.of(VISION)
    with pytest.raises(ValueError, match="fastv acts between a decoder's layers, and the model is an encoder"):
        stages.recipe_of(["fastv"], sizes, 9)
    with pytest.raises(ValueError, match=r"catp\.select looks at the text beside the picture; an encoder has none"):
        stages.stages(VISION, own, image, None, stages.recipe_of(["catp.select"], sizes, 9))
    (stage,) = stages.stages(VISION, own, image, None, stages.recipe_of(["random_rows"], sizes, 9))
    assert stage.counts == {"kept": 9, "merged": 0, "groups": 0, "dropped": 27, "rows": 9}
    with pytest.raises(ValueError, match="needs the 36 placeholders of one picture"):
        stages.stages(CFG, vlm.init(CFG, jax.random.key(0)), image, IDS[:-9], Recipe())


# --- drawing -------------------------------------------------------------------------------------------------------------


def test_paint():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2, :2], picture[2:, :2], picture[:2, 2:] = 200, 90, 30  # the fourth patch is black
    out = pictures.paint(picture, np.array([[5, -1], [7, 7]]), 40)
    assert out.shape == (40, 40, 3) and (out[:20, :20] == 200).all(), "kept"
    assert (out[:20, 20:] == np.round(0.22 * 30 + 0.78 * pictures.VEIL)).all(), "dropped"
    assert (out[23:37, 3:37] == 45).all(), "merged: the mean"
    for edge in (out[20:22], out[38:], out[20:, :2], out[20:, 38:]):
        assert (edge == pictures.colour(0)).all(), "drawn around"
    assert pictures.crop(np.zeros((9, 11, 3), np.uint8), (2, 3)).shape == (8, 9, 3)


def test_counts_in_words():
    stage = stages.Stage("vit", 1, "tome", "", np.array([[0, 0, 1], [2, -1, 0]]), 3, False)
    assert stage.counts == {"kept": 2, "merged": 3, "groups": 1, "dropped": 1, "rows": 3}
    assert pictures.told(stage) == "of 6 patches 2 kept, 3 merged into 1, 1 dropped; 3 rows go on"


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("show") / "picture.png"
    y, x = np.mgrid[:40, :50]
    PIL.Image.fromarray(np.stack([5 * x, 6 * y, 3 * (x + y) % 256], -1).astype(np.uint8)).save(path)
    return str(path)


def test_show(photo, tmp_path, capsys):
    folder = str(make_vlm.FOLDER / "llava")
    argv = ["show", photo, "--model", folder, "--out", str(tmp_path), "--keep", "4", "--method", "divprune:keep=6", "--method", "fastv"]
    assert cli.main([*argv, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(e["method"], e["kept"], e["dropped"]) for e in entries] == [("divprune", 6, 3), ("fastv", 4, 5)]
    for entry in entries:
        with PIL.Image.open(entry["file"]) as made:
            assert made.size[0] == 680 and len(made.getcolors(2**20)) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1_select_divprune.png", "2_layers1_fastv.png"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "no preprocessor_config.json" in said and "of 9 patches 4 kept, 5 dropped; 4 rows go on" in said


def test_show_an_encoder(photo, tmp_path, capsys):
    load.save(tmp_path / "vit", VISION, encoder.init(VISION, jax.random.key(0)))
    argv = ["show", photo, "--model", str(tmp_path / "vit"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--method", "random_rows"]) == 0
    assert (tmp_path / "out" / "1_select_random_rows.png").is_file()
    capsys.readouterr()
    for more, message in (
        (["--method", "fastv"], "the model is an encoder"),
        (["--method", "tome", "--question", "what?"], "leave --question out"),
        ([], "show needs --method NAME"),
        (["--method", "tome", "--keep", "0"], "budget '0'"),
        (["--method", "tome", "--keep", "99"], "99 rows of a picture of 36 patches"),
    ):
        assert cli.main([*argv, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("jaxtok: ") and said.count("\n") == 1 and message in said
    for name in ("none.png", str(tmp_path)):
        assert cli.main(["show", name, *argv[2:], "--method", "tome"]) == 2
        assert "is no picture that can be read" in capsys.readouterr().err
