"""Hugging Face encoders as data: config.json <-> EncoderConfig, and which tensor holds which parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxtok.models import blocks, encoder
from jaxtok.models.config import EncoderConfig
from jaxtok.models.hf import Fields
from jaxtok.models.tensors import Path, Piece, Table, matrix, piece

_BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_VISION = {**_BASE, "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True}
_DINO = {**_VISION, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}

# What transformers (5.x, configuration_<family>.py) assumes where config.json is silent.
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {**_VISION, "layer_norm_eps": 1e-12},
    "deit": {**_VISION, "layer_norm_eps": 1e-12},
    "dinov2": {**_DINO, "patch_size": 14},
    "dinov2_with_registers": {**_DINO, "num_register_tokens": 4},
    "clip_vision_model": {**_VISION, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "clip_text_model": {**_BASE, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
                        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    "siglip_vision_model": {**_VISION, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
    "siglip_text_model": {**_BASE, "vocab_size": 32000, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
                          "layer_norm_eps": 1e-6, "projection_size": None},
}  # fmt: skip
_ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
         "silu": "silu", "swish": "silu"}  # fmt: skip
TOWERS = ("vision", "text")


def tower_config(raw: dict[str, Any], tower: str) -> dict[str, Any]:
    """The config.json of one encoder: `raw`, or that of its vision or text tower (CLIP, SigLIP, and the vision tower of larger models)."""
    if tower not in TOWERS:
        raise ValueError(f"tower={tower!r}; choose one of {', '.join(TOWERS)}")
    outer, key = raw.get("model_type"), f"{tower}_config"
    if outer in FAMILIES or not (key in raw or outer in ("clip", "siglip")):
        return raw
    r = Fields(raw, {})
    inner = r.object(key) | r.object(key + "_dict")  # the second is an old spelling that wins over the first
    if outer in ("clip", "siglip"):
        inner = inner | {"model_type": f"{outer}_{tower}_model"}
    return inner


def config_from_hf(raw: dict[str, Any], tower: str = "vision") -> EncoderConfig:
    """EncoderConfig of a config.json, without a head (`fit` finds it); ValueError names whatever is not supported."""
    raw = tower_config(raw, tower)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {family!r} is no encoder that is supported; supported: clip, siglip, {', '.join(FAMILIES)}"
        )
    r = Fields(raw, FAMILIES[family])
    if raw.get("quantization_config"):
        raise ValueError(f"config.json: quantization_config is not supported for {family}; load a checkpoint without it")
    width, layers, heads = (r.size(k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if layers > 10_000:
        raise ValueError(f"config.json: num_hidden_layers={layers} is absurd")
    kind = r.get("hidden_act", (str,))
    if kind not in _ACTS:
        raise ValueError(f"config.json: activation {kind!r} is not supported; supported: {', '.join(_ACTS)}")
    common: dict[str, Any] = dict(
        family=family, width=width, layers=layers, heads=heads, act=_ACTS[kind], norm_eps=r.number("layer_norm_eps")
    )
    try:
        if family.endswith("text_model"):
            clip = family == "clip_text_model"
            eos = r.get("eos_token_id", (int, type(None)), 0) if clip else None
            return EncoderConfig(
                **common, hidden=r.size("intermediate_size"), image=None, vocab=r.size("vocab_size"), context=r.size("max_position_embeddings"),
                causal=clip, cls=False, pool="eos", out_bias=not clip, eos=-1 if eos == 2 else eos,
            )  # fmt: skip
        dino, siglip, clip = family.startswith("dinov2"), family.startswith("siglip"), family.startswith("clip")
        hidden = int(width * r.size("mlp_ratio")) if dino else r.size("intermediate_size")
        gated = dino and r.get("use_swiglu_ffn", (bool,))
        common["act"] = "silu" if gated else common["act"]
        registers = r.size("num_register_tokens") if family == "dinov2_with_registers" else 0
        return EncoderConfig(
            **common, hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
            image=_pair(r, "image_size"), patch=_pair(r, "patch_size"), channels=r.size("num_channels"), antialias=registers > 0,
            cls=not siglip, distilled=family == "deit", registers=registers, gated=gated, stem_norm=clip, layer_scale=dino,
            qkv_bias=r.get("qkv_bias", (bool,)), patch_bias=not clip,
            pool="map" if siglip and r.get("vision_use_head", (bool,)) else "mean" if siglip else "cls", out_bias=not clip,
        )  # fmt: skip
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith("config.json") else f"config.json: {e}") from None


def _pair(r: Fields, key: str) -> tuple[int, int]:
    value = r.get(key, (int, list), None)
    sides = [value, value] if isinstance(value, int) else value
    if len(sides) != 2 or not all(type(side) is int and 1 <= side < 2**20 for side in sides):
        raise ValueError(f"config.json: {key}={value!r} should be a size in pixels, or height and width")
    return sides[0], sides[1]


# --- tensors ----------------------------------------------------------------------------------------------------------

_VIT = {
    "cls": "embeddings.cls_token", "dist": "embeddings.distillation_token", "registers": "embeddings.register_tokens",
    "pos": "embeddings.position_embeddings", "patch": "embeddings.patch_embeddings.projection.weight", "norm": "layernorm.weight",
    "layer": "encoder.layer", "norm1": "layernorm_before.weight", "norm2": "layernorm_after.weight",
    "q": "attention.attention.query.weight", "k": "attention.attention.key.weight", "v": "attention.attention.value.weight",
    "o": "attention.output.dense.weight", "up": "intermediate.dense.weight", "down": "output.dense.weight",
}  # fmt: skip
_DINOV2 = _VIT | {
    "norm1": "norm1.weight", "norm2": "norm2.weight", "up": "mlp.fc1.weight", "down": "mlp.fc2.weight",
    "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1",
}  # fmt: skip
_SWIGLU = _DINOV2 | {**dict.fromkeys(("gate", "up"), "mlp.weights_in.weight"), "down": "mlp.weights_out.weight"}
_CLIP = {
    "cls": "embeddings.class_embedding", "pos": "embeddings.position_embedding.weight", "patch": "embeddings.patch_embedding.weight",
    "embed": "embeddings.token_embedding.weight", "stem_norm": "pre_layrnorm.weight", "norm": "post_layernorm.weight",
    "layer": "encoder.layers", "norm1": "layer_norm1.weight", "norm2": "layer_norm2.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkv"}, "o": "self_attn.out_proj.weight", "up": "mlp.fc1.weight", "down": "mlp.fc2.weight",
}  # fmt: skip
_MAP = {
    "probe": "head.probe", **dict.fromkeys("qkv", "head.attention.in_proj_weight"), "o": "head.attention.out_proj.weight",
    "norm": "head.layernorm.weight", "up": "head.mlp.fc1.weight", "down": "head.mlp.fc2.weight",
}  # fmt: skip


_ORDER = {"gate": 0, "q": 0, "up": 1, "k": 1, "v": 2}  # in a tensor that holds several


def _names(cfg: EncoderConfig) -> dict[str, str]:
    if cfg.family.startswith("dinov2"):
        return _SWIGLU if cfg.gated else _DINOV2
    if cfg.family in ("vit", "deit"):
        return _VIT
    return _CLIP | ({"norm": "final_layer_norm.weight"} if cfg.image is None else {})


def _heads(cfg: EncoderConfig, prefix: str) -> dict[str, str]:
    """Names of the heads that a checkpoint of the family may have, for a body whose names start with `prefix`."""
    outer = prefix
    for part in ("vit.", "deit.", f"{cfg.family}.", "vision_model.", "text_model."):
        outer = outer.removesuffix(part)
    if cfg.family == "siglip_text_model":
        return {"head": prefix + "head.weight"}
    return {
        "head": outer + "classifier.weight", "cls_head": outer + "cls_classifier.weight", "head_dist": outer + "distillation_classifier.weight",
        "projection": outer + ("text" if cfg.image is None else "visual") + "_projection.weight",
    }  # fmt: skip


def fit(cfg: EncoderConfig, home: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[EncoderConfig, str]:
    """(cfg with the head that the tensors have, what the names of its body start with). `home`: tensor name -> its open file."""
    anchor = _names(cfg)["patch" if cfg.image is not None else "embed"]
    found = [name[: -len(anchor)] for name in home if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise ValueError(f"{len(found)} tensors are named ...{anchor}: {', '.join(sorted(found))}; which encoder is meant?")
    prefix = found[0] if found else ""
    rows = lambda name: (list(home[name].get_slice(name).get_shape()) or [0])[0] if name in home else 0
    heads = _heads(cfg, prefix)
    out = {kind: rows(name) for kind, name in heads.items()}
    if cfg.family in ("clip_vision_model", "siglip_vision_model") and out["head"]:  # ...ForImageClassification: the mean of all patches
        return dataclasses.replace(cfg, pool="mean", final_norm=cfg.family != "clip_vision_model", out=out["head"], out_bias=True), prefix
    if cfg.family in ("clip_vision_model", "clip_text_model"):
        return dataclasses.replace(cfg, out=out["projection"] or None), prefix
    if cfg.family == "deit" and (out["cls_head"] or out["head_dist"]):
        return dataclasses.replace(cfg, pool="cls_dist", out=out["cls_head"] or out["head_dist"]), prefix
    if cfg.family == "siglip_text_model":
        width = Fields(dict(raw), {"projection_size": None}).get("projection_size", (int, type(None)), 1)
        return dataclasses.replace(cfg, out=width or cfg.width), prefix
    if out.get("head"):
        return dataclasses.replace(cfg, pool="cls_mean" if cfg.family.startswith("dinov2") else "cls", out=out["head"]), prefix
    return cfg, prefix


def table(cfg: EncoderConfig, prefix: str = "") -> Table:
    """Which tensor holds which parameters, the first embedding's first; `prefix` is what the names of its body start with."""
    names, heads = _names(cfg), _heads(cfg, prefix)
    classifies = not (cfg.family.startswith("clip") and cfg.pool != "mean")
    heads["head"] = heads["cls_head"] if cfg.pool == "cls_dist" else heads["head"] if classifies else heads["projection"]
    out: Table = {}
    lead = not cfg.family.endswith("_model")
    for path, shape in paths(cfg).items():
        name = _weight(path)
        full = (
            prefix + _MAP[name] if path[0] == "map"
            else f"{prefix}{names['layer']}.{path[1]}.{names[name]}" if path[0] == "layers"
            else heads[name] if name in ("head", "head_dist") else prefix + names[name]
        )  # fmt: skip
        if name != path[-1]:
            full = full[: -len("weight")] + "bias"
        out.setdefault(full, []).append(stored(cfg, path, shape, lead))
    return out


def paths(cfg: EncoderConfig) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of every parameter: the embedding first, and in the order in which tensors that hold several of them do."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(encoder.shapes(cfg), is_leaf=blocks.is_shape)
    shapes: dict[Path, tuple[int, ...]] = {tuple(getattr(k, "key", getattr(k, "idx", 0)) for k in path): shape for path, shape in leaves}
    rank = lambda path: (path[0] != ("patch" if cfg.image is not None else "embed"), _ORDER.get(_weight(path), 0))
    return {path: shapes[path] for path in sorted(shapes, key=rank)}


def _weight(path: Path) -> str:
    return str(path[-1]).removesuffix("_bias")


def stored(cfg: EncoderConfig, path: Path, shape: tuple[int, ...], lead: bool, flat: bool = False) -> Piece:
    """How torch stores a parameter: the patch's as a convolution (`flat`: as a matrix), the tokens' and positions' with axes of size 1
    before them where `lead`, matrices [out, in]."""
    name = path[-1]
    if name == "patch" and not flat:
        return piece(path, shape, (cfg.width, cfg.channels, *cfg.patch), (2, 3, 1, 0))
    if name == "probe" or (lead and name in ("cls", "dist", "registers", "pos")):
        return piece(path, shape, (1,) * (3 - len(shape)) + shape)
    return matrix(path, shape) if len(shape) == 2 and name not in ("embed", "pos") else piece(path, shape)


def ignorable(name: str, cfg: EncoderConfig, prefix: str, composite: bool) -> bool:
    """Tensors beside an encoder that its output does not depend on: other parts of a larger model, the pooler and the mask token of
    pretraining, tables of positions 0, 1, 2, ..., and the head of SigLIP or the norm of CLIP where a classifier stands in its place."""
    if composite and not name.startswith(prefix):
        return True
    rest = name.removeprefix(prefix)
    unread = cfg.pool == "mean" and (rest.startswith("head.") if cfg.family.startswith("siglip") else rest.startswith("post_layernorm."))
    return unread or rest.startswith("pooler.dense.") or rest.endswith(("position_ids", "embeddings.mask_token"))


# --- saving -----------------------------------------------------------------------------------------------------------


def config_to_hf(cfg: EncoderConfig) -> tuple[dict[str, Any], str]:
    """(config.json, what the names of its body start with) of an encoder; ValueError where the family cannot express it."""
    if cfg.family not in FAMILIES:
        raise ValueError(f"family {cfg.family!r} has no Hugging Face format; choose one of {', '.join(FAMILIES)}")
    family, text = cfg.family, cfg.image is None
    act = next(k for k, v in _ACTS.items() if v == cfg.act)
    raw: dict[str, Any] = {
        "model_type": family, "hidden_size": cfg.width, "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.hidden, "hidden_act": act, "layer_norm_eps": cfg.norm_eps,
    }  # fmt: skip
    if text:
        raw |= {"vocab_size": cfg.vocab, "max_position_embeddings": cfg.context, "bos_token_id": cfg.bos, "pad_token_id": None}
        raw |= {
            "eos_token_id": 2 if cfg.eos == -1 else cfg.eos,
            "projection_dim" if family.startswith("clip") else "projection_size": cfg.out,
        }
    else:
        one = lambda pair: pair[0] if pair[0] == pair[1] else list(pair)
        raw |= {"image_size": one(cfg.image), "patch_size": one(cfg.patch), "num_channels": cfg.channels, "qkv_bias": cfg.qkv_bias}
        raw |= {"vision_use_head": cfg.pool == "map"} if family.startswith("siglip") else {}
        raw |= {"projection_dim": cfg.out} if family.startswith("clip") and cfg.out is not None else {}
    if family.startswith("dinov2"):
        raw |= {"use_swiglu_ffn": cfg.gated, "mlp_ratio": cfg.hidden * 3 // 2 // cfg.width if cfg.gated else cfg.hidden // cfg.width}
        raw |= {"num_register_tokens": cfg.registers} if cfg.registers else {}
    model, prefix = _architecture(cfg)
    back = dataclasses.replace(config_from_hf(raw), pool=cfg.pool, out=cfg.out, out_bias=cfg.out_bias, bos=cfg.bos)
    if cfg.pool == "mean" and family.startswith("clip"):
        back = dataclasses.replace(back, final_norm=False)
    lost = [f"{f.name}={getattr(cfg, f.name)!r}" for f in dataclasses.fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)]
    if lost:
        raise ValueError(f"a {family} checkpoint cannot express {', '.join(lost)}; change cfg or its family")
    if cfg.out is not None and "Classification" in model:
        raw |= {"id2label": {str(i): f"LABEL_{i}" for i in range(cfg.out)}, "label2id": {f"LABEL_{i}": i for i in range(cfg.out)}}
    if family.endswith("vision_model") and "Classification" in model:  # these want the configuration of a pair of towers
        labels = {k: raw.pop(k) for k in ("id2label", "label2id")}
        raw = {"model_type": family.split("_")[0], "vision_config": raw, "text_config": {}} | labels
    return raw | {"architectures": [model]}, prefix


def _architecture(cfg: EncoderConfig) -> tuple[str, str]:
    stem = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}.get(cfg.family)
    if stem is not None:
        if cfg.out is None:
            return stem + "Model", ""
        return stem + "ForImageClassification" + ("WithTeacher" if cfg.pool == "cls_dist" else ""), cfg.family + "."
    stem, tower = ("CLIP" if cfg.family.startswith("clip") else "Siglip"), "text" if cfg.image is None else "vision"
    if cfg.pool == "mean" and cfg.out is not None:
        return stem + "ForImageClassification", "vision_model."
    projected = cfg.out is not None and stem == "CLIP"
    return f"{stem}{tower.title()}Model" + ("WithProjection" if projected else ""), f"{tower}_model." if projected else ""
