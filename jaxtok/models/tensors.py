"""Hugging Face checkpoint folders as data: tables that say which tensor holds which parameters, read and written one tensor at a time."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxtok.models import llama2c

Path = tuple[str | int, ...]
Place = Callable[[Path, np.ndarray], jax.Array]
Progress = Callable[[int, int, str], None]
Home = dict[str, Any]  # tensor name -> the open file that holds it

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MOST_NAMES = 20  # tensors that one error lists
SHARD_BYTES = 4 * 2**30


class Piece(NamedTuple):
    """A parameter and the rows of a tensor that hold it: transposed by `axes`, then reshaped."""

    path: Path
    shape: tuple[int, ...]  # of the parameter
    stored: tuple[int, ...]  # of its rows in the tensor
    axes: tuple[int, ...]  # permutation of `stored`

    def ours(self, x: np.ndarray) -> np.ndarray:
        return x.transpose(self.axes).reshape(self.shape)

    def theirs(self, x: np.ndarray) -> np.ndarray:
        return x.reshape([self.stored[a] for a in self.axes]).transpose(np.argsort(self.axes))


Table = dict[str, list[Piece]]  # tensor name -> what it holds, stacked along its first axis


def piece(path: Path, shape: tuple[int, ...], stored: tuple[int, ...] | None = None, axes: tuple[int, ...] | None = None) -> Piece:
    """A parameter stored as it is, or as `stored`."""
    stored = shape if stored is None else stored
    return Piece(path, shape, stored, tuple(range(len(stored))) if axes is None else axes)


def matrix(path: Path, shape: tuple[int, ...]) -> Piece:
    """A matrix that is stored [out, in]."""
    return Piece(path, shape, shape[::-1], (1, 0))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        out = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(out, dict):
        raise ValueError(f"{path} should hold an object, holds a {type(out).__name__}")
    return out


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weights.values()))
        # an index is data from somebody else: it must not reach outside its folder
        bad = [n for n in names if pathlib.PurePath(n).name != n or not n.endswith(".safetensors")]
        if bad:
            raise ValueError(f"{index} names {bad[0]!r}, which is no safetensors file of the same folder")
        gone = [n for n in names if not (folder / n).is_file()]
        if gone:
            raise ValueError(f"{folder} lacks {', '.join(gone)}, which its index names")
        return [folder / n for n in names]
    one = folder / "model.safetensors"
    files = [one] if one.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ValueError(f"{folder} has {len(files)} safetensors files but neither model.safetensors nor model.safetensors.index.json")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(f"{folder} has pickled weights only, which are never opened: they can run code; convert them to safetensors")
    if any(folder.glob("*.msgpack")):
        raise ValueError(f"{folder} has Flax weights only; models.flax_msgpack.read gives their arrays, load takes safetensors")
    raise ValueError(f"{folder} has a config.json but no safetensors file")


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        reason = str(e).splitlines()[0]
    with path.open("rb") as f:
        head = f.read(2)
    if llama2c.is_pickle(head):
        raise ValueError(f"{path} is a pickle (torch.save) named safetensors, which is never opened: it can run code; convert it")
    raise ValueError(f"{path} is not a safetensors file or is cut off: {reason}")


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Home]:
    """The tensors of a folder by name, while its files are open."""
    with contextlib.ExitStack() as close:
        files = [close.enter_context(_open(p)) for p in _shards(folder)]
        yield {name: f for f in files for name in f.keys()}


def check(where: pathlib.Path, what: str, table: Table, home: Home, ignorable: Callable[[str], bool]) -> None:
    """ValueError that lists every tensor that is missing, unexpected, misshaped or of a wrong type."""
    wrong = []
    for name, parts in table.items():
        if name not in home:
            continue
        want = (sum(p.stored[0] for p in parts), *parts[0].stored[1:]) if parts[0].stored else ()
        part = home[name].get_slice(name)
        got, kind = tuple(part.get_shape()), part.get_dtype()
        if got != want or kind not in FLOATS:
            wrong.append(f"{name} is {kind} {list(got)}, should be {'/'.join(FLOATS)} {list(want)}")
    missing = [name for name in table if name not in home]
    extra = sorted(name for name in home if name not in table and not ignorable(name))
    some = lambda names: ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
    said = [f"{what}: {some(names)}" for what, names in (("missing", missing), ("unexpected", extra), ("misshaped", wrong)) if names]
    if said:
        raise ValueError(f"{where}: the tensors do not fit {what}; {'; '.join(said)}")


def read(table: Table, home: Home, layers: Mapping[str, int], dtype: Any, place: Place, progress: Progress | None) -> dict[str, Any]:
    """The parameters of a table that was checked, one tensor in memory at a time; dtype=None: that of the table's first tensor.

    layers: how many there are of a model ("layers") and of a part of it (its name)."""
    first = next(iter(table))
    dtype = jnp.dtype(FLOATS[home[first].get_slice(first).get_dtype()]) if dtype is None else dtype
    if dtype == jnp.dtype("float64") and not jax.config.read("jax_enable_x64"):
        dtype = jnp.dtype("float32")
    params: dict[str, Any] = {}
    for part, count in layers.items():
        insert(params, (part, "layers") if part != "layers" else ("layers",), tuple({} for _ in range(count)))
    for done, (name, parts) in enumerate(table.items()):
        at = 0
        for part in parts:
            if len(parts) == 1:
                x = home[name].get_tensor(name)
            else:
                x = home[name].get_slice(name)[at : at + part.stored[0]]
                at += part.stored[0]
            insert(params, part.path, place(part.path, np.ascontiguousarray(part.ours(x), dtype=dtype)))
        if progress is not None:
            progress(done + 1, len(table), name)
    return params


def insert(params: dict[str, Any], path: Path, x: Any) -> None:
    """Put a leaf at ("norm",), ("layers", 0, "q") or ("map", "q")."""
    for key in path[:-1]:
        params = params[key] if isinstance(params, tuple) else params.setdefault(key, {})  # type: ignore[index]
    params[path[-1]] = x  # type: ignore[index]


# --- writing ----------------------------------------------------------------------------------------------------------


def write(folder: pathlib.Path, config: Mapping[str, Any], table: Table, pick: Callable[[Path], Any], kind: Any) -> None:
    """config.json and the tensors of a table, in shards of 4 GiB; `pick` gives the parameter at a path, `kind` is their dtype.

    Existing files of that name are replaced; a folder with other weights in it is a ValueError.
    """
    kind = jnp.dtype(kind)
    config = dict(config) | {"dtype": str(kind), "torch_dtype": str(kind)}
    bytes_of = lambda parts: sum(int(np.prod(p.stored)) for p in parts) * kind.itemsize
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, parts in table.items():
        size = bytes_of(parts)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    ours = files if len(files) == 1 else [*files, index.name]
    stale = [p.name for end in ("*.safetensors", "*.safetensors.index.json") for p in folder.glob(end) if p.name not in ours]
    if stale:
        raise ValueError(f"{folder} holds other weights ({', '.join(sorted(stale))}); save into another directory or remove them")
    described = folder / "config.json"
    described.write_text(json.dumps(config, indent=1) + "\n")
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            arrays = [p.theirs(np.asarray(pick(p.path))) for p in table[name]]
            tensors[name] = np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        # written aside and renamed: a killed save leaves no half file under the final name
        safetensors.numpy.save_file(tensors, folder / (file + ".part"), metadata={"format": "pt"})
        shutil.copymode(described, folder / (file + ".part"))  # safetensors writes for the owner alone
        os.replace(folder / (file + ".part"), folder / file)
    if len(shards) > 1:
        weights = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(map(bytes_of, table.values()))
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=1) + "\n")
