"""A hundred thousand calls with awkward values and wrong arguments: nothing but the promised errors, and no NaN.

Claim: calls on finite inputs (24 shape sets; values up to 1e30, denormals, ties, dead rows, gaps, budgets out of range) of every public
    function of core and ops and of every registered method give no NaN, no undocumented infinity and no error; with an argument
    spoiled (one call in eight, and the constructors), nothing is raised but ValueError, TypeError or, for a named impl,
    NotImplementedError, in words that hold the value.
Command: PYTHONPATH=.:kernels python experiments/robustness.py      (--calls 2000 for a look, --only method for some functions)
Hardware and time: two cores of a 2.6 GHz Xeon; `seconds` in results/robustness/robustness.json.
Expected: 0 failures and every function covered; exit code 1 otherwise, with the first failing calls of each function.

Each function is compiled once a shape set (it meets half of the sets, a method a third); hypothesis draws the values (tests/calls says
how each function is called). Spoiled calls are traced, not run: what is statically wrong must be refused before anything is computed.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # it compiles more than it computes

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxtok.core import registry
from tests import calls

ROOT = pathlib.Path(__file__).parents[1]
SPOILED = 8  # one call in so many
DTYPES = (np.float32, np.int32, np.bool_, np.uint8, np.complex64, jnp.bfloat16)
VALUE = re.compile(r"""[\d'"\[({]|nan|inf|None|True|False|\S+\.\S+""")  # a number, a text, a list or a name in a message


@dataclasses.dataclass
class Count:
    """What the calls of one function came to."""

    calls: int = 0
    spoiled: int = 0
    errors: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    nans: int = 0
    infinities: int = 0
    forbidden: int = 0  # other errors, and any error of a right call
    wordless: int = 0  # errors of the library's own without a value in them
    failures: list[str] = dataclasses.field(default_factory=list)

    def fail(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.failures) < 3:
            self.failures.append(what[:600])


def sets_of(name: str) -> list[calls.Sizes]:
    """The shape sets that a function meets: every second, of a method every third, beginning somewhere."""
    every = 3 if name.startswith("method ") else 2
    return [s for s in calls.SETS if (s.i + zlib.crc32(name.encode())) % every == 0]


@functools.cache
def prepared(name: str, s: calls.Sizes) -> tuple[calls.Case, Any]:
    """A case and its compiled function."""
    made = calls.CASES[name](s)
    return made, jax.jit(lambda arrays: made.fn(**arrays, **made.options))


def right_call(name: str, s: calls.Sizes, raw: bytes, count: Count) -> None:
    """A call with nothing wrong: it must give finite numbers."""
    made, program = prepared(name, s)
    out = jax.tree.leaves(program(made.arrays(calls.Values(raw, s))))
    floats = jax.device_get([x for x in out if jnp.issubdtype(jnp.result_type(x), jnp.floating)])
    if any(np.isnan(x).any() for x in floats):
        count.fail("nans", f"NaN: {name}, set {s.i}: {raw.hex()}")
    elif not made.infinite and not all(np.isfinite(x).all() for x in floats):
        count.fail("infinities", f"infinity: {name}, set {s.i}: {raw.hex()}")


def spoiled_call(name: str, s: calls.Sizes, raw: bytes, draw: Callable) -> tuple[Callable, str]:
    """A call with one argument wrong, and which; traced only."""
    made, _ = prepared(name, s)
    paths, tree = jax.tree.flatten_with_path(made.arrays(calls.Values(raw, s)))
    leaves, options = [x for _, x in paths], dict(made.options)
    at = draw(st.sampled_from([i for i, x in enumerate(leaves) if not isinstance(x, jax.Array)] + list(options)))  # jax.Array: a PRNG key
    if isinstance(at, str):
        options[at] = draw(st.sampled_from(calls.ODD))
        said = f"{at}={options[at]!r}"
    else:
        old = np.asarray(leaves[at])
        leaves[at] = new = spoil(old, draw)
        said = f"{jax.tree_util.keystr(paths[at][0])} {old.dtype}{list(old.shape)} as {new.dtype}{list(new.shape)}"

    def trace():
        with warnings.catch_warnings(action="ignore"):  # such as of a complex number made real
            jax.eval_shape(lambda leaves: made.fn(**jax.tree.unflatten(tree, leaves), **options), leaves)

    return trace, said


def spoil(x: np.ndarray, draw: Callable) -> np.ndarray:
    """An array of another dtype or shape."""
    way = draw(st.sampled_from(["dtype", "rank", "size", "empty"]))
    if way == "dtype" or (way != "rank" and not x.ndim):
        with np.errstate(all="ignore"):
            return x.astype(draw(st.sampled_from([d for d in DTYPES if d != x.dtype])))
    axis, more = draw(st.integers(0, max(x.ndim - 1, 0))), draw(st.integers(1, 2))
    if way == "rank":
        return x[None] if not x.ndim or more == 1 else x.sum(axis).astype(x.dtype)
    keep = np.arange(0 if way == "empty" else x.shape[axis] + more)
    return x.take(keep, axis, mode="wrap") if x.shape[axis] or not len(keep) else x


def judged(fn: Callable, count: Count, where: str, right: bool = False) -> None:
    """Run `fn`: a right call raises nothing, another one what is allowed, in words that hold a value."""
    try:
        fn()
    except Exception as e:
        name, text = type(e).__name__, str(e)
        count.errors[name] += 1
        allowed = isinstance(e, ValueError | TypeError) or (isinstance(e, NotImplementedError) and "impl=" in where)
        if right or not allowed:
            frames = [
                f"{pathlib.Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if "/jaxtok/" in f.filename
            ]
            count.fail("forbidden", f"{name} at {', '.join(frames[-2:])}: {' '.join(text.split())[:200]} ({where})")
        elif "/jaxtok/" in traceback.extract_tb(e.__traceback__)[-1].filename and not (
            VALUE.search(text) or any(n in text for n in registry.names())
        ):
            count.fail("wordless", f"says no value: {name}: {text} ({where})")


def exercise(name: str, most: int, seed: int, tick: Callable = lambda: None, *, sets: Any = None, way: int | None = None) -> Count:
    """`most` calls of one function; on these shape sets, and all spoiled (way=0) or all right (1)."""
    count = Count()

    def once() -> bool:
        if count.calls < most:
            count.calls += 1
            tick()
            return True
        return False

    def static(data):
        fn, args, kwargs = calls.PLAIN[name](data.draw)
        where = f"{name}{args} {kwargs}"
        if once():
            judged(lambda: number(fn(*args, **kwargs), where, count), count, where)

    def arrays(data, s, raw, way):
        if way:
            call, where = (lambda: right_call(name, s, raw, count)), raw.hex()
        else:
            call, where = spoiled_call(name, s, raw, data.draw)
        if once():
            count.spoiled += not way
            judged(call, count, f"{name}, set {s.i}: {where}", right=way > 0)

    if name in calls.PLAIN:
        test = hypothesis.given(st.data())(static)
    else:
        ways = st.integers(0, SPOILED - 1) if way is None else st.just(way)
        test = hypothesis.given(st.data(), st.sampled_from(sets or sets_of(name)), st.binary(min_size=24, max_size=120), ways)(arrays)
    chosen = hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate,),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    test, old = chosen(test), jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # whose error it is, is seen at its end
    try:
        for again in range(20):  # hypothesis stops early where there is little to draw
            if count.calls < most:
                hypothesis.seed(seed + again)(test)()
    finally:
        jax.config.update("jax_traceback_filtering", old)
    return count


def number(out: Any, where: str, count: Count) -> None:
    if isinstance(out, float) and math.isnan(out):
        count.fail("nans", f"NaN: {where}")


def run(total: int, only: str = "", seed: int = 0, progress: bool = True) -> dict[str, Count]:
    """`total` calls spread evenly over the functions whose name holds `only`."""
    names, out = [n for n in (*calls.CASES, *calls.PLAIN) if only in n], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=total)
        for i, name in enumerate(names):
            bar.update(task, description=name)
            share = total * (i + 1) // len(names) - total * i // len(names)
            out[name] = exercise(name, share, seed + 1000 * i, lambda: bar.advance(task))
            prepared.cache_clear()
            jax.clear_caches()  # thousands of programs would fill the memory
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Call everything with awkward values and wrong arguments."""

    calls: int = 100_000
    only: str = ""
    """Functions whose name holds this, such as core.reduce or "method h2o"; nothing is written then."""
    seed: int = 0
    out: pathlib.Path = ROOT / "experiments" / "results" / "robustness"


def main(args: Args) -> int:
    start, kinds = time.time(), ("nans", "infinities", "forbidden", "wordless")
    counts = run(args.calls, args.only, args.seed)
    table = Table("function", "calls", "spoiled", "errors", *kinds, box=None, pad_edge=False)
    for name, c in counts.items():
        said = " ".join(f"{kind} {n}" for kind, n in c.errors.items())
        table.add_row(name, str(c.calls), str(c.spoiled), said, *(str(getattr(c, kind)) for kind in kinds))
    Console(width=160).print(table)
    failures, uncovered = [line for c in counts.values() for line in c.failures], calls.missing()
    document = {
        "calls": sum(c.calls for c in counts.values()),
        "functions": len(counts),
        "shape_sets": len(calls.SETS),
        "seed": args.seed,
        "seconds": round(time.time() - start),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "hypothesis": hypothesis.__version__,
        },
        "errors": dict(sum((c.errors for c in counts.values()), collections.Counter())),
        **{kind: sum(getattr(c, kind) for c in counts.values()) for kind in ("spoiled", *kinds)},
        "without_a_case": uncovered,
        "failures": failures,
        "by_function": {name: {**vars(c), "errors": dict(c.errors)} for name, c in counts.items()},
    }
    if not args.only:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "robustness.json").write_text(json.dumps(document, indent=1) + "\n")
    for line in failures:
        print(line)
    print(
        f"{document['calls']} calls of {len(counts)} functions in {document['seconds']} s: {len(failures)} failures; "
        f"without a case: {', '.join(uncovered) or 'none'}"
    )
    return 1 if failures or uncovered else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
