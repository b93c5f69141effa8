"""Every method of the KV family at four budgets, graded against an oracle that knows the answer.

Claim: on the embedded model at a tenth of the cache, with the question seen when compressing, at least four methods keep 90% of the full
    model's score on the needle and multi-key tasks; not seeing the question turns the ranking round.
Command: python experiments/kv_leaderboard.py
Hardware and time: half an hour of one core of a 2.6 GHz Xeon by what its methods cost apart (a run on two cores with a load of 12 took
    over an hour for half of it). Killed and started again, it goes on after the last method that was finished.
Expected: the tables in experiments/results/kv_leaderboard (README.md discusses them), with the settings that each method ran with.

Sites prompt, cache, policy and reader; whatever is registered takes part. Windows of 64 do not fit into 5% of 1,024 slots, so methods have
one setting for all budgets, by SETTINGS or as `jaxtok compare` chooses it. For readers a budget is how many keys a step reads: their slots
are those of the full model. `oracle`: share of the leave-one-out mass (`jaxtok.evals.oracle`) that the kept slots hold; its own row keeps the
slots of largest mass. Time is not measured. All budgets of a method that takes a traced budget run in one program, on the arrays of the
largest; bytes are those of arrays of the budget's own size.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.cli.common import EMBEDDED, console, load_draft, load_model
from jaxtok.core import budget as sizes
from jaxtok.core import registry
from jaxtok.evals import cases, compare, figures, measure, oracle, report
from jaxtok.models import text
from jaxtok.train.compresskv import calibrate_heads

OUT = pathlib.Path(__file__).parent / "results" / "kv_leaderboard"
FIELDS = ("method", "budget", "task", "query_aware", "cases", "score", "kl", "top1", "kept", "lost", "oracle",
          "cache_bytes", "step_bytes")  # fmt: skip
SETTINGS = {
    "actqkv": "block=8,n_init=4,n_local=16",
    "ada_kv": "base=snapkv,window=16",
    "cam": "base=snapkv,window=16,window=16",
    "cam.policy": "base=h2o",
    "chain": "methods=snapkv+think,window=16",
    "chunked": "base=snapkv,chunk=256,window=16",
    "chunkkv": "base=snapkv,window=16",
    "criticalkv": "base=snapkv,window=16",
    "decoding": "base=snapkv,interval=16,window=16",
    "ems": "window=16",
    "key_rerotation": "base=snapkv,window=16",
    "merging": "base=snapkv,window=16",
    "per_layer": "base=snapkv,weights=3+2+1,window=16",
    "quest": "dense_layers=0",
    "sentencekv.cache": "window=16",
    "sentencekv.reader": "start_tokens=4,recent=16,ends={ends}",
    "speckv": "window=16",
    "tidaldecode": "dense_layers=1,corrections=",
    "tokenselect": "n_init=4,n_local=16",
    "infiniretri": "chunk=256,topk=60,ends={ends}",
}
REMARKS = {
    "compresskv": "heads calibrated on needles of another seed",
    "landmark": "the model was not trained with landmarks",
    "lococo": "memory not trained",
    "think": "drops channels, no tokens: one result for all budgets",
    oracle.ORACLE: "knows question and answer",
}
ALONE = ("lococo",)  # a budget at a time: side by side its convolution, which few steps need, would run in all
ORDER = ("cache", "policy", "prompt", "reader")  # those that share most first
FAMILY = {"cache": "compressors", "policy": "step policies", "reader": "readers", "prompt": "prompt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What runs. A folder holds the results of one setting of everything but `methods` and `protocols`."""

    budgets: tuple[str, ...] = ("50%", "25%", "10%", "5%")
    tasks: tuple[str, ...] = ("needle", "multi_key", "multi_query", "kv_recall")
    length: int = 1024
    """Tokens of context and question."""
    count: int = 6
    """Cases a task, all in one batch."""
    methods: tuple[str, ...] = ()
    """Names of methods (() = all), to run these only."""
    protocols: tuple[bool, ...] = (True, False)
    """Whether the question is seen when compressing."""
    seed: int = 0
    model: str = EMBEDDED
    out: pathlib.Path = OUT


def specs_of(o: Options, cfg, tokenizer, draft) -> tuple[list[str], dict[str, str]]:
    """(what runs, with its setting; what does not: name -> reason)."""
    ends = "+".join(str(tokenizer.encode(c, special=False)[0]) for c in ".?!\n")
    names = [n for n in registry.names() if registry.get(n).site in measure.SITES and n != measure.FULL]
    chosen = sorted((n for n in names if not o.methods or n in o.methods), key=lambda n: (n in ALONE, ORDER.index(registry.get(n).site)))
    smallest = compare.smallest(compare.Options(methods=("full",), budgets=o.budgets, tasks=o.tasks, lengths=(o.length,)))
    good, left = [], {}
    for name in chosen:
        if name in SETTINGS:
            good.append(f"{name}:{SETTINGS[name].format(ends=ends)}")
            continue
        spec, notes = compare.fitted([name], cfg, smallest, leave_out=True, draft=None if draft is None else draft[0])
        good += spec
        left |= {} if spec else {name: notes[0].removeprefix("left out: ")}
    plain = [n for n in (measure.FULL, oracle.ORACLE) if not o.methods or n in o.methods]
    return plain + good, left


def semantic_heads(cfg, params, tokenizer, o: Options) -> dict[str, Any]:
    """CompressKV's retrieval scores from needles of another seed."""
    made = cases.make("needle", tokenizer, lengths=(min(512, o.length),), count=8, seed=o.seed + 1)
    rows = [c.context + c.question for c in made]
    ids, live = text.pad(rows, cases.BUCKET)
    needle = np.zeros(ids.shape, bool)
    for i, c in enumerate(made):
        answer = c.example.answers[0]
        fact = np.asarray(tokenizer.encode(c.example.question.strip() + answer, special=False))
        at = next((j for j in range(len(c.context)) if np.array_equal(c.context[j : j + len(fact)], fact)), None)
        if at is not None:
            needle[i, ids.shape[1] - len(rows[i]) + at :][: len(fact)] = True
    fn = jax.jit(calibrate_heads, static_argnums=0, static_argnames="new")
    return {"heads": fn(cfg, params, jnp.asarray(ids), jnp.asarray(live), jnp.asarray(needle), new=8).heads}


def together(work: measure.Work, g: cases.Group, spec: str, budgets: Sequence[str]) -> list[tuple[str, ...]]:
    """Which budgets of a method run in one program: all, where it takes a traced budget; one for all, where it has none."""
    if spec == measure.FULL:
        return [("100%",)]
    recipe, capacity, _ = work.settled(spec, max(budgets, key=registry.parse_budget), g.context)
    if budgetless(recipe):
        return [(budgets[0],)]
    _, rows = cases.batches(g, work.batch)[0]
    alone = (
        registry_name(spec) in ALONE or measure.keeps(recipe, cases.keep(registry.parse_budget(budgets[0]), rows.live), capacity)[0] is None
    )
    return [(b,) for b in budgets] if alone else [tuple(budgets)]


def budgetless(recipe: Any) -> bool:
    """Whether a method drops no slots whatever the budget."""
    return recipe.cache is not None and recipe.cache.capacity >= sizes.UNLIMITED


def run_one(work: measure.Work, g: cases.Group, reference: measure.Reference, spec: str, budgets: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a method at all budgets."""
    parts = together(work, g, spec, budgets)
    rows = [r for part in parts for r in work.measure(g, reference, spec, *part)[0]]
    if spec != measure.FULL and sum(map(len, parts)) < len(budgets):
        return [r | {"budget": b} for b in budgets for r in rows]
    return rows


def compile_one(work: measure.Work, g: cases.Group, spec: str, budgets: Sequence[str]) -> None:
    """What `run_one` will run, compiled; what a method refuses is said when it runs."""
    with contextlib.suppress(Exception):
        for part in together(work, g, spec, budgets):
            work.programs_of(g, spec, *part)


def settings_of(o: Options) -> dict[str, Any]:
    """What must be alike in one file of results."""
    return {"budgets": list(o.budgets), "tasks": list(o.tasks), "length": o.length, "count": o.count, "seed": o.seed, "model": o.model}


def held(o: Options, path: pathlib.Path) -> dict[str, Any]:
    """What is there already. ValueError where it was made with other settings."""
    if not path.exists():
        return {"settings": settings_of(o), "machine": report.machine(), "specs": {}, "failed": [], "notes": [], "rows": []}
    document = json.loads(path.read_text())
    if document["settings"] != settings_of(o):
        raise ValueError(f"{path} holds results of other settings, {document['settings']}; give another --out or remove it")
    return document


def main(o: Options, run: Callable[..., list[dict[str, Any]]] = run_one, model: Any = None) -> dict[str, Any]:
    """Measure what is not there yet, each method written at once; then tables and figures."""
    o.out.mkdir(parents=True, exist_ok=True)
    path, screen = o.out / "results.json", console()
    document = held(o, path)
    cfg, params, tokenizer = load_model(o.model) if model is None else model
    draft = load_draft(None, o.model) if model is None else (cfg, params)
    specs, left = specs_of(o, cfg, tokenizer, draft)
    again = {(aware, n) for aware in o.protocols for n in [*map(registry_name, specs), *left]}
    document["failed"] = [f for f in document["failed"] if (f["query_aware"], f["method"]) not in again]
    document["failed"] += [{"method": n, "query_aware": aware, "reason": why} for n, why in left.items() for aware in o.protocols]
    done = {(r["query_aware"], registry_name(r["method"])) for r in document["rows"]}
    todo = {aware: [s for s in specs if (aware, registry_name(s)) not in done] for aware in o.protocols}
    total, count = sum(map(len, todo.values())), 0
    learned = {"compresskv": semantic_heads(cfg, params, tokenizer, o)} if any("compresskv" in s for t in todo.values() for s in t) else {}
    with report.bar("leaderboard") as progress, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for aware, mine in todo.items():
            if not mine:
                continue
            progress(count, total, "the full model")
            made = [c for t in o.tasks for c in cases.make(t, tokenizer, lengths=(o.length,), count=o.count, seed=o.seed)]
            (g,) = cases.group(made, query_aware=aware)
            work = measure.Work(cfg, params, tokenizer, len(made), 0, o.seed, draft, grade=True, learned=learned)
            reference = work.reference(g)
            for i, spec in enumerate(mine):
                progress(count, total, spec)
                if run is run_one:  # the next method compiles meanwhile; nothing is timed here
                    pool.submit(compile_one, work, g, mine[min(i + 1, len(mine) - 1)], o.budgets)
                try:
                    rows = run(work, g, reference, spec, o.budgets)
                    document["rows"] += [short({k: r.get(k) for k in FIELDS} | {"query_aware": aware}) for r in rows]
                    document["specs"][registry_name(spec)] = spec
                except Exception as e:  # what does not run stands in the table, with its reason
                    reason = str(e) if isinstance(e, ValueError | NotImplementedError) else f"{type(e).__name__}: {e}"
                    document["failed"].append({"method": registry_name(spec), "query_aware": aware, "reason": reason[:400]})
                document["notes"] = list(dict.fromkeys([*document["notes"], *work.splits.notes]))
                count += 1
                report.write(path, document, indent=None)
                print(f"{count}/{total} {spec}, question {'seen' if aware else 'not seen'}", flush=True)
    report.write(path, document, indent=None)
    written = [str(path), *map(str, show(document, o.out))]
    screen.print(f"wrote {', '.join(written)}", markup=False, soft_wrap=True)
    return document


def short(row: dict[str, Any]) -> dict[str, Any]:
    """A row with six digits of each number."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def registry_name(spec: str) -> str:
    """The method that a spec names."""
    return spec.partition(":")[0]


def family(name: str) -> str:
    """The panel, and the word in the table, for a method."""
    if name in (measure.FULL, oracle.ORACLE):
        return "references"
    cls = registry.get(name)
    wraps = {"base", "methods"} & {f.name for f in dataclasses.fields(cls)}
    return "wrappers" if wraps else FAMILY[cls.site]


def show(document: dict[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Tables and figures of what is there."""
    made: list[pathlib.Path | None] = []
    for aware in (True, False):
        rows = [r | {"method": registry_name(r["method"])} for r in document["rows"] if r["query_aware"] == aware]
        if not rows:
            continue
        stem = "query_aware" if aware else "question_unseen"
        panels = {n: family(n) for n in dict.fromkeys(r["method"] for r in rows) if family(n) != "references"}
        panels |= {n: panels.get(n, "compressors") for n in {r["method"] for r in rows}}
        made.append(figures.pareto(rows, out / f"{stem}_pareto.png", panels))
        made.append(figures.grid(rows, out / f"{stem}_grid.png"))
        (out / f"{stem}.md").write_text(table(document, rows, aware))
        made.append(out / f"{stem}.md")
    return [p for p in made if p is not None]


def table(document: dict[str, Any], rows: list[dict[str, Any]], aware: bool) -> str:
    """A protocol's tables in Markdown: budgets side by side, then the tasks at the budget nearest to a tenth, then what did not run."""
    lines, budgets = report.summary(rows), sorted(document["settings"]["budgets"], key=registry.parse_budget)
    by = {(line["method"], line["budget"]): line for line in lines}
    names = list(dict.fromkeys(line["method"] for line in lines if line["method"] != measure.FULL))
    score = lambda n: -sum(by[n, b]["score"] for b in budgets if (n, b) in by)
    names.sort(key=lambda n: (score(n), n))
    full = by.get((measure.FULL, "100%"))
    out = [f"# Question {'seen' if aware else 'not seen'} when the cache is compressed", ""]
    facts = document["settings"]
    out += [
        f"{facts['length']} tokens, {facts['count']} cases each of {', '.join(facts['tasks'])}; model: {facts['model']}. Best on top.",
        "",
    ]
    several = lambda values, f: " / ".join("-" if v is None else f(v) for v in values)
    head = ["method", "kind", *budgets, "KL", "oracle's mass held", "slots kept", "KB allocated", "KB a step"]
    out += [f"Columns with slashes: {' / '.join(budgets)}. KL in nats; slots a layer and KV head; bytes of one sequence.", ""]
    out += _markdown(head)
    if full:
        cells = [f"{full['score']:.2f}"] * len(budgets) + ["0", "1", f"{full['kept']:.0f}"]
        out.append(_line(["**full**", "references", *cells, *(f"{full[k] / 1000:.0f}" for k in ("cache_bytes", "step_bytes"))]))
    for n in names:
        mine = [by.get((n, b)) for b in budgets]
        get = lambda key, f, mine=mine: several([m and m[key] for m in mine], f)
        cells = [n, family(n), *("-" if m is None else f"{m['score']:.2f}" for m in mine), get("kl", lambda v: f"{v:.2g}")]
        cells += [get("oracle", lambda v: f"{v:.2f}"), get("kept", lambda v: f"{v:.0f}")]
        out.append(_line(cells + [get(k, lambda v: f"{v / 1000:.0f}") for k in ("cache_bytes", "step_bytes")]))
    near = min(budgets, key=lambda b: abs(float(registry.parse_budget(b)) - 0.1))
    tasks = report.tasks_of(rows)
    out += ["", f"## Tasks at {near}", "", *_markdown(["method", *tasks, "KL", "top-1", "setting"])]
    for n in [*([measure.FULL] if full else []), *sorted((n for n in names if (n, near) in by), key=lambda n: (-by[n, near]["score"], n))]:
        line = by[n, "100%" if n == measure.FULL else near]
        setting = document["specs"].get(n, n).partition(":")[2].replace("|", " ")
        said = "; ".join(x for x in (f"`{setting}`" if setting else "", REMARKS.get(n, "")) if x)
        cells = ["-" if line["tasks"].get(t) is None else f"{line['tasks'][t]:.2f}" for t in tasks]
        out.append(_line([n, *cells, report.show(line["kl"], 3), report.show(line["top1"]), said]))
    failed = {f["method"]: f["reason"] for f in document["failed"] if f["query_aware"] == aware}
    if failed:
        out += ["", "## Did not run", "", *_markdown(["method", "reason"]), *(_line([n, why]) for n, why in sorted(failed.items()))]
    if document["notes"]:
        out += ["", *(f"- {note}" for note in document["notes"])]
    return "\n".join(out) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _markdown(head: Sequence[str]) -> list[str]:
    return [_line(head), "|" + "---|" * len(head)]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
