"""Pictures as LLaVA-NeXT takes them: a thumbnail and a grid of crops each, as the folder's preprocessor_config.json says."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jaxtok.models import anyres, hf_vlm, image
from jaxtok.models.hf import Fields
from jaxtok.models.image import Image, Processor


class Crops(NamedTuple):
    """A batch of pictures; the leading axes are [i], or [b i] of pictures by prompt."""

    pixels: np.ndarray  # f32 [... i p y x 3]: the thumbnail, the crops by raster, zeros
    sizes: np.ndarray  # i32 [... i 2] original height and width; 0 = no picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyresProcessor:
    """Pictures -> `Crops`: what Hugging Face's processor with the `pil` backend does, to the bit (see `Processor`).

    A picture keeps its shape where it is scaled into the best of the `pinpoints` (`anyres.best`) and gets black margins there; `each`
    normalises the crops that it is cut into, and the thumbnail of `thumbnail` pixels, which keeps no shape. parts: sub-images of each
    picture, thumbnail included (static in the model's program); None = those of the largest one in the call.
    """

    each: Processor
    thumbnail: tuple[int, int]  # height, width
    crop: int  # side of a crop, in pixels
    pinpoints: anyres.Pinpoints
    parts: int | None = None

    def __post_init__(self):
        for point in self.pinpoints:
            if len(point) != 2 or any(not 1 <= side <= anyres.MOST_SIDE or side % self.crop for side in point):
                raise ValueError(f"pinpoint {point} is no grid of crops of {self.crop} pixels")
        if not self.pinpoints:
            raise ValueError("no pinpoints: a picture needs a resolution to be scaled into")
        if self.parts is not None and self.parts < 2:
            raise ValueError(f"parts={self.parts}; a picture has a thumbnail and at least one crop")

    @classmethod
    def read(cls, path: str | os.PathLike[str], parts: int | None = None) -> "AnyresProcessor":
        """That of a checkpoint's folder or hub id; ValueError, one line, for a missing file and for what is not supported."""
        return image.described(path, lambda raw: cls.of(raw, parts))

    @classmethod
    def of(cls, raw: dict[str, Any], parts: int | None = None) -> "AnyresProcessor":
        """That of a preprocessor_config.json of LLaVA-NeXT."""
        if image.family(raw) != "LlavaNext":
            raise ValueError(f"image_processor_type {image.family(raw)!r} cuts no crops; models.image.Processor reads the others")
        plain = raw | {"image_processor_type": "CLIPImageProcessor", "do_pad": False}
        each, resized, cropped = (Processor.of(plain | more) for more in ({}, {"do_resize": True}, {"do_center_crop": True}))
        size, crop = resized.size, cropped.crop
        thumbnail = (size, size) if isinstance(size, int) else size
        if crop is None or thumbnail is None or crop[0] != crop[1]:
            raise ValueError(f"crop_size={raw.get('crop_size')!r} should be a square")
        return cls(
            each=each,
            thumbnail=thumbnail,
            crop=crop[0],
            parts=parts,
            pinpoints=hf_vlm.pinpoints(Fields(raw, {"image_grid_pinpoints": hf_vlm.PINPOINTS})),
        )

    def __call__(self, images: Image | Iterable[Image] | Sequence[Sequence[Image]]) -> Crops:
        """One picture or several, of any sizes (see `Processor`), or one list of them a prompt; a shorter list is filled up."""
        pictures: list[Any] = [images] if isinstance(images, Image) else list(images)
        nested = bool(pictures) and all(isinstance(p, Sequence) for p in pictures)
        rows: list[Any] = [list(row) for row in pictures] if nested else [pictures]
        done = [[self._one(image.rgb(p)) for p in row] for row in rows]
        if not any(done):
            raise ValueError("no pictures")
        here = max(len(tiles) for row in done for tiles, _ in row)
        parts = here if self.parts is None else self.parts
        if here > parts:
            raise ValueError(f"a picture has {here - 1} crops and a thumbnail; parts={parts} has no room for them")
        width, (first, _) = max(map(len, done)), next(row[0] for row in done if row)
        pixels = np.zeros((len(done), width, parts, *first.shape[1:]), np.float32)
        sizes = np.zeros((len(done), width, 2), np.int32)
        for i, row in enumerate(done):
            for j, (tiles, size) in enumerate(row):
                pixels[i, j, : len(tiles)], sizes[i, j] = tiles, size
        return Crops(pixels, sizes) if nested else Crops(pixels[0], sizes[0])

    def _one(self, picture: PIL.Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """(f32 [p y x 3], height and width)."""
        size = (picture.height, picture.width)
        high, wide = anyres.best(self.pinpoints, size)
        down, across = high / size[0], wide / size[1]
        fit = (min(math.ceil(size[0] * across), high), wide) if across < down else (high, min(math.ceil(size[1] * down), wide))
        scaled = lambda shape: picture.resize(shape[::-1], resample=PIL.Image.Resampling(self.each.resample))
        canvas = np.zeros((high, wide, 3), np.uint8)
        top, left = ((a - b) // 2 for a, b in zip((high, wide), fit, strict=True))
        canvas[top : top + fit[0], left : left + fit[1]] = np.asarray(scaled(fit))
        k = self.crop
        tiles = [canvas[y : y + k, x : x + k] for y in range(0, high, k) for x in range(0, wide, k)]
        return self.each([scaled(self.thumbnail), *map(PIL.Image.fromarray, tiles)]), size
