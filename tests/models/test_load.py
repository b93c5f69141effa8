"""Loading and saving: configurations, both formats, the real small checkpoint, and files that lie."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtok.models import blocks, hf, load, tensors, text
from jaxtok.models.config import Config, RopeScaling
from tests.models import golden as files

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


# --- config.json ------------------------------------------------------------------------------------------------------

LLAMA31 = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], tie_word_embeddings=False,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"),
)  # fmt: skip
GEMMA3 = dict(
    model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, max_position_embeddings=32768, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=1000000,
    rope_local_base_freq=10000, rope_scaling=None, sliding_window=512, sliding_window_pattern=6, bos_token_id=2, eos_token_id=[1, 106],
)  # fmt: skip


def test_published_llama31():
    want = Config(
        family="llama", vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, hidden=14336, context=131072,
        rope_theta=500000.0, bos=128000, eos=(128001, 128008, 128009), rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    )  # fmt: skip
    assert hf.config_from_hf(LLAMA31) == want
    # transformers 5 spells it so
    new = {k: v for k, v in LLAMA31.items() if k not in ("rope_theta", "rope_scaling")}
    assert hf.config_from_hf(new | {"rope_parameters": LLAMA31["rope_scaling"] | {"rope_theta": 500000.0}}) == want
    old = LLAMA31["rope_scaling"] | {"type": "llama3"}
    del old["rope_type"]
    assert hf.config_from_hf(LLAMA31 | {"rope_scaling": old}) == want


def test_published_gemma3():
    got = hf.config_from_hf(GEMMA3)
    assert got.local == tuple((i + 1) % 6 != 0 for i in range(26)) and got.window == 512
    assert (got.rope_theta, got.rope_theta_local, got.rope_scaling) == (1e6, 1e4, None)
    assert got.tied and got.qk_norm and got.sandwich and got.norm_offset == 1.0 and got.scale == 1 / 16 and got.eos == (1, 106)
    assert (got.act, got.embed_scale, got.softcap, got.logit_softcap, got.kv_heads) == ("gelu_tanh", 1152**0.5, None, None, 1)
    new = {k: v for k, v in GEMMA3.items() if not k.startswith("rope") and k != "sliding_window_pattern"}
    new["layer_types"] = ["sliding_attention" if x else "full_attention" for x in got.local]
    new["rope_parameters"] = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert hf.config_from_hf(new) == got
    scaled = hf.config_from_hf(GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled == dataclasses.replace(got, rope_scaling=RopeScaling(kind="linear", factor=8.0))


@pytest.mark.parametrize(
    "family, raw, want",
    [
        ("llama", {}, dict(kv_heads=4, head_dim=8, norm_eps=1e-6, context=2048, tied=False, bos=1, eos=(2,), window=None, local=())),
        ("mistral", {}, dict(kv_heads=8, window=4096, local=(True, True), context=131072)),
        ("mistral", {"sliding_window": None}, dict(window=None, local=())),
        ("qwen2", {"num_key_value_heads": 2}, dict(qkv_bias=True, window=None, local=(), bos=None, eos=())),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, dict(window=6, local=(False, True))),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6}, dict(window=None, local=())),  # max_window_layers=28
        ("qwen3", {}, dict(qk_norm=True, head_dim=128, qkv_bias=False)),
        ("gemma2", {}, dict(head_dim=256, kv_heads=4, softcap=50.0, logit_softcap=30.0, scale=1 / 16, window=4096, local=(True, False), tied=True)),
        ("gemma2", {"attn_logit_softcapping": None, "query_pre_attn_scalar": 144}, dict(softcap=None, scale=1 / 12)),
        ("gemma3_text", {}, dict(rope_theta=1e6, rope_theta_local=1e4, local=(True, True), norm_eps=1e-6)),
        ("phi3", {}, dict(norm_eps=1e-5, eos=(32000,), rotary_dim=None, window=None)),
        ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": 7}, dict(rotary_dim=6, window=7, local=(True, True))),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4}}, dict(rope_scaling=RopeScaling(kind="linear", factor=4.0))),
        ("llama", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, dict(window=None, local=())),  # transformers ignores it
    ],
)  # fmt: skip
def test_silent_configs_mean_what_transformers_says(family, raw, want):
    heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, 4)  # its silent num_key_value_heads
    got = hf.config_from_hf(SIZE | {"model_type": family, "num_attention_heads": heads, "hidden_size": 8 * heads} | raw)
    assert {k: getattr(got, k) for k in want} == want


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported: llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope scaling 'longrope' is not supported; supp"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' should be an object"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; supported: silu"),
        ({"hidden_size": None}, "hidden_size=None should be int"),
        ({"hidden_size": "32"}, "hidden_size='32' should be int"),
        ({"hidden_size": True}, "hidden_size=True should be int"),
        ({"hidden_size": 0}, "hidden_size=0 is out of range"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers=100000000 is absurd"),
        ({"vocab_size": 10**30}, "vocab_size=1000000000000000000000000000000 is out of range"),
        ({"num_attention_heads": 3}, "hidden_size=32 is no multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is out of range"),
        ({"rope_theta": 0}, "rope_theta=0 is out of range"),
        ({"head_dim": 7}, "7 rotated channels of head_dim=7"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is supported for phi3 only"),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["sliding_attention"] * 2}, "no sliding_window is in force"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types should be 2 of full_attention, sliding_attention"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' should be int or list or null"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id=['</s>'] should be a list of int"),
    ],
)  # fmt: skip
def test_unsupported_configs(change, message):
    with pytest.raises(ValueError) as e:
        hf.config_from_hf(SIZE | {"model_type": "llama"} | change)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_missing_key():
    with pytest.raises(ValueError, match=r"config\.json lacks hidden_size"):
        hf.config_from_hf({k: v for k, v in SIZE.items() if k != "hidden_size"} | {"model_type": "llama"})


@pytest.mark.parametrize("name", files.NAMES)
def test_config_round_trip(name):
    cfg = files.read(name).cfg
    assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(cfg)))) == cfg


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qk_norm=True), "a llama checkpoint cannot express qk_norm=True"),
        (dict(softcap=5.0, embed_scale=2.0), r"softcap=5\.0, embed_scale=2\.0"),
        (dict(window=4, local=(True, False)), "window=4, local="),
        (dict(family="byte"), "family 'byte' has no Hugging Face format; choose one of llama"),
    ],
)
def test_config_that_no_family_expresses(change, message):
    with pytest.raises(ValueError, match=message):
        hf.config_to_hf(dataclasses.replace(files.read("llama_mha").cfg, **change))


# --- Hugging Face directories -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A copy of a good tiny checkpoint, to be spoiled."""
    shutil.copytree(files.FOLDER / "llama31_gqa", tmp_path / "model")
    return tmp_path / "model"


def refused(path, *messages, **options):
    with pytest.raises(ValueError) as e:
        load.load(path, **options)
    said = str(e.value)
    assert "\n" not in said and all(m in said for m in messages), said
    return said


@pytest.mark.parametrize("name", ["phi3_gqa", "gemma3_text_gqa", "qwen2_window_mha"])
def test_save_and_load(name, tmp_path, monkeypatch):
    """Same config, bit-equal arrays; in shards, from stacked layers, in bfloat16 too."""
    case = files.read(name)
    load.save(tmp_path / "one", case.cfg, case.params)
    cfg, params, tokenizer = load.load(tmp_path / "one")
    assert cfg == case.cfg and tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    load.save(tmp_path / "one", case.cfg, case.params)  # in place

    monkeypatch.setattr(tensors, "SHARD_BYTES", 9000)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.params)
    load.save(tmp_path / "many", case.cfg, blocks.stack(half))
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    cfg, params, _ = load.load(tmp_path / "many")
    assert cfg == case.cfg and {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), params, half)
    with pytest.raises(ValueError, match=r"holds other weights \(model\.safetensors\)"):
        load.save(tmp_path / "one", case.cfg, case.params)


def test_save_refuses_parameters_of_another_config(tmp_path):
    case = files.read("llama_mha")
    with pytest.raises(ValueError, match=r"params do not fit cfg: head is \(32, 64\), cfg says none"):
        load.save(tmp_path, dataclasses.replace(case.cfg, tied=True), case.params)
    assert not list(tmp_path.iterdir())


def test_dtype_progress_and_sharding(folder):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    row, all_ = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("x", None), jax.P()))
    seen = []
    cfg, params, _ = load.load(
        folder, dtype="float16", sharding={r"layers/\d+/[qkv]$": row, ".*": all_}, progress=lambda *a: seen.append(a)
    )
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float16")}
    assert params["layers"][1]["k"].sharding == row and params["layers"][1]["o"].sharding == all_ == params["embed"].sharding
    total = len(hf.table(cfg))
    assert [a[:2] for a in seen] == [(i + 1, total) for i in range(total)] and seen[0][2] == "model.embed_tokens.weight"
    assert load.load(folder, sharding=all_)[1]["norm"].sharding == all_
    with jax.set_mesh(mesh):
        assert load.load(folder, sharding={"": jax.P()})[1]["norm"].sharding == all_
    refused(folder, "no pattern of sharding matches embed; end the table with '.*'", sharding={"layers": all_})
    refused(folder, "dtype=int8 is no floating type", dtype="int8")


def test_all_wrong_tensors_in_one_error(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    # these two say nothing
    tensors["lm_head.weight"], tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = (
        np.zeros((64, 32), np.float32),
        np.zeros(4, np.float32),
    )
    safetensors.numpy.save_file(tensors, file)
    said = refused(
        folder,
        "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight;",
        "unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight;",
        "model.layers.0.self_attn.q_proj.weight is F32 [32, 31], should be F64/F32/F16/BF16 [32, 32]",
        "model.layers.0.mlp.up_proj.weight is I8 [48, 32]",
    )
    assert "lm_head" not in said and "inv_freq" not in said


def test_generation_config_and_tokenizers(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    score = text.ScoreTokenizer([b"x"] * 259, [0.0] * 259)
    score.save(folder)
    cfg, _, tokenizer = load.load(folder)
    assert cfg.eos == (5, 6) and isinstance(tokenizer, text.ScoreTokenizer)
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json is not a tokenizer.json")


def test_hub(monkeypatch, folder):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub extra")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **k: asked.append(name) or str(folder))
    assert load.load("some-owner/some-model")[0] == files.read("llama31_gqa").cfg and asked == ["some-owner/some-model"]

    def offline(name, **_):
        raise RuntimeError("cannot reach the hub\nmore text")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    refused("some-owner/some-model", "some-owner/some-model is no local path, and the hub did not give it: cannot reach the hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("some-owner/some-model", "pip install 'jaxtok[hub]'")
    refused("./nowhere/at/all", "no checkpoint at ./nowhere/at/all: no such file or directory")


# --- files that lie ---------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickles(mark):
    for protocol in (2, 5):
        yield pickle.dumps(Bomb(mark), protocol)
    yield b"PK\x03\x04" + pickle.dumps(Bomb(mark))  # torch.save's zip


def test_pickles_are_never_opened(folder, tmp_path):
    mark = tmp_path / "exploded"
    for raw in pickles(mark):
        (folder / "model.safetensors").write_bytes(raw)
        refused(folder, "model.safetensors is a pickle (torch.save) named safetensors, which is never opened")
        (tmp_path / "weights.bin").write_bytes(raw)
        refused(tmp_path / "weights.bin", "weights.bin is a pickle (torch.save), which is never opened")
        refused(tmp_path, "weights.bin is a pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has pickled weights only, which are never opened")
    assert not mark.exists()


def test_spoiled_safetensors(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    cuts = [0, 7, 8, 9, size, size + 8, len(good) // 2, len(good) - 1]
    for raw in [good[:n] for n in cuts] + [
        struct.pack("<Q", 2**62) + good[8:],
        struct.pack("<Q", size - 1) + good[8:],
        good[:8] + b"[" + good[9:],
        good + b"tail",
        b"\x00" * 4096,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ]:
        file.write_bytes(raw)
        refused(folder, "model.safetensors is not a safetensors file or is cut off")
    rng = np.random.default_rng(0)
    for _ in range(200):  # any byte of the header may be wrong: it loads the same shapes or is refused, nothing else
        raw = bytearray(good)
        raw[rng.integers(0, size + 8)] = rng.integers(0, 256)
        file.write_bytes(raw)
        try:
            load.load(folder)
        except ValueError as e:
            assert "\n" not in str(e)


def test_spoiled_folders(folder):
    config = folder / "config.json"
    good = config.read_text()
    for junk, message in [
        ("", "is not JSON"),
        (good[:40], "is not JSON"),
        ("[1]", "holds a list"),
        ("[" * 10**5, "is not JSON"),
        ('"\ud800"', "holds a str"),
    ]:
        config.write_bytes(junk.encode("utf-8", "surrogatepass"))
        refused(folder, "config.json", message if "\ud800" not in junk else "config.json")
    config.write_text(good)
    index = folder / "model.safetensors.index.json"
    for weights, message in [
        ({"a": "../other.safetensors"}, "names '../other.safetensors', which is no safetensors file of the same folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"a": "model.bin"}, "names 'model.bin'"),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors, which its index names"),
        ({"a": 3}, "has no weight_map"),
        ({}, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weights}))
        refused(folder, message)
    index.unlink()
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    refused(folder, "has 2 safetensors files but neither")
    for p in folder.glob("*.safetensors"):
        p.unlink()
    refused(folder, "has a config.json but no safetensors file")
    config.unlink()
    refused(folder, "is no checkpoint: need config.json with safetensors, or one llama2.c .bin; found neither")


# --- llama2.c ---------------------------------------------------------------------------------------------------------

HEADER = (16, 24, 2, 4, 2, -300, 32)  # width, hidden, layers, heads, kv_heads, vocab (negative: a head of its own), context


def llama2c_file(path, header=HEADER, seed=0):
    """A random legacy checkpoint, and its weights by name as llama2.c lays them out."""
    c, f, l, h, g, vocab, n = header
    d = c // h
    rng = np.random.default_rng(seed)
    layout = dict(
        embed=(abs(vocab), c), attn_norm=(l, c), q=(l, h * d, c), k=(l, g * d, c), v=(l, g * d, c), o=(l, c, h * d), mlp_norm=(l, c),
        gate=(l, f, c), down=(l, c, f), up=(l, f, c), norm=(c,), tables=(n, d),
    )  # fmt: skip
    layout |= {"head": (abs(vocab), c)} if vocab < 0 else {}
    weights = {k: rng.normal(size=s).astype(np.float32) for k, s in layout.items()}
    path.write_bytes(struct.pack("<7i", *header) + b"".join(w.tobytes() for w in weights.values()))
    return weights


def interleaved(x, pos):
    """llama2.c's rotation of one head [d]: channel 2i against 2i + 1."""
    d = len(x)
    z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * pos * 10000.0 ** (-np.arange(0, d, 2) / d))
    return np.stack([z.real, z.imag], 1).reshape(d)


def test_llama2c_layout(tmp_path):
    """Every tensor in its place; scores under our half-split rotation equal llama2.c's interleaved ones."""
    w = llama2c_file(tmp_path / "model.bin")
    cfg, params, tokenizer = load.load(tmp_path)  # a directory with one .bin
    assert tokenizer is None
    assert cfg == Config(
        family="llama", vocab=300, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, context=32, bos=1, eos=(1, 2)
    )
    for i in range(2):
        for name in ("v", "o", "gate", "up", "down"):
            np.testing.assert_array_equal(params["layers"][i][name], w[name][i].T)
        for name in ("attn_norm", "mlp_norm"):
            np.testing.assert_array_equal(params["layers"][i][name], w[name][i])
    np.testing.assert_array_equal(params["embed"], w["embed"])
    np.testing.assert_array_equal(params["norm"], w["norm"])
    np.testing.assert_array_equal(params["head"], w["head"].T)
    x = np.random.default_rng(1).normal(size=16).astype(np.float32)
    for i in range(2):
        q, k = (x @ np.asarray(params["layers"][i][n]) for n in "qk")
        q, k = (blocks.rotate(cfg, i, jnp.asarray(y).reshape(1, -1, 1, 4), jnp.full((1, 1), pos, jnp.int32)) for y, pos in ((q, 9), (k, 4)))
        got = q[0, :, 0] @ k[0, :, 0].T  # [h g]
        old_q, old_k = (w["q"][i] @ x).reshape(4, 4), (w["k"][i] @ x).reshape(2, 4)
        want = [[interleaved(a, 9) @ interleaved(b, 4) for b in old_k] for a in old_q]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    half = load.load(tmp_path / "model.bin", dtype=jnp.bfloat16)[1]
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_spoiled_llama2c(tmp_path):
    file = tmp_path / "model.bin"
    llama2c_file(file)
    good = file.read_bytes()
    for n in (0, 3, 27, 28, 1000, len(good) - 1):
        file.write_bytes(good[:n])
        refused(file, "is no llama2.c checkpoint")
    file.write_bytes(good + b"x")
    refused(
        file, f"{len(good) + 1} bytes, its header (width=16 hidden=24 layers=2 heads=4 kv_heads=2 vocab=-300 context=32) needs {len(good)}"
    )
    big = 2**31 - 1
    for header in [(big,) * 7, (16, big, big, 4, 2, big, big), (0, 24, 2, 4, 2, 300, 32), (16, 24, 2, 0, 2, 300, 32), (16, 24, 2, 4, 3, 300, 32),
                   (16, 24, -2, 4, 2, 300, 32), (16, 24, 2, 4, 2, -(2**31), 32), (12, 24, 2, 4, 2, 300, 32)]:  # fmt: skip
        file.write_bytes(struct.pack("<7i", *header) + good[28:])
        refused(file, "is no llama2.c checkpoint")
    file.write_bytes(struct.pack("<I", 0x616B3432) + good[4:])
    refused(file, "llama2.c's versioned format; supported: the legacy one")
    file.write_bytes(good)
    text.ScoreTokenizer([b"x"] * 259, [0.0] * 259).save(tmp_path)
    refused(file, "has 259 pieces", "a vocabulary of 300")
    (tmp_path / "second.bin").write_bytes(good)
    refused(tmp_path, "found 2 .bin files: model.bin, second.bin")
    refused(files.FOLDER / "llama_mha" / "model.safetensors", "give the directory that holds config.json")


# --- the real checkpoint ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(data):
    return load.load(data / "stories260K")


@functools.cache
def program(cfg):
    return jax.jit(functools.partial(blocks.forward, cfg, remat=False))


def test_stories_logits(stories, data):
    cfg, params, _ = stories
    ref = np.load(data / "stories260K" / "ref_forward.npz")
    got = program(cfg)(blocks.stack(params), ref["ids"][None].astype(np.int32))
    assert np.abs(got[0, :96] - ref["logits"]).max() <= 1e-4


def test_stories_greedy(stories, data):
    """200 greedy tokens by running the whole parallel pass again for each: the published text, character for character."""
    cfg, params, tokenizer = stories
    params = blocks.stack(params)

    @jax.jit
    def grow(ids):
        def step(i, ids):
            z = blocks.logits(cfg, params, jax.lax.dynamic_slice_in_dim(blocks.hidden(cfg, params, ids, remat=False), i, 1, 1))
            return ids.at[:, i + 1].set(jnp.argmax(z[:, 0], -1).astype(jnp.int32))

        return jax.lax.fori_loop(0, 200, step, ids)

    ids = grow(jnp.zeros((1, 201), jnp.int32).at[0, 0].set(cfg.bos))
    assert tokenizer.decode(ids[0]) == (data / "stories260K" / "expected_greedy_200steps.txt").read_text()


def test_stories_likelihood(stories, data):
    """Mean negative log-likelihood of five whole stories, each after bos: 1.27 (data/README.md)."""
    cfg, params, tokenizer = stories
    parts = (data / "text" / "tinystories_valid5.txt").read_text().split("<|endoftext|>")
    ids, live = text.pad([tokenizer.encode(p.strip()) for p in parts if p.strip()], side="left")
    z = jax.nn.log_softmax(program(cfg)(blocks.stack(params), ids, live))
    picked = np.take_along_axis(np.asarray(z)[:, :-1], ids[:, 1:, None], 2)[..., 0]
    known = live[:, 1:] & live[:, :-1]
    assert abs(-picked[known].mean() - 1.27) < 0.01


def test_stories_as_hugging_face(stories, tmp_path):
    """Saved in the other format and read back: the same model and tokenizer."""
    cfg, params, tokenizer = stories
    load.save(tmp_path, cfg, params, tokenizer)
    cfg2, params2, tokenizer2 = load.load(tmp_path)
    assert cfg2 == cfg and tokenizer2.encode("Lily and Tom") == tokenizer.encode("Lily and Tom")
    jax.tree.map(np.testing.assert_array_equal, params2, params)
    assert os.path.getsize(tmp_path / "model.safetensors") < 1.1e6
