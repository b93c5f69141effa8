"""How far down its window a needle ranks by the question's attention: what the settings of infini_retri.py were chosen by.

Command: python experiments/infini_retri_ranks.py
Hardware and time: two cores of a 2.6 GHz Xeon, 5 minutes with a dozen other programs beside it.
Expected: experiments/results/infini_retri/ranks.json. The most above the needle of any of 400 keys, weighted: 11 tokens and 111 characters
    in the last layer, 3 and 69 in the one before it, no use in the first.

Keys that the evaluation does not use, each in a window of text of its own. Above the needle: tokens of larger score than the best of its
sentence (with a topk of no more than these the sentence goes), and characters of the sentences that come before it and its own (it goes
where the room is less). Scores as the method has them, for each layer, with the question's weights from a first chunk of other text or
without.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.cli.common import console
from jaxtok.evals import report, tasks
from jaxtok.methods import InfiniRetri
from jaxtok.models import decoder, load, text

QUANTILES = 0.5, 0.9, 0.98, 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """first, count: development seeds, not 0 to 4; window: tokens of retained text, chunk and question; chunk: of the first one."""

    first: int = 1000
    count: int = 400
    window: int = 1004
    chunk: int = 620
    question: int = 20
    width: int = 8
    hardest: int = 10
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "infini_retri" / "ranks.json"


def sentences(context: str) -> np.ndarray:
    """Number of each character's sentence."""
    ends = np.array([c in ".?!\n" for c in context])
    return np.cumsum(ends) - ends


def above(score: np.ndarray, context: str, answer: str) -> tuple[int, int]:
    """(tokens that score more than the answer's sentence, characters of the sentences up to it by their best tokens)."""
    of = sentences(context)
    best = np.array([score[of == i].max() for i in range(of[-1] + 1)])
    mine = best[of[context.index(answer)]]
    return int((score > mine).sum()), int(np.bincount(of)[best >= mine].sum())


def main(o: Options) -> dict[str, Any]:
    cfg, params, tokenizer = load.load("embedded")
    encode = lambda s: tokenizer.encode(s, special=False)
    method = InfiniRetri(capacity=o.window, question=o.question, width=o.width)

    @jax.jit
    def look(params, ids, live):  # [layers b q n], heads summed
        tokens = decoder.embed(cfg, params, ids, live)
        return jnp.stack([decoder.last_rows(cfg, params, tokens, o.question, layer=i).sum(1) for i in range(cfg.layers)])

    score = jax.jit(jax.vmap(lambda rows, w: method.scores(rows[None, None], w[None])[0]))
    found: list[dict[str, Any]] = []
    with report.bar("looking") as progress:
        for seed in range(o.first, o.first + o.count):
            rng = np.random.default_rng(seed)
            case = tasks.examples("needle", 1, length=o.window, encode=encode, seed=seed, depth=float(rng.uniform(0.1, 0.9)))[0]
            start, q = int(rng.integers(0, len(tasks.haystack()) - o.chunk)), len(encode(case.question))
            before = tasks.haystack()[start : start + o.chunk]
            ids, live = text.pad([encode(x + case.question) for x in (case.context, before)], o.window)
            rows = np.asarray(look(params, jnp.asarray(ids), jnp.asarray(live)))
            seen, first = (np.where(np.arange(o.question)[:, None] >= o.question - q, rows[:, b], 0) for b in (0, 1))
            n, pad = len(case.context), o.window - int(live[0].sum())
            line: dict[str, Any] = {"seed": seed, "key": case.question.strip()}
            for name, w in (("weighted", first[..., -q:].sum(-1)), ("plain", np.ones(first.shape[:2], np.float32))):
                s = np.asarray(score(jnp.asarray(seen), jnp.asarray(w)))[:, pad : pad + n]
                line |= {f"layer {i}, {name}": above(s[i], case.context, case.answers[0]) for i in range(cfg.layers)}
            found.append(line)
            progress(len(found), o.count, "keys")
    names = [name for name in found[0] if name.startswith("layer")]
    table = {name: np.quantile([r[name] for r in found], QUANTILES, axis=0).astype(int).tolist() for name in names}
    last = f"layer {cfg.layers - 1}, weighted"
    hardest = sorted(found, key=lambda r: r[last], reverse=True)[: o.hardest]
    document = {
        "options": {k: v for k, v in dataclasses.asdict(o).items() if k != "out"},
        "machine": report.machine(),
        "quantiles": QUANTILES,
        "tokens_and_characters": table,
        "hardest": hardest,
    }
    for name, rows in table.items():
        console().print(f"{name}: {json.dumps(dict(zip(map(str, QUANTILES), rows, strict=True)))} tokens and characters", soft_wrap=True)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(o.out, document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
