"""Checkpoints that are cut off, lie about their size, or carry code: through the command line, one line and exit code 2."""

import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxtok import cli
from jaxtok.models import encoder, hf, hf_encoders, load
from jaxtok.models.image import PROCESSORS, Processor
from tests.evals import tiny
from tests.models.test_load import HEADER, Bomb, llama2c_file

ROOT = pathlib.Path(__file__).parents[1]
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    """A tiny checkpoint that generates."""
    path = tmp_path_factory.mktemp("good") / "model"
    load.save(path, *tiny.make())
    return path


@pytest.fixture
def spoiled(good, tmp_path):
    """Its copy, to be spoiled."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "model"))


def refused(path, capsys, *words, most=64 * 2**20):
    """The command line's one line about a checkpoint that it will not take; it allocates little on the way."""
    tracemalloc.start()
    try:
        assert cli.main(["generate", "--model", str(path), "--prompt", "hi"]) == 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("jaxtok: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said
    assert len(said.err) < 20_000 and peak < most, f"{len(said.err)} characters, {peak} bytes"
    for word in words:
        assert word in said.err, said.err


def header(change):
    """A safetensors file whose header (a dict) was changed."""

    def make(raw):
        size = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + size])
        text = change(table)
        text = json.dumps(table if text is None else text).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    return make


NORM = "model.norm.weight"  # f32 [16]


def entry(**given):
    return header(lambda table: table[NORM].update(given))


def swapped(table):
    """Two tensors in one place."""
    table[NORM]["data_offsets"] = table["model.layers.0.input_layernorm.weight"]["data_offsets"]


SPOILED = {
    "empty": (lambda raw: b"", "is cut off"),
    "cut in the length": (lambda raw: raw[:5], "is cut off"),
    "cut in the header": (lambda raw: raw[:100], "is cut off"),
    "cut in the data": (lambda raw: raw[:-1], "is cut off"),
    "half": (lambda raw: raw[: len(raw) // 2], "is cut off"),
    "longer": (lambda raw: raw + b"x", "is cut off"),
    "header of 2**63 bytes": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], "is cut off"),
    "header of 2**64 - 1 bytes": (lambda raw: b"\xff" * 8 + raw[8:], "is cut off"),
    "header of 100 MB": (lambda raw: struct.pack("<Q", 10**8) + raw[8:], "is cut off"),
    "header of 0 bytes": (lambda raw: bytes(8) + raw[8:], "is cut off"),
    "header is no JSON": (lambda raw: raw[:8] + b"}" + raw[9:], "is cut off"),
    "header is no UTF-8": (lambda raw: raw[:9] + b"\xff\xfe" + raw[11:], "is cut off"),
    "header is a list": (header(lambda table: [1, 2]), "is cut off"),
    "header is a number": (header(lambda table: 3), "is cut off"),
    "no tensors": (header(lambda table: {}), "is cut off"),
    "nested 10,000 deep": (lambda raw: struct.pack("<Q", 20_000) + b"[" * 10_000 + b"]" * 10_000, "is cut off"),
    "a dtype that is none": (entry(dtype="F31"), "is cut off"),
    "a dtype of another size": (entry(dtype="F64"), "is cut off"),
    "a dtype that is no number": (entry(dtype=["F32"]), "is cut off"),
    "integers": (entry(dtype="I32"), "model.norm.weight is I32 [16], should be F64/F32/F16/BF16 [16]"),
    "8-bit floats": (entry(dtype="F8_E4M3", shape=[64]), "is F8_E4M3 [64]"),
    "a shape of another size": (entry(shape=[17]), "is cut off"),
    "a shape of the same size": (entry(shape=[4, 4]), "model.norm.weight is F32 [4, 4]"),
    "a negative shape": (entry(shape=[-16]), "is cut off"),
    "a shape that overflows": (entry(shape=[2**62, 2**62]), "is cut off"),
    "a shape of zero": (entry(shape=[0], data_offsets=[0, 0]), "is cut off"),
    "offsets past the end": (entry(data_offsets=[10**12, 10**12 + 64]), "is cut off"),
    "offsets backwards": (entry(data_offsets=[64, 0]), "is cut off"),
    "negative offsets": (entry(data_offsets=[-64, 0]), "is cut off"),
    "offsets of text": (entry(data_offsets=["0", "64"]), "is cut off"),
    "tensors that overlap": (header(swapped), "is cut off"),
    "a tensor less": (header(lambda table: table.update({"other": table.pop(NORM)})), "missing: model.norm.weight; unexpected: other"),
    "ten thousand names": (header(lambda table: table.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)})), ""),
    "zeros": (lambda raw: bytes(len(raw)), "is cut off"),
    "a web page": (lambda raw: b"<!DOCTYPE html><html>404</html>", "is cut off"),
    "a pickle": (lambda raw: pickle.dumps({"w": [1.0]}, 2), "is a pickle (torch.save)"),
    "a zip of pickles": (lambda raw: b"PK\x03\x04" + raw, "is a pickle (torch.save)"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_weights(how, spoiled, capsys):
    change, word = SPOILED[how]
    file = spoiled / WEIGHTS
    file.write_bytes(change(file.read_bytes()))
    refused(spoiled, capsys, word)


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("hidden_size", (-1, 0, 2**31, 2**200, "16", None, NAN, INF, 16.0, True, [16], {}, 17, 2**31 - 1)),
    ("num_hidden_layers", (-1, 0, 1, 3, 1_000, 10**9, "2", NAN, None)),
    ("num_attention_heads", (-4, 0, 3, 2**31 - 1, "4", NAN, None)),
    ("num_key_value_heads", (-1, 0, 3, 2**31 - 1, "2", NAN)),
    ("head_dim", (-8, 0, 7, 2**31 - 2, "8", NAN)),
    ("intermediate_size", (-1, 0, 2**31 - 1, "24", NAN, None)),
    ("vocab_size", (-1, 0, 1, 2**31 - 1, 10**30, "97", NAN, None)),
    ("max_position_embeddings", (-1, 0, 2**31, "2048", NAN)),
    ("rms_norm_eps", (-1e-5, 0, "1e-5", NAN, INF, 1e300)),
    ("rope_theta", (-1, 0, "1e4", NAN, INF)),
    ("rope_scaling", ("linear", 3, {"rope_type": "linear", "factor": NAN}, {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1},
                      {"rope_type": ["linear"]})),
    ("model_type", ("", "gpt2", None, 3, ["llama"], "x" * 5000)),
    ("tie_word_embeddings", (1, "yes", None, False)),
    ("hidden_act", ("relu", None, 3)),
    ("eos_token_id", (-1, 2**31, 10**30, "2", [2**40], [[2]], NAN, True)),
    ("bos_token_id", (-1, 2**31, "1", NAN)),
]  # fmt: skip


@pytest.mark.parametrize("key, values", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_config_values(key, values, spoiled, capsys):
    file = spoiled / CONFIG
    raw = json.loads(file.read_text())
    for value in values:
        file.write_text(json.dumps(raw | {key: value}))
        refused(spoiled, capsys)


def test_config_files(spoiled, capsys):
    file = spoiled / CONFIG
    raw = json.loads(file.read_text())
    for text in (b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'{"model_type": "llama"}', b"[" * 10**5, b'{"a": ' + b"9" * 10**4 + b"}"):
        file.write_bytes(text)
        refused(spoiled, capsys, "config.json")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        file.write_text(json.dumps({k: v for k, v in raw.items() if k != key}))
        refused(spoiled, capsys, key)


def test_tokenizers(spoiled, capsys):
    file = spoiled / TOKENIZER
    text = file.read_bytes()
    for bad in (b"", b"{}", text[: len(text) // 2], b"\x00" * 100, text.replace(b'"BPE"', b'"BPX"'), b"[" * 10**5):
        file.write_bytes(bad)
        refused(spoiled, capsys, "tokenizer.json")
    file.unlink()
    refused(spoiled, capsys, "has no tokenizer")


def test_generation_config(spoiled, capsys):
    for text, known in (("{", False), ("[1]", False), ('{"eos_token_id": [99999999999999999999]}', True), ('{"eos_token_id": "x"}', True)):
        (spoiled / "generation_config.json").write_text(text)
        if known:  # what cannot be an id says nothing
            assert load.load(spoiled)[0].eos == tiny.CFG.eos
        else:
            refused(spoiled, capsys, "generation_config.json")


def test_llama2c(tmp_path, capsys):
    file = tmp_path / "model.bin"
    llama2c_file(file)
    raw = file.read_bytes()
    big = 2**31 - 1
    heads = [(big,) * 7, (-1,) * 7, (0,) * 7, (16, big, big, 4, 2, big, big), (big - 1, 1, 1, 1, 1, 1, 1), (*HEADER[:5], -(2**31), 32)]
    for bad in [raw[:n] for n in (0, 1, 27, 28, 29, len(raw) - 4)] + [raw + b"tail"] + [struct.pack("<7i", *h) + raw[28:] for h in heads]:
        file.write_bytes(bad)
        refused(file, capsys, "is no llama2.c checkpoint")
        refused(tmp_path, capsys, "is no llama2.c checkpoint")
    file.write_bytes(raw)
    refused(file, capsys, "has no tokenizer")
    for bad in (b"", b"\x00" * 7, struct.pack("<ifi", 9, 0.0, -1), struct.pack("<ifi", 9, 0.0, big), struct.pack("<ifi", 9, 0.0, 0)):
        (tmp_path / "tokenizer.bin").write_bytes(bad)
        refused(file, capsys, "is not a llama2.c tokenizer")


def test_pickles_run_nothing(good, tmp_path, capsys):
    mark = tmp_path / "exploded"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        raw = pickle.dumps(Bomb(mark), protocol)
        for name in ("model.bin", "model.pt", "pytorch_model.bin", "model.pth"):
            place = tmp_path / f"{protocol}-{name}"
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(raw)
            refused(place / name, capsys, name)
            refused(place, capsys)
            shutil.copy(good / CONFIG, place)
            refused(place, capsys, "has pickled weights only")
    assert not mark.exists()


def test_no_checkpoint_at_all(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "gone", "/dev/null", "no\nnewlines\nplease", "", "a" * 5000, "~nobody/model"):
        refused(path, capsys)


few = hypothesis.settings(
    max_examples=250, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@few
@hypothesis.given(st.data())
def test_flipped_bytes_of_a_header(good, data):
    """Any bytes of the header may be wrong: the file is refused in one line, or it is a right file."""
    raw = bytearray((good / WEIGHTS).read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, size + 7))] = data.draw(st.integers(0, 255))
    file = good.parent / "flipped" / WEIGHTS
    file.parent.mkdir(exist_ok=True)
    shutil.copy(good / CONFIG, file.parent)
    file.write_bytes(raw)
    try:
        load.load(file.parent)
    except ValueError as e:
        assert str(e) and "\n" not in str(e)


KEYS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta",
        "max_position_embeddings", "rms_norm_eps", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "bos_token_id", "eos_token_id",
        "tie_word_embeddings", "query_pre_attn_scalar", "partial_rotary_factor", "max_window_layers", "sliding_window_pattern", "hidden_act"]  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 300), st.floats(), st.text(max_size=4), st.sampled_from(
        ["default", "linear", "llama3", "yarn", "silu", "full_attention", "sliding_attention"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "full_attention", "low_freq_factor",
        "high_freq_factor", "original_max_position_embeddings"]), inner, max_size=4)), max_leaves=6,
)  # fmt: skip


@few
@hypothesis.given(st.sampled_from(list(hf.FAMILIES)), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
def test_any_config_is_a_config_or_a_value_error(good, family, changes):
    raw = json.loads((good / CONFIG).read_text())
    try:
        cfg = hf.config_from_hf(raw | {"model_type": family} | changes)
    except ValueError as e:
        assert str(e) and "\n" not in str(e)
    else:
        assert hash(cfg) is not None and min(cfg.vocab, cfg.width, cfg.layers, cfg.heads, cfg.head_dim, cfg.hidden, cfg.context) >= 1


TOWER = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "num_channels", "hidden_act",
         "qkv_bias", "layer_norm_eps", "mlp_ratio", "use_swiglu_ffn", "num_register_tokens", "vocab_size", "max_position_embeddings", "eos_token_id",
         "vision_use_head", "vision_config", "text_config", "vision_config_dict"]  # fmt: skip


@few
@hypothesis.given(
    st.sampled_from([*hf_encoders.FAMILIES, "clip", "siglip", "llava"]), st.sampled_from(hf_encoders.TOWERS), st.dictionaries(st.sampled_from(TOWER), JSON, max_size=5)
)  # fmt: skip
def test_any_config_of_an_encoder_is_a_config_or_a_value_error(family, tower, changes):
    try:
        cfg = hf_encoders.config_from_hf({"model_type": family} | changes, tower)
    except ValueError as e:
        assert str(e) and "\n" not in str(e)
    else:
        assert hash(cfg) is not None and min(cfg.width, cfg.layers, cfg.heads, cfg.head_dim, cfg.hidden) >= 1
        assert cfg.image is None or min(cfg.grid) >= 1
        if cfg.layers < 100:
            assert encoder.shapes(cfg)


@few
@hypothesis.given(
    st.sampled_from(list(PROCESSORS)),
    st.dictionaries(
        st.sampled_from(["size", "crop_size", "resample", "do_resize", "do_center_crop", "do_pad", "do_normalize", "rescale_factor", "image_mean", "image_std"]),
        st.one_of(JSON, st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "longest_edge"]), st.integers(-2, 2**40))), max_size=4),
)  # fmt: skip
def test_any_preprocessor_is_one_or_a_value_error(kind, changes):
    try:
        got = Processor.of({"image_processor_type": kind + "ImageProcessor"} | changes)
    except ValueError as e:
        assert str(e) and "\n" not in str(e)
    else:
        assert hash(got) is not None


@pytest.mark.parametrize("how", ["cut in the data", "header of 2**63 bytes", "a pickle"])
def test_as_a_process(how, spoiled):
    file = spoiled / WEIGHTS
    file.write_bytes(SPOILED[how][0](file.read_bytes()))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    argv = [sys.executable, "-m", "jaxtok", "generate", "--model", str(spoiled), "--prompt", "hi"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("jaxtok: ") and done.stderr.count("\n") == 1, done
