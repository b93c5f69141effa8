"""Sound as rows for an encoder: mel-frequency cepstral coefficients."""

import pathlib
import wave

import numpy as np


def read_wav(path: pathlib.Path) -> tuple[np.ndarray, int]:
    """(samples f32 [n] in -1 to 1 of the first channel, rate) of a 16-bit WAV file; ValueError for any other."""
    try:
        with wave.open(str(path), "rb") as f:
            channels, width, rate = f.getnchannels(), f.getsampwidth(), f.getframerate()
            data = f.readframes(f.getnframes())
    except (wave.Error, EOFError) as e:
        raise ValueError(f"{path} is no WAV file of plain samples: {e}") from None
    if width != 2:
        raise ValueError(f"{path} has samples of {8 * width} bits; 16 are read")
    data = data[: len(data) // (2 * channels) * 2 * channels]
    return np.frombuffer(data, "<i2").reshape(-1, channels)[:, 0].astype(np.float32) / 2**15, rate


def mfcc(samples: np.ndarray, *, window: np.ndarray, re: np.ndarray, im: np.ndarray, mel: np.ndarray, dct: np.ndarray, hop: int,
         floor: float = 1e-12) -> np.ndarray:  # fmt: skip
    """f32 [... frames coefficients] of samples [... n]: dct @ log(max(mel @ |DFT(window * frame)|, floor)), a frame every `hop` samples.

    window [w], DFT matrices re, im [bins w], mel [bands bins], dct [coefficients bands]. frames = 1 + (n - w) // hop; what is left over
    at the end is not heard. float64 inside. ValueError where the tables do not fit each other or the samples are shorter than a frame.
    """
    w, n = window.shape[0], samples.shape[-1]
    if re.shape != im.shape or re.shape[1:] != (w,) or mel.shape[1:] != re.shape[:1] or dct.shape[1:] != mel.shape[:1]:
        raise ValueError(f"tables do not fit: window {window.shape}, DFT {re.shape} and {im.shape}, mel {mel.shape}, dct {dct.shape}")
    if n < w or hop < 1:
        raise ValueError(f"{n} samples are less than a frame of {w}, or hop={hop} is not positive")
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), w, -1)[..., ::hop, :] * window
    power = np.hypot(frames @ re.T.astype(np.float64), frames @ im.T.astype(np.float64))
    return (np.log(np.maximum(power @ mel.T, floor)) @ dct.T).astype(np.float32)
