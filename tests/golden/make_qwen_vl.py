"""Makes tests/golden/qwen_vl/: tiny random Qwen2.5-VL models as Hugging Face directories, with transformers' outputs, and its processor's.

    python tests/golden/make_qwen_vl.py            (needs the `parity` extra: torch, transformers; writes about 0.3 MB)

Each folder: config.json and model.safetensors (bfloat16) as transformers saved them, and case.npz with what the float32 model of eager
attention makes of a batch of two prompts, padded left, with two pictures and with one, all of different sizes: `pixels` f32 [patches p] and
`grid` [3 3] as the processor returns them, `ids` i32 [b n], `live` bool [b n], `logits` f32 [b n vocab], `rope` i32 [3 b n], `delta` i32 [b],
`received` f32 [layers units] what the tower's merged units receive (see _units), the ids of four more tokens `more` [b 4] and the logits
`steps` f32 [b 4 vocab] after each of them, from the cache. Seeds are fixed; every parameter is random. processor.npz: pictures of noise as
Qwen2VLImageProcessorPil leaves them, `<case>.config`, `<case>.<picture>`, `<case>.<picture>.grid`.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from tests.golden.make_images import pictures

FOLDER = pathlib.Path(__file__).parent / "qwen_vl"
IMAGE, START, END = 40, 42, 43  # ids of the placeholder and of what stands around a picture
GRIDS = ((6, 10), (4, 4), (2, 14))  # patches: a ragged grid of windows, one window, less than a window high
VISION = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=2, spatial_merge_size=2, temporal_patch_size=2, window_size=8,
    out_hidden_size=32, fullatt_block_indexes=[1],
)  # fmt: skip
TEXT = dict(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, rope_theta=1e4, bos_token_id=1, eos_token_id=2, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]),
)  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen": ({}, {}),
    # windows of three units, the last layer windowed, one head of keys, a tied head, another split of the frequencies
    "qwen_other": (
        dict(window_size=12, fullatt_block_indexes=[0], in_channels=1),
        dict(num_key_value_heads=1, tie_word_embeddings=True, rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1])),
    ),
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "plain": dict(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}),
    "shrinks": dict(patch_size=2, size={"shortest_edge": 64, "longest_edge": 600}, resample=2),
    "enlarges": dict(patch_size=4, size={"shortest_edge": 4000, "longest_edge": 8000}, temporal_patch_size=1, do_normalize=False),
}


def build(name: str, seed: int) -> Any:
    """A random transformers model, float32, eager attention."""
    import torch
    import transformers

    vision, text = CASES[name]
    tied = text.get("tie_word_embeddings", False)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=VISION | vision, text_config=TEXT | text, image_token_id=IMAGE, video_token_id=41, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            x = torch.randn(p.shape, generator=noise)
            fan = p[0].numel() if p.ndim > 1 else 1
            norm = p.ndim == 1 and ("norm" in key or "ln_q" in key) and key.endswith("weight")
            x = 1 + 0.2 * x if norm else 0.3 * x if p.ndim == 1 else x / fan**0.5
            p.copy_((2 * x if "attn" in key and p.ndim > 1 else x).to(torch.bfloat16))
    return model


def case(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Pictures, prompts with placeholders and padding, logits, rotary ids, four steps."""
    import torch

    vision, rng = model.config.vision_config, np.random.default_rng(seed)
    units = [h * w // 4 for h, w in GRIDS]
    words = lambda n: rng.integers(3, IMAGE, n).tolist()
    picture = lambda i: [START] + [IMAGE] * units[i] + [END]
    prompts = [words(3) + picture(0) + words(2) + picture(1) + words(4), words(2) + picture(2) + words(5)]
    n = max(map(len, prompts)) + 2
    ids = np.array([[0] * (n - len(p)) + p for p in prompts], np.int32)
    live = np.arange(n)[None] >= np.array([[n - len(p)] for p in prompts])
    pixels = rng.normal(
        size=(sum(4 * u for u in units), vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    )
    pixels[:, :, 1:] = pixels[:, :, :1]  # a still picture
    pixels = pixels.reshape(len(pixels), -1).astype(np.float16).astype(np.float32)
    grid = np.array([[1, h, w] for h, w in GRIDS])
    more = rng.integers(3, IMAGE, (2, 4)).astype(np.int32)
    long = lambda x: torch.tensor(x, dtype=torch.long)
    mask, steps = long(live), []
    with torch.no_grad(), _watched(vision.depth) as columns:
        rope, delta = model.model.get_rope_index(
            long(ids), mm_token_type_ids=long(ids == IMAGE), image_grid_thw=long(grid), attention_mask=mask
        )
        out = model(
            input_ids=long(ids), attention_mask=mask, pixel_values=torch.tensor(pixels), image_grid_thw=long(grid),
            mm_token_type_ids=long(ids == IMAGE), use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        received = _units(vision, columns, long(grid))
        for token in more.T:
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            place = (mask.sum(-1, keepdim=True) - 1 + delta)[None].expand(3, -1, -1)  # as `generate` counts on
            step = model(input_ids=long(token[:, None]), attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
            steps.append(step.logits[:, 0].numpy())
    return {
        "pixels": pixels, "grid": grid, "ids": ids, "live": live, "logits": out.logits.numpy(), "rope": rope.numpy().astype(np.int32),
        "delta": delta.numpy().reshape(-1).astype(np.int32), "more": more, "steps": np.stack(steps, 1), "received": received,
    }  # fmt: skip


@contextlib.contextmanager
def _watched(depth: int):
    """Per layer of the tower: attention summed over queries, mean over heads, f32 [patches] in the order in which windows are run."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    found: dict[int, list[np.ndarray]] = {}
    plain = modeling.eager_attention_forward

    def spy(module, *args, **kwargs):
        out = plain(module, *args, **kwargs)
        if not module.is_causal:
            found.setdefault(id(module), []).append(out[1][0].sum(1).mean(0).numpy())
        return out

    modeling.eager_attention_forward = spy
    try:
        yield found
    finally:
        modeling.eager_attention_forward = plain


def _units(vision: Any, columns: dict[int, list[np.ndarray]], grid: Any) -> np.ndarray:
    """f32 [layers units]: the mean over each merged unit's patches, units of all pictures by rows."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return np.stack([np.concatenate(each).reshape(-1, 4).mean(1)[np.argsort(order.numpy())] for each in columns.values()])


def write(name: str, folder: pathlib.Path, seed: int) -> None:
    """The model (bfloat16) and its case."""
    import torch

    model = build(name, seed)
    arrays = case(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("generation_config.json"):
        path.unlink()
    np.savez_compressed(folder / "case.npz", **arrays)


def processor(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """(transformers' processor, its preprocessor_config.json)."""
    import transformers

    made = transformers.Qwen2VLImageProcessorPil(**changes)
    with tempfile.TemporaryDirectory() as tmp:
        made.save_pretrained(tmp)
        return made, json.loads(pathlib.Path(tmp, "preprocessor_config.json").read_text())


def run(made: Any, picture: Any) -> tuple[np.ndarray, np.ndarray]:
    out = made(picture, return_tensors="np")
    return np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"])[0]


def write_processor(file: pathlib.Path) -> None:
    import PIL.Image

    out = {}
    for name, changes in PROCESSORS.items():
        made, config = processor(**changes)
        out[f"{name}.config"] = np.array(json.dumps(config))
        for key, x in pictures().items():
            out[f"{name}.{key}"], out[f"{name}.{key}.grid"] = run(made, PIL.Image.fromarray(x))
    np.savez_compressed(file, **out)


if __name__ == "__main__":
    for seed, name in enumerate(CASES):
        write(name, FOLDER / name, seed)
        print(name, file=sys.stderr)
    write_processor(FOLDER / "processor.npz")
