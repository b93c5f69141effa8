"""Makes tests/golden/models/: tiny random decoders of each family as Hugging Face directories, with transformers' logits.

    python tests/golden/make_models.py            (needs the `parity` extra: torch, transformers; writes about 0.8 MB)

Each folder: config.json and model.safetensors (bfloat16) as transformers saved them, and case.npz: ids i32 [b n],
live bool [b n], logits f32 [b n vocab] of the float32 model with eager attention (0 at dead rows). Rows: full, two padded
left, one padded right. Seeds are fixed; every parameter is random, norms and biases too, so that none can be forgotten.
"""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "models"
VOCAB, LENGTH = 64, 24
SIZE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
TYPES = ["sliding_attention", "full_attention"]
GEMMA = dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=6, layer_types=TYPES)

# name -> (class prefix, configuration beside SIZE and the heads)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(head_dim=8)),
    "llama31": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=6, head_dim=16, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=8.0)),
    "gemma3_text": (
        "Gemma3Text",
        dict(
            **GEMMA,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e3),
            },
        ),
    ),
    "phi3": ("Phi3", dict(sliding_window=6, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
GOLDEN = [
    ("llama", "mha"), ("llama", "mqa"), ("llama31", "gqa"), ("mistral", "gqa"), ("mistral", "mqa"), ("qwen2", "gqa"), ("qwen2_window", "mha"),
    ("qwen3", "mqa"), ("gemma2", "gqa"), ("gemma3_text", "gqa"), ("gemma3_text", "mha"), ("phi3", "mha"), ("phi3", "gqa"),
]  # fmt: skip


def build(family: str, heads: str, seed: int) -> Any:
    """A random transformers model, float32, eager attention, logits of order one."""
    import torch
    import transformers

    prefix, extra = FAMILIES[family]
    h, g = HEADS[heads]
    config = getattr(transformers, prefix + "Config")(**{**SIZE, "num_attention_heads": h, "num_key_value_heads": g, **extra})
    cls = getattr(transformers, prefix.replace("Text", "") + "ForCausalLM")
    model = cls._from_config(config, attn_implementation="eager").float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=noise)
            # embeddings that give logits of order one; matrices that keep the variance; norms and biases moved off their 1 and 0
            tied = 0.3 if config.tie_word_embeddings else 1.0
            scale = 0.3 if p.ndim == 1 else tied if "embed" in name else 1.5 * p.shape[1] ** -0.5
            p.copy_((scale * x + (p if p.ndim == 1 else 0.0)).bfloat16().float())
    return model


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and live [4 LENGTH]: a full row, two padded left, one padded right."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (4, LENGTH)).astype(np.int32)
    at, live = np.arange(LENGTH), np.ones((4, LENGTH), bool)
    live[1], live[2], live[3] = at >= 5, at >= LENGTH - 3, at < LENGTH - 7
    return np.where(live, ids, 0), live


def logits(model: Any, ids: np.ndarray, live: np.ndarray) -> np.ndarray:
    """transformers' logits f32 [b n vocab], 0 at dead rows."""
    import torch

    pos = np.maximum(np.cumsum(live, 1) - 1, 0)
    args = dict(input_ids=ids.astype(np.int64), attention_mask=live.astype(np.int64), position_ids=pos)
    with torch.no_grad():
        out = model(**{k: torch.from_numpy(v) for k, v in args.items()}).logits.numpy()
    return np.where(live[..., None], out, 0.0).astype(np.float32)


def main() -> None:
    import torch

    for seed, (family, heads) in enumerate(GOLDEN):
        model = build(family, heads, seed)
        ids, live = batch(seed)
        z = logits(model, ids, live)
        folder = FOLDER / f"{family}_{heads}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as tmp:
            model.to(torch.bfloat16).save_pretrained(tmp)
            for name in ("config.json", "model.safetensors"):
                (folder / name).write_bytes(pathlib.Path(tmp, name).read_bytes())
        np.savez_compressed(folder / "case.npz", ids=ids, live=live, logits=z)
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"{folder.name:20} logits std {z[live].std():.2f} max {abs(z).max():.2f}, {size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
