"""Makes tests/golden/images.npz: small pictures of noise as transformers' image processors (pil backend) leave them.

    python tests/golden/make_images.py            (needs the `parity` extra and pillow; writes about 60 kB)

Arrays: `<case>.config` the preprocessor_config.json, `<case>.<picture>` f32 [y x 3] for each of `pictures`.
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

FILE = pathlib.Path(__file__).parent / "images.npz"
SHAPES = {"wide": (30, 47), "tall": (61, 22), "small": (9, 10)}

# name -> (processor, what is changed of its defaults)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", dict(size={"height": 12, "width": 16})),
    "vit_nearest": ("ViT", dict(size={"height": 5, "width": 7}, resample=0, do_normalize=False)),
    "deit": ("DeiT", dict(size={"height": 16, "width": 16}, crop_size={"height": 11, "width": 12}, image_mean=[0.485, 0.456, 0.406])),
    "clip": ("CLIP", dict(size={"shortest_edge": 13}, crop_size={"height": 13, "width": 13})),
    "clip_plain": ("CLIP", dict(do_resize=False, crop_size={"height": 15, "width": 14})),
    "clip_bounded": ("CLIP", dict(size={"shortest_edge": 20, "longest_edge": 29}, crop_size={"height": 21, "width": 21}, resample=1)),
    "siglip": ("Siglip", dict(size={"height": 14, "width": 9})),
    "bit": ("Bit", dict(size={"shortest_edge": 16}, crop_size={"height": 14, "width": 14}, do_rescale=False)),
}


def pictures() -> dict[str, np.ndarray]:
    """u8 [y x 3]: noise over a slope, so that filters and edges show."""
    rng = np.random.default_rng(0)
    return {
        n: (rng.integers(0, 128, (y, x, 3)) + np.linspace(0, 127, x).astype(int)[None, :, None]).astype(np.uint8)
        for n, (y, x) in SHAPES.items()
    }


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """(transformers' processor, its preprocessor_config.json)."""
    import transformers

    kind, changes = CASES[name]
    processor = getattr(transformers, kind + "ImageProcessorPil")(**changes)
    with tempfile.TemporaryDirectory() as tmp:
        processor.save_pretrained(tmp)
        return processor, json.loads(pathlib.Path(tmp, "preprocessor_config.json").read_text())


def run(processor: Any, picture: Any) -> np.ndarray:
    return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0], np.float32).transpose(1, 2, 0)


def main() -> None:
    import PIL.Image

    out = {}
    for name in CASES:
        processor, config = build(name)
        out[f"{name}.config"] = np.array(json.dumps(config))
        out |= {f"{name}.{k}": run(processor, PIL.Image.fromarray(x)) for k, x in pictures().items()}
    np.savez_compressed(FILE, **out)


if __name__ == "__main__":
    main()
