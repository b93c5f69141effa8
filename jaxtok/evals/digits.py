"""Pictures of scattered handwritten digits with questions about them: the task of the small vision-language model.

A canvas of 84 x 84 pixels (12 x 12 patches of 7) holds 4 to 9 digits of MNIST at random places, each scaled to 0.75..1 of its size (about
15 to 20 pixels high), their boxes apart; between them lie strokes and pieces of digits, over all of it noise. Two kinds of question:

    place:     "which digit is nearest the top left corner ?"   the digit whose centre (of its box) is nearest to that corner of the canvas
    relation:  "which digit is right of the 7 ?" (or left)       of the digits to the right whose centre is at most BAND pixels higher or
               lower than that of the 7, the nearest by columns; the canvas has exactly one 7

Questions whose answer hangs on a few pixels are not asked: the next candidate must be CLEAR pixels farther, and no digit up to BAND + CLEAR
pixels higher or lower may stand before the answer. Nor are canvases asked about that have not, for each kind, questions with two different
answers: who knows all digits, but not the question, is right in 36%. The answer is one token, the digit, then the end.

Everything is numpy and a function of the digits given and of (seed, number of the canvas). Digits: `load`, 5,000 of MNIST's test set (Yann
LeCun, Corinna Cortes; CC BY-SA 3.0); every fifth is kept from training (split "unseen").
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Bool, Float32, Int32, UInt8

from jaxtok.core.recipe import Recipe
from jaxtok.models import decoder, vlm

SIDE, PATCH, MOST = 84, 7, 9  # pixels of a canvas, of a patch; digits on a canvas
GRID = SIDE // PATCH
BAND, CLEAR = 9.0, 5.0  # pixels
MEAN, STD = 0.15, 0.3  # of the normalised pictures
WINDOW = 26  # pixels: a scaled digit with what surrounds it

WORDS = (
    *("<pad>", "<s>", "</s>", "<image>", *"0123456789", "user:", "assistant:", "picture", "which", "digit", "is", "nearest", "the"),
    *("top", "bottom", "left", "right", "corner", "of", "?"),
)
IDS = {w: i for i, w in enumerate(WORDS)}
IMAGE_TOKEN, END = IDS["<image>"], IDS["</s>"]
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("right", "left")
HEAD, TAIL = "<s> user: picture", "assistant:"


class Digits(NamedTuple):
    """Handwritten digits to draw from."""

    image: UInt8[np.ndarray, "n 28 28"]
    label: UInt8[np.ndarray, " n"]


class Canvases(NamedTuple):
    """Pictures and what is on them."""

    pixels: Float32[np.ndarray, "b y x"]  # 0 black, 1 white
    label: Int32[np.ndarray, "b 9"]  # -1 = no digit
    box: Int32[np.ndarray, "b 9 4"]  # top, left, bottom, right, the ends excluded


class Batch(NamedTuple):
    """Prompts with one picture each, as `vlm.embed` takes them."""

    images: Float32[np.ndarray, "b 1 y x 1"]  # normalised
    ids: Int32[np.ndarray, "b n"]  # padded left
    live: Bool[np.ndarray, "b n"]
    answer: Int32[np.ndarray, " b"]  # token id: IDS["0"] + digit
    relation: Bool[np.ndarray, " b"]  # else a place
    label: Int32[np.ndarray, "b 9"]
    box: Int32[np.ndarray, "b 9 4"]
    role: Int32[np.ndarray, "b 9"]  # 2 = the answer, 1 = the digit that the question names, 0 = another, -1 = none
    cells: Bool[np.ndarray, "b 12 12"]  # patches that the digits of role 1 and 2 cover: what the answer needs


def load(split: str, folder: str | os.PathLike[str] | None = None) -> Digits:
    """The digits of a split: "train" (4,000) or "unseen" (1,000, every fifth). ValueError: another split, no such data.

    folder: what holds mnist_test/mnist_t10k_even.npz; None = the environment variable JAXTOK_DATA, else data/ beside pyproject.toml.
    """
    if split not in ("train", "unseen"):
        raise ValueError(f"split={split!r}; there are train and unseen")
    folder = pathlib.Path(folder or os.environ.get("JAXTOK_DATA") or pathlib.Path(__file__).parents[2] / "data")
    path = folder / "mnist_test" / "mnist_t10k_even.npz"
    if not path.is_file():
        raise ValueError(f"no digits at {path}; point JAXTOK_DATA to the data folder")
    with np.load(path, allow_pickle=False) as file:
        image, label = file["image"], file["label"]
    pick = (np.arange(len(label)) % 5 == 4) == (split == "unseen")
    return Digits(image[pick], label[pick])


# --- canvases ---------------------------------------------------------------------------------------------------------


def _warp(image: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Digits [n 28 28] -> f32 [n WINDOW WINDOW]: bilinear, output offset d from the centre reads at the centre + inverse [n 2 2] @ d."""
    n, padded = len(image), np.pad(image, ((0, 0), (1, 2), (1, 2))).astype(np.float32) / 255
    d = np.indices((WINDOW, WINDOW)).reshape(2, -1).astype(np.float32) - (WINDOW - 1) / 2
    at = np.clip(13.5 + inverse.astype(np.float32) @ d[None], -1, 28) + 1  # [n 2 w*w] in the padded picture
    low = np.minimum(at.astype(np.int32), 29)
    fy, fx = np.moveaxis(at - low, 1, 0)
    flat, base = padded.reshape(n, -1), low[:, 0] * 31 + low[:, 1]
    take = lambda k: np.take_along_axis(flat, base + k, 1)
    out = (1 - fy) * ((1 - fx) * take(0) + fx * take(1)) + fy * ((1 - fx) * take(31) + fx * take(32))
    return out.reshape(n, WINDOW, WINDOW)


def _shape(rng: np.random.Generator, n: int, bend: float) -> np.ndarray:
    """Inverse matrices [n 2 2] of scales 0.75..1; bend > 0 turns, shears and stretches too."""
    scale = rng.uniform(0.75 - 0.03 * (bend > 0), 1.0 + 0.03 * (bend > 0), n)
    turn, shear, stretch = (bend * rng.uniform(-1, 1, n) * top for top in (0.22, 0.2, 0.16))
    one, zero = np.ones(n), np.zeros(n)
    matrix = lambda *rows: np.moveaxis(np.array(rows), -1, 0)
    rotation = matrix((np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn)))
    skew = matrix((one, zero), (shear, one))
    size = matrix((scale * np.exp(stretch), zero), (zero, scale * np.exp(-stretch)))
    return np.linalg.inv(rotation @ skew @ size)


def _places(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Boxes [k 4] of the sizes [k 2] at random places, two pixels apart and one from the edge."""
    for _ in range(50):
        boxes = np.zeros((0, 4), np.int32)
        for h, w in sizes:
            corner = rng.integers(1, (SIDE - h, SIDE - w), (80, 2))
            tries = np.concatenate([corner, corner + np.array([h, w])], 1)
            t, o = tries[:, None], boxes[None]
            apart = ((t[..., :2] >= o[..., 2:] + 2) | (t[..., 2:] + 2 <= o[..., :2])).any(-1).all(-1)
            if not apart.any():
                break
            boxes = np.concatenate([boxes, tries[np.argmax(apart)][None]]).astype(np.int32)
        else:
            return boxes
    raise ValueError(f"no room for digits of the sizes {sizes.tolist()}")  # nine digits of 20 x 20 find room within a few tries


def _clutter(rng: np.random.Generator, pieces: np.ndarray) -> np.ndarray:
    """A canvas [y x] of strokes and of the pieces of digits."""
    out = np.zeros((SIDE + 1, SIDE + 1), np.float32)
    t = np.linspace(0, 1, 22)[:, None]
    for _ in range(rng.integers(2, 7)):
        a = rng.uniform(2, SIDE - 3, 2)
        b, c = a + rng.uniform(-10, 10, 2), a + rng.uniform(-10, 10, 2)
        line = np.clip((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c, 0, SIDE - 1)
        low = line.astype(int)
        fy, fx = (line - low).T
        ink = rng.uniform(0.3, 0.9)
        for dy, dx, weight in ((0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx)):
            np.maximum.at(out, (low[:, 0] + dy, low[:, 1] + dx), (ink * weight).astype(np.float32))
    for piece in pieces:
        h, w = rng.integers(4, 8, 2)
        sy, sx = rng.integers(5, WINDOW - 5 - h), rng.integers(5, WINDOW - 5 - w)
        y, x = rng.integers(0, SIDE - h), rng.integers(0, SIDE - w)
        out[y : y + h, x : x + w] = np.maximum(out[y : y + h, x : x + w], piece[sy : sy + h, sx : sx + w])
    return np.minimum(out[:SIDE, :SIDE], 1)


def canvases(digits: Digits, numbers: list[tuple[int, ...]], *, least: int = 4, most: int = MOST, bend: float = 0.0) -> Canvases:
    """One canvas for each of `numbers` (what seeds it) with least..most digits. bend: how much digits are turned and stretched (training)."""
    if not 1 <= least <= most <= MOST:
        raise ValueError(f"{least} to {most} digits; a canvas holds 1 to {MOST}")
    rngs = [np.random.default_rng(number) for number in numbers]
    b, extra = len(numbers), 6  # of the digits drawn: those that pieces are cut from
    counts = [int(rng.integers(least, most + 1)) for rng in rngs]
    which = np.stack([rng.integers(0, len(digits.label), MOST + extra) for rng in rngs])
    inverse = np.concatenate([_shape(rng, MOST + extra, bend) for rng in rngs])
    drawn = _warp(digits.image[which.reshape(-1)], inverse).reshape(b, MOST + extra, WINDOW, WINDOW)
    if bend:
        drawn = drawn ** np.stack([rng.uniform(0.7, 1.4, (MOST + extra, 1, 1)) for rng in rngs])
    pixels, label, box = np.zeros((b, SIDE, SIDE), np.float32), np.full((b, MOST), -1, np.int32), np.zeros((b, MOST, 4), np.int32)
    for i, (rng, k) in enumerate(zip(rngs, counts, strict=True)):
        ink = drawn[i, :k] > 0.2
        spans = [(np.flatnonzero(x.any(1))[[0, -1]], np.flatnonzero(x.any(0))[[0, -1]]) for x in ink]
        sizes = np.array([(y[1] - y[0] + 1, x[1] - x[0] + 1) for y, x in spans])
        order = np.argsort(-sizes.prod(1), kind="stable")  # large ones find room first
        box[i, order] = _places(rng, sizes[order])
        label[i, :k] = digits.label[which[i, :k]]
        layer = _clutter(rng, drawn[i, MOST : MOST + int(rng.integers(2, extra + 1))])
        for (top, left, bottom, right), one, (y, x) in zip(box[i], drawn[i], spans, strict=False):
            layer[top - 1 : bottom + 1, left - 1 : right + 1] = 0
            layer[top:bottom, left:right] = one[y[0] : y[1] + 1, x[0] : x[1] + 1]
        noise = rng.standard_normal((SIDE, SIDE), np.float32) * rng.uniform(0.03, 0.1)
        specks = (rng.random((SIDE, SIDE), np.float32) < 0.006) * rng.uniform(0.2, 0.8)
        pixels[i] = np.clip(np.maximum(layer, specks) + noise, 0, 1)
    return Canvases(pixels, label, box)


# --- questions --------------------------------------------------------------------------------------------------------


def nearest(c: Canvases) -> Int32[np.ndarray, "b 4"]:
    """The digit nearest to each of CORNERS; -1 = the next one is not CLEAR pixels farther."""
    centre = (c.box[..., :2] + c.box[..., 2:]) / 2
    corner = SIDE * np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    far = np.linalg.norm(centre[:, None] - corner[None, :, None], axis=-1)
    far = np.where(c.label[:, None] < 0, np.inf, far)
    two = np.sort(far, -1)[..., :2]
    return np.where(two[..., 1] - two[..., 0] < CLEAR, -1, np.argmin(far, -1)).astype(np.int32)


def beside(c: Canvases) -> Int32[np.ndarray, "b 9 2"]:
    """The digit right and left of each; -1 = there is none (or no digit here), -2 = it hangs on a few pixels."""
    centre = (c.box[..., :2] + c.box[..., 2:]) / 2
    gap = centre[:, None] - centre[:, :, None]  # [b from to 2]
    live = (c.label[:, None] >= 0) & (c.label[:, :, None] >= 0) & ~np.eye(MOST, dtype=bool)
    out = []
    for sign in (1, -1):
        dy, dx = np.abs(gap[..., 0]), sign * gap[..., 1]
        to = np.where(live & (dx > 0) & (dy <= BAND), dx, np.inf)
        first = np.min(to, -1)
        near = np.where(live & (dx > -CLEAR) & (dy <= BAND + CLEAR), dx, np.inf)  # those that would count a few pixels on
        near = np.where(np.arange(MOST) == np.argmin(to, -1)[..., None], np.where(np.isinf(first)[..., None], near, np.inf), near)
        clear = np.where(np.isinf(first), np.isinf(near.min(-1)), near.min(-1) - np.where(np.isinf(first), 0, first) >= CLEAR)
        out.append(np.where(clear, np.where(np.isinf(first), -1, np.argmin(to, -1)), np.where(c.label < 0, -1, -2)))
    return np.stack(out, -1).astype(np.int32)


def questions(c: Canvases) -> list[tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]]:
    """Of each canvas all (question, digit named or -1, digit that is the answer): those of a place, those of a relation."""
    out, corner, side = [], nearest(c), beside(c)
    for i, label in enumerate(c.label):
        once = [j for j in range(MOST) if label[j] >= 0 and (label == label[j]).sum() == 1]
        place = [(f"which digit is nearest the {w} corner ?", -1, int(corner[i, k])) for k, w in enumerate(CORNERS) if corner[i, k] >= 0]
        relation = [
            (f"which digit is {w} of the {label[j]} ?", j, int(side[i, j, k]))
            for j in once
            for k, w in enumerate(SIDES)
            if side[i, j, k] >= 0
        ]
        out.append((place, relation))
    return out


def encode(text: str) -> list[int]:
    """Token ids of words apart by blanks; ValueError names words that the model does not know."""
    if unknown := sorted(set(text.split()) - set(IDS)):
        raise ValueError(f"unknown words: {', '.join(unknown)}; the model knows {', '.join(WORDS)}")
    return [IDS[w] for w in text.split()]


def prompt(question: str) -> list[int]:
    """Token ids of a question about one picture."""
    return [*encode(HEAD), *[IMAGE_TOKEN] * GRID**2, *encode(question), *encode(TAIL)]


class Example(NamedTuple):
    """A canvas that ships with the package, made of digits never trained on, with questions and their answers."""

    path: pathlib.Path
    pixels: Float32[np.ndarray, "y x"]
    asked: tuple[tuple[str, str], ...]


def examples() -> list[Example]:
    """The canvases of the folder canvases/ (its README says whose digits they are made of)."""
    folder = pathlib.Path(__file__).parent / "canvases"
    table = json.loads((folder / "questions.json").read_text())
    return [Example(folder / name, read(folder / name), tuple(map(tuple, asked))) for name, asked in table.items()]


def read(path: str | os.PathLike[str]) -> Float32[np.ndarray, "y x"]:
    """A picture file in grey, scaled to SIDE x SIDE pixels of 0 to 1: bright digits on a dark ground are what the model knows."""
    with PIL.Image.open(path) as picture:
        grey = picture.convert("L")
        grey = grey if grey.size == (SIDE, SIDE) else grey.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        return np.asarray(grey, np.float32) / 255


WIDTH = len(prompt("which digit is nearest the top left corner ?"))  # of the longest prompt


def normalised(pixels: Float32[np.ndarray, "b y x"]) -> Float32[np.ndarray, "b 1 y x 1"]:
    """Pictures as the model takes them."""
    return ((pixels - np.float32(MEAN)) / np.float32(STD))[:, None, :, :, None]


def cover(box: Int32[np.ndarray, "b k 4"]) -> Bool[np.ndarray, "b k 12 12"]:
    """Patches that a box covers: at least 12 of their 49 pixels lie in it."""
    at = PATCH * np.arange(GRID)
    lap = lambda a, b: np.clip(np.minimum(b[..., None], at + PATCH) - np.maximum(a[..., None], at), 0, None)
    return lap(box[..., 0], box[..., 2])[..., :, None] * lap(box[..., 1], box[..., 3])[..., None, :] >= 12


def batch(digits: Digits, seed: int, count: int, *, start: int = 0) -> Batch:
    """Prompts number start to start + count - 1 of a seed, places and relations in turn; a number's prompt does not depend on the others."""
    found: dict[int, tuple[Canvases, int, tuple[str, int, int]]] = {}
    for attempt in range(100):
        open_ = [i for i in range(start, start + count) if i not in found]
        if not open_:
            break
        c = canvases(digits, [(seed, i, attempt) for i in open_])
        for row, (i, kinds) in enumerate(zip(open_, questions(c), strict=True)):
            if min(len({c.label[row, it] for *_, it in kind}) for kind in kinds) >= 2:
                asked = kinds[i % 2]
                found[i] = (c, row, asked[int(np.random.default_rng((seed, i, attempt, 1)).integers(len(asked)))])
    rows = [found[i] for i in range(start, start + count)]
    pick = lambda name: np.stack([getattr(c, name)[row] for c, row, _ in rows])
    label, box, role = pick("label"), pick("box"), np.where(pick("label") < 0, -1, 0).astype(np.int32)
    ids, answer = np.zeros((count, WIDTH), np.int32), np.zeros(count, np.int32)
    for i, (_, _, (question, named, it)) in enumerate(rows):
        text = prompt(question)
        ids[i, WIDTH - len(text) :] = text
        role[i, it] = 2
        role[i, named if named >= 0 else it] = 1 if named >= 0 else 2
        answer[i] = IDS["0"] + label[i, it]
    cells = np.any(cover(box) & (role > 0)[..., None, None], axis=1)
    relation = np.arange(start, start + count) % 2 == 1
    return Batch(normalised(pick("pixels")), ids, ids > 0, answer, relation, label, box, role, cells)


# --- the model on it --------------------------------------------------------------------------------------------------


def answer(cfg: vlm.VlmConfig, params, images, ids, live, recipe: Recipe = vlm.PLAIN, **options: Any) -> tuple[jax.Array, Any, Any]:
    """(logits f32 [b vocab] of the answer, rows that entered the decoder, rows that left it); options as `vlm.embed`."""
    seen = vlm.embed(cfg, params, images, ids, live, recipe, **options)
    out, _ = decoder.prefill(cfg.text, params, seen, recipe, new=0)
    return decoder.logits(cfg.text, params, out.x[:, -1:])[:, 0], seen, out


@functools.partial(jax.jit, static_argnums=(0, 5))
def _predicted(cfg, params, images, ids, live, recipe):
    return jnp.argmax(answer(cfg, params, images, ids, live, recipe)[0], -1)


def parts(b: Batch, size: int) -> Iterator[Batch]:
    """A batch in pieces of equal size; ValueError where it does not divide."""
    if len(b.ids) % size:
        raise ValueError(f"{len(b.ids)} prompts in batches of {size}; the number must divide")
    for i in range(0, len(b.ids), size):
        yield Batch(*(x[i : i + size] for x in b))


def right(cfg: vlm.VlmConfig, params, b: Batch, recipe: Recipe = vlm.PLAIN, *, size: int = 50) -> Bool[np.ndarray, " b"]:
    """Which prompts get their answer as the likeliest next token."""
    out = [np.asarray(_predicted(cfg, params, p.images, p.ids, p.live, recipe)) == p.answer for p in parts(b, min(size, len(b.ids)))]
    return np.concatenate(out)
