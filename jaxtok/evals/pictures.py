"""Pictures of what became of a picture's patches (`stages.Stage`).

Kept: the pixels as they are. Merged: a group is filled with the mean colour of its patches and drawn around in a colour of its own; a
group need not hang together. Dropped: under a dark veil.
"""

import colorsys
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from jaxtok.evals import figures
from jaxtok.evals.stages import Stage

VEIL, SHARE = np.array([72.0, 76.0, 94.0]), 0.78  # of a dropped patch: its colour, and how much of it is veil
PIXELS, WIDE = 600, 3.4  # of the longer side, about; inches of a column


def colour(i: int) -> np.ndarray:
    """u8 [3] of the i-th group: hues by the golden angle, bright and less bright in turn."""
    return np.round(255 * np.array(colorsys.hsv_to_rgb(i * 0.618034 % 1.0, 0.85, (1.0, 0.75)[i % 2]))).astype(np.uint8)


def paint(picture: UInt8[np.ndarray, "y x 3"], group: np.ndarray, pixels: int = PIXELS) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture, enlarged without smoothing, with what became of its patches: group [rows columns], -1 = dropped.

    The picture is cut into rows by columns equal patches; `pixels`: of the longer side, rounded so that patches are whole pixels.
    """
    rows, cols = group.shape
    size = max(4, round(pixels / max(rows, cols)))
    big = PIL.Image.fromarray(picture).resize((cols * size, rows * size), PIL.Image.Resampling.NEAREST)
    out = np.asarray(big).astype(np.float64)
    tiles = np.asarray(picture, np.float64).reshape(rows, picture.shape[0] // rows, cols, picture.shape[1] // cols, 3).swapaxes(1, 2)
    patch = lambda i, j: out[i * size : (i + 1) * size, j * size : (j + 1) * size]
    for i, j in np.argwhere(group < 0):
        patch(i, j)[:] = (1 - SHARE) * patch(i, j) + SHARE * VEIL
    line, wide = max(1, round(size / 9)), np.pad(group, 1, constant_values=-1)
    names, many = np.unique(group[group >= 0], return_counts=True)
    for number, name in enumerate(names[many > 1]):
        fill, edge = tiles[group == name].mean((0, 1, 2)), colour(number)
        for i, j in np.argwhere(group == name):
            tile = patch(i, j)
            tile[:] = fill
            sides = (
                (0, 1, tile[:line]),
                (2, 1, tile[-line:]),
                (1, 0, tile[:, :line]),
                (1, 2, tile[:, -line:]),
            )  # above, below, left, right
            for down, right, side in sides:
                if wide[i + down, j + right] != name:
                    side[:] = edge
    return np.round(out).astype(np.uint8)


def crop(picture: UInt8[np.ndarray, "y x 3"], grid: tuple[int, int]) -> UInt8[np.ndarray, "Y X 3"]:
    """The part of a picture that whole patches cover."""
    (y, x), (rows, cols) = picture.shape[:2], grid
    return picture[: y // rows * rows, : x // cols * cols]


def told(stage: Stage) -> str:
    """One line of counts."""
    c, n = stage.counts, stage.group.size
    parts = [f"{c['kept']} kept"] if c["kept"] else []
    parts += [f"{c['merged']} merged into {c['groups']}"] if c["merged"] else []
    parts += [f"{c['dropped']} dropped"] if c["dropped"] else []
    return f"of {n} patches {', '.join(parts)}; {c['rows']} rows go on"


def save(picture: UInt8[np.ndarray, "y x 3"], stage: Stage, number: int, of: int, out: pathlib.Path) -> pathlib.Path:
    """A PNG of one stage, with a legend and the counts, as wide as a column."""
    image = paint(crop(picture, stage.group.shape), stage.group)
    figure, axes = figures._new(WIDE, 3.2 * image.shape[0] / image.shape[1] + 0.95)
    axis = axes[0, 0]
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    untrained = " (weights of the method: random)" if stage.untrained else ""
    axis.set_title(textwrap.fill(f"{stage.method}, {stage.where}{untrained}", 52), fontsize=8)
    axis.set_xlabel(textwrap.fill(f"stage {number} of {of}: {told(stage)}", 62), fontsize=7)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize=7, frameon=False, handlelength=1.2, columnspacing=1.2)
    figure.savefig(out, dpi=200)
    return out


def _legend() -> list:
    from matplotlib.patches import Patch

    of = lambda x: "#" + "".join(f"{int(c):02x}" for c in x)
    return [
        Patch(facecolor="white", edgecolor="0.3", linewidth=0.6, label="kept"),
        Patch(facecolor="0.6", edgecolor=of(colour(0)), linewidth=1.4, label="merged: mean colour, a colour a group"),
        Patch(facecolor=of(VEIL), label="dropped"),
    ]


def sheet(
    picture: UInt8[np.ndarray, "y x 3"], panels: Sequence[tuple[str, Stage]], out: pathlib.Path, *, columns: int = 7, dpi: int = 150
) -> pathlib.Path:
    """All methods on one sheet: the picture, then (title, stage) by stage."""
    rows = -(-(len(panels) + 1) // columns)
    shape = panels[0][1].group.shape
    side, pixels = 1.5, round(1.45 * dpi)  # inches, dots of a panel
    figure, axes = figures._new(side * columns, rows * (side * shape[0] / shape[1] + 0.31) + 0.35, rows, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(paint(crop(picture, shape), np.arange(shape[0] * shape[1]).reshape(shape), pixels), interpolation="nearest")
    axes.flat[0].set_title(f"the picture\n{shape[0] * shape[1]} patches", fontsize=7)
    for axis, (title, stage) in zip(axes.flat[1:], panels, strict=False):
        c = stage.counts
        axis.imshow(paint(crop(picture, shape), stage.group, pixels), interpolation="nearest")
        short = f"{c['kept']} kept" + (f", {c['merged']} in {c['groups']}" if c["merged"] else "")
        axis.set_title(f"{title}\n{short}", fontsize=7)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02)
    figure.savefig(out, dpi=dpi)
    return out
