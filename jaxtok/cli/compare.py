"""`jaxtok compare`: every method at every budget on the same cases."""

import dataclasses
import pathlib
import time

from jaxtok.cli.common import EMBEDDED, Common, console, load_draft, load_model

ALL = "all"
# the ten methods that the library began with and the wrapper over heads; `--methods all` takes whatever is registered
DEFAULT = (
    "full", "random", "streaming_llm", "h2o", "tova", "snapkv", "pyramidkv", "expected_attention", "key_diff", "k_norm", "ada_kv",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Every method at every budget on the same cases: a table, compare.json and figures."""

    methods: tuple[str, ...] = DEFAULT
    """Such as snapkv:window=32, quest, ada_kv:base=k_norm; `all` = every method that works without options. Where a method is named
    without options, a window that leaves too little of the smallest budget is made smaller, and the table says so."""
    budgets: tuple[str, ...] = ("50%", "25%", "10%")
    """Slots a KV head: numbers of tokens, or shares of the context (25%)."""
    tasks: tuple[str, ...] = ("needle", "multi_key", "kv_recall")
    """needle, multi_key, multi_value, multi_query, kv_recall, variable_tracking, common_words, frequent_words, single_needle, multi_needle,
    conditional_needle, thread, multi_thread, branched_thread, perplexity, or RULER-style .jsonl files."""
    model: str = EMBEDDED
    """A Hugging Face directory or hub id, a llama2.c .bin file or directory, or `embedded`, the model of the package."""
    draft: str | None = None
    """A smaller model with the same tokens, as --model, for the methods that look at a draft of the answer; default: that of the embedded
    model where that is the model."""
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

    def run(self) -> None:
        from jaxtok.core import registry
        from jaxtok.evals import compare, figures, measure, report

        start = time.perf_counter()
        # bare names are fitted to the budgets; of those that nobody named, what does not work here is left out
        unnamed = list(DEFAULT) if self.methods == DEFAULT else []
        if ALL in self.methods:
            unnamed = [n for n in registry.names() if registry.get(n).site in measure.SITES]
        named = [m for m in self.methods if m != ALL and m not in unnamed]
        shared = {f.name for f in dataclasses.fields(compare.Options)} & {f.name for f in dataclasses.fields(Compare)} - {"methods"}
        options = compare.Options(methods=tuple(unnamed + named), **{name: getattr(self, name) for name in shared})
        cfg, params, tokenizer = load_model(self.model)
        out = pathlib.Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        smallest = compare.smallest(options)
        draft = load_draft(self.draft, self.model)
        small = None if draft is None else draft[0]
        good, notes = compare.fitted(unnamed, cfg, smallest, leave_out=True, draft=small)
        more, remarks = compare.fitted(named, cfg, smallest, leave_out=False, draft=small)
        options, notes = dataclasses.replace(options, methods=(*good, *more)), [*notes, *remarks]
        with report.bar("compare") as progress:
            result = compare.run(cfg, params, tokenizer, options, progress, draft)
            made = [
                figures.pareto(result.rows, out / "pareto.png"),
                figures.needles(result.rows, out / "needles.png"),
                figures.kept(result.kept, out / "kept.png"),
                figures.perplexities(result.rows, out / "perplexity.png"),
            ]
        notes = [*notes, *result.notes]
        document = {
            "options": {**dataclasses.asdict(options), "model": self.model, "draft": self.draft, "import": self.import_},
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
        if self.json:
            print(path.read_text(), end="")
            return
        screen = console(160)
        screen.print(report.table(result.rows))
        screen.print(report.LEGEND, style="dim", soft_wrap=False, markup=False)
        for note in notes:
            screen.print(f"note: {note}", markup=False)
        written = [str(p) for p in (path, *made) if p is not None]
        screen.print(f"{document['seconds']} s; wrote {', '.join(written)}", markup=False, soft_wrap=True)
