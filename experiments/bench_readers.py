"""A decoding step's attention by readers at 5% of a cache, against attention to all of it, on the CPU.

Claim: for one layer of 16,384 slots, appending a token, keeping the index, choosing and attending by Quest, SentenceKV, ActQKV or Landmark
    takes a third of the CPU time of full attention, or less, in float32.
Command: python experiments/bench_readers.py
Hardware and time: two cores of a 2.6 GHz Xeon, 8 minutes with a dozen other programs beside it.
Expected: experiments/results/bench_readers/results.json. CPU time less than full attention's, batch 1 and 4: Quest 6.2 and 6.0 times,
    SentenceKV 5.2 and 5.1, ActQKV 6.5 and 5.0, Landmark 4.7 and 3.7; at 4,096 and 65,536 slots no less than 3.5. In bfloat16 1.4 to 2.0.

A run is one compiled loop of `steps` steps over one layer's cache, as in a decoding loop: caches and states are given over, so nothing is
copied that a loop would not copy. The sides run in turn, again and again; medians and quartiles of the time of all cores (`cpu`, which
other programs disturb little) and on the clock. Full attention is the faster of ours and of jax.nn.dot_product_attention, which gets its
cache in the layout that it wants. ActQKV gathers twice its mean share, as its blocks may be dealt out unevenly among layers. SentenceKV:
sparse steps; with the two of each sentence of 20 tokens that read everything, see "sentencekv, sentences". In bfloat16 XLA's CPU compiler
turns the whole cache into float32 and back to write a row: most of every side's time; "ratio_but_append" leaves the append out.
"""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.table import Table

from jaxtok.cli.common import console
from jaxtok.core.reader import Reader, Sight
from jaxtok.core.types import KV
from jaxtok.evals import report
from jaxtok.methods import ActQKV, Landmark, Quest, SentenceKV
from jaxtok.ops.cache import append
from jaxtok.ops.read import attend_all, attend_blocks

GOAL = 3.0
SENTENCE = 20  # tokens
FULL = "full, ours", "full, jax.nn"
KINDS = "cpu", "clock"  # time of all cores, and on the clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured: each size at the batches whose cache of float32 takes at most `most` bytes; `narrow`: sizes in bfloat16 too."""

    sizes: tuple[int, ...] = (4096, 16384, 65536)
    batches: tuple[int, ...] = (1, 4)
    narrow: tuple[int, ...] = (16384,)
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    share: float = 0.05
    steps: int = 4
    repeats: int = 5
    most: float = 6e8
    only: tuple[str, ...] = ()
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "bench_readers" / "results.json"


def readers(o: Options, s: int) -> dict[str, Reader]:
    """The four at `share` of s slots."""
    n = int(o.share * s)
    return {
        "quest": Quest(pages=n // 16),
        "sentencekv": SentenceKV(budget=n, ends=(1, 2), sentences=s // SENTENCE),
        "actqkv": ActQKV(budget=n, n_init=s // 128, n_local=s // 64),
        "landmark": Landmark(top_k=max(n // 51, 1), share="heads"),
    }


def cache(o: Options, s: int, b: int, dtype) -> KV:
    """A cache of s slots with the last `steps` empty."""
    rng = np.random.default_rng(s + b)
    row = lambda: jnp.asarray(rng.standard_normal((b, o.kv_heads, s, o.width), np.float32)).astype(dtype)
    n = s - o.steps
    pos = np.where(np.arange(s) < n, np.arange(s), -1)[None, None] + np.zeros((b, o.kv_heads, 1), int)
    whole = lambda x, shape: jnp.full(shape, x, jnp.int32)
    segment = jnp.asarray(np.where(pos >= 0, np.arange(s) // SENTENCE, -1), jnp.int32)
    return KV(row(), row(), jnp.asarray(pos, jnp.int32), jnp.zeros(pos.shape), whole(n, (b,)), whole(0, (b,)), whole(n, ()), whole(0, pos.shape[:2]), segment)  # fmt: skip


def rewind(o: Options, kv: KV) -> KV:
    """The cache before the first of the steps."""
    s = kv.pos.shape[2]
    pos = kv.pos.at[:, :, s - o.steps :].set(-1)
    return kv._replace(pos=pos, cursor=jnp.full_like(kv.cursor, s - o.steps), seen=jnp.full_like(kv.seen, s - o.steps))


class Tokens:
    """Queries, keys and values of the steps: [steps b heads 1 width]."""

    def __init__(self, o: Options, b: int, dtype):
        rng = np.random.default_rng(b)
        of = lambda heads: jnp.asarray(rng.standard_normal((o.steps, b, heads, 1, o.width), np.float32)).astype(dtype)
        self.q, self.k, self.v = of(o.heads), of(o.kv_heads), of(o.kv_heads)


def joined(kv: KV, k, v) -> KV:
    pos = jnp.broadcast_to(kv.seen[:, None], (k.shape[0], 1))
    kv = append(kv, k, v, pos, jnp.zeros((*k.shape[:2], 1)))
    return kv._replace(seen=kv.seen + 1)


def ours(o: Options, method: Reader | None, freqs, alone: bool = False) -> Callable[..., Any]:
    """(cache, state, sum of the outputs) after the steps; method None = all slots. `alone`: nothing but the append."""
    sight = Sight(freqs)

    def step(i, held, q, k, v):
        kv, state, total = held
        slot = jnp.broadcast_to(kv.cursor, kv.pos.shape[:2])
        kv = joined(kv, k[i], v[i])
        pos = (kv.seen - 1)[:, None]
        see = sight._replace(ids=jnp.full(pos.shape, 5, jnp.int32))
        if method is None and alone:
            out = q[i]
        elif method is None:
            out, _ = attend_all(q[i], pos, kv, see)
        elif method.attends:
            state, _, out, _ = method.attend({}, 5, state, None, q[i], pos, kv, see)
        else:
            state = method.update({}, state, kv, slot)
            state, carry, index = method.read({}, 5, state, None, q[i], pos, kv, see)
            (state,) = method.finish({}, (state,), carry)
            out, _ = attend_blocks(q[i], pos, kv, index.index, see, method.block, index.rope)
        return kv, state, total + out

    def run(kv, state, q, k, v):
        if method is not None and method.name == "sentencekv.reader":
            state = state._replace(length=jnp.full_like(state.length, 5))  # within a sentence: a sparse step
        held = rewind(o, kv), state, jnp.zeros_like(q[0])
        return lax.fori_loop(0, o.steps, lambda i, held: step(i, held, q, k, v), held)

    return run


def theirs(o: Options) -> Callable[..., Any]:
    """jax.nn.dot_product_attention on a cache [b s g d]."""

    def run(kv, state, q, k, v):
        s = kv[0].shape[1]

        def step(i, held):
            keys, values, total = held
            at = s - o.steps + i
            keys = lax.dynamic_update_slice_in_dim(keys, jnp.swapaxes(k[i], 1, 2), at, 1)
            values = lax.dynamic_update_slice_in_dim(values, jnp.swapaxes(v[i], 1, 2), at, 1)
            length = jnp.full((keys.shape[0],), at + 1, jnp.int32)
            out = jax.nn.dot_product_attention(jnp.swapaxes(q[i], 1, 2), keys, values, key_value_seq_lengths=length)
            return keys, values, total + jnp.swapaxes(out, 1, 2)

        keys, values, total = lax.fori_loop(0, o.steps, step, (*kv, jnp.zeros_like(q[0])))
        return (keys, values), state, total

    return run


class Side:
    """A compiled run that keeps what it was given over."""

    def __init__(self, run, kv, state, tokens: Tokens):
        self.args = tokens.q, tokens.k, tokens.v
        begin = time.perf_counter()
        self.run = jax.jit(run, donate_argnums=(0, 1)).lower(kv, state, *self.args).compile()
        self.compile_s, self.state = time.perf_counter() - begin, state

    def __call__(self, kv) -> tuple[tuple[float, float], Any, Any]:
        """((seconds of all cores, seconds on the clock), the cache, what was attended to)."""
        begin = time.process_time(), time.perf_counter()
        kv, self.state, out = jax.block_until_ready(self.run(kv, self.state, *self.args))
        return (time.process_time() - begin[0], time.perf_counter() - begin[1]), kv, out


def measure(o: Options, s: int, b: int, dtype: str, tick) -> dict[str, Any]:
    """Seconds a step of each side, interleaved."""
    kv, tokens = cache(o, s, b, jnp.dtype(dtype)), Tokens(o, b, jnp.dtype(dtype))
    freqs = 1e4 ** -(jnp.arange(0, o.width, 2) / o.width)
    methods = {name: m for name, m in readers(o, s).items() if not o.only or name in o.only}
    plain = kv._replace(segment=None)
    sides = {"append": Side(ours(o, None, freqs, alone=True), plain, (), tokens)}
    sides["full, ours"] = Side(ours(o, None, freqs), plain, (), tokens)
    for name, m in methods.items():
        state = jax.block_until_ready(m.start({}, 5, kv, o.heads))
        sides[name] = Side(ours(o, m, freqs), plain, state, tokens)
    other = tuple(jnp.copy(jnp.swapaxes(x, 1, 2)) for x in (kv.k, kv.v))
    peer = Side(theirs(o), other, (), tokens)
    del kv
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*sides, "full, jax.nn"]}
    agree: dict[str, float] = {}
    for _ in range(o.repeats + 1):
        took, other, reference = peer(other)
        times["full, jax.nn"].append(took)
        for name, side in sides.items():
            took, plain, out = side(plain)
            times[name].append(took)
            agree[name] = float(jnp.max(jnp.abs(out.astype(jnp.float32) - reference.astype(jnp.float32))))
        tick()
    row: dict[str, Any] = {"slots": s, "batch": b, "dtype": dtype, "differs": agree["full, ours"]}
    row["compile_s"] = {name: round(side.compile_s, 2) for name, side in sides.items()}
    for i, kind in enumerate(KINDS):
        ms = row[f"{kind}_ms"] = {name: quartiles([1e3 * x[i] / o.steps for x in took[1:]]) for name, took in times.items()}
        full = min(ms[name][1] for name in FULL)
        row[f"{kind}_ratio"] = {name: round(full / ms[name][1], 2) for name in methods}
        first = ms["append"][1]
        row[f"{kind}_ratio_but_append"] = {name: round((full - first) / (ms[name][1] - first), 2) for name in methods}
        if "sentencekv" in methods:  # a closing token and the next one read everything
            mean = (1 - 2 / SENTENCE) * ms["sentencekv"][1] + 2 / SENTENCE * ms["full, ours"][1]
            row[f"{kind}_ratio"]["sentencekv, sentences"] = round(full / mean, 2)
    return row


def quartiles(x: list[float]) -> list[float]:
    """25%, median, 75%."""
    return [round(float(v), 4) for v in (*np.quantile(x, (0.25,)), statistics.median(x), *np.quantile(x, (0.75,)))]


def main(o: Options) -> dict[str, Any]:
    size = lambda s, b: 8 * b * o.kv_heads * s * o.width
    todo = [(s, b, "float32") for s in o.sizes for b in o.batches if size(s, b) <= o.most]
    todo += [(s, b, "bfloat16") for s in o.narrow for b in o.batches if size(s, b) <= o.most]
    rows, done = [], 0
    with report.bar("measuring") as progress:
        for s, b, dtype in todo:

            def tick():
                nonlocal done
                done += 1
                progress(done, len(todo) * (o.repeats + 1), f"{s} slots, batch {b}, {dtype}")  # noqa: B023

            rows.append(measure(o, s, b, dtype, tick))
    screen = console()
    for kind in KINDS:
        names = list(rows[0][f"{kind}_ms"])
        table = Table(title=f"{kind}, ms a step of one layer (times less than full attention, the faster)")
        for name in ("slots", "batch", "dtype", *names):
            table.add_column(name, justify="right")
        for r in rows:
            ratio = r[f"{kind}_ratio"]
            cells = [f"{r[f'{kind}_ms'][n][1]:.2f}" + (f" ({ratio[n]:.1f})" if n in ratio else "") for n in names]
            table.add_row(str(r["slots"]), str(r["batch"]), r["dtype"], *cells)
        screen.print(table)
    document = {
        "options": {k: v for k, v in dataclasses.asdict(o).items() if k != "out"},
        "machine": report.machine(),
        "load": os.getloadavg(),
        "goal": GOAL,
        "rows": rows,
    }
    o.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(o.out, document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
