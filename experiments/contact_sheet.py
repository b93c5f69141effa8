"""All methods that drop or merge rows of a picture, on one canvas of handwritten digits at one budget: a sheet of pictures.

Claim: none; it shows what each method keeps. The table beside it counts, for each method, how many patches of the digits that the question
    is about go on as they are.
Command: JAXTOK_DATA=... python experiments/contact_sheet.py [--seen "what is to be seen" ...]
    `seen`: sentences for the caption, about what somebody has seen on the sheet.
Hardware and time: two cores of a 2.6 GHz Xeon, a few minutes: one compilation a method.
Expected: experiments/results/contact_sheet/{contact_sheet.png,canvas.png,README.md,results.json}.

A panel shows the last place of a method: behind the tower, at its output or between the decoder's layers; `jaxtok show` draws every place.
The canvas is made of digits of MNIST's test set (Yann LeCun, Corinna Cortes), licence CC BY-SA 3.0, and may be redistributed under it.
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
import PIL.Image
import tyro

import jaxtok.methods
from jaxtok.core import registry
from jaxtok.evals import onlookers, pictures, report, stages

ROOT = pathlib.Path(__file__).parents[1]
LICENCE = "Digits: MNIST test set, Yann LeCun and Corinna Cortes, CC BY-SA 3.0; the canvas and the sheet are under the same licence."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """number: which canvas of the seed; keep: image rows left in the end; only: some methods."""

    model: str = onlookers.DEFAULT
    seed: int = 7
    number: int = 5
    keep: str = "25%"
    only: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    out: pathlib.Path = ROOT / "experiments/results/contact_sheet"


def main(options: Options) -> None:
    from jaxtok.evals import digits

    assert jaxtok.methods
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    model = onlookers.of(options.model)
    asked = digits.batch(digits.load("unseen"), options.seed, 1, start=options.number)
    ids = [int(i) for i in asked.ids[0][asked.live[0]]]
    question = " ".join(digits.WORDS[i] for i in ids if i != digits.IMAGE_TOKEN)
    canvas = np.round(np.clip(asked.images[0, 0, :, :, 0] * digits.STD + digits.MEAN, 0, 1) * 255).astype(np.uint8)
    PIL.Image.fromarray(canvas).save(options.out / "canvas.png")
    needed = np.asarray(asked.cells[0], bool)
    sizes = stages.Sizes.of(model.cfg)
    keep = stages.rows_of(registry.parse_budget(options.keep), sizes.patches)
    panels, rows = [], []
    for name in options.only or [name for site in stages.SITES for name in registry.names(site)]:
        recipe = stages.recipe_of([name], sizes, keep)
        found = stages.stages(model.cfg, model.params, asked.images[0, 0], ids, recipe)
        stage = found[-1]
        whole = int((needed & (stage.group >= 0) & ~stage.merged).sum())
        there = int((needed & (stage.group >= 0)).sum())
        rows.append({"method": name, "site": stage.site, "where": stage.where, **stage.counts, "needed_kept": whole, "needed_there": there})
        panels.append((name + (" (untrained)" if stage.untrained else ""), stage))
        print(json.dumps(rows[-1]))
    pictures.sheet(np.repeat(canvas[..., None], 3, -1), panels, options.out / "contact_sheet.png")
    facts = {"question": question, "answer": digits.WORDS[int(asked.answer[0])], "patches_needed": int(needed.sum()), "rows_kept": keep}
    settings = dataclasses.asdict(options) | {"out": options.out.name}
    document = {"options": settings, "machine": report.machine(), "seconds": round(time.perf_counter() - start, 1), **facts, "rows": rows}
    report.write(options.out / "results.json", document)
    (options.out / "README.md").write_text(markdown(options, facts, rows, sizes.patches))


def markdown(options: Options, facts: dict, rows: list[dict], patches: int) -> str:
    """The caption and the table."""
    out = [f"# What each method keeps of one picture at {options.keep} of its rows", "", "![all methods](contact_sheet.png)", ""]
    out += [f"- {sentence}" for sentence in options.seen] + [""] * bool(options.seen)
    out += [f"Model: {options.model}. Question: `{facts['question']}` (answer: {facts['answer']}). Of {patches} patches "
            f"{facts['rows_kept']} rows are to be left. As it is: kept. Filled with its mean colour, in a frame of its own colour: merged. Under a veil: "
            "dropped. Each panel is the last place of a method; weights of methods that must be trained are random.", "", LICENCE, "",
            f"Last column: of the {facts['patches_needed']} patches that the digits of question and answer cover, how many are kept alone / are there at all.", "",
            "| method | where | kept | merged | into | dropped | rows | needed |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        cells = [r["method"], r["where"], *(str(r[k]) for k in ("kept", "merged", "groups", "dropped", "rows"))]
        out.append("| " + " | ".join([*cells, f"{r['needed_kept']} / {r['needed_there']}"]) + " |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
