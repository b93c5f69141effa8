"""The tiny golden encoders of tests/golden/make_encoders.py, read without torch."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.models import load, vit
from jaxtok.models.config import EncoderConfig

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "encoders"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir())


class Golden(NamedTuple):
    towers: dict[str, tuple[EncoderConfig, dict[str, Any]]]  # "vision", "text"
    case: dict[str, np.ndarray]


def towers(case: dict[str, np.ndarray]) -> list[str]:
    return [t for t, key in (("vision", "pixels"), ("text", "ids")) if key in case]


@functools.cache
def read(name: str) -> Golden:
    with np.load(FOLDER / name / "case.npz") as npz:
        case = dict(npz)
    return Golden({t: load.load_encoder(FOLDER / name, tower=t, dtype=jnp.float32) for t in towers(case)}, case)


@functools.partial(jax.jit, static_argnums=0)
def see(cfg, params, pixels):
    out = vit.encode(cfg, params, vit.embed(cfg, params, pixels)).tokens
    return out.x, vit.head(cfg, params, out)


@functools.partial(jax.jit, static_argnums=0)
def _read(cfg, params, ids, live):
    out = vit.encode(cfg, params, vit.embed_text(cfg, params, ids, live)).tokens
    return out.x, vit.head(cfg, params, out)


def outputs(cfg: EncoderConfig, params, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `models.vit` makes of the inputs of a case; keys as in its file."""
    out = {}
    if cfg.image is not None:
        for key, mark in (("pixels", ""), ("wide", "wide_")):
            if key in case:
                out[mark + "rows"], out[mark + "out"] = see(cfg, params, jnp.asarray(case[key]))
    else:
        out["text_rows"], out["text_out"] = _read(cfg, params, jnp.asarray(case["ids"]), jnp.asarray(case["live"]))
    return {k: np.asarray(v) for k, v in out.items()}


def errors(got: dict[str, np.ndarray], case: dict[str, np.ndarray]) -> dict[str, float]:
    """max |difference| of each output that the case has; of a text tower's rows, over the live ones."""
    out = {}
    for key in got.keys() & case.keys():
        off = np.abs(got[key] - case[key])
        out[key] = float((off * case["live"][..., None] if key == "text_rows" else off).max())
    return out
