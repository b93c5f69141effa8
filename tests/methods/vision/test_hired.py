"""HiRED against its formulas, the official outputs and its limits."""

import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import FasterVLM, HiRED
from tests.methods.golden import cases
from tests.methods.vision.select import best, grid, images, kept

small = lambda n: HiRED(capacity=n)


def attention(rng, *shape):
    a = np.exp(2 * rng.normal(size=shape))
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


def crops(rng, parts, side):
    """Tokens of `parts` sub-images of side x side rows without class rows."""
    n = side * side
    x = rng.normal(size=(1, parts * n, 3)).astype(np.float32)
    return images(x, special=0, segment=np.repeat(np.arange(parts), n), cell=np.tile(grid(side, side), (parts, 1)))


def reference(early, late, shape, total, alpha, spatial, side):
    """The card's formulas for [P, h, n] -> kept rows of P * n."""
    rows, cols = shape
    parts, n = len(early), early.shape[-1]
    early, late = early.astype(np.float64).sum(1), late.astype(np.float64).sum(1)
    thumbnail = min(int(total * alpha), n)
    rest = min(total - thumbnail, (parts - 1) * n)
    marks = np.zeros(n, int)
    marks[best(early[0], int(n * (1 - alpha)))] = 1
    if spatial == "official":
        m = marks.reshape(rows * cols, -1).sum(1)
    else:
        where = marks.reshape(side, side)
        m = [
            where[r * side // rows : (r + 1) * side // rows, c * side // cols : (c + 1) * side // cols].sum()
            for r in range(rows)
            for c in range(cols)
        ]
    k = [thumbnail] + [min(int(np.float32(np.float32(i) / np.float32(sum(m))) * rest), n) for i in m]
    return [p * n + j for p in range(parts) for j in best(late[p], k[p])]


@pytest.mark.parametrize("spatial", ["official", "quadrant"])
@pytest.mark.parametrize("alpha", [0.5, 0.25])
def test_reference(spatial, alpha):
    rng = np.random.default_rng(0)
    early, late, tokens = attention(rng, 5, 2, 16), attention(rng, 5, 2, 16), crops(rng, 5, 4)
    row = lambda a: a.transpose(1, 0, 2).reshape(1, 2, -1)
    method = HiRED(capacity=30, special=0, grid=(2, 2), alpha=alpha, spatial=spatial)
    found = kept(method, tokens, Evidence(cls=np.stack([row(early), row(late)])))
    assert found == reference(early, late, (2, 2), 30, alpha, spatial, 4)
    assert len(found) <= 30  # the sum is at most the total
    five = kept(method, tokens, Evidence(cls=np.stack([row(early), row(late)])), np.array([20], np.int32))
    assert five == reference(early, late, (2, 2), 20, alpha, spatial, 4)


@pytest.mark.parametrize("spatial", ["official", "quadrant"])
def test_a_grid_that_is_told(spatial):
    """Of at most four crops; two of them are there, below each other."""
    rng = np.random.default_rng(3)
    cls, tokens = attention(rng, 2, 1, 2, 80), crops(rng, 5, 4)
    few = tokens._replace(pos=np.where(np.arange(80)[None] < 48, tokens.pos, -1))
    method = HiRED(capacity=30, special=0, crops=5, spatial=spatial)
    found = kept(method, few, Evidence(cls=cls, grid=np.array([[2, 1]], np.int32)))
    parts = cls[:, 0].reshape(2, 2, 5, 16).transpose(0, 2, 1, 3)[:, :3]
    assert found == reference(*parts, (2, 1), 30, 0.5, spatial, 4)


def test_alpha_one_leaves_the_thumbnail_alone():
    rng = np.random.default_rng(1)
    cls, tokens = attention(rng, 2, 1, 2, 80), crops(rng, 5, 4)
    found = kept(HiRED(capacity=10, special=0, grid=(2, 2), alpha=1.0), tokens, Evidence(cls=cls))
    assert found == best(cls[1, 0].sum(0)[:16], 10)


def test_official_cells_are_runs_and_half_of_them_lie_elsewhere():
    """24 x 24 thumbnail, 2 x 2 crops: 72 of the 144 rows of a run overlap the true quadrant."""
    tokens = images(np.zeros((1, 576, 1)), special=0, cell=grid(24, 24))
    thumb, rank = np.ones((1, 576), bool), np.arange(576, dtype=np.int32)[None]
    runs, quadrants = (
        np.asarray(HiRED(capacity=9, grid=(2, 2), spatial=s).place(tokens, thumb, rank, Evidence()))[0] for s in ("official", "quadrant")
    )
    assert [((runs == i) & (quadrants == i)).sum() for i in range(4)] == [72, 72, 72, 72]


def test_one_image_is_fastervlm():
    rng = np.random.default_rng(2)
    cls, tokens = attention(rng, 2, 1, 3, 17), images(rng.normal(size=(1, 17, 3)))
    assert kept(HiRED(capacity=6), tokens, Evidence(cls=cls)) == kept(FasterVLM(capacity=6), tokens, Evidence(cls=cls[1]))


def test_bad_grids():
    with pytest.raises(ValueError, match=r"crops=5 stand in a grid; give grid=\(rows, columns\), or tell HiRED that of each image"):
        kept(HiRED(capacity=4, crops=5), crops(np.random.default_rng(0), 5, 2), Evidence(cls=np.ones((2, 1, 1, 20), np.float32)))
    with pytest.raises(ValueError, match="sub-images"):
        HiRED(capacity=4, crops=4, grid=(2, 2))


def test_official_outputs_of_one_image(data):
    for case in cases(data, "hired_llava15"):
        cls = case["cls_attn_layer22"]
        n = cls.shape[-1] - 1
        method = HiRED(capacity=int(n * float(case["rate"])))
        found = kept(method, images(np.zeros((1, n + 1, 1))), Evidence(cls=np.stack([cls, cls])))
        assert (np.array(found[1:]) - 1).tolist() == np.flatnonzero(case["mask"]).tolist()


def test_official_outputs_of_crops(data):
    for case in cases(data, "hired_llava_next"):
        start = 0
        for image, parts in enumerate(case["num_patches"].tolist()):
            pick = slice(start, start + parts)
            start += parts
            two = [case[f"cls_attn_layer{i}"][pick, :, 1:] for i in (0, 22)]
            n = two[0].shape[-1]
            cls = np.stack([a.transpose(1, 0, 2).reshape(1, a.shape[1], -1) for a in two])
            total = int(parts * n * float(case["rate"]))
            shape = tuple(int(i) for i in case["grid_rows_cols"][image])
            method = HiRED(capacity=total, special=0, grid=shape, alpha=float(case["alpha"]))
            tokens = images(np.zeros((1, parts * n, 1)), special=0, segment=np.repeat(np.arange(parts), n))
            found = kept(method, tokens, Evidence(cls=cls))
            want = np.flatnonzero(case["mask"][pick].reshape(-1))
            assert found == want.tolist()
