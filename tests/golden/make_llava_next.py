"""Makes tests/golden/llava_next/: tiny random LLaVA-NeXT models as Hugging Face directories, with transformers' outputs, and its pictures.

    python tests/golden/make_llava_next.py            (needs the `parity` extra and pillow; writes about 0.2 MB)

Each folder: config.json and model.safetensors (bfloat16) as transformers saved them, and case.npz with what the float32 model of eager
attention makes of a batch of two with two pictures of different sizes each: `pixels` f32 [b i p y x ch], `sizes` i32 [b i 2], `ids`
i32 [b n], `live` bool [b n], `logits` f32 [b n vocab]. images.npz: `config` the preprocessor_config.json, `pixels` f32 [i p y x 3] and
`sizes` i32 [i 2] of `pictures`; `published.sizes` i32 [k 2] and `published.many` i32 [k], how many placeholders the processor of
LLaVA-v1.6 (crops of 336 pixels, patches of 14) writes for pictures of these sizes.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from tests.golden import make_images, make_vlm
from tests.golden.make_vlm import IMAGE, SIDE, TEXT, VISION

FOLDER = pathlib.Path(__file__).parent / "llava_next"
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = np.array([[[31, 17], [11, 40]], [[24, 24], [90, 11]]], np.int32)
CASES: dict[str, dict[str, Any]] = {
    "next": dict(vision_config=dict(model_type="clip_vision_model", **VISION), text_config=TEXT | dict(model_type="mistral")),
    "next_siglip": dict(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        text_config=TEXT | dict(model_type="qwen2"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
}


def build(name: str, seed: int) -> Any:
    """A random transformers model, float32, eager attention."""
    import transformers

    config = transformers.LlavaNextConfig(image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, **CASES[name])
    return make_vlm.randomise(transformers.LlavaNextForConditionalGeneration._from_config(config, attn_implementation="eager"), seed)


def counts(sizes: np.ndarray, pinpoints: list[list[int]], side: int, patch: int) -> list[int]:
    """How many placeholders transformers' processor writes for pictures of these sizes."""
    import transformers

    processor = object.__new__(transformers.LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = patch, 0
    processor.image_processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)
    return [processor._get_number_of_features(int(y), int(x), side, side) for y, x in sizes]


def case(model: Any, seed: int, sizes: np.ndarray = SIZES) -> dict[str, np.ndarray]:
    """Pictures, prompts with placeholders and padding, logits."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    rng = np.random.default_rng(seed)
    flat = sizes.reshape(-1, 2)
    parts = [image_size_to_num_patches(tuple(map(int, size)), PINPOINTS, SIDE) for size in flat]
    many = np.reshape(counts(flat, PINPOINTS, SIDE, 4), sizes.shape[:2])
    pixels = np.zeros((len(flat), max(parts), SIDE, SIDE, 3), np.float32)
    for i, p in enumerate(parts):
        pixels[i, :p] = np.round(rng.normal(size=(p, SIDE, SIDE, 3)) * 8) / 8
    n = int(many.sum(1).max()) + 10
    ids, live = rng.integers(1, IMAGE, (2, n)).astype(np.int32), np.zeros((2, n), bool)
    for row, gap in enumerate((3, 0)):  # in the second prompt the pictures stand side by side
        length = int(many[row].sum()) + 10 - gap
        live[row, n - length :] = True
        first = n - length + 4
        second = first + many[row, 0] + gap
        ids[row, first : first + many[row, 0]] = ids[row, second : second + many[row, 1]] = IMAGE
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(live, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(np.cumsum(live, 1) - 1, 0)),
            pixel_values=torch.tensor(pixels.transpose(0, 1, 4, 2, 3).copy()),
            image_sizes=torch.tensor(flat),
        )
    return {
        "pixels": pixels.reshape(*sizes.shape[:2], *pixels.shape[1:]),
        "sizes": sizes,
        "ids": ids,
        "live": live,
        "logits": out.logits.numpy(),
    }


def write(name: str, folder: pathlib.Path, seed: int, sizes: np.ndarray = SIZES) -> None:
    """The model (bfloat16) and its case."""
    import torch

    model = build(name, seed)
    arrays = case(model, seed, sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("generation_config.json"):
        path.unlink()
    np.savez_compressed(folder / "case.npz", **arrays)


def awkward(seed: int, k: int = 400) -> np.ndarray:
    """i32 [k 2]: sizes of pictures, many of them where a product of floats falls short of a whole number and decides."""
    rng = np.random.default_rng(seed)
    side = rng.integers(1, 3000, k)
    ratio = rng.choice([0.5, 1, 2, 3, 1 / 3], k)
    near = np.maximum((side * ratio).astype(int) + rng.integers(-1, 2, k), 1)
    free = np.exp(rng.uniform(0, 9, (k, 2))).astype(int)
    return np.where(rng.random((k, 1)) < 0.6, np.stack([side, near], 1), free).astype(np.int32)


def processor(**changes: Any) -> tuple[Any, str]:
    """(transformers' processor, its preprocessor_config.json)."""
    import transformers

    theirs = transformers.LlavaNextImageProcessorPil(**changes)
    with tempfile.TemporaryDirectory() as tmp:
        theirs.save_pretrained(tmp)
        return theirs, pathlib.Path(tmp, "preprocessor_config.json").read_text()


def run(theirs: Any, pictures: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(f32 [i p y x 3], i32 [i 2])."""
    out = theirs(pictures, return_tensors="np")
    return np.asarray(out["pixel_values"], np.float32).transpose(0, 1, 3, 4, 2), np.asarray(out["image_sizes"], np.int32)


def main() -> None:
    import PIL.Image

    for seed, name in enumerate(CASES):
        write(name, FOLDER / name, seed)
        print(name, file=sys.stderr)
    theirs, config = processor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    pixels, sizes = run(theirs, [PIL.Image.fromarray(x) for x in make_images.pictures().values()])
    odd = awkward(0)
    published = {"published.sizes": odd, "published.many": np.array(counts(odd, PUBLISHED, 336, 14), np.int32)}
    config = json.dumps({k: v for k, v in json.loads(config).items() if v is not None})
    np.savez_compressed(FOLDER / "images.npz", config=np.array(config), pixels=pixels, sizes=sizes, **published)


if __name__ == "__main__":
    main()
