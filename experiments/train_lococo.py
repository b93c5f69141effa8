"""Train LoCoCo's memory for the model of the package: convolutions and alpha alone, the model frozen.

Claim: the step compiles once, gradients reach the convolutions and alpha through all blocks, nothing else moves, and the loss on held-out
    text falls under that of the same slots kept by heavy hitters alone: by a little (0.001 nats a character) after this short a run.
Command: JAXTOK_DATA=... python experiments/train_lococo.py
Hardware and time: a 2.6 GHz Xeon; about 4 minutes of one core (eval.json's half hour is of a machine that ten other programs shared).
Expected: nats a character on the end of Moby Dick, which neither the model nor the memory has seen (results/train_lococo/eval.json):
    full cache 1.6307; 32 slots: heavy hitters alone 1.6862, before training 1.6867, trained 1.6851. metrics.jsonl and curves.png are the
    run's.

Text of `length` characters is read in blocks of `block`; the loss is that of all blocks but the first. Learning rates in the ratio of the
official script: the convolution 1,000 times, alpha 5 times the base rate. Killed and started again, it goes on from its last checkpoint.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxtok.core.recipe import Recipe
from jaxtok.evals.report import machine
from jaxtok.methods import LoCoCo
from jaxtok.models import blocks, load
from jaxtok.train import figures, lococo
from jaxtok.train.loop import fit

ROOT = pathlib.Path(__file__).parents[1]
HELD = 100_000  # characters at the end that are never trained on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """slots: of the memory; block, length: characters; rate: the base learning rate; rows: held-out rows that are measured."""

    slots: int = 32
    block: int = 64
    length: int = 512
    batch: int = 4
    steps: int = 150
    rate: float = 2e-5
    rows: int = 64
    seed: int = 0
    out: pathlib.Path = ROOT / "experiments" / "results" / "train_lococo"


def book() -> str:
    """Moby Dick (Project Gutenberg 2701), as the model of the package knows it."""
    where = pathlib.Path(os.environ.get("JAXTOK_DATA") or ROOT / "data") / "text" / "moby_dick.txt"
    if not where.is_file():
        raise SystemExit(f"needs {where}: point JAXTOK_DATA to the shared data folder")
    text = where.read_text("utf-8-sig")
    for a, b in (("\u201c", '"'), ("\u201d", '"'), ("\u2018", "'"), ("\u2019", "'"), ("\u2014", "--"), ("\r", ""), ("\n\n", "\n")):
        text = text.replace(a, b)
    return text[text.index("Call me Ishmael") : text.rindex("End of Project Gutenberg")]


def windows(ids: np.ndarray, args: Args, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, a function of (seed, step): ids i32 [b n+1] from random places of the training text."""
    at = np.random.default_rng([args.seed, step]).integers(0, len(ids) - args.length - 1, args.batch)
    return {"ids": ids[at[:, None] + np.arange(args.length + 1)]}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nll(cfg, recipe: Recipe, block: int, params: Any, ids: jax.Array) -> jax.Array:
    loss = lococo.make_loss(cfg, recipe, chunk=block)
    return loss(params, {"ids": ids}, None)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _full(cfg, skip: int, params: Any, ids: jax.Array) -> jax.Array:
    z = blocks.forward(cfg, params, ids[:, :-1])[:, skip:]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, ids[:, 1 + skip :]))


def mean(fn, held: np.ndarray, args: Args) -> float:
    """NLL a character over the held-out rows."""
    rows = held[: args.rows * (args.length + 1)].reshape(args.rows, -1)
    parts = [float(fn(jnp.asarray(rows[at : at + args.batch]))) for at in range(0, args.rows, args.batch)]
    return round(float(np.mean(parts)), 4)


def main(args: Args) -> dict[str, Any]:
    """Train, measure, draw."""
    cfg, params, tokenizer = load.load("embedded")
    assert tokenizer is not None
    text = book()
    ids, held = (np.asarray(tokenizer.encode(part, special=False), np.int32) for part in (text[:-HELD], text[-HELD:]))
    recipe = Recipe(policy=LoCoCo(capacity=args.slots))
    params = params | {"methods": recipe.init_params(jax.random.key(args.seed), cfg)}
    start, loss_fn = time.time(), lococo.make_loss(cfg, recipe, chunk=args.block)
    state = fit(
        loss_fn, params, functools.partial(windows, ids, args), steps=args.steps, seed=args.seed, trainable=lococo.trainable,
        optimizer=lococo.optimizer(optax.cosine_decay_schedule(args.rate, args.steps, 0.1)), directory=args.out / "checkpoints",
        save_every=50, log_every=5, tokens=lambda b: b["ids"].size,
    )  # fmt: skip
    seconds = time.time() - start
    metrics = args.out / "metrics.jsonl"
    metrics.write_bytes((args.out / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, args.out / "curves.png", ("loss", "alpha_high"), smooth=5)
    own = state.params["methods"]["policy"]
    scores = {"full cache": mean(functools.partial(_full, cfg, args.block, params), held, args)}
    for name, memory in {
        "alpha = 0: heavy hitters only": own | {"alpha": jnp.zeros_like(own["alpha"])},
        "before training": params["methods"]["policy"],
        "trained": own,
    }.items():
        scores[name] = mean(functools.partial(_nll, cfg, recipe, args.block, params | {"methods": {"policy": memory}}), held, args)
    result = {
        "options": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"},
        "machine": machine(),
        "training seconds": round(seconds, 1),
        "parameters trained": sum(x.size for x in jax.tree.leaves(own)),
        "alpha": np.asarray(own["alpha"]).round(4).tolist(),
        "nats a character": scores,
    }
    (args.out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
