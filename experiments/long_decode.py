"""Ten thousand tokens through a cache of 256 slots, against recomputing the last 256 tokens for each of them.

Claim: with compact positions StreamingLLM and H2O decode without end: no NaN, memory flat, `seen` right, and over the second half of
    the text a mean NLL within 3% of sliding-window recomputation (the model run afresh on the last 256 tokens, for each token).
Command: JAXTOK_DATA=... python experiments/long_decode.py
Hardware and time: one core of a 2.6 GHz Xeon, five minutes, half of it the recomputation.
Expected: see "rows" of experiments/results/long_decode/results.json: StreamingLLM and H2O at compact positions; beside them (nothing is
    claimed of these) both at the text's positions, which leave the model's context of 512 behind, window attention, Keyformer, and what
    the recomputation gives from half as many tokens.

The model is stories260K, the text running stories of the data folder (`--text` takes another). Step i feeds token i and predicts token
i + 1; the caches begin with the text's first token (bos) and every later token goes through a step. A recomputed window ends with
token i, so it sees the same text up to the same token and nothing that is older than the window, at positions 0, 1, 2, ...
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import Progress
from rich.table import Table

from jaxtok.cli.common import console
from jaxtok.core.recipe import Recipe
from jaxtok.evals import report
from jaxtok.methods import H2O, Keyformer, StreamingLLM
from jaxtok.models import blocks, decoder, load

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """steps: tokens decoded; slots: of a cache; score: NLL is averaged over the steps from this one on; every: steps a compiled call."""

    steps: int = 10_000
    slots: int = 256
    score: int = 5_000
    every: int = 500
    batch: int = 50
    within: float = 0.03
    text: str = "tinystories_a.txt"
    model: str = "stories260K"
    out: pathlib.Path | None = ROOT / "experiments/results/long_decode"


def policies(slots: int) -> dict[str, tuple[Recipe, bool]]:
    """name -> (recipe, whether the claim is about it)."""
    return {
        "streaming_llm, compact": (Recipe(policy=StreamingLLM(capacity=slots)), True),
        "h2o, compact": (Recipe(policy=H2O(capacity=slots, compact=True)), True),
        "streaming_llm, absolute": (Recipe(policy=StreamingLLM(capacity=slots, compact=False)), False),
        "h2o, absolute": (Recipe(policy=H2O(capacity=slots)), False),
        "window, compact": (Recipe(policy=StreamingLLM(capacity=slots, sinks=0)), False),
        "h2o, compact, 90% recent": (Recipe(policy=H2O(capacity=slots, recent=0.9, compact=True)), False),
        "keyformer, compact": (Recipe(policy=Keyformer(capacity=slots, compact=True)), False),
    }


def nll(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """-log p(id) f32 [b] of logits [b vocab]."""
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _steps(cfg, recipe: Recipe, params, layers, ids):
    """Feed ids[:-1], predict ids[1:] -> (NLL [t], caches)."""

    def one(layers, pair):
        x = blocks.embed(cfg, params, pair[:1, None])
        x, layers = decoder.step(cfg, params, x, jnp.ones((1, 1), bool), layers, recipe)
        return layers, nll(decoder.logits(cfg, params, x)[:, 0], pair[1:])[0]

    layers, out = jax.lax.scan(one, layers, jnp.stack([ids[:-1], ids[1:]], 1))
    return out, layers


def stream(cfg, params, recipe: Recipe, ids: np.ndarray, *, every: int, tick: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """ids[0] is the prompt, every later one but the last a step -> NLL [len(ids) - 2] of the predictions of ids[2:], what the caches
    say they have seen and hold after each call, and the bytes that are alive in JAX and in the process then."""
    params = jax.tree.map(jnp.asarray, params)
    begin = lambda params, ids: decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), recipe, new=0)[1]
    layers = jax.jit(begin)(params, jnp.asarray(ids[None, :1]))
    out: dict[str, Any] = {"nll": [], "seen": [], "live": [], "bytes": [], "resident": [], "seconds": []}
    for at in range(1, len(ids) - 1, every):
        now = time.perf_counter()
        score, layers = _steps(cfg, recipe, params, layers, jnp.asarray(ids[at : min(at + every, len(ids) - 1) + 1]))
        out["nll"].append(np.array(score))  # a copy: the view would keep the device's array alive
        kvs = [part.kv for parts in layers for part in parts]
        out["seconds"].append(time.perf_counter() - now)
        out["seen"].append(sorted({int(x) for kv in kvs for x in np.asarray(kv.seen)}))
        out["live"].append(max(int((np.asarray(kv.pos) >= 0).sum(-1).max()) for kv in kvs))
        age = np.concatenate([np.asarray(kv.seen[:, None, None] - kv.pos)[np.asarray(kv.pos) >= 0] for kv in kvs])
        out["old"] = float((age > 4 * max(kv.pos.shape[-1] for kv in kvs)).mean())
        del score, kvs
        out["bytes"].append(sum(x.nbytes for x in jax.live_arrays()))
        out["resident"].append(resident())
        tick()
    return out | {"nll": np.concatenate(out["nll"])}


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not say."""
    path = pathlib.Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


@functools.partial(jax.jit, static_argnums=0)
def _afresh(cfg, params, windows, targets):
    return nll(blocks.logits(cfg, params, blocks.hidden(cfg, params, windows)[:, -1:])[:, 0], targets)


def recompute(cfg, params, ids: np.ndarray, steps: np.ndarray, slots: int, *, batch: int, tick=lambda: None) -> np.ndarray:
    """NLL of ids[i + 1] for each step i, by the model run on ids[i - slots + 1 .. i] and nothing else; all windows must be full."""
    params, out = jax.tree.map(jnp.asarray, params), []
    for at in range(0, len(steps), batch):
        i = steps[at : at + batch]
        i = np.pad(i, (0, batch - len(i)), mode="edge")
        windows = ids[i[:, None] + np.arange(1 - slots, 1)]
        out.append(np.array(_afresh(cfg, params, jnp.asarray(windows), jnp.asarray(ids[i + 1]))))
        tick()
    return np.concatenate(out)[: len(steps)]


def verdict(found: dict[str, Any], afresh: np.ndarray, o: Options, claimed: bool) -> dict[str, Any]:
    """The row of one policy: its mean NLL over the last steps against recomputation, and what must hold whatever the score."""
    late = found["nll"][o.score :]
    differ = late - afresh
    # neighbouring steps are alike, so the error of the mean is taken over blocks of 250
    blocks_ = [b.mean() for b in np.array_split(differ, max(len(differ) // 250, 1))]
    ratio = float(late.mean() / afresh.mean())
    kinds = {"bytes": found["bytes"], "resident": [x for x in found["resident"] if x is not None]}
    half = len(found["bytes"]) // 2
    return {
        "nll": float(late.mean()),
        "against recomputation": ratio - 1,
        "error of the difference": float(np.std(blocks_) / math.sqrt(len(blocks_)) / afresh.mean()),
        "nll before": float(found["nll"][: o.score].mean()),
        "worst step": float(found["nll"].max()),
        "nan": bool(np.isnan(found["nll"]).any()),
        "seen": found["seen"][-1],
        "seen is right": found["seen"] == [[min((i + 1) * o.every, o.steps) + 1] for i in range(len(found["seen"]))],
        "live slots": found["live"][-1],
        "slots older than four caches": found["old"],
        "live bytes": sorted(set(kinds["bytes"])),
        "memory is flat": len(set(kinds["bytes"])) == 1,
        "resident MB, middle and end": [round(x / 2**20, 1) for x in (kinds["resident"][half - 1 : half] + kinds["resident"][-1:])],
        "ms a step": 1000 * float(np.sum(found["seconds"][1:])) / max(o.steps - o.every, 1),
        "claimed": claimed,
        "holds": bool(ratio - 1 <= o.within) if claimed else None,
    }


def main(o: Options) -> dict[str, Any]:
    """Run, print the table, write results.json."""
    data = pathlib.Path(os.environ.get("JAXTOK_DATA") or ROOT / "data")
    if not (data / o.model).exists() or not (data / "text" / o.text).is_file():
        raise SystemExit(f"needs {data / o.model} and {data / 'text' / o.text}: point JAXTOK_DATA to the shared data folder")
    cfg, params, tokenizer = load.load(data / o.model)
    assert tokenizer is not None
    text = (data / "text" / o.text).read_text("utf-8-sig")[: 12 * o.steps]
    ids = np.asarray(([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text, special=False), np.int32)
    if len(ids) < o.steps + 2:
        raise SystemExit(f"{o.text} begins with {len(ids)} tokens only; {o.steps} steps need {o.steps + 2}")
    ids, late = ids[: o.steps + 2], np.arange(o.score + 1, o.steps + 1)
    rows, recipes = {}, policies(o.slots)
    with Progress(console=console(140)) as bar:
        job = bar.add_task("decoding", total=len(recipes) * -(-o.steps // o.every))
        found = {
            name: stream(cfg, params, recipe, ids, every=o.every, tick=lambda: bar.advance(job)) for name, (recipe, _) in recipes.items()
        }
        job = bar.add_task("recomputing", total=2 * -(-len(late) // o.batch))
        now = time.perf_counter()
        afresh = recompute(cfg, params, ids, late, o.slots, batch=o.batch, tick=lambda: bar.advance(job))
        seconds = time.perf_counter() - now
        half = recompute(cfg, params, ids, late, o.slots // 2, batch=o.batch, tick=lambda: bar.advance(job))
    for name, (_, claimed) in recipes.items():
        rows[name] = verdict(found[name], afresh, o, claimed)
    result = {
        "options": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(o).items() if k != "out"},
        "machine": report.machine(),
        "recomputation": {
            "nll": float(afresh.mean()),
            "nll from half as many tokens": float(half.mean()),
            "ms a step": 1000 * seconds / len(late),
        },
        "rows": rows,
    }
    table = Table("cache of " + str(o.slots), "NLL", "against recomputation", "memory flat", "seen", "ms a step")
    table.add_row("recomputation", f"{afresh.mean():.4f}", "", "", "", f"{result['recomputation']['ms a step']:.2f}")
    table.add_row("recomputation from half of it", f"{half.mean():.4f}", f"{half.mean() / afresh.mean() - 1:+.2%}", "", "", "")
    for name, r in rows.items():
        change = f"{r['against recomputation']:+.2%} ± {r['error of the difference']:.2%}"
        table.add_row(name, f"{r['nll']:.4f}", change, str(r["memory is flat"]), str(r["seen"]), f"{r['ms a step']:.2f}")
    console(140).print(table)
    if o.out is not None:
        o.out.mkdir(parents=True, exist_ok=True)
        (o.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
