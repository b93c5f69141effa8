"""Learn DuoAttention's gates for the character model of the package, and see whether they name the heads that retrieve.

Claim: 150 updates close the gate of the one head of six that the answers do not need and leave the others over 0.8. What half of the
    heads streaming costs is what the script measures at its end.
Command: python experiments/train_duo_gates.py                      (gates.tsv and results.json in experiments/results/duo_gates)
    For a model of yours: --model DIR --sinks 128 --recent 256 --length 8192 --steps 2000 (the paper's sizes; passkeys as below).
Hardware and time: one core of a 2.6 GHz Xeon, about three minutes, one of them training.
Expected: gates .00 .94 | 1.0 1.0 | .85 .93 (layer by layer); in results.json the share of answers found when the heads of the largest gates
    are whole, those of the smallest, those of kvpress's scores on the fly and of RazorAttention's search (not recorded yet).

Texts with eight facts, of which one is asked for at the end; the rows that say the answer are brought near to what full attention makes of
them (the official code takes the rows of the answer's own tokens, behind the first), the model itself is frozen.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.core import heads
from jaxtok.core.recipe import Recipe
from jaxtok.evals import batched, report, tasks
from jaxtok.evals.heads import SEARCH
from jaxtok.methods.policy.duo_attention import DuoAttention, full_heads, save_gates
from jaxtok.models import blocks, load
from jaxtok.train.duo_attention import learn

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """length: tokens of a text. pool: different texts. sparsity: share of the heads that stream in the evaluation of `count` texts."""

    model: str = "embedded"
    length: int = 256
    steps: int = 150
    batch: int = 8
    pool: int = 256
    lr: float = 0.02
    weight: float = 0.05
    sinks: int = 4
    recent: int = 16
    sparsity: float = 0.5
    count: int = 32
    seed: int = 0
    out: pathlib.Path = ROOT / "experiments/results/duo_gates"


def texts(tokenizer, args: Args, count: int, split: str) -> list[tuple[list[int], list[int], list[int]]]:
    """(context, question, answer) as ids."""
    encode = lambda s: tokenizer.encode(s, special=False)
    made = tasks.examples("multi_key", count, length=args.length - 4, encode=encode, seed=args.seed, split=split)
    return [(tokenizer.encode(e.context, special=True), encode(e.question), encode("".join(e.answers))) for e in made]


def data(tokenizer, args: Args):
    """step -> batch of left-padded texts; `label` marks the rows that say the answer: each one before a token of it."""
    found = texts(tokenizer, args, args.pool, "train")
    n = max(sum(map(len, text)) for text in found)
    ids, live, label = (np.zeros((len(found), n), kind) for kind in (np.int32, bool, bool))
    for row, (context, question, answer) in enumerate(found):
        whole = [*context, *question, *answer]
        ids[row, -len(whole) :], live[row, -len(whole) :], label[row, -len(answer) - 1 : -1] = whole, True, True

    def at(step: int) -> dict:
        rows = np.random.default_rng([args.seed, step]).integers(0, len(found), args.batch)
        return {"ids": jnp.asarray(ids[rows]), "live": jnp.asarray(live[rows]), "label": jnp.asarray(label[rows])}

    return at


def found(cfg, params, tokenizer, args: Args, full: np.ndarray) -> float:
    """The share of answers that the model gives with these heads whole and the others streaming."""
    sizes, order = heads.split(full)
    recipe = Recipe(policy=DuoAttention(capacity=args.sinks + args.recent, sinks=args.sinks), heads=sizes)
    model = batched.Model(cfg=cfg, params=blocks.reorder_heads(cfg, params, order), method=recipe, batch=args.count)
    cases = texts(tokenizer, args, args.count, "eval")
    said = model.continuations([(batched.Prompt(context, question), len(answer)) for context, question, answer in cases])
    return float(np.mean([mine == answer for mine, (_, _, answer) in zip(said, cases, strict=True)]))


def main(args: Args) -> dict:
    """Learn, evaluate, write."""
    cfg, params, tokenizer = load.load(args.model)
    lines: list[dict] = []
    gates, _ = learn(
        cfg, params, data(tokenizer, args), steps=args.steps, lr=args.lr, sinks=args.sinks, recent=args.recent, weight=args.weight,
        log_every=max(1, args.steps // 5), on_log=lines.append,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    save_gates(args.out / "gates.tsv", gates)
    largest = full_heads(gates, sparsity=args.sparsity)
    count = int(largest.sum())
    choices = {"all heads": np.ones_like(largest), "largest gates": largest, "smallest gates": heads.best(-gates, count)}
    choices |= {name: search(cfg, params, tokenizer, args.length)(count) for name, search in SEARCH.items()}
    choices |= {"no head": np.zeros_like(largest)}
    scores = {name: found(cfg, params, tokenizer, args, full) for name, full in choices.items()}
    for name, score in scores.items():
        print(f"{name:16} whole: {score:.2f} of the answers")
    document = {
        "args": dataclasses.asdict(args) | {"out": None},
        "machine": report.machine(),
        "gates": np.round(gates, 4).tolist(),
        "whole": {name: full.astype(int).tolist() for name, full in choices.items()},
        "answers": scores,
        "log": [{k: line[k] for k in ("step", "loss", "distill", "size")} for line in lines],
    }
    report.write(args.out / "results.json", document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
