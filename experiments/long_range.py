"""Trained attentions on long texts at equal parameters: full attention, a sliding window, CCA, SCOUT, landmarks and meta-tokens.

Claim: trained on 1,024 rows, CCA, SCOUT, landmarks and meta-tokens answer associative recall (16 pairs, all asked) within 3 points of full
    attention, which answers at least 95%. Measured on 64 texts, 1,024 questions, one seed: full 100.0%, CCA 99.5%, SCOUT 100.0%, landmarks
    99.9%, meta-tokens 99.8%, a sliding window of 32 rows a layer 10.5% (chance is 6.2%). No system keeps that at 16 times the length; FLOPs and
    bytes of a decode state grow slower than full attention's for CCA and SCOUT (results/long_range/recall/README.md).
Command: python experiments/long_range.py [--systems full cca ...]       associative recall and needle, 1k to 16k
         JAXTOK_DATA=... python experiments/long_range.py --task text    bits a byte of a novel's end, not trained on
    with XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" for one core.
Hardware and time: part of one core of a Xeon that other programs used too, so the seconds of the tables are rough; 5 to 15 minutes a system
    to train (`train_seconds`), 2 to 8 to measure. Text: 200 steps of 2,048 bytes, a minute a system, 16,384 bytes
    measured at 256 a row: full 2.68, window 2.65, CCA 2.66, SCOUT 2.80, landmarks 2.68, meta-tokens 2.80 (a check that all learn, no more).

Every system has the width and depth of the full model; the MLP's hidden channels are chosen so that parameters agree (a SCOUT layer is two
attentions and two MLPs, meta-tokens add an attention). Data, steps and rates are the same for all. A run that was killed goes on from its
last checkpoint, what is done is not done again; curves, metrics, eval.json, a table and a figure stay in `out`/<task>.

How to read the tables: FLOPs and decode state of the window are those of a mask, as the decoder has it; landmarks read all blocks (their
training form; the reader `landmark` retrieves few). Needle is the same task with one pair, which no stage trains; from 8,192 rows on it is
8 and 4 questions, recall 128 and 64.

What made recall learnable in minutes: short texts first (64 rows, then up to `length`), every pair asked, few different ids, RMS-normed
queries and keys, embeddings of std 0.7, and a head that begins by looking one row back (`language.look_back`).
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtok.core.recipe import Recipe
from jaxtok.evals import cost
from jaxtok.evals.report import machine
from jaxtok.methods import CCA, SCOUT, LandmarkAttention, MetaTokens
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.train import figures, language
from jaxtok.train.loop import fit

ROOT = pathlib.Path(__file__).parents[1]
SYSTEMS = ("full", "window", "cca", "scout", "landmark", "meta")
KEYS, VALUES = 32, 16


@dataclasses.dataclass(frozen=True)
class Stage:
    """steps updates on texts of `length` rows; pairs, asked: of recall."""

    steps: int
    length: int
    pairs: int = 0
    asked: int = 0


STAGES = {
    "recall": (Stage(400, 64, 4, 16), Stage(300, 128, 4, 8), Stage(400, 256, 8, 8), Stage(200, 512, 12, 12), Stage(200, 1024, 16, 16)),
    "text": (Stage(200, 256),),
}
LENGTHS = {"recall": (1024, 2048, 4096, 8192, 16384), "text": (256, 1024)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """near: the window of all but full, landmark and meta; group: of CCA; segment: of SCOUT; block: of landmarks, with the landmark.

    tokens: of a step; rows: texts measured at the shortest length (and as many tokens of the longer ones, at least 4 texts).
    """

    task: str = "recall"
    systems: tuple[str, ...] = SYSTEMS
    near: int = 32
    group: int = 4
    segment: int = 8
    block: int = 17
    width: int = 64
    heads: int = 2
    layers: int = 2
    hidden: int = 256
    tokens: int = 2048
    rate: float = 3e-3
    rows: int = 64
    seed: int = 0
    out: pathlib.Path = ROOT / "experiments" / "results" / "long_range"


def system(name: str, args: Args) -> tuple[Config, Any]:
    """(configuration, method) of one system, with as many parameters as full attention has (to about one in a hundred)."""
    if name not in SYSTEMS:
        raise SystemExit(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    token = 256 if args.task == "text" else KEYS + VALUES + 1
    base = Config(
        vocab=token + 1, width=args.width, layers=args.layers, heads=args.heads, kv_heads=args.heads, head_dim=args.width // args.heads,
        hidden=args.hidden, tied=True, qk_norm=True, qkv_bias=True, rope_theta=1e6,
    )  # fmt: skip
    method = {
        "cca": CCA(group=args.group, window=args.near),
        "scout": SCOUT(segment=args.segment, window=args.near),
        "landmark": LandmarkAttention(block=args.block, token=token),
        "meta": MetaTokens(token=token),
    }.get(name)
    if name == "window":
        base = dataclasses.replace(base, window=args.near, local=(True,) * base.layers)
    if name in ("scout", "meta"):
        want = count(base, None)
        base = min((dataclasses.replace(base, hidden=f) for f in range(8, args.hidden, 2)), key=lambda c: abs(count(c, method) - want))
    return base, method


def count(cfg: Config, method: Any) -> int:
    """Parameters of a system."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: made(cfg, method, 0))))


def made(cfg: Config, method: Any, seed: int) -> Any:
    """Parameters at the start."""
    params = blocks.stack(blocks.init(cfg, jax.random.key(seed), embed_std=0.7 if cfg.vocab < 256 else None))
    params = language.look_back(cfg, params)
    params["layers"] |= {k: 1.4 * params["layers"][k] for k in ("q_norm", "k_norm")}
    return params if method is None else params | {"methods": Recipe(attention=method).init_params(jax.random.key(seed + 1), cfg)}


@functools.cache
def book() -> tuple[jax.Array, jax.Array]:
    """Moby Dick (Project Gutenberg 2701) as bytes, and its last 100,000."""
    where = pathlib.Path(os.environ.get("JAXTOK_DATA") or ROOT / "data") / "text" / "moby_dick.txt"
    if not where.is_file():
        raise SystemExit(f"needs {where}: point JAXTOK_DATA to the shared data folder")
    text = where.read_bytes()
    text = text[text.index(b"Call me Ishmael") : text.rindex(b"End of Project Gutenberg")]
    ids = jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))
    return ids[:-100_000], ids[-100_000:]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def told(method: Any, stage: Stage, b: int, key: jax.Array) -> language.Batch:
    """A batch of recall as the system gets it."""
    draw, places = jax.random.split(key)
    return marked(method, language.recall(draw, b, stage.length, pairs=stage.pairs, asked=stage.asked, keys=KEYS, values=VALUES), places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(method: Any, n: int, ids: jax.Array, start: jax.Array, key: jax.Array) -> language.Batch:
    """The n bytes from each start on as the system gets them."""
    return marked(method, language.text(jax.vmap(lambda i: jax.lax.dynamic_slice(ids, (i,), (n,)))(start)), key)


def marked(method: Any, batch: language.Batch, key: jax.Array) -> language.Batch:
    """The batch with landmarks or meta-tokens put in."""
    if isinstance(method, LandmarkAttention):
        return language.insert_landmarks(batch, method.token, method.block, predict=False)
    return language.insert_meta(batch, method.token, key, ratio=method.ratio) if isinstance(method, MetaTokens) else batch


def batch_of(args: Args, method: Any, step: int) -> language.Batch:
    """The training batch of a step."""
    stages = STAGES[args.task]
    stage = stages[int(np.searchsorted(np.cumsum([s.steps for s in stages]), step, side="right"))]
    key, b = jax.random.fold_in(jax.random.key(args.seed), step), max(1, args.tokens // stage.length)
    if args.task == "recall":
        return told(method, stage, b, key)
    places, key = jax.random.split(key)
    return read(method, stage.length, book()[0], jax.random.randint(places, (b,), 0, len(book()[0]) - stage.length), key)


def measured(args: Args, cfg: Config, method: Any, params: Any, length: int) -> dict[str, Any]:
    """Share of right answers (recall, needle) or bits a byte, FLOPs and seconds of a text's forward pass, bytes of its decode state."""
    score, seconds, n = jax.jit(language.make_loss(cfg, method, remat=False)), [], 0

    def mean(task: str, pairs: int = 0) -> float:
        nonlocal n
        out = []
        for i in range(max(4, args.rows * min(LENGTHS[args.task]) // length)):
            key = jax.random.fold_in(jax.random.key(10**6 + args.seed), i)
            if task == "text":
                batch = read(method, length, book()[1], jnp.asarray([i * length % (len(book()[1]) - length)]), key)
            else:
                batch = told(method, Stage(0, length, pairs, pairs), 1, key)
            begin = time.perf_counter()
            loss, more = jax.block_until_ready(score(params, batch, None))
            seconds.append(time.perf_counter() - begin)
            n = batch["ids"].shape[1]
            out.append(float(loss) / math.log(2) if task == "text" else float(more["accuracy"]))
        return round(float(np.mean(out)), 4)

    pairs = STAGES[args.task][-1].pairs
    scores = {"bits": mean("text")} if args.task == "text" else {"recall": mean("recall", pairs), "needle": mean("needle", 1)}
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blocks.unstack(params))
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    forward = lambda params, ids: blocks.hidden(cfg, params, ids, method=method, remat=False)
    state = jax.eval_shape(lambda params: decoder.empty(cfg, params, 1, n, Recipe(attention=method)), whole)
    return {"length": length} | scores | {
        "flops": cost.count(forward, whole, ids).flops,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "seconds": round(float(np.median(seconds)), 5),
    }  # fmt: skip


def run(name: str, args: Args) -> dict[str, Any]:
    """Train and measure one system."""
    cfg, method = system(name, args)
    out = args.out / args.task / name
    steps = sum(s.steps for s in STAGES[args.task])
    warm, hold = min(50, steps // 4 + 1), steps // 2 + 1
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, args.rate, warm), optax.constant_schedule(args.rate), optax.cosine_decay_schedule(args.rate, steps - hold + 1, 0.05)],
        [warm, hold],
    )  # fmt: skip
    state = fit(
        language.make_loss(cfg, method, remat=False), made(cfg, method, args.seed), lambda step: batch_of(args, method, step),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)), steps=steps, seed=args.seed,
        directory=out / "checkpoints", save_every=100, log_every=10, tokens=lambda b: b["ids"].size,
        on_log=lambda line: line["step"] % 100 or print({k: round(float(v), 3) for k, v in line.items()}, flush=True), progress=False,
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    metrics.write_bytes((out / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, out / "curves.png", ("loss", "accuracy"), smooth=9)
    rows = []
    for n in LENGTHS[args.task]:
        rows.append(measured(args, cfg, method, state.params, n))
        print(name, rows[-1], flush=True)
    return {
        "method": repr(method),
        "hidden": cfg.hidden,
        "parameters": count(cfg, method),
        "train_seconds": round(json.loads(metrics.read_text().splitlines()[-1])["wall"], 1),
        "lengths": rows,
    }


def draw(result: dict[str, Any], where: pathlib.Path, task: str) -> None:
    """The table and the figure of all systems that are done."""
    shown = ("bits",) if task == "text" else ("recall", "needle")
    panels = (*shown, "flops", "state_bytes", "seconds")
    drawn = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, len(panels))
    for name, r in result["systems"].items():
        for axis, panel in zip(axes, panels, strict=True):
            axis.plot([x["length"] for x in r["lengths"]], [x[panel] for x in r["lengths"]], marker="o", label=name)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("length")
        axis.set_title(panel)
        axis.grid(alpha=0.3)
        if panel not in shown:
            axis.set_yscale("log")
    axes[0].legend()
    drawn.savefig(where / "lengths.png", dpi=90)
    lengths = [x["length"] for x in next(iter(result["systems"].values()))["lengths"]]
    title = {"recall": "share of right answers, recall", "needle": "share of right answers, needle", "bits": "bits a byte, held-out text"}
    title |= {"flops": "MFLOPs of a forward pass", "state_bytes": "KiB of decode state", "seconds": "seconds of a forward pass"}
    text = f"# {task}: trained attentions against length\n\n![against length](lengths.png)\n"
    for panel in panels:
        unit = {"flops": 1e-6, "state_bytes": 2**-10}.get(panel, 1)
        text += f"\n{title[panel]}:\n\n| system | parameters | " + " | ".join(f"{n:,}" for n in lengths) + " |\n|---|---:|"
        text += "---:|" * len(lengths) + "\n"
        for name, r in result["systems"].items():
            cells = (f"{x[panel] * unit:,.{0 if unit != 1 else 3}f}" for x in r["lengths"])
            text += f"| {name} | {r['parameters']:,} | " + " | ".join(cells) + " |\n"
    (where / "README.md").write_text(text)


def main(args: Args) -> dict[str, Any]:
    """Train and measure all systems; those that are done are not done again."""
    if args.task not in STAGES:
        raise SystemExit(f"no task {args.task!r}; there are {', '.join(STAGES)}")
    folder = args.out / args.task
    folder.mkdir(parents=True, exist_ok=True)
    where = folder / "eval.json"
    options = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "systems")}
    options |= {"stages": [dataclasses.asdict(s) for s in STAGES[args.task]], "lengths": list(LENGTHS[args.task])}
    result = json.loads(where.read_text()) if where.exists() else {"options": options, "systems": {}}
    if result["options"] != options:
        raise SystemExit(f"{where} is of other options; give another --out")
    for name in args.systems:
        if name not in result["systems"]:
            result["systems"][name] = run(name, args) | {"machine": machine()}
            result["systems"] = {s: result["systems"][s] for s in SYSTEMS if s in result["systems"]}
            where.write_text(json.dumps(result, indent=1) + "\n")
            draw(result, folder, args.task)
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
