"""The digits task: canvases, questions whose answers another reckoning confirms, the split, the boxes; and the shipped model on it."""

import hashlib
import importlib.resources
import pathlib

import numpy as np
import pytest

from jaxtok.evals import digits
from jaxtok.evals.digits import IDS, PATCH, SIDE, Digits
from jaxtok.models import load

MODEL = pathlib.Path(str(importlib.resources.files("jaxtok.models"))) / load.EMBEDDED_VLM


def drawn(n: int = 40) -> Digits:
    """Digits that need no data: a filled block of a size of its own for each class, its brightness the class."""
    image = np.zeros((n, 28, 28), np.uint8)
    label = (np.arange(n) % 10).astype(np.uint8)
    for picture, k in zip(image, label, strict=True):
        picture[4:24, 9 - k // 3 : 19 + k // 3] = 255
    return Digits(image, label)


@pytest.fixture(scope="module")
def batch():
    return digits.batch(drawn(), 0, 60)


def words(ids, live) -> list[str]:
    return [digits.WORDS[i] for i in ids[live] if i != digits.IMAGE_TOKEN]


def centre(box):
    return (box[:2] + box[2:]) / 2


def test_answers_by_another_reckoning(batch):
    kinds = set()
    for ids, live, answer, label, box, role in zip(batch.ids, batch.live, batch.answer, batch.label, batch.box, batch.role, strict=True):
        text = words(ids, live)
        assert text[:3] == digits.HEAD.split() and text[-1] == digits.TAIL
        at = [(centre(b), int(k)) for b, k in zip(box, label, strict=True) if k >= 0]
        if "nearest" in text:
            y, x = (SIDE if w in text else 0 for w in ("bottom", "right"))
            far = sorted((np.hypot(c[0] - y, c[1] - x), k) for c, k in at)
            assert far[1][0] - far[0][0] >= digits.CLEAR
            want = far[0][1]
        else:
            sign, named = (1 if "right" in text else -1), int(text[-3])
            (start,) = [c for c, k in at if k == named]
            band = sorted(
                (sign * (c[1] - start[1]), k) for c, k in at if abs(c[0] - start[0]) <= digits.BAND and sign * (c[1] - start[1]) > 0
            )
            wide = [sign * (c[1] - start[1]) for c, k in at if digits.BAND < abs(c[0] - start[0]) <= digits.BAND + digits.CLEAR]
            assert all(not -digits.CLEAR < d < band[0][0] + digits.CLEAR for d in wide)
            want = band[0][1]
            assert label[role == 1].tolist() == [named]
        assert answer == IDS["0"] + want and label[role == 2].tolist() == [want]
        kinds.add(" ".join(w for w in text[3:-1] if not w.isdigit()))
    assert len(kinds) == 6


def test_places_and_relations_in_turn_with_4_to_9_digits(batch):
    assert (batch.relation == (np.arange(60) % 2 == 1)).all()
    many = (batch.label >= 0).sum(1)
    assert set(many.tolist()) == set(range(4, 10))
    assert (batch.live == (batch.ids > 0)).all() and ((batch.ids == digits.IMAGE_TOKEN).sum(1) == digits.GRID**2).all()
    assert batch.live[:, -1].all() and not batch.live[1::2, 0].any()  # padded left


def test_boxes_hold_the_digits_and_lie_apart(batch):
    for image, label, box in zip(batch.images, batch.label, batch.box, strict=True):
        pixels = image[0, :, :, 0] * digits.STD + digits.MEAN
        assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
        boxes = box[label >= 0]
        covered = np.zeros((SIDE, SIDE), int)
        for top, left, bottom, right in boxes:
            assert 1 <= top < bottom <= SIDE - 1 and 1 <= left < right <= SIDE - 1 and 14 <= bottom - top <= 21
            assert pixels[top:bottom, left:right].mean() > 0.6  # these are filled
            covered[top - 1 : bottom + 1, left - 1 : right + 1] += 1
        assert covered.max() == 1


def test_cells_are_what_the_answer_hangs_on(batch):
    for cells, box, role in zip(batch.cells, batch.box, batch.role, strict=True):
        want = np.zeros((digits.GRID, digits.GRID), bool)
        for top, left, bottom, right in box[role > 0]:
            inside = np.zeros((SIDE, SIDE), int)
            inside[top:bottom, left:right] = 1
            want |= inside.reshape(digits.GRID, PATCH, digits.GRID, PATCH).sum((1, 3)) >= 12
        assert (cells == want).all() and want.any()


def test_a_prompt_is_a_function_of_the_seed_and_its_number(batch):
    later = digits.batch(drawn(), 0, 5, start=20)
    assert all((a[20:25] == b).all() for a, b in zip(batch, later, strict=True))
    assert (digits.batch(drawn(), 1, 5).images != batch.images[:5]).any()


def test_by_hand():
    box = np.zeros((1, 9, 4), np.int32)
    box[0, :4] = [(30, 10, 50, 20), (32, 40, 52, 50), (28, 60, 48, 70), (60, 12, 80, 22)]  # 7, 1 and 2 to its right, 1 below
    label = np.full((1, 9), -1, np.int32)
    label[0, :4] = 7, 1, 2, 1
    c = digits.Canvases(np.zeros((1, SIDE, SIDE), np.float32), label, box)
    assert digits.nearest(c).tolist() == [[0, 2, 3, 2]]
    assert digits.beside(c)[0, :5].tolist() == [[1, -1], [2, 0], [-1, 1], [-1, -1], [-1, -1]]
    ((place, relation),) = digits.questions(c)
    assert [(t, i) for t, _, i in place] == [
        (f"which digit is nearest the {w} corner ?", i) for w, i in zip(digits.CORNERS, (0, 2, 3, 2), strict=True)
    ]
    assert relation == [("which digit is right of the 7 ?", 0, 1), ("which digit is left of the 2 ?", 2, 1)]  # two 1s: not asked about
    nearly = box.copy()
    nearly[0, 1, :3:2] += 10  # 12 pixels lower: out of the band of the 7, but not clearly
    moved = c._replace(box=nearly)
    assert digits.beside(moved)[0, 0].tolist() == [-2, -1]


def test_the_examples_are_there_with_their_answers():
    examples = digits.examples()
    assert len(examples) == 2
    for e in examples:
        assert e.pixels.shape == (SIDE, SIDE) and 0 <= e.pixels.min() < 0.1 and e.pixels.max() > 0.9
        assert len(e.asked) >= 6 and all(digits.encode(q) and a in "0123456789" for q, a in e.asked)
        assert "by-sa/3.0" in (e.path.parent / "README.md").read_text()


def test_who_does_not_know_the_question_has_two_answers_to_choose_from(batch):
    canvases = digits.Canvases(batch.images[:, 0, :, :, 0], batch.label, batch.box)
    for kinds, label in zip(digits.questions(canvases), batch.label, strict=True):
        assert all(len({label[it] for *_, it in kind}) >= 2 for kind in kinds)


def test_the_split_is_disjoint_and_whole(data):
    train, unseen = digits.load("train", data), digits.load("unseen", data)
    assert (len(train.label), len(unseen.label)) == (4000, 1000)
    prints = lambda d: {hashlib.sha256(x.tobytes()).digest() for x in d.image}
    assert not prints(train) & prints(unseen) and set(unseen.label) == set(range(10))


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="train and unseen"):
        digits.load("test")
    with pytest.raises(ValueError, match="no digits at"):
        digits.load("train", tmp_path)
    with pytest.raises(ValueError, match="unknown words: seven"):
        digits.encode("which digit is right of the seven ?")
    with pytest.raises(ValueError, match="1 to 9"):
        digits.canvases(drawn(), [(0,)], most=10)
    with pytest.raises(ValueError, match="must divide"):
        next(digits.parts(digits.batch(drawn(), 0, 3), 2))


def test_the_shipped_model_answers_about_digits_it_never_saw(data):
    cfg, params, tokenizer = load.load_vlm(load.EMBEDDED_VLM)
    b = digits.batch(digits.load("unseen", data), 3, 64)
    assert tokenizer.encode("<s> user: picture" + "<image>" * cfg.patches + "which digit is right of the 7 ? assistant:") == digits.prompt(
        "which digit is right of the 7 ?"
    )
    assert digits.right(cfg, params, b, size=64).mean() >= ACCURACY


def test_the_shipped_model_is_small():
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 8e6


ACCURACY = 0.9
