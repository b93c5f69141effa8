"""A comparison as a table for people and as JSON."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

PERPLEXITY = "perplexity"
COSTS = ("cache_bytes", "step_bytes", "step_flops", "prefill_flops", "peak_bytes", "compile_s", "time_s")


def tasks_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The scored tasks of some rows, in order."""
    return list(dict.fromkeys(r["task"] for r in rows if r["task"] != PERPLEXITY))


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and math.isfinite(v)]
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else None


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a method and budget. Scores: the mean over a task's cases, and over the tasks; the rest: the mean over the cases,
    the largest of peak_bytes and compile_s."""
    out = []
    for method, budget in dict.fromkeys((r["method"], r["budget"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["budget"]) == (method, budget)]
        scored = [r for r in mine if r["task"] != PERPLEXITY]
        weights = [r["cases"] for r in scored]
        line: dict[str, Any] = {"method": method, "budget": budget, "tasks": {}}
        for task in tasks_of(scored):
            these = [r for r in scored if r["task"] == task]
            line["tasks"][task] = _mean([r["score"] for r in these], [r["cases"] for r in these])
        scores = list(line["tasks"].values())
        line["score"] = _mean(scores, [1] * len(scores))
        for name in ("kl", "top1", "kept", "lost", "sinks", "oracle", *COSTS):
            source = scored if scored or name not in ("kept", "lost", "compile_s") else mine
            values, w = [r.get(name) for r in source], weights if source is scored else [r["cases"] for r in source]
            known = [v for v in values if v is not None]
            line[name] = (max(known) if known else None) if name in ("peak_bytes", "compile_s") else _mean(values, w)
        line["perplexity"] = next((r["perplexity"] for r in mine if r["task"] == PERPLEXITY), None)
        line["nll"] = next((r["nll"] for r in mine if r["task"] == PERPLEXITY), None)
        out.append(line)
    return out


def show(value: float | int | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def size(value: float | int | None) -> str:
    """Bytes or FLOPs in short: 1234567 -> "1.23M"."""
    if value is None:
        return "-"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table of `summary(rows)`."""
    from rich.markup import escape
    from rich.table import Table

    lines, names = summary(rows), tasks_of(rows)
    running = any(line["nll"] is not None for line in lines)
    aware = "seen" if rows[0].get("query_aware") else "not seen"
    out = Table(title=f"question {aware} when compressing", header_style="bold", pad_edge=False)
    out.add_column("method", no_wrap=True)
    for name in ("budget", *names, *(["mean"] if len(names) > 1 else []), *(["NLL", "ppl"] if running else [])):
        out.add_column(pathlib.Path(name).stem.replace("_", "\n"), justify="right")
    if names:
        for name in ("KL", "top-1"):
            out.add_column(name, justify="right")
    for name in ("kept", "lost"):
        out.add_column(name, justify="right")
    if names:
        out.add_column("sinks\nof 4", justify="right")
        for name in ("cache\nB", "moved\nB/tok", "FLOP\n/tok", "FLOP\nprefill", "peak\nB"):
            out.add_column(name, justify="right")
    out.add_column("compile\ns", justify="right")
    if names:
        out.add_column("time\ns", justify="right")
    last = None
    for line in lines:
        if last not in (None, line["method"]):
            out.add_section()
        cells = [escape(line["method"]) if line["method"] != last else "", line["budget"]]
        cells += [show(line["tasks"].get(n)) for n in names] + ([show(line["score"])] if len(names) > 1 else [])
        cells += [show(line["nll"], 3), show(line["perplexity"])] if running else []
        cells += [show(line["kl"], 3), show(line["top1"])] if names else []
        cells += [show(line["kept"], 1), show(line["lost"], 1)] + ([show(line["sinks"], 1)] if names else [])
        cells += [size(line[k]) for k in ("cache_bytes", "step_bytes", "step_flops", "prefill_flops", "peak_bytes")] if names else []
        cells += [show(line["compile_s"], 1)] + ([show(line["time_s"])] if names else [])
        out.add_row(*cells)
        last = line["method"]
    return out


LEGEND = (
    "score: share of the answers found. KL (nats), top-1: next-token agreement with the full model on its own continuation. kept, lost: "
    "slots a layer and KV head. sinks: how many of the first four tokens are kept. cache, moved, FLOP: of one sequence. peak, time (median of prefill + continuation): of a batch. "
    "compile: wall seconds of the programs, several at a time; shared ones count in each row."
)


def clean(value: Any) -> Any:
    """`value` with only what JSON has: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(path: str | os.PathLike[str], document: dict[str, Any], indent: int | None = 1) -> pathlib.Path:
    """The document as JSON in `path`, replaced in one go."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(clean(document), indent=indent, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def machine() -> dict[str, Any]:
    """What a result was measured with."""
    import jax

    versions = {}
    for name in ("jaxtok", "jax", "jaxlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def bar(text: str) -> Iterator[Any]:
    """A function (done, total, text) that draws a bar on stderr, where that is a terminal, once two seconds have passed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    terminal = console.is_terminal
    drawn = Progress(
        TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False),
        console=console, transient=True,
    )  # fmt: skip
    start, shown = time.perf_counter(), []

    def update(done: int, total: int, what: str) -> None:
        if terminal and not shown and time.perf_counter() - start > 2:
            drawn.start()
            shown.append(drawn.add_task(what, total=total))
        if shown:
            drawn.update(shown[0], completed=done, total=total, description=what)

    try:
        yield update
    finally:
        if shown:
            drawn.stop()
