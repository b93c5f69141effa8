"""One command for a GPU: are the kernels' numbers right there, and how fast are they? One JSON and one Markdown table.

Claim: on an NVIDIA H200 every kernel equals its float32 reference on all its cases (bf16 2e-2, float32 1e-5), and the goals of bench_kernels are met.
Command: python experiments/gpu_report.py                     (Python and JAX with CUDA are enough; run it from a checkout, nothing is installed)
    python experiments/gpu_report.py --impl interpret --quick     tries it on a CPU, in the Pallas interpreter, one case a kernel: its times mean nothing
Hardware and time: one NVIDIA H200 or another Hopper GPU; 9 minutes at most (--limit SECONDS), the most important rows first.
Expected: experiments/results/gpu_report/results.json and README.md (--out FOLDER), written anew after every row; exit code 0 unless numbers are wrong.

First the numbers, in --jobs processes side by side that share the GPU, for two fifths of the time at most (and what is left at the end): forward passes, then gradients; a case
that a kernel refuses in words ("on GPUs all are bfloat16") is listed and no failure, one that does not compile, hangs or differs is. Then the rows of
bench_kernels, one process, so that nothing runs beside what is timed. What time did not suffice for is listed as left.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import bench_kernels as bench
import kernel_rows
from bench_kernels import RESULTS

from jaxtok.evals import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """impl: None = the platform's. quick: tiny shapes. only: rows whose id contains one of these. limit: seconds in all; each: for a row. here: no
    processes."""

    impl: str | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    limit: float = 520.0
    each: float = 60.0
    jobs: int = 6
    repeats: int = 15
    budget: float = 1.5
    here: bool = False
    out: pathlib.Path = RESULTS / "gpu_report"


NUMBERS = 0.4  # of the time, for the numbers


def state(r: dict[str, Any]) -> str:
    return "refused" if "refused" in r else "wrong" if r.get("right") is False else "error" if "error" in r else "right"


def tally(checks: Sequence[dict[str, Any]], left: Sequence[str]) -> list[list[str]]:
    """One line a kernel and part: how many cases are right, wrong, errors, refused, left."""
    lines = []
    for part, said in ((kernel_rows.CHECK, ""), (kernel_rows.GRAD, ", gradients")):
        for kernel in kernel_rows.KERNELS:
            mine = [r for r in checks if (r["part"], r["kernel"]) == (part, kernel)]
            rest = sum(n.startswith(f"{part} {kernel}: ") for n in left)
            if mine or rest:
                worst = max((r["delta"] for r in mine if r.get("right") and r.get("delta") is not None), default=None)
                number = lambda what, mine=mine: str(sum(state(r) == what for r in mine))
                lines.append([kernel + said, *map(number, ("right", "wrong", "error", "refused")), str(rest), bench.short(worst)])
    return lines


TALLY = "numbers", "right", "wrong", "error", "refused", "left", "largest delta of those right"
GOALS = "goal", "bound", "measured", "met"


def failed(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in checks if state(r) in ("wrong", "error")]


def page(document: dict[str, Any]) -> str:
    """The Markdown."""
    checks, rows, left = document["checks"], document["rows"], document["left"]
    about, wrong = document["machine"], failed(checks)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# Kernels on {about['device']}",
        f"{versions}, Python {about['python']}, {about['date']}; impl {document['impl']}{', tiny shapes' if document['quick'] else ''}. "
        "Columns and how they were measured: `experiments/bench_kernels.py`."
        + " In an interpreter times mean nothing."
        * document["impl"].startswith("interpret"),
        "## Goals\n\n" + bench.markdown(GOALS, bench.goal_lines(document["goals"])),
        "## Numbers\n\n" + bench.markdown(TALLY, tally(checks, left)),
    ]
    if wrong:
        cells = [[r["part"], r["kernel"], r["name"], bench.short(r.get("delta")), r.get("error", "")] for r in wrong]
        parts.append("Not right:\n\n" + bench.markdown(("part", "kernel", "case", "delta", "error"), cells))
    parts.append("## Time\n\n" + bench.markdown(bench.HEAD, [bench.cells(r) for r in rows]))
    if left:
        parts.append("No time was left for: " + "; ".join(left) + ".")
    return "\n\n".join(parts) + "\n"


def main(o: Options) -> dict[str, Any]:
    begin = time.monotonic()
    about = bench.machine(o.here)
    impl = bench.implementation(o.impl, about["backend"])
    checks = list(bench.chosen(kernel_rows.checks(impl, o.quick), o.only))
    timed = list(bench.chosen(kernel_rows.timed(about["backend"], o.quick), o.only))
    document: dict[str, Any] = {"impl": impl, "quick": o.quick, "machine": about, "checks": [], "rows": [], "goals": []}
    raw: list[dict[str, Any]] = []
    left = dict.fromkeys([*checks, *timed])
    progress = bench.Progress("kernels", len(left))
    o.out.mkdir(parents=True, exist_ok=True)

    def done(name, found):
        left.pop(name)
        (raw if found["part"] == kernel_rows.TIME else document["checks"]).append(found)
        document.update(rows=bench.judge(raw), goals=bench.goals(raw, o.quick), left=list(left), took_s=round(time.monotonic() - begin, 1))
        report.write(o.out / "results.json", document)
        (o.out / "README.md").write_text(page(document))
        progress(name, found)

    how: dict[str, Any] = dict(impl=impl, quick=o.quick, here=o.here, each=o.each, repeats=o.repeats, budget=o.budget)
    rest = lambda: o.limit - (time.monotonic() - begin)
    shared: dict[str, Any] = dict(jobs=o.jobs if about["backend"] == "gpu" else 1, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    bench.walk(checks, done, **how, **shared, limit=NUMBERS * rest() if timed else rest())
    bench.walk(timed, done, **how, limit=rest())
    bench.walk([name for name in checks if name in left], done, **how, **shared, limit=rest())
    progress.close()
    wrong = failed(document["checks"])
    for r in wrong:
        print(f"NOT RIGHT  {r['part']} {r['kernel']}: {r['name']}: {r.get('error', '')[:160]}")
    short = "kernel", "case", "run ms", "compute %", "copy %", "vs dense", "delta", ""
    keep = [bench.HEAD.index(x) for x in short]
    print(bench.plain(short, [[bench.cells(r)[i] for i in keep] for r in document["rows"]], 48), end="\n\n")
    print(bench.plain(TALLY, tally(document["checks"], list(left))), end="\n\n")
    print(bench.plain(GOALS, bench.goal_lines(document["goals"]), 80), end="\n\n")
    print(f"{len(left)} rows left for want of time; {len(wrong)} cases not right; {time.monotonic() - begin:.0f} s; {o.out}")
    return document


if __name__ == "__main__":
    sys.exit(1 if failed(main(bench.parse(Options, __doc__)[0])["checks"]) else 0)
