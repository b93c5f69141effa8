"""Pictures as Hugging Face's Qwen2VLImageProcessor leaves them: golden files always, the shared photo live where transformers is installed."""

import json

import numpy as np
import PIL.Image
import pytest

from jaxtok.models.smart_resize import PatchProcessor, padded
from tests.golden import make_qwen_vl
from tests.golden.make_images import pictures

PICTURES = pictures()


@pytest.fixture(scope="module")
def golden():
    with np.load(make_qwen_vl.FOLDER / "processor.npz") as npz:
        return dict(npz)


@pytest.mark.parametrize("name", make_qwen_vl.PROCESSORS)
def test_patches_equal_transformers(golden, tmp_path, name):
    """From the folder's file, to the bit: as they are, shrunk, enlarged; three pictures of two prompts, padded."""
    (tmp_path / "preprocessor_config.json").write_text(str(golden[f"{name}.config"]))
    processor = PatchProcessor.read(tmp_path)
    for key, picture in PICTURES.items():
        rows, grid = processor.one(PIL.Image.fromarray(picture))
        assert rows.dtype == np.float32 and (1, *grid) == tuple(golden[f"{name}.{key}.grid"])
        np.testing.assert_array_equal(rows, golden[f"{name}.{key}"])
    keys = list(PICTURES)
    patches = processor([[PICTURES[keys[0]], PICTURES[keys[1]]], [PICTURES[keys[2]]]])
    theirs = [np.concatenate([golden[f"{name}.{k}"] for k in keys]), np.stack([golden[f"{name}.{k}.grid"] for k in keys])]
    rows, grid = padded(*theirs, [2, 1], patches.rows.shape[2])
    np.testing.assert_array_equal(patches.rows, rows)
    assert (patches.grid == grid[..., 1:]).all() and (grid[1, 1] == 0).all() and (patches.rows[1, 1] == 0).all()


@pytest.mark.filterwarnings("default")
def test_live(data):
    """The shared photo, whole, cut to several shapes and enlarged, by the defaults and by small bounds."""
    pytest.importorskip("transformers", reason="live parity needs the parity extra: transformers")
    with PIL.Image.open(data / "photo" / "coco_000000039769.png") as photo:
        shapes = [photo.convert("RGB"), photo.crop((50, 10, 250, 470)), photo.crop((3, 7, 414, 334)), photo.resize((31, 21))]
    for changes in ({}, dict(size={"shortest_edge": 3136, "longest_edge": 50000})):
        theirs, config = make_qwen_vl.processor(**changes)
        ours = PatchProcessor.of(config)
        for picture in shapes:
            (want, grid), (got, size) = make_qwen_vl.run(theirs, picture), ours.one(picture)
            assert tuple(grid) == (1, *size) and np.array_equal(got, want), np.abs(got - want).max()


def test_sizes_by_hand():
    p = PatchProcessor()  # units of 28, 3136 to 1003520 pixels
    assert p.shape(480, 640) == (476, 644) and p.shape(28, 28) == (56, 56) and p.shape(10, 100) == (28, 196)
    assert p.shape(42, 70) == (56, 56), "half a unit goes to the even number"
    assert p.shape(4000, 3000) == (1148, 840), "rounded down"
    assert p.shape(14, 2800) == (28, 812), "0 x 100 units are too few pixels: enlarged, rounded up"
    with pytest.raises(ValueError, match="a picture of 1 by 201 pixels is too long"):
        p.shape(1, 201)


def test_a_patch_by_hand():
    """4 x 8 pixels in patches of 2: two units; rows by unit, then by row and column in it; a row by channel, frame, y, x."""
    x = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    rows, grid = PatchProcessor(patch=2, resize=False, scale=None, mean=None)([[x]])
    assert grid.tolist() == [[[2, 4]]] and rows.shape == (1, 1, 8, 24)
    for j, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]):
        cut = x[top : top + 2, left : left + 2].transpose(2, 0, 1)
        assert rows[0, 0, j].tolist() == np.repeat(cut[:, None], 2, 1).reshape(-1).tolist()


def test_published_files():
    """Qwen2.5-VL-7B-Instruct: bounds in the old spelling."""
    raw = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    assert PatchProcessor.of(raw) == PatchProcessor(most=12845056)


@pytest.mark.parametrize(
    "raw, match",
    [
        (dict(image_processor_type="CLIPImageProcessor"), "image_processor_type 'CLIPImageProcessor' is not supported here"),
        (dict(min_pixels=0), "min_pixels=0 is out of range"),
        (dict(size={"shortest_edge": 9, "longest_edge": 4}), "least=9, most=4 pixels: must rise"),
        (dict(size=[2, 3]), r"size=\[2, 3\] should be an object"),
        (dict(patch_size="x"), "patch_size='x' should be int"),
        (dict(image_std=[1, 0, 1]), "std not 0"),
        (dict(resample=17), "resample=17"),
        (dict(do_resize=1), "do_resize=1 should be bool"),
    ],
)
def test_wrong_files(tmp_path, raw, match):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"} | raw))
    with pytest.raises(ValueError, match=match) as e:
        PatchProcessor.read(tmp_path)
    assert "\n" not in str(e.value) and str(e.value).startswith(str(file))


def test_what_does_not_fit():
    p = PatchProcessor(patch=2, resize=False)
    x = np.zeros((4, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="a picture of 3 by 8 pixels is no multiple of 4"):
        p.one(x[:3])
    with pytest.raises(ValueError, match="pictures of 8 patches into 6; give a multiple of 4 that is enough"):
        p([[x]], patches=6)
    with pytest.raises(ValueError, match="no pictures"):
        p([[], []])
    with pytest.raises(TypeError, match="give the pictures of each prompt"):
        p([x])
    rows, grid = np.zeros((12, 24), np.float32), np.array([[1, 2, 4], [1, 2, 2]])
    for many, most, match in (
        ([1], 8, "do not fit together"),
        ([2, 1], 8, "do not fit together"),
        ([1, 1], 4, "a picture has 8 patches, the most is 4"),
    ):
        with pytest.raises(ValueError, match=match):
            padded(rows, grid, many, most)
