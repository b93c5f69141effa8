"""Encoders of Hugging Face checkpoints: the outputs of transformers, from golden files always and live where torch is installed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtok.models import encoder, hf_encoders, load, vit
from jaxtok.models.config import EncoderConfig
from tests.golden import make_encoders
from tests.models import encoders as files

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", files.NAMES)
def test_outputs_equal_transformers(name):
    """Rows behind the last layer and outputs, in batches of three; images of another size; text rows padded."""
    golden = files.read(name)
    for cfg, params in golden.towers.values():
        got = files.outputs(cfg, params, golden.case)
        off = files.errors(got, golden.case)
        assert off.keys() == got.keys() - {"wide_rows"} and max(off.values()) <= TOLERANCE, off
        assert all(golden.case[key].std() > 0.5 for key in off), "the case is too weak to show an error"


def test_golden_files_cover_the_families():
    cases = [cfg for name in files.NAMES for cfg, _ in files.read(name).towers.values()]
    assert {c.family for c in cases} == set(hf_encoders.FAMILIES)
    assert {c.pool for c in cases} == {"cls", "cls_dist", "cls_mean", "mean", "map", "eos"}
    assert any(c.gated for c in cases) and any(c.registers for c in cases) and any(not c.qkv_bias for c in cases)
    assert any(c.image and c.image[0] % c.patch[0] for c in cases), "none leaves pixels over"
    assert sum(p.stat().st_size for p in files.FOLDER.rglob("*") if p.is_file()) < 0.8e6


@pytest.mark.parametrize(
    "name, tower, change",
    [
        ("vit", "vision", dict(act="gelu_tanh")),
        ("vit", "vision", dict(norm_eps=1e-2)),
        ("dinov2", "vision", dict(antialias=True)),
        ("dinov2_registers", "vision", dict(antialias=False)),
        ("clip", "text", dict(causal=False)),
        ("clip", "text", dict(act="gelu")),
        ("clip_vision", "vision", dict(stem_norm=False)),
        ("clip_old_eos", "text", dict(eos=2)),
    ],
)
def test_the_golden_files_see_each_feature(name, tower, change):
    golden = files.read(name)
    cfg, params = golden.towers[tower]
    case = golden.case | ({"live": np.ones_like(golden.case["live"])} if "eos" in change else {})
    off = files.errors(files.outputs(dataclasses.replace(cfg, **change), params, case), golden.case)
    assert max(off.values()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_pair_of_towers(name):
    case = files.read(name).case
    pair = load.load_pair(files.FOLDER / name, dtype="float32")
    image, text = files.outputs(*pair.vision, case)["out"], files.outputs(*pair.text, case)["text_out"]
    got = vit.similarity(jnp.asarray(image), jnp.asarray(text), pair.scale, pair.bias)
    np.testing.assert_allclose(got, case["similarity"], atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"no encoder that is supported|no pair"):
        load.load_pair(files.FOLDER / "clip_vision")


def test_a_row_of_ids_ends_with_its_end():
    """Padding with the end, and no mask: the same output and the same live rows as with the mask."""
    golden = files.read("clip")
    cfg, params = golden.towers["text"]
    with_mask = vit.embed_text(cfg, params, jnp.asarray(golden.case["ids"]), jnp.asarray(golden.case["live"]))
    without = vit.embed_text(cfg, params, jnp.asarray(golden.case["ids"]))
    jax.tree.map(np.testing.assert_array_equal, with_mask, without)
    assert with_mask.seen.tolist() == [12, 7, 4]
    with pytest.raises(ValueError, match="13 token ids for a text tower of 12 positions"):
        vit.embed_text(cfg, params, jnp.zeros((1, 13), jnp.int32))


def test_bf16():
    """Parameters in bfloat16 give bfloat16 rows and float32 logits near those of float32."""
    golden = files.read("vit")
    cfg, params = load.load_encoder(files.FOLDER / "vit")
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    x, logits = files.see(cfg, params, jnp.asarray(golden.case["pixels"]))
    assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert 0 < np.abs(logits - golden.case["out"]).max() < 0.2


@pytest.mark.parametrize("name", files.NAMES)
def test_save_and_load(name, tmp_path):
    for tower, (cfg, params) in files.read(name).towers.items():
        load.save(tmp_path / tower, cfg, params)
        again, back = load.load_encoder(tmp_path / tower, tower=tower)
        assert again == cfg
        jax.tree.map(np.testing.assert_array_equal, back, params)


# --- files that lie ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(files.FOLDER / "vit", tmp_path / "vit")


def refused(folder, match, **options):
    with pytest.raises(ValueError, match=match) as e:
        load.load_encoder(folder, **options)
    assert "\n" not in str(e.value) and str(e.value).count(str(folder)) <= 1


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(model_type="beit"), "model_type 'beit' is no encoder that is supported; supported: clip, siglip, vit"),
        (dict(hidden_act="mish"), "activation 'mish' is not supported"),
        (dict(hidden_size="24"), "hidden_size='24' should be int"),
        (dict(hidden_size=25), "config.json: width=25"),
        (dict(image_size=[16]), r"image_size=\[16\] should be a size in pixels"),
        (dict(image_size=2), "must have room for a patch"),
        (dict(num_hidden_layers=10**6), "is absurd"),
        (dict(num_hidden_layers=3), "missing: vit.encoder.layer.2.*16 tensors|missing: vit.encoder.layer.2"),
        (dict(num_hidden_layers=1), "unexpected: vit.encoder.layer.1"),
        (
            dict(intermediate_size=41, num_channels=1),
            r"misshaped: .*projection.weight is BF16 \[24, 3, 4, 4\], should be .* \[24, 1, 4, 4\]",
        ),
        (dict(quantization_config={"bits": 4}), "quantization_config is not supported"),
    ],
)
def test_wrong_configurations(folder, changes, match):
    edit(folder, **changes)
    refused(folder, match)


def test_all_wrong_tensors_in_one_error(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["vit.layernorm.bias"]
    tensors["vit.layernorm.weight"] = tensors["vit.layernorm.weight"][:3]
    tensors["more"] = tensors["vit.layernorm.weight"]
    tensors["vit.embeddings.mask_token"] = tensors["vit.pooler.dense.weight"] = tensors["more"]  # these are nothing to us
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    refused(folder, r"missing: vit.layernorm.bias; unexpected: more; misshaped: vit.layernorm.weight is BF16 \[3\], should be .* \[24\]$")


def test_other_errors(folder):
    refused(folder, "tower='audio'; choose one of vision, text", tower="audio")
    refused(folder, "dtype=int8 is no floating type", dtype="int8")
    refused(folder.parent, "is no encoder's checkpoint")
    with pytest.raises(ValueError, match=r"holds an encoder \(vit\); models.load.load_encoder loads it"):
        load.load(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    safetensors.numpy.save_file(tensors | {"x." + name: tensors[name]}, folder / "model.safetensors")
    refused(folder, "2 tensors are named ...embeddings.patch_embeddings.projection.weight: vit., x.vit.; which encoder is meant")


def test_save_refuses_what_a_family_cannot_express(tmp_path):
    cfg, params = files.read("vit").towers["vision"]
    for changes, match in (
        (dict(layer_scale=True), "a vit checkpoint cannot express layer_scale=True"),
        (dict(family="own"), "family 'own' has no Hugging Face format"),
        (dict(out=6), r"params do not fit cfg: head is \(24, 5\), cfg says \(24, 6\)"),
    ):
        with pytest.raises(ValueError, match=match):
            load.save(tmp_path, dataclasses.replace(cfg, **changes), params)
    assert not list(tmp_path.iterdir())


def test_the_vision_tower_of_a_larger_model(tmp_path):
    """Whatever else its checkpoint holds is not read."""
    source = files.FOLDER / "clip_vision"
    raw = json.loads((source / "config.json").read_text())
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    body = {"model.vision_tower." + k: v for k, v in tensors.items() if k.startswith("vision_model")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": raw, "text_config": {"model_type": "llama"}}))
    safetensors.numpy.save_file(body | {"model.language_model.x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    cfg, params = load.load_encoder(tmp_path, dtype=jnp.float32)
    assert cfg.out is None and cfg.family == "clip_vision_model"
    golden = files.read("clip_vision")
    x, _ = files.see(cfg, params, jnp.asarray(golden.case["pixels"]))
    np.testing.assert_allclose(x, golden.case["rows"], atol=TOLERANCE)


# --- published configurations -----------------------------------------------------------------------------------------

SO400M = dict(hidden_size=1152, image_size=384, intermediate_size=4304, model_type="siglip_vision_model", num_attention_heads=16,
              num_hidden_layers=27, patch_size=14)  # fmt: skip


@pytest.mark.parametrize(
    "raw, tower, millions, want",
    [
        (dict(model_type="vit", image_size=224, patch_size=16), "vision", 85.8, dict(grid=(14, 14), norm_eps=1e-12)),
        (dict(model_type="clip", vision_config=dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
              patch_size=14, image_size=336), text_config={}), "vision", 303.5, dict(grid=(24, 24), act="quick_gelu")),
        (dict(model_type="clip", text_config={"eos_token_id": 2}, text_config_dict={"hidden_size": 768, "intermediate_size": 3072,
              "num_attention_heads": 12}), "text", 123.1, dict(eos=-1, causal=True)),
        (SO400M, "vision", 428.2, dict(grid=(27, 27), pool="map")),
        (dict(model_type="siglip", vision_config=SO400M, text_config=None), "text", 109.7, dict(context=64, pool="eos", eos=None)),
        (dict(model_type="dinov2", hidden_size=1536, num_attention_heads=24, num_hidden_layers=40, image_size=518, use_swiglu_ffn=True),
         "vision", 1136.5, dict(hidden=4096, act="silu", grid=(37, 37))),
    ],
)  # fmt: skip
def test_published_sizes(raw, tower, millions, want):
    """Parameters counted from shapes: ViT-B/16, CLIP L/14-336 and its text tower, SigLIP so400m, DINOv2 giant."""
    cfg = hf_encoders.config_from_hf(raw, tower)
    assert {k: getattr(cfg, k) for k in want} == want
    count = sum(
        int(np.prod(s)) for s in jax.tree.leaves(encoder.shapes(cfg), is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int))
    )
    assert round(count / 1e6, 1) == millions


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="live parity needs the parity extra: torch")
    module = pytest.importorskip("transformers", reason="live parity needs the parity extra: transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize("name", make_encoders.CASES)
def test_live(transformers, tmp_path, name):
    """A fresh random model: its saved directory gives its outputs; saved by us, transformers reads the same model back."""
    seed = 1000 + list(make_encoders.CASES).index(name)
    model = make_encoders.build(name, seed)
    data = make_encoders.batch(name, seed)
    want = make_encoders.outputs(model, data)
    model.save_pretrained(tmp_path / "theirs")
    for tower in files.towers(want):
        cfg, params = load.load_encoder(tmp_path / "theirs", tower=tower)
        off = files.errors(files.outputs(cfg, params, want), want)
        print(f"{name} {tower}: max |difference| {off}")
        assert max(off.values()) <= TOLERANCE
        load.save(tmp_path / tower, cfg, params)
        kind = getattr(transformers, json.loads((tmp_path / tower / "config.json").read_text())["architectures"][0])
        back, info = kind.from_pretrained(tmp_path / tower, attn_implementation="eager", output_loading_info=True)
        unread = ("pooler", "mask_token", "vision_model.head", "post_layernorm")  # what load_encoder leaves out
        assert not [k for k in info["missing_keys"] if not any(u in k for u in unread)]
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        got = make_encoders.outputs(back.float().eval(), data)
        for key in got.keys() & off.keys():
            np.testing.assert_allclose(got[key], want[key], atol=1e-5, err_msg=key)


def test_a_config_of_its_own():
    """A width that its heads do not share out, and images that are no squares."""
    cfg = EncoderConfig(width=6, inner=8, heads=2, layers=1, hidden=4, image=(2, 5), patch=(1, 5), channels=2, out=3)
    params = encoder.init(cfg, jax.random.key(0))
    _, logits = files.see(cfg, params, jnp.ones((2, 2, 5, 2)))
    assert logits.shape == (2, 3) and cfg.head_dim == 4 and params["layers"][0]["o"].shape == (8, 6)
    with pytest.raises(ValueError, match="must be a multiple of heads=2"):
        dataclasses.replace(cfg, inner=7)
    with pytest.raises(ValueError, match=r"images are \[2, 2, 4, 2\]"):
        vit.forward(cfg, params, jnp.ones((2, 2, 4, 2)))
