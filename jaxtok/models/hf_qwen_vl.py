"""Hugging Face's Qwen2.5-VL as data: config.json <-> QwenVlConfig, and which tensor holds which parameters."""

import dataclasses
from typing import Any

from jaxtok.models import hf
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.models.hf import Fields
from jaxtok.models.qwen_vl import QwenVlConfig, shapes
from jaxtok.models.tensors import Home, Path, Table, matrix, piece

FAMILIES = ("qwen2_5_vl",)
# What transformers (5.x, configuration_qwen2_5_vl.py) assumes where the file is silent.
_TEXT: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 80, "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}
_SECTION = [16, 24, 24]
_EPS = 1e-6  # of the tower's norms, in the code


def config_from_hf(raw: dict[str, Any]) -> QwenVlConfig:
    """QwenVlConfig of a config.json, with the text's fields in it or in text_config; ValueError names whatever is not supported."""
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"config.json: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ValueError("config.json: quantization_config is not supported for qwen2_5_vl; load a checkpoint without it")
    r = Fields(raw, _TOKENS)
    text = r.object("text_config") or {k: v for k, v in raw.items() if k in _TEXT or k in ("rope_scaling", "rope_parameters")}
    token = lambda key: r.get(key, (int,), 0)
    tied = r.get("tie_word_embeddings", (bool,)) or bool(text.get("tie_word_embeddings"))
    try:
        return QwenVlConfig(
            vision=_vision(Fields(r.object("vision_config"), _VISION), text),
            text=_text(text | {"tie_word_embeddings": tied}),
            image_token=token("image_token_id"),
            video_token=token("video_token_id"),
            ends=(token("vision_start_token_id"), token("vision_end_token_id")),
        )
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith("config.json") else f"config.json: {e}") from None


def _text(text: dict[str, Any]) -> Config:
    text = _TEXT | text | {"model_type": "qwen2"}
    rope = Fields(text, {}).object("rope_scaling") or Fields(text, {}).object("rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    section = rope.get("mrope_section", _SECTION)
    if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and 0 <= n < 2**20 for n in section):
        raise ValueError(f"config.json: mrope_section={section!r} should be three numbers of frequencies")
    plain = {k: v for k, v in rope.items() if k not in ("mrope_section", "type", "rope_type")} | {
        "rope_type": "default" if kind == "mrope" else kind
    }
    cfg = hf.config_from_hf({k: v for k, v in text.items() if k != "rope_parameters"} | {"rope_scaling": plain})
    if cfg.head_dim * cfg.heads != cfg.width:
        raise ValueError(f"config.json: head_dim={cfg.head_dim}, but the code splits hidden_size={cfg.width} into {cfg.heads} heads")
    return dataclasses.replace(cfg, mrope=tuple(section))


def _vision(r: Fields, text: dict[str, Any]) -> EncoderConfig:
    width, side, merge, wide = (r.size(k) for k in ("hidden_size", "patch_size", "spatial_merge_size", "window_size"))
    if r.size("depth") > 10_000:
        raise ValueError(f"config.json: depth={r.size('depth')} is absurd")
    if r.get("hidden_act", (str,)) not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act={r.get('hidden_act', (str,))!r} of the tower is not supported; supported: silu")
    if r.size("out_hidden_size") != text.get("hidden_size", _TEXT["hidden_size"]):
        raise ValueError(
            f"config.json: out_hidden_size={r.size('out_hidden_size')} must be the text's hidden_size={text.get('hidden_size')}"
        )
    whole = r.get("fullatt_block_indexes", (list,))
    if not all(type(i) is int and 0 <= i < r.size("depth") for i in whole):
        raise ValueError(f"config.json: fullatt_block_indexes={whole!r} should be layers of {r.size('depth')}")
    rope = Fields(r.object("rope_parameters"), {"rope_theta": 10000.0, "rope_type": "axial"})
    if rope.get("rope_type", (str,)) != "axial":
        raise ValueError(f"config.json: rope_type={rope.get('rope_type', (str,))!r} of the tower is not supported; supported: axial")
    if wide < merge * side:
        raise ValueError(f"config.json: window_size={wide} has no room for {merge} x {merge} patches of {side}")
    return EncoderConfig(
        family="qwen2_5_vl_vision", width=width, layers=r.size("depth"), heads=r.size("num_heads"), hidden=r.size("intermediate_size"),
        image=None, patch=(side, side), channels=r.size("in_channels"), cls=False, act="silu", gated=True, norm_eps=_EPS, final_norm=False,
        patch_bias=False, pool="mean", rms=True, rope_theta=rope.number("rope_theta"), window=wide // merge // side * merge, whole=tuple(whole),
        frames=r.size("temporal_patch_size"), merge=merge,
    )  # fmt: skip


def config_to_hf(cfg: QwenVlConfig) -> dict[str, Any]:
    """The config.json of `cfg`; ValueError where it cannot say so."""
    v = cfg.vision
    text = hf.config_to_hf(dataclasses.replace(cfg.text, mrope=(), family="qwen2"))
    rope: dict[str, Any] = text.get("rope_scaling") or {"rope_type": "default", "rope_theta": cfg.text.rope_theta}
    text = {k: t for k, t in text.items() if k not in ("architectures", "head_dim", "rope_scaling")} | {"model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] = rope | {"mrope_section": list(cfg.text.mrope)}
    start, end = cfg.ends or (_TOKENS["vision_start_token_id"], _TOKENS["vision_end_token_id"])
    out = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": cfg.family, "text_config": text, "tie_word_embeddings": cfg.text.tied,
        "image_token_id": cfg.image_token, "video_token_id": _TOKENS["video_token_id"] if cfg.video_token is None else cfg.video_token,
        "vision_start_token_id": start, "vision_end_token_id": end,
        "vision_config": {
            "model_type": v.family, "depth": v.layers, "hidden_size": v.width, "hidden_act": v.act, "intermediate_size": v.hidden, "num_heads": v.heads,
            "in_channels": v.channels, "patch_size": v.patch[0], "spatial_merge_size": v.merge, "temporal_patch_size": v.frames,
            "window_size": (v.window or 0) * v.patch[0], "out_hidden_size": cfg.text.width, "fullatt_block_indexes": list(v.whole),
            "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        },
    }  # fmt: skip
    back = config_from_hf(out)
    for ours, theirs in ((v, back.vision), (cfg.text, back.text)):
        lost = [f"{f.name}={getattr(ours, f.name)!r}" for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
        if lost:
            raise ValueError(f"a {cfg.family} checkpoint cannot express {', '.join(lost)}; change cfg")
    return out


_LAYER = {
    "norm1": "norm1.weight", "norm2": "norm2.weight", **dict.fromkeys("qkv", "attn.qkv.weight"), "o": "attn.proj.weight",
    **{n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}  # fmt: skip
_MERGER = {"norm": "ln_q.weight", "up": "mlp.0.weight", "up_bias": "mlp.0.bias", "down": "mlp.2.weight", "down_bias": "mlp.2.bias"}


def table(cfg: QwenVlConfig, home: Home | None = None) -> Table:
    """Which tensor holds which parameters, the embedding first: under the names of the hub, or those some versions of transformers wrote."""
    new = home is not None and "model.language_model.embed_tokens.weight" in home
    out: Table = {}
    for name, parts in hf.table(cfg.text).items():
        body = name.removeprefix("model.")
        out[f"model.language_model.{body}" if new and name.startswith("model.") else name] = parts
    tower, want = ("model." if new else "") + "visual.", shapes(cfg)
    v = cfg.vision
    out[tower + "patch_embed.proj.weight"] = [
        piece(("vision", "patch"), want["vision"]["patch"], (v.width, v.channels, v.frames, *v.patch), (1, 2, 3, 4, 0))
    ]
    for i, layer in enumerate(want["vision"]["layers"]):
        rank = lambda name: "qkv".find(name[0]) if name[0] in "qkv" else 0
        for name in sorted(layer, key=rank):  # q, k and v stand in one tensor, in this order
            weight, path = name.removesuffix("_bias"), ("vision", "layers", i, name)
            full = f"{tower}blocks.{i}.{_LAYER[weight]}"
            full = full if weight == name else full.removesuffix("weight") + "bias"
            out.setdefault(full, []).append(_piece(path, layer[name]))
    for name, shape in want["projector"].items():
        out[f"{tower}merger.{_MERGER[name]}"] = [_piece(("projector", name), shape)]
    return out


def _piece(path: Path, shape: tuple[int, ...]):
    return matrix(path, shape) if len(shape) == 2 else piece(path, shape)


def ignorable(name: str, cfg: QwenVlConfig) -> bool:
    """Tensors that say nothing."""
    return name.endswith("rotary_emb.inv_freq") or name.endswith("rotary_pos_emb.inv_freq") or (cfg.text.tied and name == "lm_head.weight")
