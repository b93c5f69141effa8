"""Block-sparse attention's XLA path on the CPU: does its time follow the share of blocks that is listed?

Claim: with room for rho of the key blocks in each list (max_blocks = rho * nk), forward and backward take rho times what all blocks take, times at
    most 1.3, for rho = 1, 1/2, 1/4, 1/8, 1/16, in float32.
Command: python experiments/bench_block_sparse_cpu.py
Hardware and time: two cores of a 2.6 GHz Xeon, about two minutes.
Expected: experiments/results/bench_block_sparse_cpu/results.json; `ratio` = time / (rho * time at rho = 1), 1.3 at most.

Sides run in turn, again and again; quartiles of the time of all cores (`cpu`, which other programs disturb little) and on the clock. Lists are
random and full; nothing is causal, so that every listed tile is whole.
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtok_kernels.block_sparse import block_sparse, cases
from rich.table import Table

from jaxtok.cli.common import console
from jaxtok.evals import report

GOAL = 1.3
KINDS = "cpu", "clock"  # time of all cores, and on the clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured; `parts`: 1/rho."""

    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 2
    width: int = 64
    block: int = 128
    parts: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 9
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "bench_block_sparse_cpu" / "results.json"


class Side:
    """A compiled pass at one density."""

    def __init__(self, o: Options, part: int, grad: bool):
        case = cases.Case(
            h=o.heads, g=o.kv_heads, t=o.tokens, s=o.tokens, d=o.width, c=o.width, bq=o.block, bk=o.block, density=1 / part, causal=False
        )
        given, rest = case.arrays()
        q, k, v, index, count = map(jnp.asarray, given)
        self.blocks, other = int(count.sum()), (index, count, jnp.asarray(rest["q_pos"]), jnp.asarray(rest["k_pos"]))

        def attend(q, k, v, index, count, q_pos, k_pos):
            return block_sparse(q, k, v, index, count, q_pos=q_pos, k_pos=k_pos, **case.options(), impl="xla")

        total = lambda *given: jnp.sum(attend(*given)[0])
        self.args = q, k, v, *other
        self.run = jax.jit(jax.grad(total, (0, 1, 2)) if grad else attend).lower(*self.args).compile()

    def __call__(self) -> tuple[float, float]:
        """(seconds of all cores, seconds on the clock)."""
        begin = time.process_time(), time.perf_counter()
        jax.block_until_ready(self.run(*self.args))
        return time.process_time() - begin[0], time.perf_counter() - begin[1]


def main(o: Options) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with report.bar("measuring") as progress:
        for n, grad in enumerate((False, True)):
            sides = [Side(o, part, grad) for part in o.parts]
            times: list[list[tuple[float, float]]] = [[] for _ in sides]
            for repeat in range(o.repeats + 1):
                for took, side in zip(times, sides, strict=True):
                    took.append(side())
                progress(n * (o.repeats + 1) + repeat + 1, 2 * (o.repeats + 1), "backward" if grad else "forward")
            found = [{"pass": "forward and backward" if grad else "forward", "rho": 1 / part} for part in o.parts]
            for i, kind in enumerate(KINDS):
                ms = [[round(float(x), 3) for x in np.quantile([1e3 * x[i] for x in took[1:]], (0.25, 0.5, 0.75))] for took in times]
                for row, side, x in zip(found, sides, ms, strict=True):
                    row["blocks"] = side.blocks
                    row[f"{kind}_ms"], row[f"{kind}_ratio"] = x, round(x[1] / ms[0][1] / side.blocks * sides[0].blocks, 3)
            rows += found
    table = Table(title="ms of the median, and time / (rho * time at rho = 1)")
    for name in ("pass", "rho", "cpu", "ratio", "clock", "ratio"):
        table.add_column(name, justify="right")
    for r in rows:
        cells = [cell for kind in KINDS for cell in (f"{r[f'{kind}_ms'][1]:.1f}", f"{r[f'{kind}_ratio']:.2f}")]
        table.add_row(r["pass"], f"{r['rho']:.4f}", *cells)
    console().print(table)
    options = {k: v for k, v in dataclasses.asdict(o).items() if k != "out"}
    document = {"options": options, "machine": report.machine(), "load": os.getloadavg(), "goal": GOAL, "rows": rows}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(o.out, document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=(__doc__ or "").partition("\n")[0]))
