"""Models that look at one picture: the small one of the package, a LLaVA's folder, an encoder's folder."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jaxtok.models import hf_vlm, image, load, tensors
from jaxtok.models.config import EncoderConfig
from jaxtok.models.vlm import VlmConfig

DEFAULT = "embedded_vlm"  # the model of the package
QUESTION = "What is in the picture?"


class Onlooker(NamedTuple):
    """A model, and how a picture and a question come to it."""

    cfg: VlmConfig | EncoderConfig
    params: dict[str, Any]
    look: Callable[[PIL.Image.Image], tuple[np.ndarray, np.ndarray]]  # picture -> f32 [y x ch] for the tower, u8 [y x 3] to draw on
    ask: Callable[[str | None], list[int]] | None  # question (None = the usual one) -> prompt with the placeholders; None = an encoder
    note: str | None = None  # what had to be assumed


def of(name: str) -> Onlooker:
    """That of a name or folder; ValueError as of `models.load`."""
    return default() if name == DEFAULT else of_folder(name)


def default() -> Onlooker:
    """The small model of the package, which answers questions about handwritten digits on a canvas."""
    from jaxtok.evals import digits

    cfg, params, _ = load.load_vlm(DEFAULT)
    assert isinstance(cfg, VlmConfig)

    def look(picture):
        grey = np.asarray(picture.convert("L").resize((digits.SIDE, digits.SIDE), PIL.Image.Resampling.BILINEAR))
        pixels = grey.astype(np.float32) / 255
        return digits.normalised(pixels[None])[0, 0], np.repeat(grey[..., None], 3, -1)

    def ask(question):
        text = "which digit is nearest the top left corner ?" if question is None else question.lower().replace("?", " ?")
        return digits.prompt(text)

    return Onlooker(cfg, params, look, ask)


def of_folder(name: str) -> Onlooker:
    """A LLaVA, or an encoder, with its preprocessor_config.json; without one: resized to the tower's size, -1 to 1."""
    folder = load.find(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a LLaVA or of an image encoder")
    family = tensors.read_json(folder / "config.json").get("model_type")
    if family in ("llava_next", "qwen2_5_vl"):
        raise ValueError(
            f"{folder} holds a {family}, whose pictures in crops and windows are not drawn; give a LLaVA-1.5 or an image encoder"
        )
    if family in hf_vlm.FAMILIES:
        cfg, params, tokenizer = load.load_vlm(name)
        assert isinstance(cfg, VlmConfig)
        look, note = _look(cfg.vision, folder)
        return Onlooker(cfg, params, look, _prompt(cfg, tokenizer, folder), note)
    cfg, params = load.load_encoder(name)
    look, note = _look(cfg, folder)
    return Onlooker(cfg, params, look, None, note)


def _look(cfg: EncoderConfig, folder: pathlib.Path):
    if cfg.image is None:
        raise ValueError(f"{folder} holds a text tower; give an encoder of images")
    size, note = cfg.image, None
    if any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        processor = image.Processor.read(folder)
    else:
        processor, note = image.Processor(size=size), f"{folder} has no preprocessor_config.json: pictures are resized to {size}, -1 to 1"
    bare = dataclasses.replace(processor, mean=None, scale=1 / 255)

    def look(picture):
        pixels, seen = processor(picture)[0], bare(picture)[0]
        if pixels.shape[:2] != size:
            raise ValueError(f"the preprocessor makes {pixels.shape[:2]} of this picture, the tower takes {size}; crop it to a square")
        if cfg.channels == 1:
            pixels, seen = pixels.mean(-1, keepdims=True), np.repeat(seen.mean(-1, keepdims=True), 3, -1)
        return pixels, np.round(np.clip(seen, 0, 1) * 255).astype(np.uint8)

    return look, note


def _prompt(cfg: VlmConfig, tokenizer, folder: str | os.PathLike[str]) -> Callable[[str | None], list[int]]:
    def ask(question):
        if tokenizer is None:
            if question is not None:
                raise ValueError(f"{folder} has no tokenizer.json for the question; leave --question out: the prompt is then the picture")
            return [cfg.image_token] * cfg.patches
        head = tokenizer.encode("USER: ", special=True)
        tail = tokenizer.encode(f"\n{QUESTION if question is None else question} ASSISTANT:", special=False)
        return [*head, *[cfg.image_token] * cfg.patches, *tail]

    return ask
