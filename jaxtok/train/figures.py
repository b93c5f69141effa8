"""Curves of a metrics file."""

import pathlib
from collections.abc import Sequence

from jaxtok.train.metrics import read


def curves(
    path: str | pathlib.Path, out: str | pathlib.Path, keys: Sequence[str] = ("loss",), *, smooth: int = 1, log_y: bool = False
) -> pathlib.Path:
    """Draw the metrics `keys` of a metrics.jsonl against the step, one panel a key, into the image `out`; returns its path.

    smooth: lines in the centred running mean (the raw curve stays, pale); 1 = none. Values that are not finite leave gaps.
    Raises ValueError for a key that no line has.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive in global state and may ask for a display

    lines = read(path)
    known = sorted({key for line in lines for key in line} - {"step"})
    if smooth < 1 or not keys:
        raise ValueError(f"smooth={smooth} must be at least 1 and keys={list(keys)} not empty")
    for key in keys:
        if key not in known:
            raise ValueError(f"no line of {path} has {key!r}; it has {known}")
    figure = Figure(figsize=(6, 2.6 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for axis, key in zip(axes, keys, strict=True):
        step, value = np.array([(line["step"], line[key]) for line in lines if key in line], float).T
        value[~np.isfinite(value)] = np.nan
        axis.plot(step, value, color="C0", alpha=0.3 if smooth > 1 else 1.0, linewidth=1)
        if smooth > 1:
            half = smooth // 2
            mean = [
                np.nanmean(w) if np.isfinite(w).any() else np.nan
                for w in (value[max(0, i - half) : i + half + 1] for i in range(len(value)))
            ]
            axis.plot(step, mean, color="C0", linewidth=1.5)
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
        if log_y:
            axis.set_yscale("log")
    axes[-1].set_xlabel("step")
    out = pathlib.Path(out)
    figure.savefig(out, dpi=120)
    return out
