"""The kernels on their large cases and on the shapes of the goals: time, rates, percent of the machine's ceilings, against dense attention.

Claim (NVIDIA H200, bf16, head dim 128, 32 query and 8 KV heads, batch 1): the goals of `goals` below, each a row of its own.
Command: python experiments/bench_kernels.py                  (also part of experiments/gpu_report.py, which checks the numbers too)
    --quick: tiny shapes;  --impl interpret --quick: on a CPU, to try the script: its times mean nothing.
Hardware and time: a GPU or TPU that the kernels run on; 6 minutes on an H200 (an estimate: kernels compile for most of it).
Expected: experiments/results/bench_kernels/results.json, written anew after every row.

A row is compiled and its numbers compared with the float32 reference first; wrong numbers have no time, and an error is the row's result. Then one
compiled program walks several input sets in turn, 200 MB at least, so that no cache is measured, again and again until a run takes some
milliseconds; each call waits for the one before. run_ms: 25%, median, 75% over the runs. delta: largest |difference| to the reference.
compute_%, copy_%: of a large matrix product in the dtype and of a large copy (bytes read plus written), timed in the same way in the same run.
vs_dense: time of the fastest dense attention (cudnn on NVIDIA, XLA elsewhere, tokamax if installed) on the same tokens over the row's.
Every row runs in a process that is replaced if it hangs or dies (--here: all in this one).
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # runs from a checkout as it is
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "kernels"))

import jax
import kernel_rows
import kernel_workers
import numpy as np
from jax import lax
from kernel_rows import DENSITIES, GOAL, TIME, TINY, Row, label

from jaxtok.evals import report
from jaxtok.ops._impl import KERNELS, settings

RESULTS = pathlib.Path(__file__).parent / "results"
TOUCHED, MOST_SETS = 200e6, 24  # bytes that the input sets of a program hold together, at least; sets, at most
RUN_S, MOST_LOOPS = 5e-3, 200  # how long a run should take
LONG_S = 1e-3  # a program that takes this long is dispatched while the one before runs
RATE, BANDWIDTH = 8e14, 4e12  # a fast chip's, from which the number of loops is guessed
SMALL = 2**23  # bytes of an array that is tied to the call before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """impl: None = the platform's. only: rows whose id contains one of these. limit, each: seconds in all and for a row. repeats, budget: timed runs
    and seconds for them. here: no processes."""

    impl: str | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    limit: float = 3600.0
    each: float = 120.0
    repeats: int = 15
    budget: float = 2.0
    here: bool = False
    out: pathlib.Path = RESULTS / "bench_kernels" / "results.json"


def implementation(impl: str | None, backend: str) -> str:
    """The kernels' name on this platform."""
    own = KERNELS.get(backend)
    if impl is None and own is None:
        raise SystemExit(f"there are no kernels for {backend}; --impl interpret --quick tries the script on any machine")
    return impl or str(own)


def machine(here: bool) -> dict[str, Any]:
    """What it runs on, by a process of its own unless `here`: this one must not hold the device."""
    if here:
        return report.machine() | {"backend": jax.default_backend()}
    worker = kernel_workers.Worker(command("none", False, 0, 0), dict(os.environ) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    try:
        found = worker.ask("machine", 150.0)
    finally:
        worker.close()
    if "error" in found:
        raise SystemExit(f"JAX finds no device: {found['error']}")
    return found


# one row ---------------------------------------------------------------------------------------------------------------------------------


def in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'...' if len(text) > 400 else ''}"


def program(fn: Callable[..., Any], loops: int) -> Callable[..., Any]:
    """fn on every set, loops times; each call waits for the one before, and nothing of a call is computed once for several."""
    fn = jax.jit(fn)  # traced and lowered once

    def once(sets, last):
        for args in sets:
            leaves, tree = jax.tree.flatten(args)
            tied = [i for i, x in enumerate(leaves) if x.size * x.dtype.itemsize <= SMALL] or [
                min(range(len(leaves)), key=lambda i: leaves[i].size)
            ]
            held, _ = lax.optimization_barrier(([leaves[i] for i in tied], last))
            for i, x in zip(tied, held, strict=True):
                leaves[i] = x
            last = fn(*jax.tree.unflatten(tree, leaves))
        return last

    def run(sets):
        last = once(sets, ())
        return last if loops == 1 else lax.fori_loop(0, loops - 1, lambda _, last: once(sets, last), last)

    return run


def perform(
    row: Row, impl: str, *, timing: bool, repeats: int = 15, budget: float = 2.0, sizes: dict[str, int] | None = None
) -> dict[str, Any]:
    """The row's result: right, delta, compile_ms, and with `timing` what was measured; or "refused" or "error" in words."""
    found: dict[str, Any] = {"impl": impl if row.kernel in kernel_rows.KERNELS else "xla"}
    try:
        try:
            _measure(row, impl, sizes, found, timing, repeats, budget)
        except NotImplementedError as error:
            if not row.after or found["impl"] == row.after:
                raise
            found |= {"impl": row.after, "refused_by_kernel": in_words(error)}
            _measure(row, row.after, sizes, found, timing, repeats, budget)
    except NotImplementedError as error:
        found["refused"] = in_words(error)
    except Exception as error:
        found["error"] = in_words(error)
        found |= {} if healthy() else {"fatal": True}
    return found


def healthy() -> bool:
    """Whether the device still computes: some errors of a kernel outlive it."""
    try:
        return float(jax.block_until_ready(jax.numpy.ones(8) + 1).sum()) == 16
    except Exception:
        return False


def _measure(row: Row, impl: str, sizes, found: dict[str, Any], timing: bool, repeats: int, budget: float) -> None:
    sizes = (settings(row.kernel) or {}) if sizes is None else sizes
    fn = row.call(impl, sizes)
    args = *row.shared(0), *row.own(0)
    begin = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    found["compile_ms"] = round(1e3 * (time.perf_counter() - begin), 1)
    out = jax.block_until_ready(compiled(*args))
    tol = kernel_rows.tolerance(row, impl)
    found["delta"], found["right"] = kernel_rows.difference(*row.compare(args, out), tol, row.least)
    found["tolerance"] = tol
    if not found["right"]:
        found["error"] = f"wrong: it differs from the reference by {found['delta']:.3g} (tolerance {tol:.0e} x the largest number)"
        return
    if not timing:
        return
    del out, compiled
    count = min(max(2, math.ceil(TOUCHED / max(row.bytes, 1))), MOST_SETS)
    if impl.startswith("interpret"):
        count = 2
    common = [row.shared(seed) for seed in range(min(count, kernel_rows.SHARED))] if args[: len(row.shared(0))] else [()]
    sets = [(*common[i % len(common)], *row.own(i)) for i in range(count)]
    floor = count * max(row.flops / RATE, row.bytes / BANDWIDTH, 1e-6)
    more = 1 if impl.startswith("interpret") else min(max(1, round(RUN_S / floor)), MOST_LOOPS)
    loops, calls = (more, 1) if floor < LONG_S else (1, more)  # what takes long waits for no host, and a loop would copy its large outputs
    walk = jax.jit(program(fn, loops)).lower(sets).compile()
    for _ in range(2):
        jax.block_until_ready(walk(sets))
    took: list[float] = []
    stop = time.perf_counter() + budget
    while len(took) < repeats and (len(took) < 3 or time.perf_counter() < stop):
        begin = time.perf_counter()
        for _ in range(calls - 1):
            walk(sets)
        jax.block_until_ready(walk(sets))
        took.append(1e3 * (time.perf_counter() - begin) / (count * loops * calls))
    found["run_ms"] = [float(f"{x:.4g}") for x in np.quantile(took, (0.25, 0.5, 0.75))]
    found |= {"sets": count, "loops": loops, "calls": calls, "runs": len(took)}
    found |= {"tflops": row.flops / found["run_ms"][1] / 1e9, "gbs": row.bytes / found["run_ms"][1] / 1e6}


def result(name: str, make: Callable[[], Row], impl: str, **how) -> dict[str, Any]:
    """What the row of this id gives, with what it is."""
    begin = time.perf_counter()
    part, _, rest = name.partition(" ")
    kernel, _, case = rest.partition(": ")
    out: dict[str, Any] = {"part": part, "kernel": kernel, "name": case}
    try:
        row = make()
    except Exception as error:
        return out | {"error": in_words(error)}
    out |= {"dtype": row.dtype, "unit": row.unit or row.dtype, "flops": row.flops, "bytes": row.bytes, "peer": row.peer}
    return out | perform(row, impl, timing=part == TIME, **how) | {"took_s": round(time.perf_counter() - begin, 1)}


# what the rows say together ----------------------------------------------------------------------------------------------------------------


def median(row: dict[str, Any] | None) -> float | None:
    return row["run_ms"][1] if row and "run_ms" in row else None


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with compute_%, copy_% and vs_dense, where the ceilings and dense attention have been measured."""
    tops = {r["name"].removeprefix("matmul "): r for r in rows if r["kernel"] == "ceiling" and "run_ms" in r}
    fastest: dict[str, float] = {}
    for r in rows:
        if r["kernel"] == "dense" and "run_ms" in r:
            fastest[r["peer"]] = min(fastest.get(r["peer"], math.inf), r["run_ms"][1])
    out = []
    for r in rows:
        if "run_ms" in r:
            r = dict(r)
            if r["flops"] and r["unit"] in tops:
                r["compute_%"] = 100 * r["tflops"] / tops[r["unit"]]["tflops"]
            if "copy" in tops:
                r["copy_%"] = 100 * r["gbs"] / tops["copy"]["gbs"]
            if r["peer"] in fastest:
                r["vs_dense"] = fastest[r["peer"]] / r["run_ms"][1]
        out.append(r)
    return out


def goals(rows: list[dict[str, Any]], tiny: bool = False) -> list[dict[str, Any]]:
    """goal, measured, met (None = not measured; tiny shapes are not judged). Dense: the fastest there is on the same tokens; full decode attention: the faster of dense and ours."""
    o, by = TINY if tiny else GOAL, {(r["kernel"], r["name"]): r for r in judge(rows)}
    get = lambda kernel, name, field="vs_dense": by.get((kernel, name), {}).get(field)
    out: list[dict[str, Any]] = []

    def goal(what: str, unit: str, bound: float, value: float | None, least: bool = True):
        met = None if value is None or tiny else bool(value >= bound if least else value <= bound)
        out.append({"goal": what, "bound": f"{'>=' if least else '<='} {bound:.4g}{unit}", "measured": value, "met": met})

    for n in o.prefill:
        goal(f"flash forward, {label(n)}: times as fast as dense", "x", 1.0, get("flash", f"prefill {label(n)}"))
    for part in DENSITIES:
        fast = get("block_sparse", f"rho 1/{part}")
        goal(f"block_sparse, rho = 1/{part}, {label(o.table)}: time / dense", "", 1.15 / part + 0.05, 1 / fast if fast else None, False)
    goal(f"full decode of {label(o.cache)}: of the copy's bandwidth", "%", 80.0, get("read", f"decode {label(o.cache)}", "copy_%"))
    known = [median(r) for (kernel, name), r in by.items() if name.startswith(f"decode {label(o.cache)}") and kernel in ("dense", "read")]
    whole = min((x for x in known if x is not None), default=None)
    for name, bound in (
        (f"{o.rows} rows by indices", 15.0),
        *((f"Quest, pages of {page}, with its selection", least) for page, least in zip(o.pages, (8.0, 15.0), strict=True)),
        ("TokenSelect, a cache hit", 15.0),
        ("TokenSelect, a cache miss", 1.6),
    ):
        mine = median(by.get(("read", name)))
        goal(f"{name}: times as fast as full decode attention", "x", bound, whole / mine if whole and mine else None)
    for n in o.prefill:
        mine, flash = (median(by.get((kernel, f"prefill {label(n)}"))) for kernel in ("column_sum", "flash"))
        goal(f"column_sum, {label(n)}: time / flash forward", "", 1.0, mine / flash if mine and flash else None, False)
    return out


HEAD = "kernel", "case", "run ms", "quartiles", "TFLOP/s", "GB/s", "compute %", "copy %", "vs dense", "delta", "compile ms", ""


def short(x: Any, digits: int = 3) -> str:
    return "-" if x is None else x if isinstance(x, str) else f"{x:.{digits}g}" if abs(x) < 1000 else f"{x:.0f}"


def cells(r: dict[str, Any]) -> list[str]:
    note = r.get("error") or r.get("refused") or (f"by {r['impl']}" if "refused_by_kernel" in r else "")
    low, mid, high = r.get("run_ms", (None,) * 3)
    return [r["kernel"], r["name"], short(mid, 4), "-" if low is None else f"{short(low)} .. {short(high)}"] + [
        short(r.get(n)) for n in ("tflops", "gbs", "compute_%", "copy_%", "vs_dense", "delta", "compile_ms")
    ] + [note]  # fmt: skip


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    row = lambda x: "| " + " | ".join(y.replace("|", "/") for y in x) + " |"
    return "\n".join([row(head), row(["---"] * len(head)), *(row(x) for x in lines)])


def plain(head: Sequence[str], lines: Sequence[Sequence[str]], widest: int = 60) -> str:
    """A table for a terminal."""
    cut = [[x if len(x) <= widest else x[: widest - 3] + "..." for x in line] for line in (head, *lines)]
    wide = [max(len(line[i]) for line in cut) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(n) for x, n in zip(line, wide, strict=True)).rstrip() for line in cut)


def goal_lines(found: list[dict[str, Any]]) -> list[list[str]]:
    said = lambda x: {True: "yes", False: "no", None: "not measured" if x["measured"] is None else "not judged"}[x["met"]]
    return [[x["goal"], x["bound"], short(x["measured"]), said(x)] for x in found]


def chosen(found: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    return {name: x for name, x in found.items() if not only or any(part in name for part in only)}


class Progress:
    """A bar where rich is installed and stderr is a terminal, else a line a row."""

    def __init__(self, text: str, total: int):
        self.total, self.done, self.drawn = total, 0, None
        try:
            self.drawn = report.bar(text)
            self.update = self.drawn.__enter__()
        except ImportError:
            self.drawn = None

    def __call__(self, what: str, result: dict[str, Any]) -> None:
        self.done += 1
        if self.drawn is not None and sys.stderr.isatty():
            self.update(self.done, self.total, what)
            return
        said = result.get("error") or result.get("refused") or ("right" if "run_ms" not in result else f"{result['run_ms'][1]} ms")
        print(f"[{self.done}/{self.total}] {what}: {said[:200]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.drawn is not None:
            self.drawn.__exit__(None, None, None)


def command(impl: str, quick: bool, repeats: int, budget: float) -> list[str]:
    """That of a worker."""
    own = ["--worker", "--impl", impl, "--repeats", str(repeats), "--budget", str(budget)]
    return [sys.executable, str(pathlib.Path(__file__).resolve()), *own, *(["--quick"] if quick else [])]


def everything(impl: str, quick: bool) -> dict[str, Callable[[], Row]]:
    return kernel_rows.checks(impl, quick) | kernel_rows.timed(jax.default_backend(), quick)


def walk(
    names: Sequence[str],
    done,
    *,
    impl: str,
    quick: bool,
    here: bool,
    limit: float,
    each: float,
    repeats: int,
    budget: float,
    jobs: int = 1,
    env=None,
):
    """done(id, result) of each row, in this process or in others."""
    how: dict[str, Any] = dict(repeats=repeats, budget=budget)
    if here:
        rows, stop = everything(impl, quick), time.monotonic() + limit
        for name in names:
            if time.monotonic() < stop:
                done(name, result(name, rows[name], impl, **how))
        return

    def arrived(name, answer):
        part, _, rest = name.partition(" ")
        kernel, _, case = rest.partition(": ")
        done(name, {"part": part, "kernel": kernel, "name": case} | answer)

    kernel_workers.run(names, command(impl, quick, **how), arrived, until=time.monotonic() + limit, each=each, jobs=jobs, env=env)


def main(o: Options) -> dict[str, Any]:
    about = machine(o.here)
    impl = implementation(o.impl, about["backend"])
    names = list(chosen(kernel_rows.timed(about["backend"], o.quick), o.only))
    if not names:
        raise SystemExit(f"no row's id contains one of {list(o.only)}")
    progress, rows = Progress("measuring", len(names)), []
    document: dict[str, Any] = {"impl": impl, "quick": o.quick, "machine": about}
    o.out.parent.mkdir(parents=True, exist_ok=True)

    def done(name, found):
        rows.append(found)
        progress(name, found)
        document.update(rows=judge(rows), goals=goals(rows, o.quick), left=[n for n in names[len(rows) :]])
        report.write(o.out, document)

    walk(names, done, impl=impl, quick=o.quick, here=o.here, limit=o.limit, each=o.each, repeats=o.repeats, budget=o.budget)
    progress.close()
    print(plain(HEAD, [cells(r) for r in judge(rows)]))
    print()
    print(plain(("goal", "bound", "measured", "met"), goal_lines(goals(rows, o.quick)), 80))
    return document


def serve(o: Options) -> None:
    """The work of a worker."""
    rows: dict[str, Callable[[], Row]] = {}

    def perform(name):
        if name == "machine":
            return machine(True)
        rows.update({} if rows else everything(str(o.impl), o.quick))
        return report.clean(result(name, rows[name], str(o.impl), repeats=o.repeats, budget=o.budget))

    kernel_workers.answer(perform)


def parse(options: type, text: str | None, *more: str) -> tuple[Any, argparse.Namespace]:
    """Options from the command line: nothing but argparse, so that the scripts run where only JAX is."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    for field in dataclasses.fields(options):
        name, default = "--" + field.name.replace("_", "-"), field.default
        if default is False:
            parser.add_argument(name, action="store_true")
        elif isinstance(default, tuple):
            parser.add_argument(name, nargs="*", default=default)
        else:
            kind = str if default is None else type(default)
            parser.add_argument(name, type=pathlib.Path if isinstance(default, pathlib.Path) else kind, default=default)
    for name in more:
        parser.add_argument(name, action="store_true")
    given = parser.parse_args()
    return options(**{f.name: tuple(x) if isinstance(x := getattr(given, f.name), list) else x for f in dataclasses.fields(options)}), given


if __name__ == "__main__":
    options, given = parse(Options, __doc__, "--worker")
    if given.worker:
        serve(options)
    else:
        main(options)
