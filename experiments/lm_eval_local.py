"""The lm-evaluation-harness on local tasks, offline, with and without a method on the cache.

Claim: on the same cases the harness and `jaxtok compare` give the same scores: with the full cache, with a compressor, a step policy and
    a reader, whether a method has seen the question or not.
Command: python experiments/lm_eval_local.py            (pip install 'jaxtok[eval]')
    The tasks that it writes run from the harness's own command line too:
    python -m jaxtok.evals.harness run --model jaxtok --model_args "method=snapkv:window=16,budget=25%" --tasks jaxtok_needle --include_path FOLDER
Hardware and time: two cores of a 2.6 GHz Xeon, two minutes, most of it compiling.
Expected: both give 1.000 for the full cache and Quest, 0.688 for KeyDiff and 0.000 for H2O at a quarter of the cache, seen or not
    (experiments/results/lm_eval_local.json).

A task of the harness is a YAML file and its rows: here needles in RULER's form (`input`, `outputs`), as text to generate and as a choice
between four values.
"""

import contextlib
import json
import os
import pathlib
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nothing here comes from the network

import lm_eval
import tyro
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

from jaxtok.evals import cases, compare, report, ruler
from jaxtok.evals.harness import Harness
from jaxtok.models import load

GENERATE = """task: jaxtok_needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs[0]}}}}"
generation_kwargs: {{until: [], max_gen_toks: {new}, do_sample: false}}
process_results: !function metric.string_match
metric_list: [{{metric: string_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """task: jaxtok_needle_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
METRIC = '''"""RULER's score."""

from jaxtok.evals import tasks


def string_match(doc, results):
    return {"string_match": tasks.string_match(results[0], doc["outputs"])}
'''


def write_tasks(folder: pathlib.Path, count: int, length: int) -> pathlib.Path:
    """Both tasks and their rows in `folder`; returns the file of rows."""
    _, _, tokenizer = load.load("embedded")
    made = [case.example for case in cases.make("needle", tokenizer, lengths=[length], count=count, seed=0)]
    rows = folder / "needle.jsonl"
    ruler.write_jsonl(rows, made)
    wrong = lambda i: [made[(i + k) % count].answers[0] for k in (1, 2, 3)]  # other cases' values
    listed = [json.loads(line) | {"choices": [e.answers[0], *wrong(i)]} for i, (line, e) in enumerate(zip(rows.open(), made, strict=True))]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    new = ruler.read_jsonl(rows, encode=tokenizer.encode)[0].max_new
    (folder / "needle.yaml").write_text(GENERATE.format(rows=rows, new=new, cache=folder / "cache"))
    (folder / "choice.yaml").write_text(CHOOSE.format(rows=folder / "choice.jsonl", cache=folder / "cache"))
    (folder / "metric.py").write_text(METRIC)
    return rows


def main(
    methods: tuple[str, ...] = ("full", "key_diff", "h2o", "quest:block=4"),
    budget: str = "25%",
    count: int = 16,
    length: int = 256,
    folder: str | None = None,
    out: str | None = None,
) -> list[dict]:
    """Every method through the harness and through compare, on the same `count` needles in `length` tokens.

    folder: where the tasks are written and stay (default: nowhere). out: a file for the figures.
    """
    found = []
    with contextlib.ExitStack() as stack:
        place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder).resolve()
        place.mkdir(parents=True, exist_ok=True)
        rows = write_tasks(place, count, length)
        manager = TaskManager(include_path=str(place), include_defaults=False)
        for aware in (True, False):
            options = compare.Options(
                methods=methods, budgets=(budget,), tasks=(str(rows),), count=count, batch=count, query_aware=aware, repeats=1
            )
            scores = {row["method"]: row["score"] for row in compare.run(*load.load("embedded"), options).rows}
            for method in methods:
                model = Harness(method=method, budget=budget, question=None if aware else "\n", batch_size=count)
                done = lm_eval.simple_evaluate(
                    model, tasks=["jaxtok_needle", "jaxtok_needle_choice"], task_manager=manager, bootstrap_iters=0, log_samples=False
                )["results"]
                found.append(
                    {
                        "method": method,
                        "budget": "100%" if method == "full" else budget,
                        "question seen": aware,
                        "compare": scores[method],
                        "harness": done["jaxtok_needle"]["string_match,none"],
                        "choice": done["jaxtok_needle_choice"]["acc,none"],
                        "shapes": sorted(model.model.sizes),
                    }
                )
    table = Table("method", "budget", "question seen", "compare", "harness", "harness, choice of four")
    for row in found:
        table.add_row(row["method"], row["budget"], str(row["question seen"]), *(f"{row[k]:.3f}" for k in ("compare", "harness", "choice")))
    Console().print(table)
    different = [row["method"] for row in found if row["compare"] != row["harness"]]
    print(f"different scores: {', '.join(different) or 'none'}")
    if out is not None:
        report.write(out, {"count": count, "length": length, "machine": report.machine(), "lm_eval": lm_eval.__version__, "rows": found})
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
