"""Flax msgpack checkpoints (what `flax.serialization.to_bytes` and `msgpack_serialize` write) as plain nested dicts, without Flax."""

import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.models.llama2c import is_pickle

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's msgpack extension types
_CHUNKED = "__msgpack_chunked_array__"  # marks a map that holds one array in pieces (Flax cuts above 1 GiB)
_DTYPES = {"bool", "bfloat16", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
_DTYPES |= {"complex64", "complex128", "float16", "float32", "float64"} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
_DEEPEST, _MOST = 100, 2**20  # nesting, and values in all: a small file must not become a large tree
# first byte -> (kind, format of its length or of itself)
_SIZED = {0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")}
_SIZED |= {0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")}
_SIZED |= {0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}
_NUMBERS = dict(zip((*range(0xCA, 0xD0), *range(0xD0, 0xD4)), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The tree of a checkpoint: dicts (keys str or int), lists, arrays (numpy, copies), numpy and Python scalars, str, bytes, None.

    like: a pytree of arrays or ShapeDtypeStructs; what is read is then given its structure (Flax writes tuples and lists as dicts
    of "0", "1", ...) and must have its shapes and dtypes: `read(path, jax.eval_shape(lambda: blocks.init(cfg, key)))`.

    The file may come from anybody: no length is believed before that many bytes were seen, and nothing is ever unpickled.
    ValueError, one line that names the file: it is missing, cut off, goes on after its end, is a pickle, holds an object dtype or
    another extension than Flax's, sizes that disagree, duplicate keys, trees too deep or too large; with `like` all missing,
    unexpected and misshaped arrays together.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if not path.is_file():
        what = "is a directory; give the msgpack file" if path.is_dir() else "does not exist"
        raise ValueError(f"no Flax msgpack checkpoint: {path} {what}")
    with path.open("rb") as f:
        head = f.read(2)
    if not head:
        raise ValueError(f"{path} is empty")
    if head != b"\x80" and is_pickle(head):  # that one byte alone is msgpack's empty map
        raise ValueError(f"{path} is a pickle, which is never opened: it can run code; write it with flax.serialization.to_bytes")
    source = _Source(np.memmap(path, np.uint8, "r").data, ext=True)
    try:
        tree = source.value()
        if source.at < len(source.data):
            raise ValueError(f"{len(source.data) - source.at} bytes follow its end")
        if not isinstance(tree, dict):
            raise ValueError(f"it holds one {type(tree).__name__}, should hold a map of names")
    except (ValueError, OverflowError) as e:
        where = f" in {'/'.join(source.path)}" if source.path else ""
        raise ValueError(f"{path} is no Flax msgpack checkpoint or is damaged{where} at byte {source.at}: {e}") from None
    return tree if like is None else _fit(path, tree, like)


class _Source:
    """MessagePack values from bytes. Every length is checked against the bytes that are there before anything is made of it."""

    def __init__(self, data: memoryview, *, ext: bool):
        self.data, self.ext, self.at = data, ext, 0
        self.path: list[str] = []  # keys down to the value being read
        self.count = 0

    def take(self, n: int, kind: str) -> memoryview:
        left = len(self.data) - self.at
        if n > left:
            raise ValueError(f"cut off: a {kind} of {n} bytes is claimed, {left} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt), "number"))[0]

    def value(self, depth: int = 0) -> Any:
        self.count += 1
        if depth > _DEEPEST or self.count > _MOST:
            raise ValueError(f"more than {_DEEPEST} levels or {_MOST} values")
        first = self.number(">B")
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first < 0xC0:
            kind, n = ("map", first & 15) if first < 0x90 else ("array", first & 15) if first < 0xA0 else ("str", first & 31)
        elif 0xD4 <= first <= 0xD8:
            kind, n = "ext", 1 << (first - 0xD4)
        elif first in _SIZED:
            kind, n = _SIZED[first][0], self.number(_SIZED[first][1])
        else:
            raise ValueError(f"byte {first:#x} begins no value")
        if kind == "map":
            return self.map(n, depth)
        if kind == "array":
            if n > len(self.data) - self.at:
                raise ValueError(f"cut off: a list of {n} values is claimed, {len(self.data) - self.at} bytes are left")
            return [self.value(depth + 1) for _ in range(n)]
        code = self.number(">b") if kind == "ext" else 0
        body = self.take(n, kind)
        if kind == "ext":
            return self.extension(code, body)
        return str(body, "utf-8") if kind == "str" else bytes(body) if self.ext else body

    def map(self, n: int, depth: int) -> Any:
        if 2 * n > len(self.data) - self.at:
            raise ValueError(f"cut off: a map of {n} entries is claimed, {len(self.data) - self.at} bytes are left")
        out, names = {}, set()
        for _ in range(n):
            key = self.value(depth + 1)
            if type(key) not in (str, int):
                raise ValueError(f"a key is a {type(key).__name__}, should be a name or a number")
            if str(key) in names:
                raise ValueError(f"the key {str(key)!r:.80} stands twice in one map")
            names.add(str(key))
            self.path.append(f"{str(key)!r:.80}"[1:-1])
            out[key] = self.value(depth + 1)
            self.path.pop()
        return _whole(out) if _CHUNKED in out else out

    def extension(self, code: int, body: memoryview) -> Any:
        if not self.ext:
            raise ValueError("an extension inside an extension")
        if code not in (_ARRAY, _COMPLEX, _SCALAR):
            raise ValueError(f"extension type {code}; Flax writes 1 (array), 2 (complex) and 3 (scalar)")
        inner = _Source(body, ext=False)
        value = inner.value()
        if inner.at < len(body):
            raise ValueError(f"an extension of {len(body)} bytes ends after {inner.at}")
        if code == _COMPLEX:
            if not (isinstance(value, list) and len(value) == 2 and all(type(x) is float for x in value)):
                raise ValueError("a complex number that is no pair of floats")
            return complex(*value)
        x = _array(value)
        if code == _SCALAR and x.ndim:
            raise ValueError(f"a scalar of shape {list(x.shape)}")
        return x if code == _ARRAY else x[()]


def _array(value: Any) -> np.ndarray:
    """The array of Flax's triple (shape, dtype name, bytes in row-major order)."""
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], list) and isinstance(value[2], memoryview)):
        raise ValueError("an array that is not (shape, dtype, bytes)")
    shape, name, body = value
    name = str(name, "utf-8") if isinstance(name, memoryview) else name
    if name not in _DTYPES:
        raise ValueError(f"an array of dtype {name!r:.40}; supported are numbers only, in a dtype of JAX")
    _dims(shape)
    dtype = jnp.dtype(name)
    if math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(
            f"an array of shape {shape} and dtype {name} takes {math.prod(shape) * dtype.itemsize} bytes, {len(body)} are there"
        )
    flat = np.frombuffer(body, np.uint8).astype(bool) if name == "bool" else np.frombuffer(body, dtype).copy()
    return flat.reshape(shape)


def _dims(shape: list) -> None:
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"an array of shape {shape!s:.80}")


def _whole(pieces: dict) -> np.ndarray:
    """The array of {marker: True, "shape": {"0": n, ...}, "chunks": {"0": flat array, ...}}."""
    numbered = [
        d for d in (pieces.get("shape"), pieces.get("chunks")) if isinstance(d, dict) and list(d) == [str(i) for i in range(len(d))]
    ]
    if len(pieces) != 3 or len(numbered) != 2 or not numbered[1]:
        raise ValueError("an array in pieces that is not (shape, chunks), each numbered from 0")
    shape, parts = (list(d.values()) for d in numbered)
    _dims(shape)
    if not all(isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype == parts[0].dtype for x in parts):
        raise ValueError("an array in pieces that are not flat arrays of one dtype")
    if math.prod(shape) != sum(x.size for x in parts):
        raise ValueError(f"an array of shape {shape} in pieces that hold {sum(x.size for x in parts)} numbers")
    return np.concatenate(parts).reshape(shape)


def _leaves(tree: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, (*at, str(key)))
    else:
        yield at, tree


def _fit(path: pathlib.Path, tree: Any, like: Any) -> Any:
    """The leaves of `tree` in the structure of `like`."""
    have = dict(_leaves(tree))
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    want = {tuple(jax.tree_util.keystr((k,), simple=True) for k in at): leaf for at, leaf in leaves}
    kind = lambda x: (str(getattr(x, "dtype", np.asarray(x).dtype)), list(np.shape(x)))
    told = lambda x: "{} {}".format(*kind(x))
    problems = {
        "missing": ["/".join(at) for at in want if at not in have],
        "unexpected": ["/".join(at) for at in have if at not in want],
        "misshaped": [
            f"{'/'.join(at)} is {told(have[at])}, should be {told(x)}" for at, x in want.items() if at in have and kind(have[at]) != kind(x)
        ],
    }
    said = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"{path}: the arrays do not fit; {'; '.join(said)}")
    return structure.unflatten([have[at] for at in want])
