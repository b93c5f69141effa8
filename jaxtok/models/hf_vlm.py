"""Hugging Face vision-language models as data: config.json -> VlmConfig, and which tensor holds which parameters."""

from typing import Any

from jaxtok.models import hf, hf_encoders
from jaxtok.models.hf import Fields
from jaxtok.models.tensors import Home, Table, matrix, piece
from jaxtok.models.vlm import VlmConfig, shapes

_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
FAMILIES = tuple(_CLASSES)
_ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-NeXT: heights and widths
_KNOWN = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_token_index": 32000,
    "image_grid_pinpoints": PINPOINTS,
}
# What transformers assumes of a text_config that is silent, as the published ones are.
_TEXT = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_TEXTS = {"llama": {**_TEXT, "intermediate_size": 11008}, "mistral": {**_TEXT, "intermediate_size": 14336}}
_PROJECTOR = {"up": "linear_1.weight", "up_bias": "linear_1.bias", "down": "linear_2.weight", "down_bias": "linear_2.bias"}


def config_from_hf(raw: dict[str, Any]) -> VlmConfig:
    """VlmConfig of a config.json; ValueError names whatever is not supported."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {family!r} is no vision-language model that is supported; supported: {', '.join(FAMILIES)}"
        )
    r = Fields(raw, _KNOWN)
    vision = hf_encoders.config_from_hf(raw, "vision")
    text = r.object("text_config")
    text = {"model_type": "llama"} | text
    text = _TEXTS.get(str(text["model_type"]), {}) | text
    layer, chosen = r.get("vision_feature_layer", (int,)), r.get("vision_feature_select_strategy", (str,))
    until = layer if layer >= 0 else vision.layers + 1 + layer  # hidden_states[0] is the embedding
    kind = r.get("projector_hidden_act", (str,))
    if chosen not in ("default", "full") or kind not in _ACTS:
        raise ValueError(
            f"config.json: vision_feature_select_strategy={chosen!r}, projector_hidden_act={kind!r}; supported: default, full; {', '.join(_ACTS)}"
        )
    token = raw.get("image_token_id", r.get("image_token_index", (int,), 0))
    if not hf.is_id(token):
        raise ValueError(f"config.json: image_token_id={token!r} should be a token id")
    try:
        return VlmConfig(
            family=family,
            vision=vision,
            text=hf.config_from_hf(text),
            until=until,
            act=_ACTS[kind],
            image_token=token,
            cls=chosen == "full" and vision.cls,
            pinpoints=pinpoints(r) if family == "llava_next" else (),
        )
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith("config.json") else f"config.json: {e}") from None


def pinpoints(r: Fields) -> tuple[tuple[int, int], ...]:
    """The resolutions of a config.json or preprocessor_config.json."""
    value = r.get("image_grid_pinpoints", (list,))
    if not value or not all(isinstance(p, list) and len(p) == 2 and all(type(side) is int for side in p) for p in value):
        raise ValueError(f"image_grid_pinpoints={value!r} should be a list of heights and widths")
    return tuple((y, x) for y, x in value)


def config_to_hf(cfg: VlmConfig) -> dict[str, Any]:
    """The config.json of `cfg`; ValueError where the family cannot express it."""
    vision, text = hf_encoders.config_to_hf(cfg.vision)[0], hf.config_to_hf(cfg.text)
    raw = {
        "architectures": [_CLASSES[cfg.family]], "model_type": cfg.family, "projector_hidden_act": next(k for k, v in _ACTS.items() if v == cfg.act),
        "vision_feature_layer": cfg.until - cfg.vision.layers - 1, "vision_feature_select_strategy": "full" if cfg.cls else "default",
        "image_token_index": cfg.image_token, "image_seq_length": cfg.patches, "tie_word_embeddings": cfg.text.tied,
        "vision_config": {k: v for k, v in vision.items() if k != "architectures"}, "text_config": text,
    }  # fmt: skip
    if cfg.pinpoints:
        raw["image_grid_pinpoints"] = [list(p) for p in cfg.pinpoints]
    if config_from_hf(raw) != cfg:
        raise ValueError(f"a {cfg.family} checkpoint cannot express {cfg}")
    return raw


SAVED: Home = dict.fromkeys(
    ("model.language_model.embed_tokens.weight", "model.vision_tower.vision_model.")
)  # how new checkpoints name tensors


def table(cfg: VlmConfig, home: Home) -> Table:
    """Which tensor holds which parameters, the embedding first: under the names of old and of new checkpoints."""
    new = "model.language_model.embed_tokens.weight" in home
    tower = "model.vision_tower." if new else "vision_tower."
    tower += "vision_model." if any(name.startswith(tower + "vision_model.") for name in home) else ""
    out: Table = {}
    for name, parts in hf.table(cfg.text).items():
        body = name.removeprefix("model.")
        full = f"model.language_model.{body}" if new and name.startswith("model.") else name if new else f"language_model.{name}"
        out[full] = parts
    for name, parts in hf_encoders.table(cfg.vision, tower).items():
        out[name] = [part._replace(path=("vision", *part.path)) for part in parts]
    projector = ("model." if new else "") + "multi_modal_projector."
    for name, shape in shapes(cfg)["projector"].items():
        out[projector + _PROJECTOR[name]] = [(matrix if len(shape) == 2 else piece)(("projector", name), shape)]
    if cfg.pinpoints:
        out[("model." if new else "") + "image_newline"] = [piece(("newline",), (cfg.text.width,))]
    return out


def ignorable(name: str, cfg: VlmConfig) -> bool:
    """Tensors that say nothing: the tower's pooling and last norm, what old checkpoints of the parts carry."""
    return (
        name.endswith(("position_ids", "rotary_emb.inv_freq"))
        or ".post_layernorm." in name
        or (cfg.text.tied and name.endswith("lm_head.weight"))
    )
