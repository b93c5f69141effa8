"""The command line: `jaxtok list`, `jaxtok generate`, `jaxtok compare` (also `python -m jaxtok`).

What a user can get wrong (a method, a budget, a path, a checkpoint, an option) is one line on stderr and exit code 2; an interrupt is 130.
"""

import contextlib
import dataclasses
import importlib.resources
import inspect
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

EMBEDDED = "embedded"
ALL = "all"
# the ten methods that the library began with and the wrapper over heads; `--methods all` takes whatever is registered
DEFAULT = (
    "full", "random", "streaming_llm", "h2o", "tova", "snapkv", "pyramidkv", "expected_attention", "key_diff", "k_norm", "ada_kv",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Which methods there are: name, site, paper. With a NAME: what it does and its options."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A method's name."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with a method at work on the cache."""

    prompt: tuple[str, ...]
    """One text or several, which then run as one batch; - reads one from standard input."""
    model: str = EMBEDDED
    """A Hugging Face directory or hub id, a llama2.c .bin file or directory, or `embedded`, the model of the package."""
    methods: tuple[str, ...] = ("full",)
    """Such as snapkv:window=32 or ada_kv:base=k_norm; each continues all prompts."""
    budget: str = "50%"
    """Slots that a method keeps a KV head: a number of tokens or a share of the prompt (25%)."""
    new: int = 100
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int | None = None
    """Draw from the k most probable tokens."""
    top_p: float | None = None
    """Draw from the most probable tokens that hold this mass."""
    min_p: float | None = None
    """Draw from tokens at least this share as probable as the best."""
    seed: int = 0
    """Of what is drawn."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Every method at every budget on the same cases: a table, compare.json and figures."""

    methods: tuple[str, ...] = DEFAULT
    """Such as snapkv:window=32, quest, ada_kv:base=k_norm; `all` = every method that works without options. Where a method is named
    without options, a window that leaves too little of the smallest budget is made smaller, and the table says so."""
    budgets: tuple[str, ...] = ("50%", "25%", "10%")
    """Slots a KV head: numbers of tokens, or shares of the context (25%)."""
    tasks: tuple[str, ...] = ("needle", "multi_key", "kv_recall")
    """needle, multi_key, multi_value, multi_query, kv_recall, variable_tracking, common_words, frequent_words, perplexity, or RULER-style
    .jsonl files."""
    model: str = EMBEDDED
    """A Hugging Face directory or hub id, a llama2.c .bin file or directory, or `embedded`, the model of the package."""
    query_aware: bool = False
    """Compress after the question was seen, instead of before."""
    out: str = "jaxtok-compare"
    """Folder for compare.json, pareto.png, needles.png, kept.png, perplexity.png."""
    json: bool = False
    """Print the document of compare.json instead of the table."""
    lengths: tuple[int, ...] = (256, 512)
    """Tokens of context + question; lengths from half the longest on share compiled programs."""
    count: int = 8
    """Cases for each task and length."""
    batch: int = 24
    """Rows in a batch."""
    new: int | None = None
    """Tokens generated for a case; default: what the longest answer takes."""
    template: str = "short"
    """Wording of the tasks: short (for the embedded model) or ruler."""
    text: str | None = None
    """Text file for perplexity; default: the haystack of the package."""
    skip: float = 0.5
    """Share of each window whose predictions perplexity does not count."""
    repeats: int = 1
    """Timed runs, at least."""
    seed: int = 0
    """Of the cases and of what is drawn."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parse(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 2
    try:
        {List: _list, Generate: _generate, Compare: _compare}[type(command)](command)
        return 0
    except KeyboardInterrupt:
        print("jaxtok: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError) as e:
        if os.environ.get("JAXTOK_TRACEBACK"):
            raise
        print(f"jaxtok: {_line(str(e) or type(e).__name__)}", file=sys.stderr)
        return 2


def _line(text: str) -> str:
    return " ".join(text.split())


def _parse(argv: list[str]) -> Any:
    """The command; what does not parse is one line, not a box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, args=argv, prog="jaxtok", description="Transformers on fewer tokens.")  # type: ignore[call-overload]
    except SystemExit as e:
        if e.code in (0, None):
            raise SystemExit(0) from None
        lines = [line.strip("│╭╮╰╯─ ") if line[:1] in "│╭╰" else line for line in said.getvalue().splitlines()]
        body = [line for line in lines[1:] if line]
        keep = body[
            : next(
                (i for i, line in enumerate(body) if line.startswith(("Argument helptext", "For full helptext", "Perhaps you meant"))),
                len(body),
            )
        ]
        print(f"jaxtok: {_line(' '.join(keep) or said.getvalue()).rstrip('.')}; see jaxtok --help", file=sys.stderr)
        raise SystemExit(2) from None


# --- list -------------------------------------------------------------------------------------------------------------


def _list(command: List) -> None:
    import jaxtok.methods  # noqa: F401  fills the registry
    from jaxtok.core import registry

    names = registry.names() if command.name is None else (command.name,)
    found = []
    for name in names:
        cls = registry.get(name)
        text = inspect.getdoc(cls) or ""
        entry: dict[str, Any] = {"name": name, "site": cls.site, "paper": cls.paper, "summary": text.splitlines()[0]}
        if command.name is not None:
            missing = dataclasses.MISSING
            options = {f.name: None if f.default is missing else f.default for f in dataclasses.fields(cls)}
            entry |= {"class": cls.__name__, "options": {k: v for k, v in options.items() if k != "capacity"}, "text": text}
        found.append(entry)
    if command.json:
        print(json.dumps(found if command.name is None else found[0], indent=1, default=str))
        return
    if command.name is not None:
        entry = found[0]
        print(f"{entry['name']}  (site {entry['site']}, {entry['paper']}, class {entry['class']})\n\n{entry['text']}")
        print("\noptions: " + (", ".join(f"{k}={v}" for k, v in entry["options"].items()) or "none"))
        return
    from rich.table import Table

    out = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "site", "paper", "summary"):
        out.add_column(column, no_wrap=column != "summary", overflow="fold")
    for entry in found:
        out.add_row(*(entry[k].replace("[", "\\[") for k in ("name", "site", "paper", "summary")))
    _console().print(out)


def _console(least: int = 100) -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.width >= least else Console(highlight=False, width=least)


def _model(name: str) -> tuple[Any, Any, Any]:
    """(cfg, params, tokenizer) of a checkpoint with a tokenizer."""
    from jaxtok.evals import report
    from jaxtok.models import load

    path: Any = name
    if name == EMBEDDED and not pathlib.Path(name).exists():
        path = pathlib.Path(str(importlib.resources.files("jaxtok.models") / EMBEDDED))
        if not (path / "config.json").is_file():
            raise ValueError("the embedded model is not in this installation; name a checkpoint with --model")
    with report.bar("loading") as progress:
        cfg, params, tokenizer = load.load(path, progress=progress)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer (tokenizer.json, or tokenizer.bin beside a llama2.c file)")
    return cfg, params, tokenizer


# --- generate ---------------------------------------------------------------------------------------------------------


def _generate(command: Generate) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxtok.methods  # noqa: F401  fills the registry
    from jaxtok.core.registry import parse_budget
    from jaxtok.core.types import live_count
    from jaxtok.decode import Sampler, generate
    from jaxtok.evals import cases, measure
    from jaxtok.models import decoder, text

    sampler = Sampler(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p, min_p=command.min_p)
    size = parse_budget(command.budget)
    for spec in command.methods:
        measure.site_of(spec)
    cfg, params, tokenizer = _model(command.model)
    prompts = [sys.stdin.read() if p == "-" else p for p in command.prompt]
    encoded = [tokenizer.encode(p, special=True) for p in prompts]
    if not all(encoded):
        raise ValueError("the prompt is empty and the model has no token that begins a text; give a prompt")
    ids, live = map(jnp.asarray, text.pad(encoded, bucket=cases.BUCKET))
    capacity, found = cases.slots(size, ids.shape[1]), []
    recipes = [measure.recipe_of(spec, capacity) for spec in command.methods]
    for recipe in recipes:
        recipe.validate(cfg)

    def run(recipe, params, ids, live, key):
        keep, after = measure.keeps(recipe, cases.keep(size, live), capacity)
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids, live), recipe, new=command.new, keep=keep, key=key)
        out = generate(cfg, params, tokens, layers, recipe, new=command.new, sampler=sampler, key=key, keep=after)
        live_slots = [jnp.mean(live_count(part.kv.pos).astype(jnp.float32)) for parts in layers for part in parts]
        return out.ids, out.count, sum(live_slots) / len(live_slots)

    for spec, recipe in zip(command.methods, recipes, strict=True):
        own = recipe.init_params(jax.random.key(command.seed), cfg)
        full = params | {"methods": own} if jax.tree.leaves(own) else params
        said, count, kept = jax.jit(run, static_argnums=0)(recipe, full, ids, live, jax.random.key(command.seed))
        for i, (prompt, row) in enumerate(zip(prompts, np.asarray(said), strict=True)):
            row = [int(t) for t in row[: int(count[i])] if int(t) not in cfg.eos]
            whole = tokenizer.decode([*encoded[i], *row])
            found.append({"method": spec, "prompt": prompt, "text": whole, "ids": row, "kept": float(kept)})
    if command.json:
        print(json.dumps(found, indent=1))
        return
    for entry in found:
        if len(found) > 1:
            print(f"--- {entry['method']}, {entry['kept']:.1f} slots kept of a prompt of up to {ids.shape[1]}")
        print(entry["text"])


# --- compare ----------------------------------------------------------------------------------------------------------


def _compare(command: Compare) -> None:
    import jaxtok.methods  # noqa: F401  fills the registry
    from jaxtok.core import registry
    from jaxtok.evals import compare, figures, measure, report

    start = time.perf_counter()
    # bare names are fitted to the budgets; of those that nobody named, what does not work here is left out
    unnamed = list(DEFAULT) if command.methods == DEFAULT else []
    if ALL in command.methods:
        unnamed = [n for n in registry.names() if registry.get(n).site in measure.SITES]
    named = [m for m in command.methods if m != ALL and m not in unnamed]
    shared = {f.name for f in dataclasses.fields(compare.Options)} & {f.name for f in dataclasses.fields(Compare)} - {"methods"}
    options = compare.Options(methods=tuple(unnamed + named), **{name: getattr(command, name) for name in shared})
    cfg, params, tokenizer = _model(command.model)
    out = pathlib.Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    smallest = compare.smallest(options)
    good, notes = compare.fitted(unnamed, cfg, smallest, leave_out=True)
    more, remarks = compare.fitted(named, cfg, smallest, leave_out=False)
    options, notes = dataclasses.replace(options, methods=(*good, *more)), [*notes, *remarks]
    with report.bar("compare") as progress:
        result = compare.run(cfg, params, tokenizer, options, progress)
        made = [
            figures.pareto(result.rows, out / "pareto.png"),
            figures.needles(result.rows, out / "needles.png"),
            figures.kept(result.kept, out / "kept.png"),
            figures.perplexities(result.rows, out / "perplexity.png"),
        ]
    notes = [*notes, *result.notes]
    document = {
        "options": {**dataclasses.asdict(options), "model": command.model},
        "machine": report.machine(),
        "config": dataclasses.asdict(cfg),
        "seconds": round(time.perf_counter() - start, 1),
        "legend": report.LEGEND,
        "notes": notes,
        "summary": report.summary(result.rows),
        "rows": result.rows,
        "kept": result.kept,
    }
    path = report.write(out / "compare.json", document)
    if command.json:
        print(path.read_text(), end="")
        return
    console = _console(160)
    console.print(report.table(result.rows))
    console.print(report.LEGEND, style="dim", soft_wrap=False, markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    written = [str(p) for p in (path, *made) if p is not None]
    console.print(f"{document['seconds']} s; wrote {', '.join(written)}", markup=False, soft_wrap=True)
