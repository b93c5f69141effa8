"""Runs rows of kernel_rows in processes of their own, so that a kernel that hangs or brings its device down costs one row.

A worker reads the id of a row on stdin and answers with one line of JSON on stdout; what else it says goes to a log. One that does not
answer in time, dies, or reports an error that its device does not survive, is replaced; the row says so.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

START = 90.0  # seconds that a new process may take beside its first row
FATAL = "CUDA_ERROR"  # in errors that outlive the row, beside those that the worker calls fatal


class Worker:
    """One process: `ask(row, seconds)` -> its answer, always a dict; `close`."""

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", errors="replace")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env, bufsize=1
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.fresh = True

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, row: str, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.fresh = False
        try:
            self.process.stdin.write(row + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=max(seconds, 1.0))
        except queue.Empty:
            return {"error": f"no answer in {seconds:.0f} s: it hangs, or compiles for longer", "fatal": True}
        except OSError:
            line = None
        if line is not None:
            return json.loads(line)
        code = self.process.wait()
        said = [x for x in pathlib.Path(self.log.name).read_text(errors="replace").splitlines() if x.strip()]
        return {"error": f"the process died ({code}): {' | '.join(said[-3:])[-400:]}", "fatal": True}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def run(
    rows: Sequence[str],
    command: Sequence[str],
    done: Callable[[str, dict[str, Any]], None],
    *,
    until: float = float("inf"),
    each: float = 90.0,
    jobs: int = 1,
    env: dict[str, str] | None = None,
) -> None:
    """done(row, answer) of each row, by `jobs` workers side by side. No row is begun once time.monotonic() has passed `until`, nor does one take
    longer than `each` seconds (and not past `until` by more than ten)."""
    left, lock = list(rows), threading.Lock()

    def serve() -> None:
        worker = None
        try:
            while True:
                with lock:
                    if not left or time.monotonic() >= until:
                        return
                    row = left.pop(0)
                worker = Worker(command, os.environ | (env or {})) if worker is None else worker
                answer = worker.ask(row, min(each + START * worker.fresh, until + 10 - time.monotonic()))
                if answer.pop("fatal", False) or FATAL in answer.get("error", ""):
                    worker.close()
                    worker = None
                with lock:
                    done(row, answer)
        finally:
            if worker is not None:
                worker.close()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for each_job in [pool.submit(serve) for _ in range(jobs)]:
            each_job.result()


def answer(perform: Callable[[str], dict[str, Any]]) -> None:
    """The worker's side: rows from stdin until it ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr
    for line in sys.stdin:
        out.write(json.dumps(perform(line.rstrip("\n"))) + "\n")
        out.flush()
