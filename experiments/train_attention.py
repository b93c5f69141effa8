"""Train encoders with other attention: PoNet, MAELRE, BiFormer, memory reweaving, beside full attention, on two small tasks.

Claim: PoNet 1.000 and MAELRE 0.999 of 1,000 rows right where full attention has 1.000 (recall as classification); BiFormer 0.874 and
    MAELRE 0.701 where full attention has 0.701 (digits on a cluttered canvas; 96,000 canvases are few: none has learnt all it could).
Command: JAXTOK_DATA=... python experiments/train_attention.py
Hardware and time: one core of a Xeon that others used too; 4 to 13 minutes a run, in eval.json, an hour in all.
Expected: results/train_attention/<task>/<system>/eval.json, curves.png and metrics.jsonl; README.md with the table, a figure a task.

Both tasks are small, because full attention had to learn them in minutes: a pair of recall is one token (17 rows: a question, 16 pairs),
and the digits stand at multiples of 7 pixels, as the patches do. With two tokens a pair full attention itself was at chance after
50,000 rows of two pairs, with digits anywhere at 0.28 after 440 steps. One seed. MAELRE's ratio on the canvas was chosen after a first
run (maelre_half, 0.614): with a half, all even rows must join an odd one; with three quarters those most alike do.

One model a system, everything else the same: width, layers, data, steps, rates, seed. PoNet has three more projections a layer, BiFormer a
depthwise kernel, memory reweaving a matrix for each remembered layer: eval.json counts the parameters, and FLOPs of one forward pass.
Killed and started again, each run goes on from its last checkpoint; what is finished is not run again.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and may ask for a display

from jaxtok.core.recipe import Recipe
from jaxtok.evals import clutter, recall
from jaxtok.evals.cost import count
from jaxtok.evals.digits import load
from jaxtok.evals.report import machine
from jaxtok.methods import BiFormer, MemoryReweaving, PoNet
from jaxtok.methods.attention.maelre import maelre
from jaxtok.models import encoder
from jaxtok.models.config import EncoderConfig
from jaxtok.train import classify, figures
from jaxtok.train.loop import fit
from jaxtok.train.metrics import read

ROOT = pathlib.Path(__file__).parents[1]
LAYERS, KEYS, VALUES, LENGTH = 4, 16, 8, 17
PATCH = 7  # pixels; the digits stand as the patches do
SHAPE: dict[str, Any] = dict(width=64, layers=LAYERS, heads=4, hidden=128, cls=False, pool="mean")
CONFIGS = {
    "clutter": EncoderConfig(**SHAPE, image=(clutter.SIDE, clutter.SIDE), patch=(PATCH, PATCH), channels=1, out=10),
    "recall": EncoderConfig(**SHAPE, image=None, vocab=recall.entries_vocab(KEYS, VALUES), context=LENGTH, out=VALUES),
}
SYSTEMS = {
    "clutter": {  # 64 patches
        "full": Recipe(),
        "biformer": Recipe(attention=BiFormer(side=4, topk=(1, 2, 4, -2))),
        "maelre": maelre(LAYERS, stages=3, ratio=0.75),  # 64 rows are no more than channels: exact attention, merging alone
        "maelre_half": maelre(LAYERS, stages=3, switch=32),  # all even rows join an odd one: nothing is left to choose
    },
    "recall": {  # 17 rows
        "full": Recipe(),
        "ponet": Recipe(attention=PoNet(segments=4)),
        "maelre": maelre(LAYERS, stages=2, switch=12, kind="nystrom", landmarks=8),
        "memory_reweaving": Recipe(attention=MemoryReweaving(layers=(0, 1, 2), slots=8)),
    },
}
STEPS, BATCH = {"clutter": 1500, "recall": 1200}, {"clutter": 64, "recall": 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """tasks, systems: which ones (none = all); rows: of recall to test on (the digits have 1,000)."""

    tasks: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    steps: int | None = None  # None: STEPS and BATCH of the task
    batch: int | None = None
    rate: float = 2e-3
    decay: float = 0.05
    rows: int = 1000
    seed: int = 0
    save_every: int = 250
    out: pathlib.Path = ROOT / "experiments" / "results" / "train_attention"


def batches(task: str, args: Args):
    """A function of the step alone."""
    seed, size = args.seed + 1, args.batch or BATCH[task]
    if task == "clutter":
        digits = load("train")
        return lambda step: clutter.batch(digits, seed, size, start=step * size, bend=1.0, step=PATCH)._asdict()
    return lambda step: recall.entries(seed, size, length=LENGTH, keys=KEYS, values=VALUES, start=step * size)._asdict()


@functools.cache
def held(task: str, rows: int) -> dict[str, np.ndarray]:
    """What is measured: another seed, and digits never trained on."""
    if task == "clutter":
        return clutter.held_out(step=PATCH)._asdict()
    return recall.entries(0, rows, length=LENGTH, keys=KEYS, values=VALUES)._asdict()


def begin(cfg: EncoderConfig, recipe: Recipe, key) -> dict[str, Any]:
    """Random parameters; tokens begin with unit size, positions of patches with half of it: with 0.02 they are hard to find."""
    params: dict[str, Any] = encoder.init(cfg, key) | {"methods": recipe.init_params(jax.random.fold_in(key, 1), cfg)}
    if cfg.vocab is None:
        return params | {"pos": 25.0 * params["pos"]}
    return params | {"embed": params["embed"] * cfg.vocab**0.5}


def train(task: str, name: str, args: Args) -> dict[str, Any]:
    """One system on one task."""
    out, cfg, recipe = args.out / task / name, CONFIGS[task], SYSTEMS[task][name]
    options = {"proportional": True} if recipe.vit else {}
    steps = args.steps or STEPS[task]
    params = begin(cfg, recipe, jax.random.key(args.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(1, steps // 20), steps, args.rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=args.decay))
    state = fit(
        classify.make_loss(cfg, recipe, **options), params, batches(task, args), optimizer=optimizer, steps=steps, seed=args.seed,
        directory=out / "checkpoints", save_every=args.save_every, log_every=min(20, steps), tokens=lambda b: len(b["label"]),
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    metrics.write_bytes((out / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, out / "curves.png", ("loss", "right"), smooth=9)
    test = held(task, args.rows)
    one = {n: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for n, x in test.items()}
    result = {
        "task": task,
        "system": name,
        "recipe": repr(recipe),
        "options": {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "tasks", "systems")}
        | {"steps": steps, "batch": args.batch or BATCH[task]},
        "machine": machine(),
        "seconds of training": json.loads(metrics.read_text().splitlines()[-1])["wall"],
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "flops a row": count(lambda p, b: classify.logits(cfg, p, b, recipe, **options), state.params, one).flops,
        "right": round(float(np.mean(classify.right(cfg, state.params, test, recipe, **options))), 4),
    }
    (out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def page(out: pathlib.Path) -> None:
    """README.md, the table of all runs that lie there, and a figure a task: how each system's share of right rows grew."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/eval.json"))]
    lines = [
        "# Other attention in encoders",
        "",
        "Made by experiments/train_attention.py. `right`: of the rows to test on; seconds: of training, on a machine that others used too.",
    ]
    for task in SYSTEMS:
        rows = {r["system"]: r for r in found if r["task"] == task}
        if not rows:
            continue
        full = rows.get("full", {}).get("right")
        lines += [
            "",
            f"## {task}",
            "",
            "| system | right | to full, points | parameters | FLOPs a row | seconds |",
            "|---|---|---|---|---|---|",
        ]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for name, r in rows.items():
            apart = "" if full is None else f"{100 * (r['right'] - full):+.1f}"
            lines.append(
                f"| {name} | {r['right']:.3f} | {apart} | {r['parameters']:,} | {r['flops a row']:,} | {r['seconds of training']:.0f} |"
            )
            curve = read(out / task / name / "metrics.jsonl")
            mean = [np.mean([x["right"] for x in curve[max(0, i - 8) : i + 1]]) for i in range(len(curve))]
            axis.plot([x["step"] for x in curve], mean, label=name)
        axis.set(xlabel="step", ylabel="right in training, mean of 9 lines", title=task)
        axis.legend()
        figure.savefig(out / f"{task}.png", dpi=100)
        lines += ["", f"![{task}]({task}.png)"]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main(args: Args) -> list[dict[str, Any]]:
    """Train what is asked; print what came of it."""
    known = {name for systems in SYSTEMS.values() for name in systems}
    if unknown := (set(args.tasks) - set(SYSTEMS)) | (set(args.systems) - known):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; tasks: {', '.join(SYSTEMS)}; systems: {', '.join(sorted(known))}")
    results = []
    for task in args.tasks or SYSTEMS:
        for name in SYSTEMS[task]:
            if args.systems and name not in args.systems:
                continue
            results.append(train(task, name, args))
            r = results[-1]
            print(
                f"{task:8} {name:18} right {r['right']:.3f}  parameters {r['parameters']:,}  FLOPs a row {r['flops a row']:,}", flush=True
            )
    page(args.out)
    return results


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
