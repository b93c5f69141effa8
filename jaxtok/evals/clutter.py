"""Handwritten digits on a cluttered canvas: which digit is it? A task for attention over a grid of patches.

A canvas of 56 x 56 pixels holds one whole digit of MNIST at a random place, scaled to 0.75..1 of its size, amid PIECES (fewest, most)
pieces of 8 x 8 pixels cut out of other digits, and noise. What is whole is the answer; where ink meets, the brighter wins.

Everything is numpy and a function of the digits given and of (seed, number of the canvas). The digits are those of `digits.load`: 4,000
to train, 1,000 ("unseen") to test, each once on a canvas of its own.
"""

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxtok.evals.digits import MEAN, STD, WINDOW, Digits, _shape, _warp, load

SIDE, PIECE, PIECES = 56, 8, (6, 12)


class Batch(NamedTuple):
    """Pictures and their digits."""

    images: Float32[np.ndarray, "b 56 56 1"]  # normalised
    label: Int32[np.ndarray, " b"]


def canvases(
    digits: Digits, which: Int32[np.ndarray, " b"], numbers: list[tuple[int, ...]], *, bend: float = 0.0, step: int = 1
) -> Float32[np.ndarray, "b 56 56"]:
    """Digit `which[i]` on the canvas that `numbers[i]` seeds; 0 black, 1 white. bend: how much the digit is turned and stretched.

    step: its corner stands at multiples of so many pixels (7: as patches of 7 x 7 do, far easier to learn). ValueError: not 1 to 30."""
    if not 1 <= step <= SIDE - WINDOW:
        raise ValueError(f"step={step} must be from 1 to {SIDE - WINDOW}")
    rngs = [np.random.default_rng(number) for number in numbers]
    drawn = _warp(digits.image[which], np.concatenate([_shape(rng, 1, bend) for rng in rngs]))
    out = np.zeros((len(numbers), SIDE, SIDE), np.float32)
    for canvas, one, rng in zip(out, drawn, rngs, strict=True):
        for other in rng.integers(0, len(digits.label), int(rng.integers(PIECES[0], PIECES[1] + 1))):
            y, x = rng.integers(0, SIDE - PIECE + 1, 2)
            sy, sx = rng.integers(4, 28 - 4 - PIECE + 1, 2)  # digits stand in the middle of their pictures
            part = digits.image[other, sy : sy + PIECE, sx : sx + PIECE].astype(np.float32) / 255
            canvas[y : y + PIECE, x : x + PIECE] = np.maximum(canvas[y : y + PIECE, x : x + PIECE], part)
        y, x = step * rng.integers(0, (SIDE - WINDOW) // step + 1, 2)
        canvas[y : y + WINDOW, x : x + WINDOW] = np.maximum(canvas[y : y + WINDOW, x : x + WINDOW], one)
        canvas += rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(rng.uniform(0.02, 0.06))
    return np.clip(out, 0, 1)


def batch(digits: Digits, seed: int, count: int, *, start: int = 0, bend: float = 0.0, step: int = 1, shuffle: bool = True) -> Batch:
    """Canvases number start to start + count - 1 of a seed. Each digit comes once in as many canvases as there are digits, in a new order
    each time; shuffle=False: in their own order, always."""
    size = len(digits.label)
    rounds = np.arange(start, start + count) // size
    order = {int(r): np.random.default_rng((seed, int(r), 1)).permutation(size) if shuffle else np.arange(size) for r in set(rounds)}
    which = np.array([order[int(r)][i % size] for r, i in zip(rounds, range(start, start + count), strict=True)], np.int32)
    pixels = canvases(digits, which, [(seed, i) for i in range(start, start + count)], bend=bend, step=step)
    return Batch(((pixels - np.float32(MEAN)) / np.float32(STD))[..., None], digits.label[which].astype(np.int32))


def held_out(folder: str | os.PathLike[str] | None = None, *, step: int = 1) -> Batch:
    """The 1,000 canvases to test on: digits never trained on, seed 0, always the same."""
    digits = load("unseen", folder)
    return batch(digits, 0, len(digits.label), step=step, shuffle=False)
