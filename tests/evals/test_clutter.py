"""Digits on cluttered canvases: what stands where, that a number alone decides, the split."""

import numpy as np
import pytest

from jaxtok.evals import clutter
from jaxtok.evals.digits import MEAN, STD, Digits


def drawn(n: int = 30) -> Digits:
    """Blocks, the brighter the larger the class."""
    image, label = np.zeros((n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
    image[:, 5:23, 7:21] = (100 + 15 * label)[:, None, None]
    return Digits(image, label)


def test_a_number_decides():
    """A canvas does not hang on the others of its batch; another seed makes another one."""
    whole, part = clutter.batch(drawn(), 3, 12), clutter.batch(drawn(), 3, 4, start=5)
    assert np.array_equal(whole.images[5:9], part.images) and np.array_equal(whole.label[5:9], part.label)
    assert not np.array_equal(clutter.batch(drawn(), 4, 12).images, whole.images)
    assert whole.images.shape == (12, clutter.SIDE, clutter.SIDE, 1) and whole.images.dtype == np.float32


def test_each_digit_once_a_round():
    digits = drawn()
    two = clutter.batch(digits, 0, 60)
    for part in (two.label[:30], two.label[30:]):
        assert np.array_equal(np.sort(part), np.sort(digits.label))
    assert not np.array_equal(two.label[:30], two.label[30:])
    assert np.array_equal(clutter.batch(digits, 0, 40, shuffle=False).label, digits.label[np.arange(40) % 30])


def test_the_digit_is_whole():
    """The label's block, alone on its canvas but for small pieces: no other patch is so large. Pieces lie under it or beside it."""
    b = clutter.batch(drawn(), 0, 20)
    pixels = b.images[..., 0] * STD + MEAN
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    for one, label in zip(pixels, b.label, strict=True):
        bright = one >= (100 + 15 * label) / 255 - 0.2
        sums = np.pad(bright.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        window = sums[12:, 9:] - sums[:-12, 9:] - sums[12:, :-9] + sums[:-12, :-9]
        assert window.max() >= 0.95 * 12 * 9  # the block, at least 0.75 of 18 x 14


def test_split(data):
    b = clutter.held_out(data)
    assert b.images.shape == (1000, 56, 56, 1) and set(b.label.tolist()) == set(range(10))
    assert np.bincount(b.label).min() > 60
    assert np.array_equal(clutter.held_out(data).images[:3], b.images[:3])


def test_places_a_step_apart(monkeypatch):
    """Without pieces, the middle of the bright block tells where the window of 26 pixels begins."""
    monkeypatch.setattr(clutter, "PIECES", (0, 0))
    for step, most in ((1, 30), (7, 4)):
        bright = clutter.canvases(drawn(), np.full(80, 9, np.int32), [(0, i) for i in range(80)], step=step) > 0.5
        corner = np.array([[np.mean(at) - 12.5 for at in np.nonzero(one)] for one in bright])
        whole = np.round(corner / step)
        assert np.abs(corner - step * whole).max() < 0.3 and whole.min() >= 0 and whole.max() == most
        assert len(np.unique(whole[:, 0])) > min(most, 20)
    for step in (0, 31):
        with pytest.raises(ValueError):
            clutter.canvases(drawn(), np.zeros(1, np.int32), [(0, 0)], step=step)
