"""Makes tests/golden/vlm/: tiny random vision-language models as Hugging Face directories, with transformers' outputs.

    python tests/golden/make_vlm.py            (needs the `parity` extra: torch, transformers; writes about 0.2 MB)

Each folder: config.json and model.safetensors (bfloat16) as transformers saved them, and case.npz with what the float32 model of eager
attention makes of a batch of two with two pictures each: `pixels` f32 [b i y x ch], `ids` i32 [b n], `live` bool [b n], `logits`
f32 [b n vocab]. Seeds are fixed; every parameter is random.
"""

import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "vlm"
IMAGE, SIDE = 40, 12  # the placeholder's id, pixels
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=4)
TEXT = dict(
    model_type="llama", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=48, max_position_embeddings=64,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llava": dict(vision_config=dict(model_type="clip_vision_model", **VISION), text_config=TEXT),
    "llava_full": dict(
        vision_config=dict(model_type="clip_vision_model", **VISION),
        text_config=TEXT | dict(model_type="qwen2"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="quick_gelu",
    ),
    "llava_siglip": dict(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        text_config=TEXT,
        vision_feature_select_strategy="full",
    ),
}


def build(name: str, seed: int) -> Any:
    """A random transformers model, float32, eager attention."""
    import transformers

    config = transformers.LlavaConfig(image_token_index=IMAGE, **CASES[name])
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    return randomise(model, seed)


def randomise(model: Any, seed: int) -> Any:
    """The model in float32 with every parameter random, of values that bfloat16 holds."""
    import torch

    model = model.float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            x = torch.randn(p.shape, generator=noise)
            x = (
                1 + 0.2 * x
                if p.ndim == 1 and "norm" in key and key.endswith("weight")
                else 0.3 * x
                if p.ndim == 1
                else x / p.shape[-1] ** 0.5
            )
            p.copy_(x.to(torch.bfloat16))
    return model


def case(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Pictures, prompts with placeholders and padding, logits."""
    import torch

    rng, full = np.random.default_rng(seed), model.config.vision_feature_select_strategy == "full"
    k = (SIDE // 4) ** 2 + (full and "clip" in model.config.vision_config.model_type)
    ids, n = rng.integers(1, IMAGE, (2, 2 * k + 12)).astype(np.int32), 2 * k + 12
    for row, starts in enumerate(((3, k + 6), (6, k + 6))):  # in the second prompt the pictures stand side by side
        for at in starts:
            ids[row, at : at + k] = IMAGE
    live = np.arange(n)[None] >= np.array([[0], [4]])
    pixels = rng.normal(size=(2, 2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(live, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(np.cumsum(live, 1) - 1, 0)),
            pixel_values=torch.tensor(pixels.reshape(4, SIDE, SIDE, 3).transpose(0, 3, 1, 2).copy()),
        )
    return {"pixels": pixels, "ids": ids, "live": live, "logits": out.logits.numpy()}


def write(name: str, folder: pathlib.Path, seed: int) -> None:
    """The model (bfloat16) and its case."""
    import torch

    model = build(name, seed)
    arrays = case(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("generation_config.json"):
        path.unlink()
    np.savez_compressed(folder / "case.npz", **arrays)


if __name__ == "__main__":
    for seed, name in enumerate(CASES):
        write(name, FOLDER / name, seed)
        print(name, file=sys.stderr)
