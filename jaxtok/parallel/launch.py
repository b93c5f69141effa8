"""Several processes as one program: what each has to do first, and how to start them."""

import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead
ENVIRONMENT = ("JAXTOK_COORDINATOR", "JAXTOK_PROCESSES", "JAXTOK_PROCESS")
_SCHEDULERS = ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "OMPI_MCA_orte_hnp_uri", "TPU_PROCESS_ADDRESSES")


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
    timeout: int = 120,
) -> bool:
    """Join the processes of one program; call it before anything that touches a device. True where there are several.

    Who takes part is told by the arguments (coordinator "host:port" of process 0, how many, which one), else by JAXTOK_COORDINATOR, JAXTOK_PROCESSES and
    JAXTOK_PROCESS (`jaxtok launch` sets them), else by the TPU pod, Slurm or Open MPI, which JAX asks; without any of these it does
    nothing. A process that dies ends the others within about twice `heartbeat` seconds, with an error that names it. Only process 0 should
    print and write (`leader()`).

    Raises:
      ValueError: the three are given in part, or do not fit each other.
      RuntimeError: the others did not come within `timeout` seconds (of JAX).
    """
    given = [coordinator, processes, process]
    if all(x is None for x in given) and any(name in os.environ for name in ENVIRONMENT):
        given = [os.environ.get(name) for name in ENVIRONMENT]
    common: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "initialization_timeout": timeout}
    if all(x is None for x in given):
        if any(name in os.environ for name in _SCHEDULERS):
            jax.distributed.initialize(**common)
        return jax.process_count() > 1 if any(name in os.environ for name in _SCHEDULERS) else False
    if any(x is None for x in given):
        names = [f"{name}={x!r}" for name, x in zip(("coordinator", "processes", "process"), given, strict=True)]
        raise ValueError(f"{', '.join(names)}: give all three, or none (environment: {', '.join(ENVIRONMENT)})")
    where, many, mine = str(given[0]), _count("processes", given[1]), _count("process", given[2])
    if ":" not in where:
        raise ValueError(f"coordinator={where!r} must be host:port, of process 0")
    if not 0 <= mine < many:
        raise ValueError(f"process={mine} must be one of 0 .. {many - 1}")
    if many == 1:
        return False
    jax.distributed.initialize(where, many, mine, **common)
    return True


def _count(name: str, x) -> int:
    try:
        return int(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={x!r} must be a whole number") from None


def leader() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def run(script: str, arguments: Sequence[str]) -> None:
    """Run a Python file as the main program, its processes joined before; processes but the first print nothing to stdout."""
    initialize()
    if not leader():  # the file itself: libraries print past sys.stdout
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()  # the script's own, whole
        elif not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        if jax.process_count() == 1:
            raise SystemExit(code) from None
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # leaving in order would wait for the others, and they for this one


def start(script: str, arguments: Sequence[str], processes: int, *, devices: int | None = None) -> int:
    """Run a Python file in several processes on this machine (for trying, and for one process a GPU) -> the first exit code that is not 0.

    devices: CPU devices of each process. When a process fails, the others have `HEARTBEAT` seconds to say so themselves and are then ended.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        where = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {ENVIRONMENT[0]: where, ENVIRONMENT[1]: str(processes)}
    env |= {} if devices is None else {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "jaxtok", "launch", "--", script, *arguments]
    running = [subprocess.Popen(command, env=env | {ENVIRONMENT[2]: str(i)}) for i in range(processes)]
    failed: int | None = None
    until = float("inf")
    try:
        while any(p.poll() is None for p in running) and time.monotonic() < until:
            bad = next((p.returncode for p in running if p.poll()), None)
            if bad is not None and failed is None:
                failed, until = bad, time.monotonic() + HEARTBEAT
            time.sleep(0.1)
    finally:
        for p in running:
            p.kill()
    return failed if failed is not None else next((p.wait() for p in running if p.wait()), 0)
