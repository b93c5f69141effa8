"""Pictures in crops as Hugging Face's processor leaves them: golden files always, the shared photo live where transformers is installed."""

import json

import numpy as np
import PIL.Image
import pytest

from jaxtok.models import image
from jaxtok.models.image_anyres import AnyresProcessor
from tests.golden import make_images, make_llava_next

PICTURES = list(make_images.pictures().values())


@pytest.fixture(scope="module")
def golden():
    with np.load(make_llava_next.FOLDER / "images.npz") as npz:
        return dict(npz)


def read(tmp_path, golden, parts=None, **changes) -> AnyresProcessor:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(json.loads(str(golden["config"])) | changes))
    return AnyresProcessor.read(tmp_path, parts)


def test_pictures_equal_transformers(golden, tmp_path):
    """Three pictures of different grids: to the bit, zeros where there is no crop."""
    got = read(tmp_path, golden)(PICTURES)
    np.testing.assert_array_equal(got.pixels, golden["pixels"])
    np.testing.assert_array_equal(got.sizes, golden["sizes"])
    assert got.pixels.dtype == np.float32 and got.sizes.dtype == np.int32


def test_pictures_by_prompt(golden, tmp_path):
    """Lists of different lengths; a picture that is not there has size 0."""
    processor = read(tmp_path, golden, parts=6)
    out = processor([[PICTURES[1]], PICTURES[::2]])
    assert out.pixels.shape == (2, 2, 6, 12, 12, 3) and out.sizes.tolist() == [[[61, 22], [0, 0]], [[30, 47], [9, 10]]]
    for got, want in ((out.pixels[0, 0], 1), (out.pixels[1, 0], 0), (out.pixels[1, 1], 2)):
        np.testing.assert_array_equal(got[:5], golden["pixels"][want])
    assert not out.pixels[0, 1].any() and not out.pixels[:, :, 5].any()
    np.testing.assert_array_equal(processor(PIL.Image.fromarray(PICTURES[0])).pixels, out.pixels[1, :1])


def test_published_file():
    """LLaVA-v1.6."""
    raw = {
        "aspect_ratio_setting": "anyres", "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_grid_pinpoints": make_llava_next.PUBLISHED,
        "image_mean": list(image.CLIP[0]), "image_std": list(image.CLIP[1]), "image_processor_type": "LlavaNextImageProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 336},
    }  # fmt: skip
    processor = AnyresProcessor.of(raw)
    assert (processor.crop, processor.thumbnail, processor.each.size) == (336, (336, 336), 336)
    assert processor.pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    out = processor(np.full((100, 300, 3), 255, np.uint8))
    assert out.pixels.shape == (1, 3, 336, 336, 3) and out.sizes.tolist() == [[100, 300]]


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            dict(image_processor_type="CLIPImageProcessor"),
            "image_processor_type 'CLIP' cuts no crops; models.image.Processor reads the others",
        ),
        (dict(image_grid_pinpoints=[[12, 25]]), r"pinpoint \(12, 25\) is no grid of crops of 12 pixels"),
        (dict(image_grid_pinpoints=[]), r"image_grid_pinpoints=\[\] should be a list"),
        (dict(image_grid_pinpoints=[[12, 24, 3]]), "should be a list of heights and widths"),
        (dict(crop_size={"height": 12, "width": 24}), "should be a square"),
        (dict(size="big"), "size='big' should be"),
    ],
)
def test_wrong_files(tmp_path, golden, changes, match):
    with pytest.raises(ValueError, match=match) as e:
        read(tmp_path, golden, **changes)
    assert "\n" not in str(e.value) and "preprocessor_config.json" in str(e.value)


def test_refused(tmp_path, golden):
    with pytest.raises(ValueError, match=r"models\.image_anyres\.AnyresProcessor takes it"):
        image.Processor.of(json.loads(str(golden["config"])))
    processor = read(tmp_path, golden, parts=3)
    with pytest.raises(ValueError, match="a picture has 4 crops and a thumbnail; parts=3 has no room for them"):
        processor(PICTURES[0])
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="no pictures"):
            processor(nothing)
    with pytest.raises(ValueError, match="parts=1"):
        read(tmp_path, golden, parts=1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("side", [224, 336])
def test_live(data, tmp_path, side):
    """The shared photo, whole, cut to several shapes and enlarged."""
    pytest.importorskip("transformers", reason="live parity needs the parity extra: transformers")
    points = [[side * a, side * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    theirs, config = make_llava_next.processor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=points
    )
    (tmp_path / "preprocessor_config.json").write_text(config)
    with PIL.Image.open(data / "photo" / "coco_000000039769.png") as photo:
        photo = photo.convert("RGB")
        shapes = [photo, photo.crop((50, 10, 250, 470)), photo.crop((3, 7, 414, 100)), photo.resize((101, 67)), photo.resize((1500, 999))]
    got, (pixels, sizes) = AnyresProcessor.read(tmp_path)(shapes), make_llava_next.run(theirs, shapes)
    assert got.pixels.shape == pixels.shape and got.sizes.tolist() == sizes.tolist()
    print(f"side {side}: max |difference| {np.abs(got.pixels - pixels).max():.1e}")
    np.testing.assert_array_equal(got.pixels, pixels)
