"""Programs compiled once and shared by all that has the same shapes, each with its cost, memory and compile time."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxtok.evals import cost


class Program(NamedTuple):
    """A compiled function and what is known of it before it runs."""

    call: Callable[..., Any]  # raises where the program was only traced
    out: Any  # shapes and dtypes of what it returns
    compile_s: float  # wall seconds for tracing, lowering and compiling, beside whatever else was compiling
    flops: float  # of one call, counted from the jaxpr
    bytes: float  # moved by one call
    unknown: tuple[str, ...]  # what the counts only guessed
    peak: int | None  # bytes held at once, arguments and outputs included; None where the backend does not say


class Programs:
    """Compiles on the first call for a (name, static things, shapes) and hands the same program out afterwards; threads may share it."""

    def __init__(self) -> None:
        self._held: dict[Any, Program] = {}
        self._locks: dict[Any, threading.Lock] = {}
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(
        self,
        name: str,
        static: Any,
        fn: Callable[..., Any],
        args: Sequence[Any],
        *,
        donate: tuple[int, ...] = (),
        trips: int | None = None,
        run: bool = True,
    ) -> Program:
        """The program of `fn(*args)`; args are arrays or shapes. `static`: hashable, all that `fn` depends on besides `args`.

        `trips`: how often its while loops run, for the counts. `donate`: args whose buffers the call may use up. `run`: False = only traced,
        for what it would return and cost.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (name, static, tree, tuple((x.shape, str(x.dtype)) for x in leaves), run)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._held:
                self._held[key] = (_compile if run else _trace)(fn, args, donate, trips)
        return self._held[key]


def _compile(fn: Callable[..., Any], args: Sequence[Any], donate: tuple[int, ...], trips: int | None) -> Program:
    start = time.perf_counter()
    traced = jax.jit(fn, donate_argnums=donate).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    try:
        peak = cost.peak_memory(compiled)
    except NotImplementedError:
        peak = None
    return _known(traced, compiled, seconds, peak, trips)


def _trace(fn: Callable[..., Any], args: Sequence[Any], donate: tuple[int, ...], trips: int | None) -> Program:
    def call(*_: Any) -> Any:
        raise RuntimeError("this program was traced for its costs only (run=False)")

    return _known(jax.jit(fn, donate_argnums=donate).trace(*args), call, 0.0, None, trips)


def _known(traced: Any, call: Callable[..., Any], seconds: float, peak: int | None, trips: int | None) -> Program:
    counted = cost.count_jaxpr(traced.jaxpr, trips=trips)
    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    return Program(call, out, seconds, counted.flops, counted.bytes, counted.unknown, peak)


def timed(call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """(what `call(*args)` returns, seconds until it is there)."""
    start = time.perf_counter()
    out = jax.block_until_ready(call(*args))
    return out, time.perf_counter() - start


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in `tree`."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
