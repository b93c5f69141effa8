"""Pictures as an encoder takes them: resized, cropped, rescaled, normalised, as the folder's preprocessor_config.json says."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from jaxtok.models import tensors
from jaxtok.models.hf import Fields
from jaxtok.models.load import find

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NEAREST, LANCZOS, BILINEAR, BICUBIC = range(4)  # the numbers of the files, and of Pillow
MOST_PIXELS = 2**28  # of a resized picture
Image = PIL.Image.Image | np.ndarray
Made = TypeVar("Made")

# What transformers (5.x, image_processing_<family>.py) assumes where the file is silent.
_BASE: dict[str, Any] = {
    "do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    "resample": BICUBIC, "size": 224, "crop_size": 224, "image_mean": list(HALF[0]), "image_std": list(HALF[1]),
}  # fmt: skip
_CLIP = {
    **_BASE,
    "do_center_crop": True,
    "size": {"shortest_edge": 224},
    "image_mean": list(CLIP[0]),
    "image_std": list(CLIP[1]),
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {**_BASE, "resample": BILINEAR}, "DeiT": {**_BASE, "do_center_crop": True, "size": 256}, "CLIP": _CLIP, "Bit": _CLIP,
    "Siglip": {**_BASE, "size": {"height": 224, "width": 224}},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Pictures -> f32 [b y x 3]. A step that is None is left out.

    Pillow resizes 8-bit values, with its antialiasing filters, and rounds: what Hugging Face's processors with the `pil` backend do, to
    the bit. The `torchvision` ones, the default of transformers 5 where torchvision is installed, resize tensors instead, with the same
    filters and other roundings: one to three steps of 1/255 off in places.
    """

    size: tuple[int, int] | int | None = (224, 224)  # height, width, or the shorter side
    longest: int | None = None  # of the longer side, where `size` is the shorter
    resample: int = BICUBIC
    crop: tuple[int, int] | None = None  # height, width of the centre; a smaller picture is surrounded by zeros
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = HALF[0]
    std: tuple[float, ...] = HALF[1]

    def __post_init__(self):
        if self.resample not in range(6):
            raise ValueError(f"resample={self.resample!r}; Pillow's filters are 0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4, 5")
        sides = [self.size, self.size] if isinstance(self.size, int) else list(self.size or ())
        for side in [*sides, *(self.crop or ()), *(() if self.longest is None else (self.longest,))]:
            if not 1 <= side < 2**15:
                raise ValueError(f"size={self.size}, crop={self.crop}, longest={self.longest}: every side must be from 1 to {2**15 - 1}")
        if self.mean is not None and (len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not min(map(abs, self.std)) > 0):
            raise ValueError(f"mean={self.mean} and std={self.std} must be one or three numbers each, std not 0")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Processor":
        """That of a checkpoint's folder or hub id; ValueError, one line, for a missing file and for what is not supported."""
        return described(path, cls.of)

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Processor":
        """That of a preprocessor_config.json, in the spellings of transformers 4 and 5."""
        kind = family(raw)
        if kind not in PROCESSORS:
            elsewhere = "; models.image_anyres.AnyresProcessor takes it" if kind == "LlavaNext" else ""
            raise ValueError(f"image_processor_type {kind!r} is not supported; supported: {', '.join(PROCESSORS)}{elsewhere}")
        if raw.get("do_pad"):
            raise ValueError("do_pad is not supported; pad what comes out")
        r = Fields(raw, PROCESSORS[kind])
        on = lambda key: r.get("do_" + key, (bool,))
        size, longest = _size(r, "size", square=kind in ("ViT", "DeiT")) if on("resize") else (None, None)
        crop, _ = _size(r, "crop_size", square=True) if on("center_crop") else (None, None)
        if isinstance(crop, int):
            raise ValueError(f"crop_size={raw.get('crop_size')!r} should be a height and a width")
        return cls(
            size=size, longest=longest, crop=crop, resample=r.get("resample", (int,), 0), scale=r.number("rescale_factor") if on("rescale") else None,
            mean=_numbers(r, "image_mean") if on("normalize") else None, std=_numbers(r, "image_std") if on("normalize") else HALF[1],
        )  # fmt: skip

    def __call__(self, images: Image | Iterable[Image]) -> np.ndarray:
        """f32 [b y x 3] of one picture or several, of any sizes: PIL images, arrays u8 [y x], [y x 1], [y x 3] or [y x 4], or float ones
        in 0 to 1. Transparency is laid on white. ValueError where the results are of several sizes (no crop, no exact size)."""
        one = isinstance(images, PIL.Image.Image | np.ndarray)
        out = [self._one(image) for image in ([images] if one else images)]
        if len({x.shape for x in out}) > 1:
            raise ValueError(f"pictures become {sorted({x.shape[:2] for x in out})}; give an exact size or a crop, or one picture a call")
        if not out:
            raise ValueError("no pictures")
        return np.stack(out)

    def _one(self, image: Image) -> np.ndarray:
        picture = rgb(image)
        if self.size is not None:
            height, width = self.shape(picture.height, picture.width)
            picture = picture.resize((width, height), resample=PIL.Image.Resampling(self.resample))
        x = np.asarray(picture)
        if self.crop is not None:
            x = centre(x, *self.crop)
        out = x.astype(np.float32) if self.scale is None else (x.astype(np.float64) * self.scale).astype(np.float32)
        return out if self.mean is None else (out - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture after the resize."""
        out = (height, width) if self.size is None else self.size
        if isinstance(out, int):
            short, long = min(height, width), max(height, width)
            new = (out, int(out * long / short))
            if self.longest is not None and long / short * out > self.longest:
                exact = self.longest * short / long
                new = (max(1, round(exact)), int(exact * long / short))
            out = new if height <= width else (new[1], new[0])
        if out[0] * out[1] > MOST_PIXELS:
            raise ValueError(f"a picture of {height} by {width} would become {out[0]} by {out[1]}; crop it first")
        return out


def described(path: str | os.PathLike[str], of: Callable[[dict[str, Any]], Made]) -> Made:
    """What `of` makes of what describes a checkpoint's image processor; ValueError, with the file's name, where that fails or is missing."""
    folder = find(path)
    file = next((f for f in (folder / "preprocessor_config.json", folder / "processor_config.json") if f.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no preprocessor_config.json; make a processor of your own: Processor(size=..., mean=..., std=...)")
    raw = tensors.read_json(file)
    try:
        return of(Fields(raw, {}).object("image_processor") or raw)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def rgb(image: Image) -> PIL.Image.Image:
    """A picture in RGB; transparency is laid on white. TypeError for what is no picture, ValueError for other shapes and values."""
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"a picture is a PIL image or an array, got {type(image).__name__}")
    if not image.width or not image.height:
        raise ValueError(f"a picture of {image.height} by {image.width} pixels is empty")
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def family(raw: dict[str, Any]) -> Any:
    """The kind of processor that a preprocessor_config.json names, without the endings of its spellings."""
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type"))
    for end in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"):
        kind = kind.removesuffix(end) if isinstance(kind, str) else kind
    return kind


def _from_array(x: np.ndarray) -> PIL.Image.Image:
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape:
        raise ValueError(f"an array of shape {list(x.shape)} is no picture; give [y x], [y x 1], [y x 3] or [y x 4]")
    if np.issubdtype(x.dtype, np.floating):
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"values from {x.min()} to {x.max()} are no picture; floats stand for 0 to 1, uint8 for 0 to 255")
        x = np.round(x * 255).astype(np.uint8)
    if x.dtype != np.uint8:
        raise ValueError(f"an array of {x.dtype} is no picture; give uint8, or floats from 0 to 1")
    return PIL.Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def centre(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre [height width ...] of x [y x ...]; zeros stand around a smaller one."""
    for axis, size in ((0, height), (1, width)):
        n = x.shape[axis]
        if n < size:
            before = -((n - size) // 2)  # the larger half of an odd remainder
            x = np.pad(x, [(before, size - n - before) if a == axis else (0, 0) for a in range(x.ndim)])
        else:
            x = np.take(x, np.arange(size) + (n - size) // 2, axis)
    return x


def _size(r: Fields, key: str, square: bool) -> tuple[tuple[int, int] | int | None, int | None]:
    """(height and width, or the shorter side; most of the longer side)."""
    value: Any = r.get(key, (int, dict, list))
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list):
        value = {"height": value[0], "width": value[1]} if len(value) == 2 else {}
    whole = lambda name: type(value.get(name)) is int
    if whole("shortest_edge"):
        return value["shortest_edge"], value["longest_edge"] if whole("longest_edge") else None
    if whole("height") and whole("width"):
        return (value["height"], value["width"]), None
    raise ValueError(f"{key}={value!r} is not supported; supported: height and width, or shortest_edge (and longest_edge)")


def _numbers(r: Fields, key: str) -> tuple[float, ...]:
    value = r.get(key, (int, float, list))
    value = value if isinstance(value, list) else [value]
    if not all(type(v) in (int, float) and abs(v) < 1e6 for v in value):
        raise ValueError(f"{key}={value!r} should be numbers")
    return tuple(float(v) for v in value)
