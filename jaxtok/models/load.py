"""Load and save checkpoints: Hugging Face directories and hub ids (safetensors), llama2.c `.bin` files. Nothing is ever unpickled."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.models import blocks, encoder, hf, hf_encoders, hf_qwen_vl, hf_vlm, llama2c, qwen_vl, tensors, vlm
from jaxtok.models.blocks import Params
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.models.qwen_vl import QwenVlConfig
from jaxtok.models.tensors import Path, Place, Progress
from jaxtok.models.text import JsonTokenizer, ScoreTokenizer, Tokenizer
from jaxtok.models.vlm import VlmConfig

Placement = jax.sharding.Sharding | jax.sharding.PartitionSpec

_CHAT_FILES = ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"]
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "*processor_config.json",
    *_CHAT_FILES,
]
EMBEDDED, DRAFT, EMBEDDED_VLM = "embedded", "embedded_draft", "embedded_vlm"  # the models of the package


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
    dtype = _floating(dtype)
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


def load_encoder(
    path: str | os.PathLike[str],
    *,
    tower: str = "vision",
    dtype: Any = None,
    sharding: Placement | Mapping[str, Placement] | None = None,
    progress: Progress | None = None,
) -> tuple[EncoderConfig, Params]:
    """(cfg, params with layers as a tuple) of an encoder: ViT, DeiT, DINOv2 (and with registers), CLIP, SigLIP, for `models.vit`.

    path: a Hugging Face directory or a hub id, as in `load`; of CLIP and SigLIP, and of larger models with such an encoder inside, one
    `tower` is read, "vision" or "text". The head is what the checkpoint has: a classifier, CLIP's projection, SigLIP's pooling, or none
    (a ViT's pooler is left out).
    dtype, sharding, progress: as in `load`; dtype=None is that of the first embedding. ValueError, one line: as in `load`.
    """
    dtype, place = _floating(dtype), _placer(sharding)
    where = find(path)
    if not (where / "config.json").is_file():
        raise ValueError(f"{where} is no encoder's checkpoint: need a directory with config.json and safetensors")
    raw = tensors.read_json(where / "config.json")
    try:
        cfg = hf_encoders.config_from_hf(raw, tower)
        inner = hf_encoders.tower_config(raw, tower)
        with tensors.opened(where) as home:
            cfg, prefix = hf_encoders.fit(cfg, home, inner)
            table = hf_encoders.table(cfg, prefix)
            what, unread = (
                f"a {cfg.family} model of its config.json",
                lambda name: hf_encoders.ignorable(name, cfg, prefix, inner is not raw),
            )
            tensors.check(where, what, table, home, unread)
            return cfg, tensors.read(table, home, {"layers": cfg.layers}, dtype, place, progress)
    except ValueError as e:
        raise ValueError(str(e) if str(where) in str(e) else f"{where}: {e}") from None


def load_vlm(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Placement | Mapping[str, Placement] | None = None,
    progress: Progress | None = None,
) -> tuple[VlmConfig | QwenVlConfig, Params, Tokenizer | None]:
    """(cfg, params, tokenizer or None) of a vision-language model; arguments and errors as in `load`.

    LLaVA-1.5 and LLaVA-NeXT for `models.vlm`, Qwen2.5-VL (a `QwenVlConfig`) for `models.qwen_vl`. "embedded_vlm" is the small one of the
    package, which reads the pictures of `jaxtok.evals.digits`.
    """
    dtype, place = _floating(dtype), _placer(sharding)
    where = find(path)
    if not (where / "config.json").is_file():
        raise ValueError(f"{where} is no vision-language model's checkpoint: need a directory with config.json and safetensors")
    try:
        raw = tensors.read_json(where / "config.json")
        family: Any = hf_qwen_vl if raw.get("model_type") in hf_qwen_vl.FAMILIES else hf_vlm
        cfg = family.config_from_hf(raw)
        with tensors.opened(where) as home:
            table = family.table(cfg, home)
            what = f"a {cfg.family} model of its config.json"
            tensors.check(where, what, table, home, lambda name: family.ignorable(name, cfg))
            layers = {"layers": cfg.text.layers, "vision": cfg.vision.layers}
            params = tensors.read(table, home, layers, dtype, place, progress)
        return cfg, params, _hf_tokenizer(where, cfg.text)
    except ValueError as e:
        raise ValueError(str(e) if str(where) in str(e) else f"{where}: {e}") from None


class Pair(NamedTuple):
    """Two towers and what turns the cosines of their outputs into logits: `vit.similarity`."""

    vision: tuple[EncoderConfig, Params]
    text: tuple[EncoderConfig, Params]
    scale: jax.Array  # f32 [], log of the factor
    bias: jax.Array  # f32 []


def load_pair(path: str | os.PathLike[str], **options: Any) -> Pair:
    """Both towers of a CLIP or SigLIP checkpoint; options as in `load_encoder`."""
    vision, text = (load_encoder(path, tower=tower, **options) for tower in hf_encoders.TOWERS)
    with tensors.opened(find(path)) as home:
        scalar = lambda name: jnp.asarray(np.asarray(home[name].get_tensor(name), np.float32).reshape(-1)[:1].sum())
        if "logit_scale" not in home:
            raise ValueError(f"{path} holds no pair of towers: it has no logit_scale; load_encoder loads one tower")
        return Pair(vision, text, scalar("logit_scale"), scalar("logit_bias") if "logit_bias" in home else jnp.zeros(()))


def _floating(dtype: Any) -> Any:
    dtype = None if dtype is None else jnp.dtype(dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype} is no floating type; choose float32, bfloat16 or float16")
    return dtype


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where a checkpoint is: a local path, a model of the package ("embedded", "embedded_draft", "embedded_vlm"), or the local snapshot of a hub id."""
    where = pathlib.Path(os.path.expanduser(path))  # pathlib's raises for ~nobody
    if where.exists():
        return where
    name = os.fspath(path)
    if name in (EMBEDDED, DRAFT, EMBEDDED_VLM):
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


def _placer(sharding: Placement | Mapping[str, Placement] | None) -> Place:
    def place(path: Path, x: np.ndarray) -> jax.Array:
        if not isinstance(sharding, Mapping):
            return jax.device_put(x, sharding)
        name = "/".join(map(str, path))
        for pattern, where in sharding.items():
            if re.search(pattern, name):
                return jax.device_put(x, where)
        raise ValueError(f"no pattern of sharding matches {name}; end the table with '.*'")

    return place


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _load_hf(folder: pathlib.Path, dtype: Any, place: Any, progress: Progress | None) -> tuple[Config, Params, Tokenizer | None]:
    raw = tensors.read_json(folder / "config.json")
    if raw.get("model_type") in (*hf_encoders.FAMILIES, "clip", "siglip"):
        raise ValueError(f"{folder} holds an encoder ({raw['model_type']}); models.load.load_encoder loads it")
    try:
        cfg = hf.config_from_hf(raw)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models list their end-of-turn ids here only
        eos = tensors.read_json(generation).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if ids and all(hf.is_id(i) for i in ids):
            cfg = dataclasses.replace(cfg, eos=tuple(ids))
    table = hf.table(cfg)
    with tensors.opened(folder) as home:
        tensors.check(folder, f"a {cfg.family} model of its config.json", table, home, lambda name: hf.ignorable(name, cfg))
        params = tensors.read(table, home, {"layers": cfg.layers}, dtype, place, progress)
    return cfg, params, _hf_tokenizer(folder, cfg)


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
        tensors.insert(params, at, place(at, np.array(read(), dtype=jnp.float32 if dtype is None else dtype, order="C")))
        if progress is not None:
            progress(done + 1, len(weights), "/".join(map(str, at)))
    names = [f"tok{cfg.vocab}.bin", "tokenizer.bin"]
    found = next((path.parent / n for n in names if (path.parent / n).is_file()), None)
    tokenizer = None if found is None else ScoreTokenizer.read(found)
    if tokenizer is not None and tokenizer.vocab != cfg.vocab:
        raise ValueError(f"{found} has {tokenizer.vocab} pieces, {path} a vocabulary of {cfg.vocab}")
    return cfg, params, tokenizer


# --- saving -----------------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str], cfg: Config | EncoderConfig | VlmConfig | QwenVlConfig, params: Params, tokenizer: Tokenizer | None = None
) -> None:
    """Write a Hugging Face directory that `load` (`load_encoder`, `load_vlm`) and transformers read: config.json, safetensors (in shards
    of 4 GiB), tokenizer.

    params: layers as a tuple or stacked. Existing files of that name are replaced; a directory with other weights in it is a ValueError.
    """
    folder = pathlib.Path(os.path.expanduser(path))
    layers = params["layers"]

    def pick(at: Path) -> Any:
        if at[0] == "layers" and isinstance(layers, dict):
            return layers[at[2]][at[1]]
        return functools.reduce(lambda tree, key: tree[key], at, cast(Any, params))

    if isinstance(cfg, EncoderConfig):
        config, prefix = hf_encoders.config_to_hf(cfg)
        table, shapes, first = hf_encoders.table(cfg, prefix), encoder.shapes(cfg), "embed" if cfg.image is None else "patch"
    elif isinstance(cfg, QwenVlConfig):
        config, table, shapes, first = hf_qwen_vl.config_to_hf(cfg), hf_qwen_vl.table(cfg), qwen_vl.shapes(cfg), "embed"
    elif isinstance(cfg, VlmConfig):
        config, table, shapes, first = hf_vlm.config_to_hf(cfg), hf_vlm.table(cfg, hf_vlm.SAVED), vlm.shapes(cfg), "embed"
    else:
        config, table, shapes, first = hf.config_to_hf(cfg), hf.table(cfg), blocks.shapes(cfg), "embed"
    have, want = (_flat(tree) for tree in (jax.eval_shape(blocks.unstack, params), shapes))
    wrong = [f"{k} is {have.get(k, 'missing')}, cfg says {want.get(k, 'none')}" for k in sorted(have | want) if have.get(k) != want.get(k)]
    if wrong:
        raise ValueError(f"params do not fit cfg: {'; '.join(wrong)}")
    tensors.write(folder, config, table, pick, params[first].dtype)
    if tokenizer is not None:
        tokenizer.save(folder)


def _flat(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"layers/0/q": shape} of a tree of shapes or of arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=blocks.is_shape)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): getattr(leaf, "shape", leaf) for path, leaf in leaves}
