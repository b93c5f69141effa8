"""Three small trained encoders with their test data: digits, pictures, spoken words. What a method costs in accuracy is measured on them.

`vit_mnist`, `vit_cifar10` and `kwt1` read a folder (a checkpoint as arrays by name, test data, reference logits) and give a `Task`.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.models import audio, hf_encoders, tensors, vit
from jaxtok.models.config import EncoderConfig

MNIST = EncoderConfig(
    width=64, layers=6, heads=4, inner=256, hidden=128, image=(28, 28), patch=(4, 4), channels=1, act="relu", norm_eps=1e-5, qkv_bias=False, out=10
)  # fmt: skip
CIFAR10 = EncoderConfig(width=128, layers=4, heads=4, hidden=256, image=(32, 32), patch=(4, 4), norm_eps=1e-6, out=10)
KWT1 = EncoderConfig(
    width=64, layers=12, heads=1, hidden=256, image=(98, 40), patch=(1, 40), channels=1, act="gelu_tanh", norm_eps=1e-6, post=True,
    final_norm=False, qkv_bias=False, out=12,
)  # fmt: skip
WORDS = ("_silence_", "_unknown_", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLIPS = ("yes", "no", "silence", "noise")

_both = lambda ours, theirs: {ours: theirs + ".weight", ours + "_bias": theirs + ".bias"}
_MNIST = {
    "cls": "cls_token", "pos": "pos_embedding", **_both("patch", "to_patch_embedding.1"), **_both("norm", "mlp_head.0"),
    **_both("head", "mlp_head.1"), **_both("norm1", "transformer.layers.{}.0.norm"), **_both("norm2", "transformer.layers.{}.1.norm"),
    **dict.fromkeys("qkv", "transformer.layers.{}.0.fn.to_qkv.weight"), **_both("o", "transformer.layers.{}.0.fn.to_out.0"),
    **_both("up", "transformer.layers.{}.1.fn.net.0"), **_both("down", "transformer.layers.{}.1.fn.net.3"),
}  # fmt: skip
_scaled = lambda ours, theirs: {ours: theirs + ".alpha", ours + "_bias": theirs + ".beta"}
_CIFAR10 = {
    "cls": "embedding.cls_token", "pos": "embedding.pos_embeddings", **_both("patch", "embedding.patch_embeddings.conv"),
    **_scaled("norm", "norm"), **_both("head", "mlp_head"), **_scaled("norm1", "encoder.layers.{}.norm1"),
    **_scaled("norm2", "encoder.layers.{}.norm2"), **_both("q", "encoder.layers.{}.attn.query"), **_both("k", "encoder.layers.{}.attn.key"),
    **_both("v", "encoder.layers.{}.attn.value"), **_both("o", "encoder.layers.{}.attn.out_proj"),
    **_both("up", "encoder.layers.{}.ffn.fc1"), **_both("down", "encoder.layers.{}.ffn.fc2"),
}  # fmt: skip
_KWT1 = {
    "cls": "cls", "pos": "pos", "patch": "proj_w", "patch_bias": "proj_b", "head": "head_w", "head_bias": "head_b",
    "norm1": "{}.g1", "norm1_bias": "{}.be1", "norm2": "{}.g2", "norm2_bias": "{}.be2", **{n: "{}.w" + n for n in "qkvo"}, "o_bias": "{}.bo",
    "up": "{}.w1", "up_bias": "{}.b1", "down": "{}.w2", "down_bias": "{}.b2",
}  # fmt: skip


class Task(NamedTuple):
    """An encoder and what it is tested on."""

    cfg: EncoderConfig
    params: dict[str, Any]
    images: np.ndarray  # f32 [n y x ch] as `vit.embed` takes them
    labels: np.ndarray  # int [n]
    logits: np.ndarray  # f32 [m classes] of another implementation, for the images `known`
    known: np.ndarray  # int [m]
    predicted: np.ndarray  # int [n] classes that it predicts


class _Arrays:
    """An .npz file that is read as `tensors` reads safetensors."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def get_tensor(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def get_slice(self, name: str) -> "_Arrays._Slice":
        return self._Slice(self.arrays[name])

    class _Slice:
        def __init__(self, x: np.ndarray):
            self.x = x

        def __getitem__(self, rows: slice) -> np.ndarray:
            return self.x[rows]

        def get_shape(self) -> tuple[int, ...]:
            return self.x.shape

        def get_dtype(self) -> str:
            return {"float64": "F64", "float32": "F32", "float16": "F16"}.get(str(self.x.dtype), str(self.x.dtype))


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; ValueError, one line, where it is none or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files}
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except Exception as e:  # zipfile, zlib, tokenize and numpy have classes of their own for a broken file
        raise ValueError(f"{path} is no .npz file of plain arrays: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None


def encoder(path: pathlib.Path, cfg: EncoderConfig, names: dict[str, str], extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parameters of an .npz file; `names`: ours -> theirs, {} is the layer; `extra`: arrays beside them. Errors as of `models.load`."""
    table: tensors.Table = {}
    for path_, shape in hf_encoders.paths(cfg).items():
        name = path_[-1]
        stored = hf_encoders.stored(cfg, path_, shape, lead=True, flat=name == "patch" and "conv" not in names["patch"])
        table.setdefault(names[str(name)].format(*path_[1:2]), []).append(stored)
    home = arrays(path)
    opened = dict.fromkeys(home, _Arrays(home))
    tensors.check(path, "the encoder that is asked for", table, opened, lambda name: name in extra)
    return tensors.read(table, opened, {"layers": cfg.layers}, jnp.float32, lambda _, x: jnp.asarray(x), None)


def vit_mnist(data: pathlib.Path) -> Task:
    """5,000 test digits, 49 patches: 97.24%. data: the folder that holds vit_mnist and mnist_test."""
    params = encoder(data / "vit_mnist" / "vit_mnist.npz", MNIST, _MNIST)
    test, known = arrays(data / "mnist_test" / "mnist_t10k_even.npz"), arrays(data / "vit_mnist" / "ref_logits_vit_mnist.npz")
    images = ((test["image"][..., None] / np.float32(255) - 0.1307) / 0.3081).astype(np.float32)
    logits = known["logits"]
    return Task(MNIST, params, images, test["label"], logits, np.arange(len(logits)), known["pred"])


def vit_cifar10(data: pathlib.Path) -> Task:
    """1,000 test pictures, 64 patches: 68.6%. data: the folder that holds vit_cifar10_preln and cifar10_test."""
    params = encoder(data / "vit_cifar10_preln" / "best_vit_cifar10.npz", CIFAR10, _CIFAR10)
    test, known = arrays(data / "cifar10_test" / "cifar10_test_1000.npz"), arrays(data / "vit_cifar10_preln" / "ref_logits_preln.npz")
    mean, std = (np.asarray(x, np.float32) for x in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    logits = known["logits"]
    return Task(
        CIFAR10, params, (test["image"] / np.float32(255) - mean) / std, test["label"], logits, 10 * np.arange(len(logits)), known["pred"]
    )


def kwt1(data: pathlib.Path) -> Task:
    """Four clips of a second, 98 rows of 40 cepstral coefficients. data: the folder that holds kwt1_audio.

    The labels are those of the clips' names, where silence and noise both are the class _silence_; noise is not recognised as such.
    """
    folder = data / "kwt1_audio"
    front = ("dft_re", "dft_im", "mel", "dct", "window", "nrm_scale", "nrm_sub", "log_floor", "eps")
    params = encoder(folder / "kwt1.npz", KWT1, _KWT1, front)
    images = np.stack([kwt1_rows(folder / f"{clip}_1000ms.wav", folder / "kwt1.npz") for clip in CLIPS])
    labels = np.array([WORDS.index(clip) if clip in WORDS else 0 for clip in CLIPS])
    logits = arrays(folder / "ref_kwt1.npz")["logits"]
    return Task(KWT1, params, images, labels, logits, np.arange(len(CLIPS)), logits.argmax(-1))


def kwt1_rows(clip: pathlib.Path, checkpoint: pathlib.Path) -> np.ndarray:
    """f32 [98 40 1]: what KWT-1 hears of a WAV file of one second at 16 kHz; shorter ones are padded with silence, longer ones cut."""
    samples, rate = audio.read_wav(clip)
    if rate != 16000:
        raise ValueError(f"{clip} has {rate} samples a second; KWT-1 hears 16000")
    z = arrays(checkpoint)
    samples = np.pad(samples[:16000], (0, max(0, 16000 - len(samples))))
    tables = dict(window=z["window"], re=z["dft_re"], im=z["dft_im"], mel=z["mel"], dct=z["dct"])
    rows = audio.mfcc(samples, **tables, hop=160, floor=float(z["log_floor"]))
    return ((rows - z["nrm_sub"]) * z["nrm_scale"])[..., None]


@functools.partial(jax.jit, static_argnames=("cfg", "recipe", "options"))
def _logits(cfg, params, images, recipe, options):
    return vit.forward(cfg, params, images, recipe, **dict(options))


def logits(task: Task, recipe: Recipe = vit.PLAIN, *, count: int | None = None, batch: int = 250, **options: Any) -> np.ndarray:
    """f32 [count classes] of the first `count` images (None = all); options as `vit.encode`, static."""
    images = task.images[:count]
    short = -len(images) % batch if len(images) > batch else 0
    padded = np.concatenate([images, images[:short]])
    size = min(batch, len(images))
    out = [_logits(task.cfg, task.params, padded[i : i + size], recipe, tuple(options.items())) for i in range(0, len(padded), size)]
    return np.concatenate([np.asarray(x) for x in out])[: len(images)]


def accuracy(task: Task, recipe: Recipe = vit.PLAIN, **options: Any) -> float:
    """Share of right answers; options as `logits`."""
    z = logits(task, recipe, **options)
    return float((z.argmax(-1) == task.labels[: len(z)]).mean())
