"""Hugging Face checkpoints as data: config.json <-> Config, and which tensor holds which parameters."""

import dataclasses
from typing import Any

from jaxtok.models import blocks
from jaxtok.models.config import Config, RopeScaling
from jaxtok.models.tensors import Path, Piece, Table, matrix, piece

_BASE: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "sliding_window": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2,
    "eos_token_id": 1, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip

# What transformers (5.x, configuration_<family>.py) assumes where config.json is silent; "" is the class name for saving.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "": "LlamaForCausalLM", "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**_BASE, "": "MistralForCausalLM", "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2,
                "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_BASE, "": "Qwen2ForCausalLM", **_QWEN},
    "qwen3": {**_BASE, "": "Qwen3ForCausalLM", **_QWEN, "head_dim": 128},
    "gemma2": {**_BASE, "": "Gemma2ForCausalLM", **_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0},
    "gemma3_text": {**_BASE, "": "Gemma3ForCausalLM", **_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1e6},
    "phi3": {**_BASE, "": "Phi3ForCausalLM", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000},
}  # fmt: skip
_ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Fields:
    """Typed look-ups in a config.json: a wrong or missing value is a ValueError that names it."""

    def __init__(self, raw: dict[str, Any], defaults: dict[str, Any]):
        self.raw, self.defaults = raw, defaults

    def get(self, key: str, kinds: tuple[type, ...], least: int | float | None = None) -> Any:
        if key not in self.raw and key not in self.defaults:
            raise ValueError(f"config.json lacks {key}")
        value = self.raw.get(key, self.defaults.get(key))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(
                f"config.json: {key}={value!r} should be {' or '.join('null' if k is type(None) else k.__name__ for k in kinds)}"
            )
        if least is not None and value is not None and not least <= value < 2**31:
            raise ValueError(f"config.json: {key}={value!r} is out of range, the least is {least}")
        return value

    def object(self, key: str) -> dict[str, Any]:
        """A nested object, {} where it is absent or null."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"config.json: {key}={value!r} should be an object")
        return value

    def size(self, key: str) -> int:
        return self.get(key, (int,), 1)

    def number(self, key: str) -> float:
        return float(self.get(key, (int, float), 1e-30))


def is_id(value: Any) -> bool:
    """Whether a value of somebody's JSON can be a token id."""
    return type(value) is int and 0 <= value < 2**31


def _rope(p: dict[str, Any], context: int) -> RopeScaling | None:
    """Scaling of one rope dict, in the spelling of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    kind = p.get("rope_type", p.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; supported: default, linear, llama3")
    r = Fields(p, {"original_max_position_embeddings": context})
    if kind == "linear":
        return RopeScaling(kind=kind, factor=r.number("factor"))
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if not low < high:
        raise ValueError(f"config.json: low_freq_factor={low} must be under high_freq_factor={high}")
    return RopeScaling(
        kind=kind,
        factor=r.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=r.size("original_max_position_embeddings"),
    )


def _layer_types(raw: dict[str, Any], family: str, layers: int, r: Fields) -> tuple[tuple[bool, ...], int | None]:
    """Which layers see a sliding window, and its size. transformers' window is q - k < sliding_window in every family."""
    window = r.get("sliding_window", (int, type(None)), 1)
    if family in ("mistral", "phi3"):
        return ((True,) * layers, window) if window else ((), None)
    if family == "llama" or (family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False)):
        window = None
    types = raw.get("layer_types")
    if types is not None and family != "llama":
        if not isinstance(types, list) or len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"config.json: layer_types should be {layers} of full_attention, sliding_attention, is {types!r}")
        local = tuple(t == "sliding_attention" for t in types)
    elif family in ("qwen2", "qwen3"):
        local = tuple(window is not None and i >= r.get("max_window_layers", (int,)) for i in range(layers))
    elif family in ("gemma2", "gemma3_text"):
        every = 2 if family == "gemma2" else raw.get("sliding_window_pattern", 6)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"config.json: sliding_window_pattern={every!r} should be a positive int")
        local = tuple(bool((i + 1) % every) for i in range(layers))
    else:
        local = ()
    if any(local) and window is None:
        raise ValueError("config.json: layer_types has sliding_attention but no sliding_window is in force")
    return (local, window) if any(local) else ((), None)


def config_from_hf(raw: dict[str, Any]) -> Config:
    """Config of a Hugging Face config.json (transformers 4 and 5 spellings); ValueError names whatever is not supported."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    r = Fields(raw, FAMILIES[family])
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} is not supported for {family}; load a checkpoint without it")
    gemma = family.startswith("gemma")
    width, layers, heads, context = (
        r.size(k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    )
    if layers > 10_000:
        raise ValueError(f"config.json: num_hidden_layers={layers} is absurd")
    act = r.get("hidden_activation" if gemma else "hidden_act", (str,))
    if act not in _ACTS:
        raise ValueError(f"config.json: activation {act!r} is not supported; supported: {', '.join(_ACTS)}")
    head_dim = r.get("head_dim", (int, type(None)), 1)
    if head_dim is None:
        if width % heads:
            raise ValueError(f"config.json: hidden_size={width} is no multiple of num_attention_heads={heads}, and head_dim is not given")
        head_dim = width // heads

    theta, theta_local, scaling = r.number("rope_theta"), None, None
    if family == "gemma3_text":
        nested = Fields(r.object("rope_parameters"), {})
        full, near = nested.object("full_attention") | r.object("rope_scaling"), nested.object("sliding_attention")
        theta = Fields(full, {"rope_theta": theta}).number("rope_theta")
        theta_local = Fields(near, {"rope_theta": raw.get("rope_local_base_freq", 10000.0)}).number("rope_theta")
        scaling = _rope(full, context)
        if _rope(near, context) is not None:
            raise ValueError("config.json: rope scaling of the sliding layers is not supported; supported: default")
        factor = full.get("partial_rotary_factor", near.get("partial_rotary_factor", 1.0))
    else:
        rope = r.object("rope_scaling") or r.object("rope_parameters")
        scaling = _rope(rope, context)
        theta = Fields(rope, {"rope_theta": theta}).number("rope_theta")
        factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if factor not in (1.0, None) and family != "phi3":
        raise ValueError(f"config.json: partial_rotary_factor={factor!r} is supported for phi3 only")
    rotary = head_dim if factor is None else int(head_dim * Fields({"partial_rotary_factor": factor}, {}).number("partial_rotary_factor"))
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise ValueError(f"config.json: {rotary} rotated channels of head_dim={head_dim}; need an even number from 2 to head_dim")

    local, window = _layer_types(raw, family, layers, r)
    eos = r.get("eos_token_id", (int, list, type(None)))
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    if not all(is_id(i) for i in eos):
        raise ValueError(f"config.json: eos_token_id={eos!r} should be a list of int, each an id from 0 on")
    softcap = lambda key: r.number(key) if gemma and r.get(key, (int, float, type(None))) else None
    return Config(
        family=family, vocab=r.size("vocab_size"), width=width, layers=layers, heads=heads,
        kv_heads=r.get("num_key_value_heads", (int, type(None)), 1) or heads, head_dim=head_dim, hidden=r.size("intermediate_size"),
        context=context, norm_eps=r.number("rms_norm_eps"), norm_offset=1.0 if gemma else 0.0, act=_ACTS[act], rope_theta=theta,
        rope_theta_local=theta_local, rope_scaling=scaling, rotary_dim=None if rotary == head_dim else rotary, window=window, local=local,
        softcap=softcap("attn_logit_softcapping"), logit_softcap=softcap("final_logit_softcapping"), qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=family == "qwen2", sandwich=gemma, scale=r.number("query_pre_attn_scalar") ** -0.5 if gemma else None,
        embed_scale=width**0.5 if gemma else 1.0, tied=r.get("tie_word_embeddings", (bool,)),
        bos=r.get("bos_token_id", (int, type(None)), 0), eos=tuple(eos),
    )  # fmt: skip


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json of `cfg`, in the spelling that transformers 4 and 5 both read; ValueError when the family cannot express it."""
    if cfg.family not in FAMILIES:
        raise ValueError(f"family {cfg.family!r} has no Hugging Face format; choose one of {', '.join(FAMILIES)}")
    gemma, sliding = cfg.family.startswith("gemma"), any(cfg.local)
    out: dict[str, Any] = {
        "architectures": [FAMILIES[cfg.family][""]], "model_type": cfg.family, "vocab_size": cfg.vocab, "hidden_size": cfg.width,
        "intermediate_size": cfg.hidden, "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim, "max_position_embeddings": cfg.context, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tied, "bos_token_id": cfg.bos, "eos_token_id": cfg.eos[0] if len(cfg.eos) == 1 else list(cfg.eos) or None,
        "pad_token_id": None,
    }  # fmt: skip
    act = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[cfg.act]
    out |= {"hidden_activation" if gemma else "hidden_act": act}
    s = cfg.rope_scaling
    if s is not None:
        out["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor, "rope_theta": cfg.rope_theta}
        if s.kind == "llama3":
            out["rope_scaling"] |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
            out["rope_scaling"] |= {"original_max_position_embeddings": s.original_context}
    if gemma:
        scalar = (cfg.head_dim**-0.5 if cfg.scale is None else cfg.scale) ** -2
        out["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
        out |= {"attn_logit_softcapping": cfg.softcap, "final_logit_softcapping": cfg.logit_softcap}
    if cfg.family == "gemma3_text":
        out["rope_local_base_freq"] = cfg.rope_theta_local
    if cfg.family == "phi3" and cfg.rotary_dim is not None:
        out["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
    if cfg.family != "llama":
        out["sliding_window"] = cfg.window if sliding else None
    if cfg.family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = sliding
    if gemma or cfg.family in ("qwen2", "qwen3"):
        out["layer_types"] = ["sliding_attention" if cfg.local and cfg.local[i] else "full_attention" for i in range(cfg.layers)]
    back = config_from_hf(out)
    want = dataclasses.replace(cfg, local=cfg.local if sliding else (), window=cfg.window if sliding else None)
    if gemma and cfg.scale is None:
        back = dataclasses.replace(back, scale=None)
    lost = [f"{f.name}={getattr(cfg, f.name)!r}" for f in dataclasses.fields(cfg) if getattr(back, f.name) != getattr(want, f.name)]
    if lost:
        raise ValueError(f"a {cfg.family} checkpoint cannot express {', '.join(lost)}; change cfg or its family")
    return out


_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
    "attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkvo"}, **{f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight", **{n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}  # fmt: skip
_SANDWICH = {"attn_post_norm": "post_attention_layernorm.weight", "mlp_norm": "pre_feedforward_layernorm.weight",
             "mlp_post_norm": "post_feedforward_layernorm.weight"}  # fmt: skip
_PHI3 = {**dict.fromkeys("qkv", "self_attn.qkv_proj.weight"), **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight")}


def table(cfg: Config) -> Table:
    """Which tensor holds which parameters, the embedding's first (Phi3 fuses q,k,v and gate,up)."""
    names = _LAYER | (_SANDWICH if cfg.sandwich else {}) | (_PHI3 if cfg.family == "phi3" else {})
    shapes = blocks.shapes(cfg)
    out: Table = {}
    for top in ("embed", "norm", "head"):
        if top in shapes:
            out[_TOP[top]] = [_piece((top,), shapes[top])]
    for i, layer in enumerate(shapes["layers"]):
        for name, shape in layer.items():
            out.setdefault(f"model.layers.{i}.{names[name]}", []).append(_piece(("layers", i, name), shape))
    return out


def _piece(path: Path, shape: tuple[int, ...]) -> Piece:
    return matrix(path, shape) if len(shape) == 2 and path != ("embed",) else piece(path, shape)


def ignorable(name: str, cfg: Config) -> bool:
    """Tensors that old checkpoints carry and that say nothing: the head of a tied model, rotary tables."""
    return (cfg.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")
