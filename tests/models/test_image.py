"""Pictures as Hugging Face's processors leave them: golden files always, the shared photo live where transformers is installed."""

import json

import numpy as np
import PIL.Image
import pytest

from jaxtok.models import image
from jaxtok.models.image import Processor
from tests.golden import make_images

TOLERANCE = 1e-4
PICTURES = make_images.pictures()


@pytest.fixture(scope="module")
def golden():
    with np.load(make_images.FILE) as npz:
        return dict(npz)


@pytest.mark.parametrize("name", make_images.CASES)
def test_pictures_equal_transformers(golden, tmp_path, name):
    """From the folder's file; resizes up and down, exact or by the shorter side, crops larger and smaller than the picture."""
    (tmp_path / "preprocessor_config.json").write_text(str(golden[f"{name}.config"]))
    processor = Processor.read(tmp_path)
    for key, picture in PICTURES.items():
        want = golden[f"{name}.{key}"]
        got = processor(PIL.Image.fromarray(picture))
        assert got.dtype == np.float32 and got.shape == (1, *want.shape)
        assert np.abs(got[0] - want).max() <= TOLERANCE * max(1, np.abs(want).max())
        np.testing.assert_array_equal(processor(picture), got)


def test_several_pictures_of_several_sizes():
    clip = Processor(size=13, crop=(13, 13), mean=image.CLIP[0], std=image.CLIP[1])
    batch = clip([PIL.Image.fromarray(PICTURES["wide"]), PICTURES["tall"], PICTURES["small"]])
    assert batch.shape == (3, 13, 13, 3)
    for row, key in enumerate(PICTURES):
        np.testing.assert_array_equal(batch[row], clip(PICTURES[key])[0])
    with pytest.raises(ValueError, match=r"pictures become \[\(13, 20\), \(36, 13\)\]; give an exact size or a crop"):
        Processor(size=13)([PICTURES["wide"], PICTURES["tall"]])
    with pytest.raises(ValueError, match="no pictures"):
        clip([])


def test_by_hand():
    """One grey row: cropped, padded, scaled, normalised."""
    x = np.array([[10, 20, 30, 40]], np.uint8)
    cut = Processor(size=None, crop=(1, 2), mean=None)(x)
    np.testing.assert_allclose(cut[0, 0, :, 0], np.array([20, 30]) / 255, rtol=1e-6)
    odd = Processor(size=None, crop=(1, 3), mean=None, scale=None)(x)  # of one row too many, the last goes
    assert odd[0, 0, :, 1].tolist() == [10, 20, 30]
    wide = Processor(size=None, crop=(2, 7), mean=(0.5,), std=(0.5,))(x)
    np.testing.assert_allclose(wide[0, 1, :, 2], 2 * np.array([0, 0, 10, 20, 30, 40, 0]) / 255 - 1, atol=1e-6)
    assert (wide[0, 0] == -1).all()


def test_kinds_of_pictures():
    """Grey, transparent, palette, floats: the same RGB."""
    plain = Processor(size=None, mean=None, scale=None)
    grey = PICTURES["small"][..., 0]
    for x in (grey, grey[..., None], np.repeat(grey[..., None], 3, -1), PIL.Image.fromarray(grey), grey / np.float32(255)):
        np.testing.assert_array_equal(plain(x)[0], np.repeat(grey[..., None], 3, -1))
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = 9, 8, 7, 255
    for x in (clear, PIL.Image.fromarray(clear)):
        assert plain(x)[0].tolist() == [[[9, 8, 7], [255] * 3], [[255] * 3, [255] * 3]]
    red = PIL.Image.new("P", (1, 1))
    red.putpalette([255, 0, 0])
    assert plain(red)[0, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "picture, match",
    [
        (np.zeros((2, 2, 2), np.uint8), r"an array of shape \[2, 2, 2\] is no picture"),
        (np.zeros((0, 2), np.uint8), "is no picture"),
        (np.zeros((2, 2), np.int64), "an array of int64 is no picture"),
        (np.full((2, 2), 2.0), "values from 2.0 to 2.0 are no picture"),
        (np.full((2, 2), np.nan), "are no picture"),
        (PIL.Image.new("RGB", (0, 4)), "a picture of 4 by 0 pixels is empty"),
        (np.zeros((1, 32767), np.uint8), "would become 300 by 9830100; crop it first"),
    ],
)
def test_no_pictures(picture, match):
    with pytest.raises(ValueError, match=match):
        Processor(size=300)([picture])


@pytest.mark.parametrize(
    "raw, want",
    [
        (dict(feature_extractor_type="ViTFeatureExtractor", size=384), Processor(size=(384, 384), resample=2)),
        (dict(feature_extractor_type="CLIPFeatureExtractor", size=336, crop_size=336),
         Processor(size=336, crop=(336, 336), mean=image.CLIP[0], std=image.CLIP[1])),
        (dict(image_processor_type="SiglipImageProcessorFast", size=dict(height=384, width=384)), Processor(size=(384, 384))),
        (dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 256}, image_mean=image.IMAGENET[0], image_std=image.IMAGENET[1]),
         Processor(size=256, crop=(224, 224), mean=image.IMAGENET[0], std=image.IMAGENET[1])),
        (dict(image_processor_type="ViTImageProcessor", do_resize=False, do_rescale=False, do_normalize=False),
         Processor(size=None, resample=2, scale=None, mean=None)),
    ],
)  # fmt: skip
def test_published_files(raw, want):
    """ViT-B/16-384, CLIP L/14-336, SigLIP so400m, DINOv2; old and new spellings."""
    assert Processor.of(json.loads(json.dumps(raw))) == want


@pytest.mark.parametrize(
    "raw, match",
    [
        (
            dict(image_processor_type="LevitImageProcessor"),
            "image_processor_type 'LevitImageProcessor' is not|image_processor_type 'Levit' is not",
        ),
        (dict(), "image_processor_type None is not supported; supported: ViT, DeiT, CLIP, Bit, Siglip"),
        (dict(size={"max_height": 3}), "size={'max_height': 3} is not supported"),
        (dict(size={"height": 0, "width": 3}), "every side must be from 1"),
        (dict(size="big"), "size='big' should be"),
        (dict(image_std=[1, 0, 1]), "std not 0"),
        (dict(image_mean=["a"]), "should be numbers"),
        (dict(resample=17), "resample=17"),
        (dict(do_pad=True), "do_pad is not supported"),
        (dict(do_resize=1), "do_resize=1 should be bool"),
    ],
)
def test_wrong_files(tmp_path, raw, match):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(({"image_processor_type": "ViTImageProcessor"} if raw and "image_processor_type" not in raw else {}) | raw))
    with pytest.raises(ValueError, match=match) as e:
        Processor.read(tmp_path)
    assert "\n" not in str(e.value) and str(e.value).startswith(str(file))


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        Processor.read(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_processor_type": "CLIPImageProcessor"}}))
    assert Processor.read(tmp_path).size == 224
    (tmp_path / "processor_config.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        Processor.read(tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "Siglip", "Bit"])
def test_live(data, tmp_path, name):
    """The shared photo, whole, cut to several shapes and enlarged, by the processors' defaults."""
    transformers = pytest.importorskip("transformers", reason="live parity needs the parity extra: transformers")
    theirs = getattr(transformers, name + "ImageProcessorPil")()
    theirs.save_pretrained(tmp_path)
    ours = Processor.read(tmp_path)
    with PIL.Image.open(data / "photo" / "coco_000000039769.png") as photo:
        shapes = [photo.convert("RGB"), photo.crop((50, 10, 250, 470)), photo.crop((3, 7, 414, 334)), photo.resize((101, 67))]
    got = ours(shapes)
    off = [np.abs(got[i] - make_images.run(theirs, x)).max() for i, x in enumerate(shapes)]
    print(f"{name}: max |difference| {max(off):.1e}")
    assert max(off) <= TOLERANCE
