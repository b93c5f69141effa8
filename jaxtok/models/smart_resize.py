"""Pictures as the towers of Qwen2-VL and Qwen2.5-VL take them: resized to whole units of patches, normalised, cut into rows."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jaxtok.core import check
from jaxtok.models.hf import Fields
from jaxtok.models.image import BICUBIC, CLIP, MOST_PIXELS, Image, Processor, described, rgb

_DEFAULTS: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": BICUBIC, "image_mean": list(CLIP[0]),
    "image_std": list(CLIP[1]), "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
}  # fmt: skip


class Patches(NamedTuple):
    """Pictures of prompts, padded to one number of patches."""

    rows: np.ndarray  # f32 [b i n p]
    grid: np.ndarray  # i32 [b i 2] rows and columns of patches; 0 = no such picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchProcessor:
    """Pictures of any size -> rows of patches, as Hugging Face's Qwen2VLImageProcessor with the `pil` backend, to the bit.

        height, width -> the nearest multiples of patch * merge; shrunk (rounded down) to at most `most` pixels, or enlarged (rounded up) to
        at least `least`;  8-bit values are resized by Pillow, scaled, normalised
        a row: a patch's values by channel, frame (all the same), y, x;  rows by units of merge x merge patches, in raster order both

    resize=False: pictures must come in multiples of patch * merge.
    """

    least: int = 56 * 56  # pixels
    most: int = 28 * 28 * 1280
    patch: int = 14
    merge: int = 2
    frames: int = 2
    resize: bool = True
    resample: int = BICUBIC
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = CLIP[0]
    std: tuple[float, ...] = CLIP[1]

    def __post_init__(self):
        for name in ("least", "most", "patch", "merge", "frames"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.least > self.most or self.most > MOST_PIXELS:
            raise ValueError(f"least={self.least}, most={self.most} pixels: must rise, {MOST_PIXELS} at most")
        self.plain  # noqa: B018  (made to check the rest)

    @property
    def plain(self) -> Processor:
        """What is done to values, without the resize."""
        return Processor(size=None, resample=self.resample, scale=self.scale, mean=self.mean, std=self.std)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "PatchProcessor":
        """That of a checkpoint's folder or hub id; ValueError, one line, for a missing file and for what is not supported."""
        return described(path, cls.of)

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "PatchProcessor":
        """That of a preprocessor_config.json, with min_pixels and max_pixels or with size."""
        kind = raw.get("image_processor_type")
        if kind not in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"):
            raise ValueError(
                f"image_processor_type {kind!r} is not supported here; supported: Qwen2VLImageProcessor (others: models.image)"
            )
        r = Fields(raw, _DEFAULTS)
        size = Fields(r.object("size"), {"shortest_edge": cls.least, "longest_edge": cls.most})
        pixels = lambda old, new: r.size(old) if raw.get(old) is not None else size.size(new)
        on = lambda key: r.get("do_" + key, (bool,))
        # the values: as of any processor that neither resizes nor crops
        plain = Processor.of(
            {k: v for k, v in (_DEFAULTS | raw).items() if k not in ("size", "crop_size", "patch_size")}
            | {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_center_crop": False}
        )
        return cls(
            least=pixels("min_pixels", "shortest_edge"), most=pixels("max_pixels", "longest_edge"), patch=r.size("patch_size"),
            merge=r.size("merge_size"), frames=r.size("temporal_patch_size"), resize=on("resize"), resample=plain.resample, scale=plain.scale,
            mean=plain.mean, std=plain.std,
        )  # fmt: skip

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture after the resize."""
        side = self.patch * self.merge
        if max(height, width) > 200 * min(height, width):
            raise ValueError(f"a picture of {height} by {width} pixels is too long; at most 200 times as long as wide")
        new = tuple(round(n / side) * side for n in (height, width))
        if new[0] * new[1] > self.most:
            by = math.sqrt(height * width / self.most)
            new = tuple(max(side, math.floor(n / by / side) * side) for n in (height, width))
        elif new[0] * new[1] < self.least:
            by = math.sqrt(self.least / (height * width))
            new = tuple(math.ceil(n * by / side) * side for n in (height, width))
        if not 0 < new[0] * new[1] <= MOST_PIXELS:
            raise ValueError(f"a picture of {height} by {width} would become {new[0]} by {new[1]}; resize it first")
        return new[0], new[1]

    def one(self, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
        """(rows f32 [n p], rows and columns of patches) of one picture."""
        picture, side = rgb(image), self.patch * self.merge
        plain = self.plain
        if self.resize:
            plain = dataclasses.replace(plain, size=self.shape(picture.height, picture.width))
        x = plain(picture)[0]
        y_, x_ = x.shape[0] // side, x.shape[1] // side
        if x.shape[:2] != (y_ * side, x_ * side) or not y_ * x_:
            raise ValueError(f"a picture of {x.shape[0]} by {x.shape[1]} pixels is no multiple of {side}; resize it, or give resize=True")
        cut = x.reshape(y_, self.merge, self.patch, x_, self.merge, self.patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        cut = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], self.frames, self.patch, self.patch))
        return cut.reshape(y_ * x_ * self.merge**2, -1), (y_ * self.merge, x_ * self.merge)

    def __call__(self, prompts: Sequence[Iterable[Image]], patches: int | None = None) -> Patches:
        """The pictures of each prompt, for `qwen_vl.embed`: `patches` rows each (None = as many as the largest has).

        ValueError where a picture has more patches, or there is none at all.
        """
        if isinstance(prompts, PIL.Image.Image | np.ndarray) or any(isinstance(p, PIL.Image.Image | np.ndarray) for p in prompts):
            raise TypeError("give the pictures of each prompt: [[picture, ...], ...]")
        done = [[self.one(image) for image in pictures] for pictures in prompts]
        each = [len(rows) for pictures in done for rows, _ in pictures]
        if not each:
            raise ValueError("no pictures")
        n = max(each) if patches is None else patches
        if max(each) > n or n % self.merge**2:
            raise ValueError(
                f"pictures of {max(each)} patches into {patches}; give a multiple of {self.merge**2} that is enough, or lower most={self.most}"
            )
        out = np.zeros((len(done), max(map(len, done)), n, 3 * self.frames * self.patch**2), np.float32)
        grid = np.zeros((*out.shape[:2], 2), np.int32)
        for b, pictures in enumerate(done):
            for i, (rows, size) in enumerate(pictures):
                out[b, i, : len(rows)], grid[b, i] = rows, size
        return Patches(out, grid)


def padded(pixels: np.ndarray, grid: np.ndarray, pictures: list[int], most: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches f32 [b i n p], grid i32 [b i 3]) for `embed` of what Hugging Face's processor returns for a batch.

    pixels [sum of all patches, p], grid [pictures in all, 3] (image_grid_thw), pictures: how many each prompt has, most: n, the static
    number of patches. ValueError where they do not fit together.
    """
    check.count("most", most)
    sizes = np.prod(np.asarray(grid, np.int64), -1)
    if len(sizes) != sum(pictures) or sizes.sum() != len(pixels) or not len(pictures):
        raise ValueError(f"{len(pixels)} patches, grids of {sizes.tolist()}, {pictures} pictures a prompt: they do not fit together")
    if sizes.max(initial=0) > most:
        raise ValueError(f"a picture has {sizes.max()} patches, the most is {most}; resize it to fewer pixels")
    out = np.zeros((len(pictures), max(1, *pictures), most, pixels.shape[-1]), np.float32)
    shape = np.zeros((*out.shape[:2], 3), np.int32)
    at = iter(np.split(pixels, np.cumsum(sizes)[:-1])) if len(sizes) else iter(())
    number = 0
    for row, many in enumerate(pictures):
        for i in range(many):
            part = next(at)
            out[row, i, : len(part)], shape[row, i] = part, grid[number]
            number += 1
    return out, shape
