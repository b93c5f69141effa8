"""Every method at every budget on the same cases: quality, agreement with the full model, memory, traffic, time.

The full model runs first; its greedy continuation of each case is what agreement is measured on. Two protocols:

    query_aware    context + question are prefilled as one, then the cache is compressed: the method has seen the question
    otherwise      the context is prefilled and compressed, then the question is appended to what is left

One program serves all tasks, cases and lengths of a static shape; the methods of site "cache" share their decode programs too.
A budget in percent is that share of each row's own live tokens, inside a capacity that is that share of the static length (of methods that
leave some heads whole, that share of the static length on average, see `evals.heads`).
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxtok.core import registry
from jaxtok.decode.prefill import Draft, check_draft
from jaxtok.evals import cases, heads, perplexity, tasks
from jaxtok.evals.measure import FULL, Work, recipe_of, site_of
from jaxtok.models.config import Config
from jaxtok.models.text import Tokenizer

PERPLEXITY = "perplexity"
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared on what. `methods` are specs of `registry.build`, `budgets` texts of `registry.parse_budget`."""

    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (512,)
    count: int = 16  # cases for each task and length
    batch: int = 16
    query_aware: bool = False
    new: int | None = None  # tokens generated; None = what the longest answer takes
    template: str = "short"
    seed: int = 0
    repeats: int = 3  # timed runs, at least
    text: str | None = None  # file for perplexity; None = the haystack of the package
    skip: float = 0.5  # share of a window whose predictions perplexity does not count

    def __post_init__(self):
        for name in ("methods", "budgets", "tasks", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        for name in ("count", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths must be >= 1, got {self.lengths}")
        if self.new is not None and self.new < 2:
            raise ValueError(f"new must be >= 2, got {self.new}")
        if not 0 < self.skip < 1:
            raise ValueError(f"skip must be between 0 and 1, got {self.skip}")
        for spec in self.methods:
            site_of(spec)
            if ":" in spec:
                registry.build(spec, 1 << 30)  # what is wrong with it at any budget
        for text in self.budgets:
            registry.parse_budget(text)
        known = (*tasks.TASKS, PERPLEXITY)
        for task in self.tasks:
            if task not in known and not task.endswith(".jsonl"):
                raise ValueError(f"unknown task {task!r}; known: {', '.join(known)}, or a .jsonl file")


class Result(NamedTuple):
    """`rows`: one a method, budget, task and length (see `measure.row`). `kept`: for the first case of each method and budget, the share of
    layers and heads that kept each position, with where the answer stands (a fraction; nan = nowhere)."""

    rows: list[dict[str, Any]]
    kept: list[dict[str, Any]]
    notes: list[str]


def checked(spec: str, capacity: int, cfg: Config, draft) -> None:
    """ValueError for what cannot work at this budget: on this model, with this draft (model or configuration)."""
    heads.validate(spec, capacity, cfg, recipe_of)
    if not heads.told_apart(spec):
        recipe = recipe_of(spec, capacity)
        if recipe.reader is not None and recipe.reader.offload:
            raise ValueError(
                f"{spec}: a comparison does not place caches in host memory, and answers are the same without; leave offload out"
            )
        check_draft(cfg, recipe, draft)


def fitted(
    specs: Iterable[str], cfg: Config, capacity: int, *, leave_out: bool, draft: Config | None = None
) -> tuple[tuple[str, ...], list[str]]:
    """Specs made to work at `capacity` on this model (and `draft` model), and notes on what was changed or (`leave_out`) left out.

    Of a bare name, a window that has no room (or the sinks of a method that leaves some heads whole, the last tokens of a reader) is made a
    power of two that leaves two thirds of the capacity free; the new spec says so.
    Specs with options stay as they are. ValueError for what does not work, unless it may be left out.
    """
    good, notes = [], []

    def works(spec: str) -> None:
        checked(spec, capacity, cfg, draft)

    for spec in specs:
        if ":" in spec:
            good.append(spec)
            continue
        try:
            works(spec)
            good.append(spec)
        except ValueError as e:
            size = 2 ** max(0, int(math.log2(max(1, heads.room(spec, capacity) // 3))))
            for option in (f"{'sinks' if heads.told_apart(spec) else 'window'}={size}", f"n_init=4,n_local={size}"):
                with contextlib.suppress(ValueError):
                    works(f"{spec}:{option}")
                    good.append(f"{spec}:{option}")
                    notes.append(f"{spec} has {option}, so that it fits into {capacity} slots")
                    break
            else:
                if not leave_out:
                    raise e from None
                notes.append(f"left out: {e}")
    return tuple(good), notes


def smallest(options: Options) -> int:
    """The smallest capacity that a comparison will ask for, near enough to choose windows by."""
    longest = [n for n in options.lengths if not any(n < m <= 2 * n for m in options.lengths)]  # of each group of shapes
    n = max(1, min(longest) - 2 * cases.BUCKET)
    return min(cases.slots(registry.parse_budget(b), n) for b in options.budgets)


def run(
    cfg: Config,
    params: Any,
    tokenizer: Tokenizer,
    options: Options,
    progress: Progress = lambda *_: None,
    draft: Draft | None = None,
) -> Result:
    """The comparison. `draft`: a model with the same token ids, for the methods that need one.

    ValueError, before anything is compiled, for what cannot work.
    """
    named = [t for t in options.tasks if t != PERPLEXITY]
    made = [
        c
        for t in named
        for c in cases.make(t, tokenizer, lengths=options.lengths, count=options.count, seed=options.seed, template=options.template)
    ]
    groups = cases.group(made, query_aware=options.query_aware, new=options.new)
    windows = (
        perplexity.windows(tokenizer, options.text, length=max(options.lengths), count=options.count)
        if PERPLEXITY in options.tasks
        else None
    )
    plan: list[tuple[str, str]] = [(FULL, "100%")] if FULL in options.methods else []
    plan += [(m, b) for m in options.methods if m != FULL for b in options.budgets]
    lengths = [g.context for g in groups] + ([windows.shape[1]] if windows is not None else [])
    for spec, budget in plan:
        for n in lengths:
            checked(spec, cases.slots(registry.parse_budget(budget), n), cfg, draft)
    notes = [
        f"{spec} at {budget} keeps {cases.slots(registry.parse_budget(budget), n)} slots of a context of {n}"
        for spec, budget in plan
        for n in lengths
        if cases.slots(registry.parse_budget(budget), n) > n
    ]
    work = Work(cfg, params, tokenizer, options.batch, options.repeats, options.seed, draft)
    units = [(g, spec, budget) for g in groups for spec, budget in plan]
    total, rows, kept = 2 * (len(units) + len(groups)) + len(plan) * (windows is not None), [], []
    tick = _Counter(progress, total)
    # compiling takes longest and barely uses a second core by itself; nothing is timed while it goes on
    with concurrent.futures.ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(work.logits_of, g) for g in groups] + [pool.submit(work.programs_of, *unit) for unit in units]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                tick("compiling")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for g in groups:
        reference = work.reference(g)
        tick("the full model")
        for spec, budget in plan:
            more, maps = work.measure(g, reference, spec, budget)
            rows += more
            kept += maps
            tick(f"{spec} at {budget}")
    if windows is not None:
        for spec, budget in plan:
            rows.append(work.perplexity(windows, spec, budget, max(1, round(windows.shape[1] * options.skip))))
            tick(f"perplexity, {spec} at {budget}")
    return Result([{**r, "query_aware": options.query_aware} for r in rows], kept, [*dict.fromkeys(notes), *work.splits.notes])


class _Counter:
    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0
        progress(0, total, "compiling")

    def __call__(self, text: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, text)
