"""What a run reports: metrics.jsonl (one JSON object a line, each logged step once, whatever was killed and resumed) and the bar."""

import json
import logging
import os
import pathlib
import time

import jax

RESERVED = ("step", "wall", "loss", "grad_norm", "skipped", "tokens/s")  # what a line has beside the metrics of the loss
_log = logging.getLogger("jaxtok.train")


class Log:
    """Appends lines to `path`. On opening, what a killed run wrote past `step` (and a torn last line) is dropped.

    `wall`: training seconds up to the last line that stayed. Only process 0 writes.
    """

    def __init__(self, path: str | pathlib.Path, *, step: int):
        self.path, self.file = pathlib.Path(path), None
        lines = [line for line in read(self.path) if line["step"] <= step] if self.path.exists() else []
        self.wall = float(lines[-1]["wall"]) if lines else 0.0
        if jax.process_index() == 0:
            # Replaced in one go: a kill here must not lose the lines that stay.
            new = self.path.with_suffix(".jsonl.new")
            new.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(new, self.path)
            self.file = self.path.open("a")

    def write(self, line: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file is not None:
            self.file.close()


def read(path: str | pathlib.Path) -> list[dict]:
    """The lines of a metrics file, in order. A torn last line (the writer was killed) is left out; elsewhere it is a ValueError."""
    lines = pathlib.Path(path).read_text().splitlines()
    out = []
    for i, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as e:
            if i + 1 < len(lines):
                raise ValueError(f"{path}, line {i + 1} is not JSON: {line[:80]!r}; mend or delete the file") from e
    return out


class Writer:
    """Turns a step's device scalars into one line, once they are there."""

    def __init__(self, log, on_log, *, skipped):
        self.log, self.on_log, self.skipped = log, on_log, skipped
        self.start = self.since = time.perf_counter()
        self.before = log.wall if log is not None else 0.0
        self.tokens = 0
        self.pending: tuple[dict, dict, dict] | None = None

    def due(self, step, out):
        """Remember a line. Stamped here, at dispatch: all windows then span whole steps, wherever they are written."""
        now = time.perf_counter()
        rate = {"tokens/s": round(self.tokens / (now - self.since), 1)} if self.tokens else {}
        self.pending = ({"step": step, "wall": round(self.before + now - self.start, 6)}, out, rate)
        self.tokens, self.since = 0, now

    def flush(self):
        if self.pending is None:
            return
        (line, out, rate), self.pending = self.pending, None
        out = {name: value.item() for name, value in jax.device_get(out).items()}
        line = {**line, "loss": out["loss"], **out, **rate}  # loss first: jit sorts the keys of a dict
        if out["skipped"] > self.skipped:
            _log.warning("step %d: %d updates skipped so far, their loss or gradient was not finite", line["step"], out["skipped"])
        self.skipped = out["skipped"]
        if self.log is not None:
            self.log.write(line)
        if self.on_log is not None:
            self.on_log(line)


class Bar:
    """A progress bar that appears when the run has lasted two seconds."""

    def __init__(self, total, *, enabled):
        self.total, self.enabled, self.start, self.bar = total, enabled, time.perf_counter(), None

    def __enter__(self):
        return self

    def update(self, done):
        if self.bar is None and self.enabled and time.perf_counter() - self.start > 2:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.bar.add_task("train", total=self.total)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()
