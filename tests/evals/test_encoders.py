"""The three small trained encoders: logits of another implementation, published accuracies, broken files."""

import functools
import wave

import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.evals import encoders
from jaxtok.methods import ToMe
from jaxtok.models import audio


@functools.cache
def task(name, data) -> encoders.Task:
    return getattr(encoders, name)(data)


@pytest.mark.parametrize("name, count", [("vit_mnist", 250), ("vit_cifar10", 1000), ("kwt1", 4)])
def test_logits_and_predictions_equal_the_reference(data, name, count):
    t = task(name, data)
    z = encoders.logits(t, count=count)
    known = t.known[t.known < count]
    assert len(known) >= 4 and np.abs(z[known] - t.logits[: len(known)]).max() <= 1e-4
    assert (z.argmax(-1) == t.predicted[:count]).all()
    if name == "vit_cifar10":
        assert (z.argmax(-1) == t.labels).mean() == 0.686


@pytest.mark.slow
def test_accuracy_on_digits(data):
    assert encoders.accuracy(task("vit_mnist", data)) == 0.9724


def test_words(data):
    """The cepstral coefficients of the reference; yes, no and silence are understood."""
    t = task("kwt1", data)
    with np.load(data / "kwt1_audio" / "ref_kwt1.npz") as ref:
        np.testing.assert_allclose(t.images[..., 0], ref["mfcc"], atol=1e-4)
    said = [encoders.WORDS[i] for i in encoders.logits(t).argmax(-1)]
    assert said[:3] == ["yes", "no", "_silence_"] and encoders.accuracy(t) == 0.75


def test_merging_costs_little(data):
    """ToMe with 8 pairs in two layers: the first 250 digits."""
    t = task("vit_mnist", data)
    recipe = Recipe(vit=((1, ToMe(remove=8)), (3, ToMe(remove=8))))
    assert encoders.accuracy(t, recipe, count=250) >= encoders.accuracy(t, count=250) - 0.02


def test_a_batch_that_does_not_fit_is_padded(data):
    t = task("vit_cifar10", data)
    np.testing.assert_allclose(encoders.logits(t, count=7, batch=3), encoders.logits(t, count=7, batch=7), atol=1e-5)


def test_mfcc_by_formula():
    rng = np.random.default_rng(0)
    x, window, mel, dct = rng.normal(size=50), rng.random(8), rng.random((3, 4)), rng.normal(size=(2, 3))
    angle = 2 * np.pi * np.outer(np.arange(4), np.arange(8)) / 8
    got = audio.mfcc(x, window=window, re=np.cos(angle), im=-np.sin(angle), mel=mel, dct=dct, hop=5)
    want = [dct @ np.log(mel @ np.abs(np.fft.fft(window * x[i : i + 8])[:4])) for i in range(0, 43, 5)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    silent = audio.mfcc(np.zeros(8), window=window, re=np.cos(angle), im=-np.sin(angle), mel=mel, dct=dct, hop=5)
    np.testing.assert_allclose(silent[0], dct @ np.full(3, np.log(1e-12)), rtol=1e-5)
    with pytest.raises(ValueError, match="7 samples are less than a frame of 8"):
        audio.mfcc(x[:7], window=window, re=np.cos(angle), im=-np.sin(angle), mel=mel, dct=dct, hop=5)
    with pytest.raises(ValueError, match="tables do not fit"):
        audio.mfcc(x, window=window, re=np.cos(angle), im=-np.sin(angle)[:2], mel=mel, dct=dct, hop=5)


def test_broken_files(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([object()], dtype=object))
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", cls_token=np.zeros((1, 1, 3), np.float32))
    for name, match in (("objects", "no .npz file of plain arrays"), ("text", "no .npz file of plain arrays"), ("gone", "no file")):
        with pytest.raises(ValueError, match=match) as e:
            encoders.arrays(tmp_path / f"{name}.npz")
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"missing: .* and .* more; misshaped: cls_token"):
        encoders.encoder(tmp_path / "other.npz", encoders.MNIST, encoders._MNIST)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="no WAV file"):
        audio.read_wav(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "b.wav"), "wb") as f:
        f.setnchannels(1), f.setsampwidth(1), f.setframerate(8000), f.writeframes(b"abc")
    with pytest.raises(ValueError, match="samples of 8 bits"):
        audio.read_wav(tmp_path / "b.wav")
