"""Figures of a comparison: score against memory, needle heat maps, which tokens were kept."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtok.evals import report

MARKS = "osD^v<>pPX*h"
BYTES = {"cache_bytes": "cache of one sequence, KiB (all arrays)", "step_bytes": "moved for one token of one sequence, KiB"}


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive in global state and may ask for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pareto(
    rows: Sequence[dict[str, Any]], out: pathlib.Path, panels: Mapping[str, str] | None = None, cost: str = "cache_bytes"
) -> pathlib.Path | None:
    """Mean score against the bytes of a sequence's cache (or another `cost`), a line a method; the full model is the dashed line.

    `panels`: method -> title of the panel that it goes to, where one would be too full. None without scores.
    """
    table = [line for line in report.summary(rows) if line["score"] is not None]
    if not table:
        return None
    titles = list(dict.fromkeys((panels or {}).values())) or [""]
    across = min(2, len(titles))
    figure, axes = _new(8.5 if len(titles) == 1 else 7.0 * across, 5.0 * -(-len(titles) // across), -(-len(titles) // across), across)
    for axis, title in zip(axes.flat, titles, strict=False):
        here = [n for n in dict.fromkeys(line["method"] for line in table) if n == "full" or not panels or panels.get(n) == title]
        for i, name in enumerate(here):
            mine = sorted((line for line in table if line["method"] == name), key=lambda line: line[cost])
            x, y = [line[cost] / 1024 for line in mine], [line["score"] for line in mine]
            if name == "full":
                axis.axhline(y[0], color="0.4", linestyle="--", linewidth=1)
                axis.plot(x, y, marker="*", markersize=13, color="0.2", linestyle="", label=name)
            else:
                axis.plot(x, y, marker=MARKS[i % len(MARKS)], color=f"C{i % 10}", linewidth=1.3, alpha=0.85, label=name)
        axis.set_xscale("log")
        axis.set_xlabel(BYTES[cost])
        axis.set_ylabel(f"score, mean of {', '.join(report.tasks_of(rows))}")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3, which="both")
        seen = "question seen when compressing" if rows[0].get("query_aware") else "question not seen when compressing"
        axis.set_title(f"{title}, {seen}" if title else seen, fontsize=10)
        if panels:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6.5)
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    if not panels:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=75 if panels else 130)
    return out


def grid(rows: Sequence[dict[str, Any]], out: pathlib.Path) -> pathlib.Path | None:
    """Heat map of the mean score, a row a method (best on top), a column a budget; the full model's is in the title. None without scores."""
    table = [line for line in report.summary(rows) if line["score"] is not None]
    names, budgets = ([*dict.fromkeys(line[k] for line in table if line["method"] != "full")] for k in ("method", "budget"))
    if not names:
        return None
    cells = {(line["method"], line["budget"]): line["score"] for line in table}
    values = np.array([[cells.get((n, b), math.nan) for b in budgets] for n in names])
    order = np.argsort(-np.nanmean(values, 1), kind="stable")
    values, names = values[order], [names[i] for i in order]
    figure, axes = _new(3.2 + 0.75 * len(budgets), 1.2 + 0.2 * len(names))
    axis = axes[0, 0]
    image = axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(np.isfinite(values)):
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6.5)
    axis.set_xticks(range(len(budgets)), budgets, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    seen = "seen" if rows[0].get("query_aware") else "not seen"
    full = [line["score"] for line in table if line["method"] == "full"]
    axis.set_title(f"score, question {seen}" + (f" (full: {full[0]:.2f})" if full else ""), fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.5)
    figure.savefig(out, dpi=85)
    return out


def needles(rows: Sequence[dict[str, Any]], out: pathlib.Path, bins: int = 5) -> pathlib.Path | None:
    """Heat maps of the needle task: a row of panels a method, a panel a budget; depth down, length across. None without needles."""
    mine = [r for r in rows if r["task"] == "needle"]
    if not mine:
        return None
    names, budgets = ([*dict.fromkeys(r[k] for r in mine if r["method"] != "full")] for k in ("method", "budget"))
    full = any(r["method"] == "full" for r in mine)
    names, budgets = (["full"] if full else []) + names, budgets or ["100%"]
    lengths = sorted({r["length"] for r in mine})
    figure, axes = _new(1.2 + 1.9 * len(budgets), 0.8 + 1.25 * len(names), len(names), len(budgets))
    image = None
    for i, name in enumerate(names):
        for j, budget in enumerate(budgets):
            axis = axes[i, j]
            grid = np.full((bins, len(lengths)), np.nan)
            for r in mine:
                if r["method"] == name and (name == "full" or r["budget"] == budget):
                    at = lengths.index(r["length"])
                    for d in range(bins):
                        here = [e["score"] for e in r["each"] if e["depth"] is not None and min(int(e["depth"] * bins), bins - 1) == d]
                        grid[d, at] = np.mean(here) if here else math.nan
            if name == "full" and j:
                axis.set_axis_off()
                continue
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", interpolation="nearest")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths] if i == len(names) - 1 else [], fontsize=7)
            axis.set_yticks([0, bins - 1], ["start", "end"] if j == 0 else [], fontsize=7)
            axis.set_title(name if name == "full" else f"{name}, {budget}", fontsize=7)
    figure.supxlabel("length in tokens", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=axes, label="score", shrink=0.6)
    figure.savefig(out, dpi=130)
    return out


def kept(maps: Sequence[dict[str, Any]], out: pathlib.Path) -> pathlib.Path | None:
    """Which positions of one case each method kept, at the smallest budget: shade = share of layers and heads; the dashed line
    marks the answer. None where nothing was dropped."""
    by = {}
    for m in maps:
        if m["method"] != "full" and (m["method"] not in by or sum(m["kept"]) < sum(by[m["method"]]["kept"])):
            by[m["method"]] = m
    if not by:
        return None
    chosen = list(by.values())
    n = max(m["context"] for m in chosen)
    figure, axes = _new(9.0, 1 + 0.33 * len(chosen))
    axis = axes[0, 0]
    grid = np.zeros((len(chosen), n))
    for i, m in enumerate(chosen):
        part = m["kept"][:n]
        grid[i, : len(part)] = part
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(chosen)), [f"{m['method']}, {m['budget']}" for m in chosen], fontsize=7)
    axis.set_xlabel("position in the context")
    first = chosen[0]
    if first["answer"] is not None:
        axis.axvline(first["answer"] * first["context"], color="C3", linestyle="--", linewidth=1)
    axis.set_title(f"what was kept of one {first['task']} case (dashed: the answer)", fontsize=9)
    figure.colorbar(image, ax=axis, label="share of layers and heads")
    figure.savefig(out, dpi=130)
    return out


def sinks(panels: Sequence[tuple[str, Any]], out: pathlib.Path) -> pathlib.Path:
    """Heat maps layer by head, a panel a (title, sink mass [l h]): the share of a head's attention that the first token takes."""
    maps = [(title, np.asarray(mass, float)) for title, mass in panels]
    wide = max(m.shape[1] for _, m in maps)
    figure, axes = _new(1.6 + len(maps) * max(1.8, 0.3 * wide), 0.9 + max(1.4, max(0.3 * m.shape[0] for _, m in maps)), 1, len(maps))
    image = None
    for axis, (title, mass) in zip(axes[0], maps, strict=True):
        image = axis.imshow(mass, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
        axis.set_xticks(range(0, mass.shape[1], 1 + mass.shape[1] // 16))
        axis.set_yticks(range(0, mass.shape[0], 1 + mass.shape[0] // 16))
        axis.set_title(title, fontsize=8)
    figure.supxlabel("query head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention to the first token")
    figure.savefig(out, dpi=130)
    return out


def perplexities(rows: Sequence[dict[str, Any]], out: pathlib.Path) -> pathlib.Path | None:
    """NLL a token against the budget, a line a method. None without perplexity rows."""
    mine = [r for r in rows if r["task"] == "perplexity"]
    if not mine:
        return None
    figure, axes = _new(8.0, 4.5)
    axis = axes[0, 0]
    for i, name in enumerate(dict.fromkeys(r["method"] for r in mine)):
        line = sorted((r for r in mine if r["method"] == name), key=lambda r: r["capacity"])
        if name == "full":
            axis.axhline(line[0]["nll"], color="0.4", linestyle="--", linewidth=1, label=name)
        else:
            axis.plot([r["capacity"] for r in line], [r["nll"] for r in line], marker=MARKS[i % len(MARKS)], color=f"C{i % 10}", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("slots")
    axis.set_ylabel("negative log-likelihood, nats a token")
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=130)
    return out


def sparsity(rows: Sequence[dict[str, Any]], full: float, times: dict[str, Any], out: pathlib.Path) -> pathlib.Path:
    """Sparse prefills: needle score and output error against density, seconds of a layer against length; a colour a method.

    rows: {"setting": "method ...", "density", "needle", "error"}; full: the dense model's score (dashed); times: {"lengths", "seconds": by side}.
    """
    figure, axes = _new(15.0, 4.2, 1, 3)
    names = list(dict.fromkeys(row["setting"].partition(" ")[0] for row in rows))
    for i, name in enumerate(names):
        mine = sorted((row for row in rows if row["setting"].partition(" ")[0] == name), key=lambda row: row["density"])
        for axis, value in zip(axes[0], ("needle", "error"), strict=False):
            style = {"marker": MARKS[i % len(MARKS)], "color": f"C{i % 10}", "linewidth": 1.2, "alpha": 0.85, "label": name}
            axis.plot([row["density"] for row in mine], [row[value] for row in mine], **style)
    axes[0, 0].axhline(full, color="0.4", linestyle="--", linewidth=1)
    for i, (name, seconds) in enumerate(times["seconds"].items()):
        axes[0, 2].loglog(times["lengths"], seconds, marker=MARKS[i % len(MARKS)], color=f"C{i % 10}", linewidth=1.2, label=name)
    texts = ("density", "needle score"), ("density", "relative error of the output"), ("tokens", "seconds of a layer's attention")
    for axis, (x, y) in zip(axes[0], texts, strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylim(-0.03, 1.03)
    for axis in axes[0, 1:]:
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=130)
    return out
