"""The tiny golden models of tests/golden/make_models.py, read without torch. Fixture `golden` (conftest.py) runs a test over all."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtok.models import load
from jaxtok.models.config import Config

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "models"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir())


class Golden(NamedTuple):
    name: str
    cfg: Config
    params: dict[str, Any]  # float32, layers as a tuple
    ids: np.ndarray  # i32 [b n]
    live: np.ndarray  # bool [b n]: a full row, two padded left, one padded right
    logits: np.ndarray  # f32 [b n vocab] of transformers, 0 at dead rows


@functools.cache
def read(name: str) -> Golden:
    cfg, params, _ = load.load(FOLDER / name, dtype=jnp.float32)
    case = np.load(FOLDER / name / "case.npz")
    return Golden(name, cfg, params, case["ids"], case["live"], case["logits"])


def error(got: Any, case: Golden) -> float:
    """max |dlogit| over the live rows."""
    return float(np.abs(np.where(case.live[..., None], np.asarray(got) - case.logits, 0)).max())
