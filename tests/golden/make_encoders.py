"""Makes tests/golden/encoders/: tiny random encoders of each family as Hugging Face directories, with transformers' outputs.

    python tests/golden/make_encoders.py            (needs the `parity` extra: torch, transformers; writes about 0.6 MB)

Each folder: config.json and model.safetensors (bfloat16) as transformers saved them, and case.npz with what the float32 model of eager
attention makes of a batch of three: `pixels` f32 [b y x ch], `wide` (another size, where positions are
resampled) or `ids` i32 [b n] and `live`
bool [b n]; `rows` f32 [b n c] behind the last layer, `out` and `wide_out` f32 [b out]. A folder that holds two towers has
the arrays of both, and `similarity` f32 [images texts]. Seeds are fixed; every parameter is random.
"""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "encoders"
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"} | dict(mlp_ratio=2)
TEXT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, max_position_embeddings=12,
    pad_token_id=1, bos_token_id=0, eos_token_id=39,
)  # fmt: skip
LABELS = dict(num_labels=5)

# name -> (class, configuration class, its arguments)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", VISION | LABELS),
    "vit_headless": ("ViTModel", "ViTConfig", VISION | dict(qkv_bias=False, patch_size=3, hidden_act="gelu_new")),  # 16 = 5 * 3 + 1
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION | LABELS),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VISION | LABELS),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO | LABELS),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", DINO | dict(use_swiglu_ffn=True)),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINO | LABELS | dict(num_register_tokens=2)),
    "clip": ("CLIPModel", "CLIPConfig", dict(vision_config=VISION, text_config=TEXT, projection_dim=12)),
    "clip_old_eos": ("CLIPTextModelWithProjection", "CLIPTextConfig", TEXT | dict(eos_token_id=2, projection_dim=12)),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION | dict(projection_dim=12, hidden_act="gelu")),
    "clip_headless": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "clip_classifier": ("CLIPForImageClassification", "CLIPConfig", dict(vision_config=VISION, text_config=TEXT) | LABELS),
    "siglip": ("SiglipModel", "SiglipConfig", dict(vision_config=VISION | dict(patch_size=5), text_config=TEXT | dict(hidden_size=24))),
    "siglip_text": ("SiglipTextModel", "SiglipTextConfig", TEXT | dict(projection_size=12)),
    "siglip_headless": ("SiglipVisionModel", "SiglipVisionConfig", VISION | dict(vision_use_head=False)),
    "siglip_classifier": ("SiglipForImageClassification", "SiglipConfig", dict(vision_config=VISION, text_config=TEXT) | LABELS),
}  # fmt: skip
KEPT = [n for n in CASES if n not in ("clip_headless", "siglip_headless")]  # as files; the others are tested live


def build(name: str, seed: int) -> Any:
    """A random transformers model, float32, eager attention, outputs of order one."""
    import torch
    import transformers

    kind, config, args = CASES[name]
    model = getattr(transformers, kind)._from_config(getattr(transformers, config)(**args), attn_implementation="eager").float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            x = torch.randn(p.shape, generator=noise)
            fan = p[0].numel() if p.ndim > 1 else 1
            table = "embedding.weight" in key or "token" in key or "position" in key or "probe" in key or "class_embedding" in key
            scale = 0.3 if p.ndim <= 1 else 0.7 if table and p.ndim != 4 else 1.5 * fan**-0.5
            start = p if p.ndim <= 1 and "weight" in key else 3.0 if key == "logit_scale" else 0.0
            p.copy_((scale * x + start).bfloat16().float())
    return model


def batch(name: str, seed: int) -> dict[str, np.ndarray]:
    """Pixels of the learned size and of another, ids of three lengths: as a tokenizer that pads with the end leaves them."""
    rng = np.random.default_rng(seed)
    pixels, wide = ((rng.integers(-32, 33, (3, y, x, 3)) / 16).astype(np.float32) for y, x in ((16, 16), (12, 28)))
    end = 39
    ids = rng.integers(3, end, (3, 12)).astype(np.int32)
    live = np.ones((3, 12), bool)
    ids[0, 11] = end
    for row, length in ((1, 7), (2, 4)):
        ids[row, length - 1 :] = end
        live[row, length:] = False
    return dict(pixels=pixels, wide=wide, ids=ids, live=live)


def outputs(model: Any, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers makes of them; keys as in case.npz."""
    import torch

    kind, out = type(model).__name__, {}
    both = kind in ("CLIPModel", "SiglipModel")
    pixel = lambda key: torch.from_numpy(data[key]).permute(0, 3, 1, 2)
    grab: dict[str, Any] = {}
    # rows behind the last layer, before the final norm
    layers = {n: m for n, m in model.named_modules() if n.endswith(".1") and type(m).__name__.endswith("Layer")}
    for n, m in layers.items():
        tower = "text" if "Text" in kind or "text_model" in n else "vision"
        m.register_forward_hook(lambda _m, _i, o, tower=tower: grab.__setitem__(tower, (o[0] if isinstance(o, tuple) else o).numpy()))
    with torch.no_grad():
        if "Text" not in kind:
            vision = model.get_image_features if both else model
            takes = "Dinov2" not in kind and kind != "CLIPForImageClassification"
            for key, mark in (("pixels", ""), ("wide", "wide_")):
                if mark and kind == "CLIPForImageClassification":
                    continue
                y = vision(pixel_values=pixel(key), **({"interpolate_pos_encoding": True} if takes and mark else {}))
                out[key], out[mark + "rows"] = data[key], grab["vision"]
                picked = [getattr(y, f, None) for f in ("logits", "image_embeds", "pooler_output")]
                first = next((p for p in picked if p is not None), None)
                if kind in ("ViTModel", "DeiTModel"):  # not the pooler's
                    first = y.last_hidden_state[:, 0]
                if first is None:  # SigLIP without its pooling: the mean
                    first = y.last_hidden_state.mean(1)
                out[mark + "out"] = first.numpy()
        if "Text" in kind or both:
            text = model.get_text_features if both else model
            padded = {} if "Siglip" in kind else {"attention_mask": torch.from_numpy(data["live"].astype(np.int64))}
            y = text(input_ids=torch.from_numpy(data["ids"].astype(np.int64)), **padded)
            picked = getattr(y, "text_embeds", None)
            live = data["live"] if padded else np.ones_like(data["live"])  # SigLIP's padding counts
            out |= {"ids": data["ids"], "live": live, "text_rows": grab["text"]}
            out["text_out"] = (y.pooler_output if picked is None else picked).numpy()
        if both:
            y = model(input_ids=torch.from_numpy(data["ids"].astype(np.int64)), pixel_values=pixel("pixels"), **padded)
            out["similarity"] = y.logits_per_image.numpy()
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in out.items()}


def main() -> None:
    import torch

    for seed, name in enumerate(KEPT):
        model = build(name, seed)
        case = outputs(model, batch(name, seed))
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as tmp:
            model.to(torch.bfloat16).save_pretrained(tmp)
            for file in ("config.json", "model.safetensors"):
                (folder / file).write_bytes(pathlib.Path(tmp, file).read_bytes())
        np.savez_compressed(folder / "case.npz", **{k: v for k, v in case.items() if k != "wide_rows"})
        size = sum(p.stat().st_size for p in folder.iterdir())
        said = ", ".join(f"{k} {v.std():.2f}" for k, v in case.items() if k.endswith(("out", "similarity")))
        print(f"{name:20} std of {said}; {size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
