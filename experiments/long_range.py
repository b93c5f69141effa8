"""Trained attentions on associative recall: full attention, a sliding window, CCA, SCOUT, landmarks and meta-tokens at equal parameters.

Claim: at the training length each trained attention answers within 3 points of full attention, which answers at least 95%; a sliding window
    does not; FLOPs of a forward pass and bytes of a decode state grow slower than full attention's for CCA and SCOUT.
Command: python experiments/long_range.py [--systems full cca ...] [--length 1024] [--steps 4000]
Hardware, time and expected numbers: not measured yet.

Every system has the width and depth of the full model but for its MLP, whose hidden channels are chosen so that parameters agree (SCOUT
has half the layers, since its layer is two). A run that was killed goes on from its last checkpoint; curves and eval.json stay in `out`.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """length: rows of a training text; lengths: of the texts that are measured; pairs, asked: of the recall task; near: window of all but full."""

    systems: tuple[str, ...] = SYSTEMS
    length: int = 1024
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    pairs: int = 32
    asked: int = 8
    near: int = 128
    group: int = 8
    width: int = 128
    layers: int = 4
    hidden: int = 256
    batch: int = 16
    steps: int = 4000
    rate: float = 1e-3
    rows: int = 64
    seed: int = 0
    out: pathlib.Path = ROOT / "experiments" / "results" / "long_range"


KEYS = VALUES = 64
TOKEN = KEYS + VALUES + 1


def system(name: str, args: Args) -> tuple[Config, Any]:
    """(configuration, method) of one system, with as many parameters as full attention has (to about one in a hundred)."""
    if name not in SYSTEMS:
        raise SystemExit(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    base = Config(
        vocab=TOKEN + 1, width=args.width, layers=args.layers, heads=4, kv_heads=4, head_dim=args.width // 4, hidden=args.hidden, tied=True
    )
    method = {
        "cca": CCA(group=args.group, window=args.near),
        "scout": SCOUT(segment=args.group, window=args.near),
        "landmark": LandmarkAttention(block=64, token=TOKEN),
        "meta": MetaTokens(token=TOKEN),
    }.get(name)
    if name == "window":
        base = dataclasses.replace(base, window=args.near, local=(True,) * base.layers)
    if name == "scout":
        base = dataclasses.replace(base, layers=args.layers // 2)
    if name in ("scout", "meta"):
        want = count(dataclasses.replace(base, layers=args.layers), None)
        base = min((dataclasses.replace(base, hidden=f) for f in range(32, 4 * args.hidden, 8)), key=lambda c: abs(count(c, method) - want))
    return base, method


def count(cfg: Config, method: Any) -> int:
    """Parameters of a system."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: made(cfg, method, 0))))


def made(cfg: Config, method: Any, seed: int) -> Any:
    params = blocks.stack(blocks.init(cfg, jax.random.key(seed)))
    return params if method is None else params | {"methods": Recipe(attention=method).init_params(jax.random.key(seed + 1), cfg)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def texts(args: Args, method: Any, length: int, b: int, key: jax.Array) -> language.Batch:
    """A batch as the system gets it, landmarks and meta-tokens put in."""
    draw, places = jax.random.split(key)
    batch = language.recall(draw, b, length, pairs=args.pairs, asked=args.asked, keys=KEYS, values=VALUES)
    if isinstance(method, LandmarkAttention):
        return language.insert_landmarks(batch, TOKEN, method.block, predict=False)
    return language.insert_meta(batch, TOKEN, places, ratio=method.ratio) if isinstance(method, MetaTokens) else batch


def measured(args: Args, cfg: Config, method: Any, params: Any, length: int) -> dict[str, Any]:
    """Share of right answers, FLOPs and seconds of a text's forward pass, bytes of its decode state."""
    score = jax.jit(language.make_loss(cfg, method, remat=False))
    right, seconds, n = [], [], 0
    for i in range(args.rows):
        batch = texts(args, method, length, 1, jax.random.fold_in(jax.random.key(10**6 + args.seed), i))
        begin = time.perf_counter()
        right.append(float(score(params, batch, None)[1]["accuracy"]))
        seconds.append(time.perf_counter() - begin)
        n = batch["ids"].shape[1]
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blocks.unstack(params))
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    forward = lambda params, ids: blocks.hidden(cfg, params, ids, method=method, remat=False)
    state = jax.eval_shape(lambda params: decoder.empty(cfg, params, 1, n, Recipe(attention=method)), whole)
    return {
        "length": length,
        "accuracy": round(float(np.mean(right)), 4),
        "flops": cost.count(forward, whole, ids).flops,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "seconds": round(float(np.median(seconds)), 5),
    }


def run(name: str, args: Args) -> dict[str, Any]:
    """Train and measure one system."""
    cfg, method = system(name, args)
    out = args.out / name
    key = jax.random.key(args.seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, min(200, args.steps // 10 + 1), args.steps, args.rate / 10)
    state = fit(
        language.make_loss(cfg, method), made(cfg, method, args.seed),
        lambda step: texts(args, method, args.length, args.batch, jax.random.fold_in(key, step)),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)), steps=args.steps, seed=args.seed,
        directory=out / "checkpoints", save_every=200, log_every=20, tokens=lambda b: b["ids"].size,
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    metrics.write_bytes((out / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, out / "curves.png", ("loss", "accuracy"), smooth=5)
    lengths = sorted({args.length, *args.lengths})
    return {"parameters": count(cfg, method), "lengths": [measured(args, cfg, method, state.params, n) for n in lengths]}


def main(args: Args) -> dict[str, Any]:
    """Train and measure all systems; those that are done are not done again."""
    args.out.mkdir(parents=True, exist_ok=True)
    where = args.out / "eval.json"
    options = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "systems")}
    options = json.loads(json.dumps(options))
    result = json.loads(where.read_text()) if where.exists() else {"options": options, "systems": {}}
    if result["options"] != options:
        raise SystemExit(f"{where} is of other options; give another --out")
    for name in args.systems:
        if name not in result["systems"]:
            result["systems"][name] = run(name, args) | {"machine": machine()}
            where.write_text(json.dumps(result, indent=1) + "\n")
        print(name, *(f"{row['length']}: {row['accuracy']}" for row in result["systems"][name]["lengths"]), sep="  ")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
