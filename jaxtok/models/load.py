"""Load and save checkpoints: Hugging Face directories and hub ids (safetensors), llama2.c `.bin` files. Nothing is ever unpickled."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxtok.models import blocks, hf, llama2c
from jaxtok.models.blocks import Params
from jaxtok.models.config import Config
from jaxtok.models.text import JsonTokenizer, ScoreTokenizer, Tokenizer

Placement = jax.sharding.Sharding | jax.sharding.PartitionSpec
Progress = Callable[[int, int, str], None]

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHAT_FILES = ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"]
_HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", *_CHAT_FILES]
EMBEDDED, DRAFT = "embedded", "embedded_draft"  # the models of the package
_SHARD_BYTES = 4 * 2**30
MOST_NAMES = 20  # tensors that one error lists


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Placement | Mapping[str, Placement] | None = None,
    progress: Progress | None = None,
) -> tuple[Config, Params, Tokenizer | None]:
    """(cfg, params with layers as a tuple, tokenizer or None) of a checkpoint.

    path: a Hugging Face directory (config.json, model.safetensors or an index and its shards, tokenizer.json), a llama2.c
    `.bin` file or a directory with one (tokenizer: tokenizer.bin or tok<vocab>.bin beside it), a hub id "owner/name"
    (needs the `hub` extra; cached files serve offline), "embedded", the small model of the package, or "embedded_draft", its draft.
    dtype: of all parameters; None = that of the checkpoint's embedding.
    sharding: where parameters go: one Sharding (or PartitionSpec, under `jax.set_mesh`) for all, or {regular expression: ...}
    searched in the path "layers/0/q", first match wins. Tensors are read one at a time: the host never holds the model twice.
    progress: called with (tensors done, tensors in all, name).

    ValueError, one line: no such checkpoint, a family or feature that is not supported, files that are cut off or no
    safetensors, pickles, and all missing, unexpected and misshaped tensors together.
    """
    if dtype is not None:
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype={dtype} is no floating type; choose float32, bfloat16 or float16")
    place = _placer(sharding)
    where = find(path)
    if where.is_file():
        return _load_llama2c(where, dtype, place, progress)
    if (where / "config.json").is_file():
        return _load_hf(where, dtype, place, progress)
    bins = sorted(p for p in where.glob("*.bin") if not llama2c.looks_like_tokenizer(p))
    if len(bins) == 1:
        return _load_llama2c(bins[0], dtype, place, progress)
    found = f"{len(bins)} .bin files: {', '.join(p.name for p in bins)}" if bins else "neither"
    raise ValueError(f"{where} is no checkpoint: need config.json with safetensors, or one llama2.c .bin; found {found}")


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where a checkpoint is: a local path, a model of the package for "embedded" or "embedded_draft", or the local snapshot of a hub id."""
    where = pathlib.Path(os.path.expanduser(path))  # pathlib's raises for ~nobody
    if where.exists():
        return where
    name = os.fspath(path)
    if name in (EMBEDDED, DRAFT):
        where = pathlib.Path(__file__).parent / name
        if not (where / "config.json").is_file():
            raise ValueError(f"the model {name!r} of the package is not in this installation; name another checkpoint")
        return where
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ValueError(f"no checkpoint at {name}: no such file or directory")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{name} is no local path; to fetch it from the hub: pip install 'jaxtok[hub]'") from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as e:  # the package's network errors share no base class
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{name} is no local path, and the hub did not give it: {reason}") from None


def _placer(sharding: Placement | Mapping[str, Placement] | None) -> Callable[[hf.Path, np.ndarray], jax.Array]:
    def place(path: hf.Path, x: np.ndarray) -> jax.Array:
        if not isinstance(sharding, Mapping):
            return jax.device_put(x, sharding)
        name = "/".join(map(str, path))
        for pattern, where in sharding.items():
            if re.search(pattern, name):
                return jax.device_put(x, where)
        raise ValueError(f"no pattern of sharding matches {name}; end the table with '.*'")

    return place


def _insert(params: Params, path: hf.Path, x: jax.Array) -> None:
    if path[0] == "layers":
        params["layers"][path[1]][path[2]] = x
    else:
        params[str(path[0])] = x


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        out = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(out, dict):
        raise ValueError(f"{path} should hold an object, holds a {type(out).__name__}")
    return out


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = _json(index).get("weight_map")
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


def _load_hf(folder: pathlib.Path, dtype: Any, place: Any, progress: Progress | None) -> tuple[Config, Params, Tokenizer | None]:
    raw = _json(folder / "config.json")
    try:
        cfg = hf.config_from_hf(raw)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models list their end-of-turn ids here only
        eos = _json(generation).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if ids and all(hf.is_id(i) for i in ids):
            cfg = dataclasses.replace(cfg, eos=tuple(ids))
    table = hf.table(cfg)
    params: Params = {"layers": tuple({} for _ in range(cfg.layers))}
    with contextlib.ExitStack() as close:
        files = [close.enter_context(_open(p)) for p in _shards(folder)]
        home = {name: f for f in files for name in f.keys()}
        _check(folder, cfg, table, home)
        if dtype is None:
            dtype = jnp.dtype(_FLOATS[home["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight").get_dtype()])
        if dtype == jnp.dtype("float64") and not jax.config.read("jax_enable_x64"):
            dtype = jnp.dtype("float32")
        for done, (name, parts) in enumerate(table.items()):
            at = 0
            for path, shape in parts:
                flip = hf.transposed(path, shape)
                rows = shape[-1] if flip else shape[0]
                x = home[name].get_tensor(name) if len(parts) == 1 else home[name].get_slice(name)[at : at + rows]
                at += rows
                _insert(params, path, place(path, np.ascontiguousarray(x.T if flip else x, dtype=dtype)))
            if progress is not None:
                progress(done + 1, len(table), name)
    return cfg, params, _hf_tokenizer(folder, cfg)


def _check(folder: pathlib.Path, cfg: Config, table: Any, home: dict[str, Any]) -> None:
    """Every tensor that is missing, unexpected, misshaped or of a wrong type, in one error."""
    wrong = []
    for name, parts in table.items():
        if name not in home:
            continue
        tall = [s[::-1] if hf.transposed(p, s) else s for p, s in parts]
        want = (sum(s[0] for s in tall), *tall[0][1:])
        part = home[name].get_slice(name)
        got, kind = tuple(part.get_shape()), part.get_dtype()
        if got != want or kind not in _FLOATS:
            wrong.append(f"{name} is {kind} {list(got)}, should be {'/'.join(_FLOATS)} {list(want)}")
    missing = [name for name in table if name not in home]
    extra = sorted(name for name in home if name not in table and not hf.ignorable(name, cfg))
    some = lambda names: ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
    said = [f"{what}: {some(names)}" for what, names in (("missing", missing), ("unexpected", extra), ("misshaped", wrong)) if names]
    if said:
        raise ValueError(f"{folder}: the tensors do not fit a {cfg.family} model of its config.json; {'; '.join(said)}")


def _hf_tokenizer(folder: pathlib.Path, cfg: Config) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer.read(folder / "tokenizer.json", bos=cfg.bos, eos=cfg.eos)
    if (folder / "tokenizer.bin").is_file():
        return ScoreTokenizer.read(folder / "tokenizer.bin")
    return None


# --- llama2.c ---------------------------------------------------------------------------------------------------------


def _load_llama2c(path: pathlib.Path, dtype: Any, place: Any, progress: Progress | None) -> tuple[Config, Params, Tokenizer | None]:
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: give the directory that holds config.json, not the safetensors file")
    if path.suffix == ".msgpack":
        raise ValueError(f"{path}: a Flax checkpoint holds no configuration; models.flax_msgpack.read(path, like=...) reads its arrays")
    cfg, weights = llama2c.read(path)
    params: Params = {"layers": tuple({} for _ in range(cfg.layers))}
    for done, (at, read) in enumerate(weights.items()):
        _insert(params, at, place(at, np.array(read(), dtype=jnp.float32 if dtype is None else dtype, order="C")))
        if progress is not None:
            progress(done + 1, len(weights), "/".join(map(str, at)))
    names = [f"tok{cfg.vocab}.bin", "tokenizer.bin"]
    found = next((path.parent / n for n in names if (path.parent / n).is_file()), None)
    tokenizer = None if found is None else ScoreTokenizer.read(found)
    if tokenizer is not None and tokenizer.vocab != cfg.vocab:
        raise ValueError(f"{found} has {tokenizer.vocab} pieces, {path} a vocabulary of {cfg.vocab}")
    return cfg, params, tokenizer


# --- saving -----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], cfg: Config, params: Params, tokenizer: Tokenizer | None = None) -> None:
    """Write a Hugging Face directory that `load` and transformers read: config.json, safetensors (in shards of 4 GiB), tokenizer.

    params: layers as a tuple or stacked. Existing files of that name are replaced; a directory with other weights in it is a ValueError.
    """
    folder = pathlib.Path(os.path.expanduser(path))
    config = hf.config_to_hf(cfg)
    layers = params["layers"]
    pick = lambda at: (layers[at[2]][at[1]] if isinstance(layers, dict) else layers[at[1]][at[2]]) if at[0] == "layers" else params[at[0]]
    table = hf.table(cfg)
    have, want = (_flat(tree) for tree in (jax.eval_shape(blocks.unstack, params), blocks.shapes(cfg)))
    wrong = [f"{k} is {have.get(k, 'missing')}, cfg says {want.get(k, 'none')}" for k in sorted(have | want) if have.get(k) != want.get(k)]
    if wrong:
        raise ValueError(f"params do not fit cfg: {'; '.join(wrong)}")
    kind = params["embed"].dtype
    config |= {"dtype": str(kind), "torch_dtype": str(kind)}

    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, parts in table.items():
        size = sum(int(np.prod(s)) for _, s in parts) * kind.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
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
            arrays = [np.asarray(pick(at)) for at, _ in table[name]]
            arrays = [a.T if hf.transposed(at, s) else a for a, (at, s) in zip(arrays, table[name], strict=True)]
            tensors[name] = np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        # written aside and renamed: a killed save leaves no half file under the final name
        safetensors.numpy.save_file(tensors, folder / (file + ".part"), metadata={"format": "pt"})
        shutil.copymode(described, folder / (file + ".part"))  # safetensors writes for the owner alone
        os.replace(folder / (file + ".part"), folder / file)
    if len(shards) > 1:
        weights = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(int(np.prod(s)) for parts in table.values() for _, s in parts) * kind.itemsize
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=1) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def _flat(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"layers/0/q": shape} of a tree of shapes or of arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=blocks.is_shape)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): getattr(leaf, "shape", leaf) for path, leaf in leaves}
