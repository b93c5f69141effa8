"""Flax msgpack checkpoints: what Flax writes, the trained one-layer model that reverses digits, and files that lie."""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from jaxtok.models import blocks, flax_msgpack, hf, load
from jaxtok.models.config import Config
from tests.models import reverse

pytestmark = pytest.mark.py312


def array(shape, dtype, body, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, body)))


def floats(*values):
    return array([len(values)], "float32", np.array(values, np.float32).tobytes())


def pieces(shape, *chunks, **more):
    number = lambda values: {str(i): x for i, x in enumerate(values)}
    return {"__msgpack_chunked_array__": True, "shape": number(shape), "chunks": number(chunks)} | more


def raw_ext(body, code=1):
    return b"\xc9" + struct.pack(">Ib", len(body), code) + body


@pytest.fixture
def reads(tmp_path):
    """Reads bytes as a checkpoint."""

    def run(body, like=None):
        path = tmp_path / "model.msgpack"
        path.write_bytes(body)
        return flax_msgpack.read(path, like)

    return run


def test_the_trained_model_reverses_a_thousand_sequences(data):
    params = flax_msgpack.read(data / reverse.FILE)
    assert sum(x.size for x in jax.tree.leaves(params)) == 10_346 and {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    ids = np.random.default_rng(0).integers(0, 10, (1000, 16))
    out = jax.jit(reverse.forward)(params, ids)
    np.testing.assert_array_equal(np.argmax(out, -1), ids[:, ::-1])


def test_by_hand(reads):
    # {"a": [1.5, -2] in bf16, "n": 3}, byte by byte
    triple = b"\x93" + b"\x91\x02" + b"\xa8bfloat16" + b"\xc4\x04" + b"\xc0\x3f" + b"\x00\xc0"
    got = reads(b"\x82" + b"\xa1a" + b"\xc7" + bytes([len(triple)]) + b"\x01" + triple + b"\xa1n\x03")
    assert got["n"] == 3 and got["a"].dtype == jnp.bfloat16 and got["a"].tolist() == [1.5, -2.0]


def test_every_kind_of_value(reads):
    numbers = [0, 127, 128, 255, 2**16 - 1, 2**16, 2**32 - 1, 2**64 - 1, -1, -32, -33, -128, -(2**15), -(2**31), -(2**63), 1.25]
    plain = {"numbers": numbers, "text": ["", "é" * 31, "x" * 300, "y" * 70_000], "bytes": [b"", b"z" * 70_000], "none": None, "yes": True}
    plain |= {"no": False, "many": list(range(70_000)), "wide": {str(i): i for i in range(20)}, 7: {}, "empty": {}}
    assert reads(msgpack.packb(plain)) == plain
    assert reads(msgpack.packb({"f": 0.5}, use_single_float=True)) == {"f": 0.5}
    kinds = ["bool", "int8", "uint16", "int64", "float16", "float64", "complex64", "bfloat16", "float8_e4m3fn"]
    for kind in kinds:
        x = np.array([[0, 1, 1], [1, 0, 1]]).astype(jnp.dtype(kind))
        got = reads(msgpack.packb({"x": array((2, 3), kind, x.tobytes()), "s": array((), kind, x[0, 1].tobytes(), 3)}))
        assert got["x"].dtype == x.dtype and got["x"].flags.writeable and got["s"].dtype == x.dtype and got["s"] == x[0, 1]
        np.testing.assert_array_equal(got["x"], x)
    old = array([2], b"float32", np.float32([1, 2]).tobytes())  # names were bytes once
    assert reads(msgpack.packb({"x": old}))["x"].tolist() == [1, 2]
    assert reads(msgpack.packb({"z": msgpack.ExtType(2, msgpack.packb((1.0, -2.0)))})) == {"z": 1 - 2j}
    assert reads(msgpack.packb({"x": array([0, 4], "float32", b"")}))["x"].shape == (0, 4)
    assert reads(b"\x80") == {}


def test_arrays_in_pieces(reads):
    got = reads(msgpack.packb({"x": pieces([2, 3], floats(0, 1), floats(2, 3), floats(4, 5))}))
    np.testing.assert_array_equal(got["x"], np.arange(6, dtype=np.float32).reshape(2, 3))


def test_any_cut_is_an_error(reads):
    whole = msgpack.packb({"w": floats(1, 2, 3), "deep": {"list": [1, "two", None], "z": pieces([1], floats(4))}, "big": 2**40})
    reads(whole)
    for n in range(len(whole)):
        with pytest.raises(ValueError, match=r"model\.msgpack (is empty|.*(cut off|bytes are left|are there))"):
            reads(whole[:n])


def deep(n):
    out = b"\x01"
    for _ in range(n):
        out = b"\x81\xa1k" + out
    return out


BAD = {
    "object dtype": (msgpack.packb({"x": array([1], "object", b"\0" * 8)}), "in x at byte .* dtype 'object'"),
    "structured dtype": (msgpack.packb({"x": array([1], "i4,f4", b"\0" * 8)}), "dtype 'i4,f4'"),
    "text dtype": (msgpack.packb({"x": array([1], "<U2", b"\0" * 8)}), "dtype '<U2'"),
    "dtype no name": (msgpack.packb({"x": array([1], 3, b"\0" * 8)}), "dtype 3"),
    "dtype not UTF-8": (msgpack.packb({"x": array([1], b"\xff", b"\0" * 8)}), "utf-8"),
    "giant shape": (
        msgpack.packb({"x": array([2**40, 2**40], "float32", b"\0" * 8)}),
        "takes 4835703278458516698824704 bytes, 8 are there",
    ),
    "giant beside zero": (msgpack.packb({"x": array([0, 2**62, 2**62], "float32", b"")}), "in x at byte"),
    "too many axes": (msgpack.packb({"x": array([1] * 33, "float32", b"\0" * 4)}), r"an array of shape \[1, 1"),
    "negative side": (msgpack.packb({"x": array([-1, -2], "float32", b"\0" * 8)}), r"an array of shape \[-1, -2\]"),
    "side no integer": (msgpack.packb({"x": array([True, 2.0], "float32", b"\0" * 8)}), r"an array of shape \[True, 2.0\]"),
    "short body": (msgpack.packb({"a": {"b": array([3], "float32", b"\0" * 8)}}), "in a/b at byte .* takes 12 bytes, 8 are there"),
    "no triple": (msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb([[1], "int8"]))}), r"not \(shape, dtype, bytes\)"),
    "body no bytes": (msgpack.packb({"x": array([1], "int8", [0])}), r"not \(shape, dtype, bytes\)"),
    "scalar of two": (msgpack.packb({"x": array([2], "int8", b"\0\0", 3)}), r"a scalar of shape \[2\]"),
    "complex of one": (msgpack.packb({"x": msgpack.ExtType(2, msgpack.packb([1.0]))}), "no pair of floats"),
    "other extension": (msgpack.packb({"x": msgpack.ExtType(4, b"abc")}), "extension type 4; Flax writes"),
    "timestamp": (msgpack.packb({"x": msgpack.Timestamp(1)}), "extension type -1"),
    "extension in extension": (b"\x81\xa1x" + raw_ext(raw_ext(b"\x93")), "inside an extension"),
    "extension goes on": (b"\x81\xa1x" + raw_ext(msgpack.packb([[0], "int8", b""]) + b"\xc0"), "ends after"),
    "extension cut": (b"\x81\xa1x" + raw_ext(b"\x93\x91\x01"), "cut off"),
    "claims 4 GiB of bytes": (b"\x81\xa1x\xc6\xff\xff\xff\xff", "a bin of 4294967295 bytes is claimed, 0 are left"),
    "claims 4 GiB extension": (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01abc", "an? ext of 4294967295 bytes is claimed, 3 are left"),
    "claims 4 G entries": (b"\xdf\xff\xff\xff\xff\xa1x", "a map of 4294967295 entries is claimed"),
    "claims 4 G values": (b"\x81\xa1x\xdd\xff\xff\xff\xff\x01", "a list of 4294967295 values is claimed, 1 bytes are left"),
    "too deep": (deep(5000), "more than 100 levels"),
    "no value": (b"\x81\xa1x\xc1", "byte 0xc1 begins no value"),
    "text not UTF-8": (b"\x81\xa1x\xa2\xff\xfe", "utf-8"),
    "twice one key": (b"\x82\xa1x\x01\xa1x\x02", "'x' stands twice"),
    "a number and its name": (b"\x82\xa11\x01\x01\x02", "'1' stands twice"),
    "key a list": (b"\x81\x90\x01", "a key is a list"),
    "key a truth": (b"\x81\xc3\x01", "a key is a bool"),
    "goes on": (msgpack.packb({"x": 1}) + b"\0\0", "2 bytes follow its end"),
    "no map": (msgpack.packb([1, 2]), "it holds one list"),
    "text file": (b"hello, world\n", "bytes follow its end"),
    "pickle": (b"\x80\x04K\x01.", "is a pickle, which is never opened"),
    "torch.save": (b"PK\x03\x04" + b"\0" * 40, "is a pickle, which is never opened"),
    "pieces missing": (msgpack.packb({"x": pieces([4], floats(1, 2))}), r"shape \[4\] in pieces that hold 2 numbers"),
    "pieces: none": (msgpack.packb({"x": pieces([0])}), r"not \(shape, chunks\)"),
    "pieces: more": (msgpack.packb({"x": pieces([1], floats(1), other=1)}), r"not \(shape, chunks\)"),
    "pieces: numbering": (msgpack.packb({"x": pieces([1], floats(1)) | {"chunks": {"1": floats(1)}}}), r"not \(shape, chunks\)"),
    "pieces: dtypes": (msgpack.packb({"x": pieces([2], floats(1), array([1], "int32", b"\0" * 4))}), "of one dtype"),
    "pieces: no arrays": (msgpack.packb({"x": pieces([1], 7)}), "flat arrays"),
    "pieces: giant": (msgpack.packb({"x": pieces([2**62, 2**62], floats(1))}), "in pieces that hold 1 numbers"),
}


@pytest.mark.parametrize("body, says", BAD.values(), ids=BAD)
def test_files_that_lie(reads, body, says):
    tracemalloc.start()
    with pytest.raises(ValueError, match=says) as e:
        reads(body)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "model.msgpack" in str(e.value) and "\n" not in str(e.value)
    assert most < 2**20  # nothing is made from a claim


def test_a_small_file_is_no_large_tree(reads, monkeypatch):
    monkeypatch.setattr(flax_msgpack, "_MOST", 1000)
    assert reads(msgpack.packb({"x": [None] * 996})) == {"x": [None] * 996}
    with pytest.raises(ValueError, match="or 1000 values"):
        reads(msgpack.packb({"x": [None] * 1000}))


def test_random_damage_is_an_error_or_a_tree(reads):
    whole = msgpack.packb({"layer": {"w": array([2, 2], "float32", b"\0" * 16), "list": [1, 2.5, "x"]}, "z": pieces([1], floats(4))})
    rng = np.random.default_rng(0)
    for _ in range(500):
        body = bytearray(whole)
        for at in rng.integers(0, len(body), 3):
            body[at] = rng.integers(0, 256)
        try:
            assert isinstance(reads(bytes(body)), dict)
        except ValueError as e:
            assert "model.msgpack" in str(e)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.msgpack does not exist"):
        flax_msgpack.read(tmp_path / "nothing.msgpack")
    with pytest.raises(ValueError, match="is a directory"):
        flax_msgpack.read(tmp_path)


def test_in_the_structure_of(reads):
    cfg = Config(vocab=5, width=4, layers=2, heads=2, kv_heads=1, head_dim=2, hidden=4)
    params = blocks.init(cfg, jax.random.key(0))
    pack = lambda x: array(x.shape, x.dtype.name, np.asarray(x).tobytes())
    tree = jax.tree.map(pack, params)
    tree["layers"] = {str(i): layer for i, layer in enumerate(tree["layers"])}  # as Flax writes a tuple
    like = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))
    got = reads(msgpack.packb(tree), like)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    del tree["norm"]
    tree["layers"]["1"]["q"] = pack(np.zeros((4, 3), np.float16))
    with pytest.raises(ValueError) as e:
        reads(msgpack.packb(tree | {"more": {"w": 1}}), like)
    for part in ("missing: norm;", "unexpected: more/w;", "misshaped: layers/1/q is float16 [4, 3], should be float32 [4, 4]"):
        assert part in str(e.value)


def test_load_says_who_reads_it(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"flax_model\.msgpack: .* no configuration; models\.flax_msgpack\.read"):
        load.load(tmp_path / "flax_model.msgpack")
    cfg = Config(vocab=5, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, hidden=4)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_to_hf(cfg)))
    with pytest.raises(ValueError, match="has Flax weights only"):
        load.load(tmp_path)
