"""The official outputs of the shared data folder, a dict of arrays a case."""

import pathlib
import re
from typing import Any

import numpy as np


def cases(data: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """The cases that golden/<name>.npz holds, by name without the case's prefix; never none."""
    z = np.load(data / "golden" / f"{name}.npz")
    out: dict[str, dict[str, Any]] = {}
    for key in z:
        if found := re.fullmatch(r"(c\d+)_(.*)", key):
            out.setdefault(found[1], {})[found[2]] = z[key]
    assert out, f"golden/{name}.npz holds no case"
    return [out[key] for key in sorted(out)]
