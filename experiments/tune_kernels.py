"""The block sizes that are fastest on this device, and which kernels may run by themselves there.

Claim: on the device kind that it ran on, `impl="auto"` takes a kernel where it is right and faster than XLA, with the fastest sizes found.
Command: python experiments/tune_kernels.py                       (commit kernels/jaxtok_kernels/blocks.json afterwards)
    --kernels flash read: only these;  --quick --impl interpret --kind try --table FILE: tries it on a CPU
Hardware and time: the GPU or TPU that is tuned for; some minutes.
Expected: kernels/jaxtok_kernels/blocks.json, under the device kind: a line a kernel, keywords of its public function ({} = its own choice).

A kernel is entered if all its cases on this platform have right numbers and it is no slower than XLA's program for the same (where jaxtok.ops has
one); otherwise its entry is taken out, so that "auto" stays with XLA. Sizes are tried for flash (block_q, block_k: the forward pass on the tokens
of the goals; one of them counts only where the gradients compile and are right at it, too) and column_sum. The rest have no sizes of their own:
those of block_sparse and scores belong to the method, and read splits by the length of the list. Every size runs in a process that is replaced if it
hangs or dies.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
from typing import Any

import bench_kernels as bench
import jax
import kernel_rows
import kernel_workers
from kernel_rows import GOAL, TINY, Row, flash_cases, label

from jaxtok.evals import report

TABLE = pathlib.Path(__file__).parents[1] / "kernels" / "jaxtok_kernels" / "blocks.json"
SIZES: dict[
    str, dict[str, dict[str, tuple[int, ...]]]
] = {  # by platform and kernel; None of a keyword = the kernel's own choice, always tried
    "gpu": {"flash": {"block_k": (64, 128)}},  # rows are two warpgroups of 64 there; column_sum has its tiles from the head dim
    "tpu": {
        "flash": {"block_q": (128, 256, 512), "block_k": (256, 512, 1024, 2048)},
        "column_sum": {"block_q": (128, 256, 512), "block_k": (256, 512, 1024, 2048)},
    },
    "cpu": {"flash": {"block_q": (16,), "block_k": (16, 32)}},  # to try the script
}
RIVAL = "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """kernels: () = all. kind: what the table calls this device; None = its own name."""

    impl: str | None = None
    kernels: tuple[str, ...] = ()
    quick: bool = False
    here: bool = False
    each: float = 120.0
    jobs: int = 4
    repeats: int = 15
    budget: float = 1.5
    kind: str | None = None
    table: pathlib.Path = TABLE


def xla(row: Row, kernel: str) -> Row:
    """The same by XLA's program in jaxtok.ops."""
    from jaxtok.core.reader import Sight
    from jaxtok.core.types import KV
    from jaxtok.ops import attention, evidence, read

    def flash(q, k, v, named):
        return attention.attention(q, k, v, **named, diagonal=0, impl="xla")

    def column_sum(q, k, lse, named):
        return evidence.received(q, k, lse, **named, diagonal=0, impl="xla")

    def whole(k, v, pos, bias, q, q_pos, _):
        zero = q_pos[:, 0]
        kv = KV(k, v, pos, bias, zero, zero, zero[0], pos[..., 0])
        b, e, r, d = q.shape
        out, lse = read.attend_all(q.reshape(b, e * r, 1, d), q_pos[:, :1], kv, Sight(q_pos.astype("float32")[0], impl="xla"))
        return out.reshape(b, e, r, -1), lse.reshape(b, e, r)

    fn = {"flash": flash, "column_sum": column_sum, "read": whole}[kernel]
    return dataclasses.replace(row, call=lambda impl, sizes: fn)


def problem(kernel: str, tiny: bool) -> str:
    """The id of the row that is timed."""
    o = TINY if tiny else GOAL
    case = {"read": f"decode {label(o.cache)}"}.get(kernel, f"prefill {label(o.prefill[0])}")
    return f"{kernel_rows.TIME} {kernel}: {case}"


def candidates(platform: str, kernel: str) -> list[dict[str, int]]:
    """Block sizes to try; {} first."""
    of = SIZES.get(platform, {}).get(kernel, {})
    return [{}] + [dict(zip(of, x, strict=True)) for x in itertools.product(*of.values())] if of else [{}]


def one(name: str, o: Options) -> dict[str, Any]:
    """A worker's row: a check by its id, or JSON {kernel, sizes} to time (sizes "xla": the rival)."""
    impl = str(o.impl)
    if not name.startswith("{"):
        return bench.result(name, kernel_rows.checks(impl, o.quick)[name], impl)
    ask = json.loads(name)
    kernel, sizes = ask["kernel"], ask["sizes"]
    row = kernel_rows.timed(jax.default_backend(), o.quick)[problem(kernel, o.quick)]()
    how: dict[str, Any] = dict(timing=True, repeats=o.repeats, budget=o.budget)
    if sizes == RIVAL:
        return bench.perform(xla(row, kernel), impl, sizes={}, **how)
    found = bench.perform(row, impl, sizes=sizes, **how)
    if kernel == "flash" and sizes and "run_ms" in found:  # the sizes serve every call: gradients, and float32 where the kernel takes it
        shapes = TINY if o.quick else GOAL
        for dtype in ("bfloat16", "float32"):
            n = shapes.prefill[0]
            case = flash_cases.Case(
                h=shapes.h, g=shapes.g, t=n, s=n, d=shapes.d, c=shapes.d, dtype=dtype, diagonal=0, block_q=None, block_k=None
            )
            again = bench.perform(kernel_rows.flash_row("", case, grad=True), impl, timing=False, sizes=sizes)
            if "error" in again:
                return found | {"error": f"gradients in {dtype}: {again['error']}"}
    return found


def chosen(kernel: str, found: dict[str, dict[str, Any]]) -> tuple[dict[str, int] | None, str]:
    """The kernel's entry (None = it gets none), and why; `found` by the ids of `one`, errors and refusals among them."""
    wrong = [name for name, x in found.items() if not name.startswith("{") and "error" in x]
    if wrong:
        return None, f"{len(wrong)} cases not right, such as {wrong[0]}: {found[wrong[0]]['error'][:100]}"
    asked = [(json.loads(name)["sizes"], x) for name, x in found.items() if name.startswith("{")]
    times = [(x["run_ms"][1], sizes) for sizes, x in asked if "run_ms" in x and "error" not in x and sizes != RIVAL]
    rival = next((x["run_ms"][1] for sizes, x in asked if sizes == RIVAL and "run_ms" in x), None)
    if not asked:
        return {}, "right; its sizes are the caller's"
    if not times:
        return None, "; ".join(str(x.get("error") or x.get("refused")) for sizes, x in asked if sizes != RIVAL)[:200]
    best, sizes = min(times, key=lambda x: x[0])
    if rival is not None and best > rival:
        return None, f"{best:.4g} ms, and XLA takes {rival:.4g}"
    return sizes, f"{best:.4g} ms" + ("" if rival is None else f", XLA {rival:.4g}")


def main(o: Options) -> dict[str, dict[str, Any]]:
    about = bench.machine(o.here)
    impl, kind = bench.implementation(o.impl, about["backend"]), o.kind or about["device"]
    kernels = [x for x in kernel_rows.KERNELS if not o.kernels or x in o.kernels]
    checks = [x for x in kernel_rows.checks(impl, o.quick) if x.split(" ")[1].rstrip(":") in kernels]
    ask = lambda kernel, sizes: json.dumps({"kernel": kernel, "sizes": sizes})
    timed = [ask(k, x) for k in kernels if k in ("flash", "column_sum", "read") for x in [*candidates(about["backend"], k), RIVAL]]
    progress = bench.Progress("tuning", len(checks) + len(timed))
    found: dict[str, dict[str, dict[str, Any]]] = {k: {} for k in kernels}

    def done(name, result):
        kernel = json.loads(name)["kernel"] if name.startswith("{") else name.split(" ")[1].rstrip(":")
        found[kernel][name] = result
        progress(name, result)

    o = dataclasses.replace(o, impl=impl)
    if o.here:
        for name in [*checks, *timed]:
            done(name, one(name, o))
    else:
        own = ["--worker", "--impl", impl, "--repeats", str(o.repeats), "--budget", str(o.budget), *(["--quick"] if o.quick else [])]
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), *own]
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        kernel_workers.run(checks, command, done, each=o.each, jobs=o.jobs if about["backend"] == "gpu" else 1, env=memory)
        kernel_workers.run(timed, command, done, each=o.each)
    progress.close()
    table = json.loads(o.table.read_text()) if o.table.exists() else {}
    entry, lines = dict(table.get(kind, {})), []
    for kernel in kernels:
        sizes, why = chosen(kernel, found[kernel])
        if sizes is None:
            entry.pop(kernel, None)
        else:
            entry[kernel] = sizes
        lines.append([kernel, "XLA" if sizes is None else json.dumps(sizes), why])
    table[kind] = entry
    part = o.table.with_name(o.table.name + ".part")
    part.write_text(json.dumps({k: v for k, v in sorted(table.items()) if v}, indent=1) + "\n")
    os.replace(part, o.table)
    print(bench.plain(("kernel", f"on {kind}", "because"), lines, 120))
    return table


if __name__ == "__main__":
    options, given = bench.parse(Options, __doc__, "--worker")
    if given.worker:
        kernel_workers.answer(lambda name: report.clean(one(name, options)))
    else:
        main(options)
