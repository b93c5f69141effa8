"""What is left of the small vision-language model on a part of its visual tokens, for every method in its tower, behind it and in its decoder.

Claim: at 16 of 144 visual tokens (11%) five methods or more keep 90% of the full model's accuracy.
Command: JAXTOK_DATA=... python experiments/vlm_pareto.py            (killed and started again, it goes on after the last row done)
         JAXTOK_DATA=... python experiments/vlm_pareto.py --time     (adds the prefill times at --main; with nothing else running)
Expected: README.md, results.json and pareto.png in experiments/results/vlm_pareto.

Prompts: canvases of digits never trained on (`jaxtok.evals.digits`, split "unseen"), places and relations in turn. A budget c is

    site select   c rows enter the decoder
    site layers   144 enter, c are left behind the method's last place: before layer 2 of 4, or in stages before layers 1, 2, 3, each
                  the same share of the one before
    site vit      merging in the tower's 4 layers, each to the same share, c rows behind it enter

so at one c a method of site layers computes more; the columns say what it costs. tokens: live image rows that enter the decoder, the mean
over its layers, and those in its last layer (of what the caches hold, a trimmed cache counts as trimmed). needed: share of the patches of
the digits that the answer hangs on (the answer's, the named one's) that still have a row, their own or a merged one, as the decoder
starts / at its end. FLOPs: counted, tower to logits, of one prompt. +-: 95% interval of the accuracy (Wilson).
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

import jaxtok.methods as m
from jaxtok.cli.common import console
from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import TEXT
from jaxtok.evals import cost, digits
from jaxtok.models import decoder, load, vlm

N, SIDE = digits.GRID**2, digits.GRID
LAYERS, UNTIL = 4, 4  # of the decoder; of the tower, that run
Build = Callable[[int], Recipe]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """time: measure the rows of --main that are there, on `batch` prompts, in `repeats` rounds. again: do not go on from what is there."""

    time: bool = False
    again: bool = False
    methods: tuple[str, ...] = ()  # these alone
    budgets: tuple[int, ...] = (72, 36, 16, 7)
    main: int = 16
    count: int = 1000  # prompts at --main
    curve: int = 400  # prompts at the other budgets
    batch: int = 50
    repeats: int = 9
    seed: int = 7
    model: str = load.EMBEDDED_VLM
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "vlm_pareto"


# --- a method's recipe for c rows -------------------------------------------------------------------------------------


class Skip(Exception):
    """Why a method takes no part, or not at this budget."""


def skip(reason: str) -> Build:
    def build(c: int) -> Recipe:
        raise Skip(reason)

    return build


def select(name: str, less: int = 0, **options: Any) -> Build:
    """less: rows of another kind that the method leaves beside its capacity (a class row that stays a visual token)."""
    return lambda c: Recipe(select=registry.get(name)(capacity=c - less, **options))


def pooled(c: int) -> Recipe:
    """The squarest coarser grid of c cells at most."""
    grids = [(a, b) for a in range(1, SIDE + 1) for b in range(a, SIDE + 1) if a * b <= c and b <= 2 * a]
    return Recipe(select=m.PoolRows(grid=(SIDE, SIDE), out=max(grids, key=lambda g: (g[0] * g[1], g[0]))))


def recycled(c: int) -> Recipe:
    """Half of the rows, at most, are cells of what is recycled."""
    for size in (2, 3, 4, 6, 12):
        if (SIDE // size) ** 2 <= c // 2:
            return Recipe(select=registry.get("vflowopt.select")(capacity=c, shape=(SIDE, SIDE), grid=None, t=1.0, m=float(size)))
    raise Skip("no grid of cells is coarse enough")


def once(name: str, at: int = 2, **options: Any) -> Build:
    return lambda c: Recipe(layers=((at, registry.get(name)(capacity=c, images=N, **options)),))


def shares(c: int, stages: int) -> list[int]:
    """Rows before, between and behind the stages: each leaves the same share."""
    return [N, *(round(N * (c / N) ** (i / stages)) for i in range(1, stages)), c]


def staged(name: str, **options: Any) -> Build:
    """An instance for each of the places before layers 1, 2, 3."""

    def build(c: int) -> Recipe:
        left, cls = shares(c, LAYERS - 1), registry.get(name)
        return Recipe(layers=tuple((k, cls(capacity=left[k], images=left[k - 1], **options)) for k in range(1, LAYERS)))

    return build


def many(name: str, **options: Any) -> Build:
    """One instance at the places before layers 1, 2, 3, with `stages`."""

    def build(c: int) -> Recipe:
        left = shares(c, LAYERS - 1)
        method = registry.get(name)(capacity=c, images=N, stages=tuple((k, left[k]) for k in range(1, LAYERS)), **options)
        return Recipe(layers=tuple((k, method) for k in range(1, LAYERS)))

    return build


def condensed(c: int) -> Recipe:
    """VisionDrop's stages: a sixth of the rows are contextual, as in the paper."""
    left, cls = shares(c, LAYERS - 1), registry.get("visiondrop.layers")
    return Recipe(layers=tuple((k, cls(capacity=left[k], images=left[k - 1], contextual=left[k] // 6)) for k in range(1, LAYERS)))


def mapped(c: int) -> Recipe:
    """VFlowOpt: the tower's map without a selection, then two stages in the decoder."""
    tower = registry.get("vflowopt.select")(capacity=N, shape=(SIDE, SIDE), t=1.0, recycle=False)
    method = registry.get("vflowopt.layers")(capacity=c, images=N, stages=((1, round((N * c) ** 0.5)), (2, c)))
    return Recipe(select=tower, layers=((1, method), (2, method)))


def clustered(c: int) -> Recipe:
    """SparseVLM: a sixth of the rows are made of dropped ones."""
    left = shares(c, LAYERS - 1)
    stages = tuple((k, left[k - 1], left[k], max(left[k] // 6, 1)) for k in range(1, LAYERS))
    method = registry.get("sparsevlm")(capacity=c, images=N, stages=stages)
    return Recipe(layers=tuple((k, method) for k in range(LAYERS)))


def merged(name: str, make: Callable[[Any, int], Any]) -> Build:
    """Layer by layer to the same share, `make(class, rows to remove)`; no merging takes more than half of the rows."""

    def build(c: int) -> Recipe:
        left = shares(c, UNTIL)
        if any(2 * b < a for a, b in itertools.pairwise(left)):
            raise Skip(f"{UNTIL} layers that at most halve the rows do not come down to {c} of {N}")
        cls = registry.get(name)
        return Recipe(vit=tuple((k, make(cls, left[k] - left[k + 1])) for k in range(UNTIL)))

    return build


def cut(name: str, **options: Any) -> Build:
    """One cut before layer 2 of the tower."""
    return lambda c: Recipe(vit=((2, registry.get(name)(capacity=c, **options)),))


BUILDS: dict[str, Build] = {
    # behind the tower
    "globalcom2": select("globalcom2", side=SIDE),
    "fopru": select("fopru", width=SIDE),
    "hiprune": select("hiprune", layers=(1, -1)),
    "hired": select("hired", layers=(0, -1)),
    "holov": select("holov", runs=4),
    "mustdrop.select": skip("drops nothing by itself: it marks rows for mustdrop.layers"),
    "pool_rows": pooled,
    "prumerge": select("prumerge", plus=True, near=4),
    "tokencorr": select("tokencorr", layers=(1, -1), sample=False),
    "vflowopt.select": recycled,
    "visiondrop.select": lambda c: Recipe(select=registry.get("visiondrop.select")(capacity=c - 1, contextual=min(6, c // 4))),
    "visionzip": lambda c: Recipe(select=registry.get("visionzip")(capacity=c - 1, contextual=c // 6)),
    "vtc_cls": select("vtc_cls", layers=(-2, -1)),
    # between the decoder's layers
    "aim.layers": many("aim.layers"),
    "catp.layers": once("catp.layers", part="query"),
    "dyvte": skip("needs its trained gate"),
    "gsearch": staged("gsearch"),
    "mustdrop.layers": once("mustdrop.layers", total=0.0, peak=0.0),  # thresholds that drop nothing: the capacity decides
    "pyramiddrop": staged("pyramiddrop"),
    "sparsevlm": clustered,
    "todre.layers": skip("all rows go or none: it has no budget"),
    "transprune": many("transprune"),
    "visiondrop.layers": condensed,
    "vflowopt.layers": mapped,
    # in the tower
    "tome": merged("tome", lambda cls, r: cls(remove=r)),
    "tome.random": merged("tome.random", lambda cls, r: cls(remove=r)),
    "pitome": merged("pitome", lambda cls, r: cls(remove=r, margin=0.9)),
    "turbo": merged("turbo", lambda cls, r: cls(remove=r, threshold=0)),
    "evit": cut("evit", fuse=False),
    "flowcut.vit": lambda c: Recipe(vit=tuple((k, registry.get("flowcut.vit")(capacity=c, last=UNTIL)) for k in range(1, UNTIL + 1))),
    "token_transforming": cut("token_transforming", tau=30.0),
}
PROPORTIONAL = ("tome", "tome.random", "turbo")  # log sizes in the tower's attention
SITES = ("select", "layers", "vit")


def candidates(o: Options) -> dict[str, Build]:
    """Every method of the sites, those of site vit if there is a recipe here; the ones of other kinds are told with their reason."""
    out: dict[str, Build] = {"full": lambda c: Recipe()}
    for site in SITES:
        for name in registry.names(site):
            if site != "vit" or name in BUILDS:
                out[name] = BUILDS.get(name, once(name) if site == "layers" else select(name))
    unknown = sorted(set(o.methods) - set(out))
    if unknown:
        raise SystemExit(f"unknown methods: {', '.join(unknown)}; there are {', '.join(out)}")
    return {k: v for k, v in out.items() if not o.methods or k in o.methods or k == "full"}


# --- what a recipe gets right and costs -------------------------------------------------------------------------------


def run(cfg, params, images, ids, live, recipe: Recipe, proportional: bool):
    """(logits, image rows at the decoder's start, image rows in the caches [l b], rows lost, row of each id now: at the start, at the end)."""
    seen = vlm.embed(cfg, params, images, ids, live, recipe, proportional=proportional)
    out, layers = decoder.prefill(cfg.text, params, seen, recipe, new=0)
    text = jnp.sum((seen.pos >= 0) & (seen.kind == TEXT), -1)
    image = jnp.sum(seen.pos >= 0, -1) - text
    held = jnp.stack([jnp.max(jnp.sum(part[0].kv.pos >= 0, -1), -1) for part in layers]) - text[None]
    logits = decoder.logits(cfg.text, params, out.x[:, -1:])[:, 0]
    return logits, image, held, out.lost, seen.source, out.source


def interval(hits: np.ndarray) -> float:
    """Half of the 95% interval of a share (Wilson)."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    return z * (p * (1 - p) / n + z * z / 4 / n**2) ** 0.5 / (1 + z * z / n)


def measure(cfg, params, b: digits.Batch, recipe: Recipe, proportional: bool, size: int) -> dict[str, Any]:
    traced = jax.jit(functools.partial(run, cfg), static_argnums=(4, 5)).trace
    first = next(digits.parts(b, size))
    program = traced(params, first.images, first.ids, first.live, recipe, proportional).lower().compile()
    hits, image, held, lost, start, end = ([] for _ in range(6))
    for part in digits.parts(b, size):
        logits, *found = jax.device_get(program(params, part.images, part.ids, part.live))
        hits.append(np.argmax(logits, -1) == part.answer)
        for into, x in zip((image, held, lost), found[:3], strict=True):
            into.append(x)
        patches = np.cumsum(part.ids == digits.IMAGE_TOKEN, 1) * (part.ids == digits.IMAGE_TOKEN) - 1  # number of the patch of each id
        need = part.cells.reshape(len(part.ids), -1)
        mine = np.take_along_axis(need, np.maximum(patches, 0), 1) & (patches >= 0)
        for into, source in zip((start, end), found[3:], strict=True):
            into.append((mine & (source >= 0)).sum(1) / np.maximum(mine.sum(1), 1))
    one = digits.Batch(*(x[:1] for x in b))
    flops = cost.count_jaxpr(traced(params, one.images, one.ids, one.live, recipe, proportional).jaxpr).flops
    tower = cost.count_jaxpr(
        jax.jit(functools.partial(vlm.embed, cfg, proportional=proportional), static_argnums=4)
        .trace(params, one.images, one.ids, one.live, recipe)
        .jaxpr
    ).flops
    right, rows = np.concatenate(hits), np.concatenate(held, 1)
    return {
        "n": len(right), "accuracy": float(right.mean()), "pm": interval(right), "place": float(right[~b.relation].mean()),
        "relation": float(right[b.relation].mean()), "enter": float(np.concatenate(image).mean()), "mean": float(rows.mean()), "end": float(rows[-1].mean()),
        "lost": int(np.concatenate(lost).sum()), "needed_start": float(np.concatenate(start).mean()), "needed_end": float(np.concatenate(end).mean()),
        "flops": float(flops), "decoder_flops": float(flops - tower),
    }  # fmt: skip


def build(name: str, make: Build, budget: int) -> tuple[Recipe | None, str]:
    """(recipe, "") or (None, why not)."""
    try:
        recipe = make(budget)
        return recipe, ""
    except Skip as e:
        return None, str(e)
    except (ValueError, TypeError) as e:
        return None, f"{type(e).__name__}: {str(e).splitlines()[0]}"


def results(o: Options) -> dict[str, Any]:
    path = o.out / "results.json"
    old = {} if o.again or not path.is_file() else json.loads(path.read_text())
    same = {"count": o.count, "curve": o.curve, "seed": o.seed}
    return old if old.get("setting") == same else {"setting": same, "rows": [], "skipped": {}}


def save(o: Options, found: dict[str, Any]) -> None:
    o.out.mkdir(parents=True, exist_ok=True)
    part = o.out / "results.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, o.out / "results.json")
    (o.out / "README.md").write_text(table(o, found))
    figure(o, found)


def accuracies(o: Options) -> None:
    screen, found = console(), results(o)
    cfg, params, _ = load.load_vlm(o.model)
    if (cfg.text.layers, cfg.until, cfg.vision.grid) != (LAYERS, UNTIL, (SIDE, SIDE)):
        raise SystemExit("the model is not the one that the recipes are for")
    unseen = digits.load("unseen")
    batches = {b: digits.batch(unseen, o.seed, o.count if b in (o.main, N) else min(o.curve, o.count)) for b in {*o.budgets, N}}
    done = {(r["method"], r["budget"]) for r in found["rows"]}
    todo = [(name, make, b) for name, make in candidates(o).items() for b in ((N,) if name == "full" else o.budgets)]
    for name, make, budget in track(
        [t for t in todo if (t[0], t[2]) not in done], "methods and budgets", console=screen, disable=len(todo) < 2
    ):
        recipe, reason = build(name, make, budget)
        if recipe is not None:
            try:
                numbers = measure(cfg, params, batches[budget], recipe, name in PROPORTIONAL, min(o.batch, len(batches[budget].ids)))
                site = "" if name == "full" else registry.get(name).site
                found["rows"].append({"method": name, "site": site, "budget": budget, **numbers, "recipe": str(recipe_text(recipe))})
            except ValueError as e:  # refused, in words
                reason = str(e).splitlines()[0]
        if reason:
            screen.print(f"{name} at {budget}: left out, {reason}", highlight=False)
            found["skipped"][f"{name} at {budget}"] = reason
        save(o, found)
    save(o, found)
    screen.print(f"wrote {o.out / 'README.md'}")


def recipe_text(recipe: Recipe) -> str:
    shown = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    return ", ".join(f"{k}={v!r}" for k, v in shown.items() if v not in (None, ()))


def times(o: Options) -> None:
    """Medians over rounds in which every program runs once, in turn: what disturbs one round disturbs all."""
    screen, found = console(), results(o)
    cfg, params, _ = load.load_vlm(o.model)
    b = digits.batch(digits.load("unseen"), o.seed, 8)
    makes, programs = candidates(o), {}
    rows = [r for r in found["rows"] if r["budget"] in (o.main, N) and r["method"] in makes]
    if not rows:
        raise SystemExit(f"no rows at {o.main}; run without --time first")

    def program(recipe: Recipe, proportional: bool):
        answer = functools.partial(digits.answer, cfg, recipe=recipe, proportional=proportional)
        return jax.jit(lambda p, *inputs: answer(p, *inputs)[0]).lower(params, b.images, b.ids, b.live).compile()

    for row in track(rows, "compiling", console=screen):
        programs[row["method"]] = program(makes[row["method"]](row["budget"]), row["method"] in PROPORTIONAL)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in track(range(o.repeats + 1), "rounds", console=screen):
        for name, run_ in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run_(params, b.images, b.ids, b.live))
            seconds[name].append(time.perf_counter() - start)
    for row in rows:
        row["ms"] = 1e3 * float(np.median(seconds[row["method"]][1:]))  # of 8 prompts; the first round warms up
    found["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    save(o, found)


# --- tables and figure ------------------------------------------------------------------------------------------------


def table(o: Options, found: dict[str, Any]) -> str:
    rows = found["rows"]
    full = next((r for r in rows if r["method"] == "full"), None)
    if full is None:
        return "# The small vision-language model on fewer visual tokens\n\nNo row of the full model yet.\n"
    lines = [
        "# The small vision-language model on fewer visual tokens", "",
        f"Full model: {100 * full['accuracy']:.1f}% (+-{100 * full['pm']:.1f}) of {full['n']} prompts about digits never trained on; {N} visual tokens;",
        f"{full['flops'] / 1e6:.1f}M FLOPs a prompt. Columns as the head of experiments/vlm_pareto.py says; ms: median prefill of 8 prompts, all methods",
        "in turn in one run. kept: share of the full model's accuracy.", "",
    ]  # fmt: skip
    for budget in sorted({r["budget"] for r in rows} - {N}, reverse=True):
        here = sorted((r for r in rows if r["budget"] == budget), key=lambda r: -r["accuracy"])
        good = sum(r["accuracy"] >= 0.9 * full["accuracy"] for r in here)
        lines += [f"## {budget} of {N} ({100 * budget / N:.0f}%)", "", f"{good} methods keep 90% or more (n = {here[0]['n']}).", ""]
        lines += ["| method | site | accuracy | +- | kept | place | relation | enter | mean | end | needed | MFLOPs | of full | ms |"]
        lines += ["|---|---|" + "---:|" * 12]
        for r in [*here, full]:
            ms = f"{r['ms']:.1f}" if "ms" in r else "-"
            lines.append(
                f"| {r['method']} | {r['site']} | {100 * r['accuracy']:.1f} | {100 * r['pm']:.1f} | {100 * r['accuracy'] / max(full['accuracy'], 1e-9):.0f} "
                f"| {100 * r['place']:.1f} | {100 * r['relation']:.1f} | {r['enter']:.1f} | {r['mean']:.1f} | {r['end']:.1f} "
                f"| {100 * r['needed_start']:.0f} / {100 * r['needed_end']:.0f} | {r['flops'] / 1e6:.1f} | {100 * r['flops'] / full['flops']:.0f}% | {ms} |"
            )
        lines.append("")
    if found["skipped"]:
        lines += ["## Left out", "", *(f"- {k}: {v}" for k, v in found["skipped"].items()), ""]
    return "\n".join(lines)


def figure(o: Options, found: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["rows"]
    full = next((r for r in rows if r["method"] == "full"), None)
    sites = [s for s in SITES if any(r["site"] == s for r in rows)]
    if full is None or not sites:
        return
    made = Figure(figsize=(6.4 * len(sites), 5.6), layout="constrained")
    FigureCanvasAgg(made)
    for axis, site in zip(made.subplots(1, len(sites), squeeze=False)[0], sites, strict=True):
        for i, name in enumerate(dict.fromkeys(r["method"] for r in rows if r["site"] == site)):
            mine = sorted((r for r in rows if r["method"] == name), key=lambda r: r["flops"])
            x, y = [100 * r["flops"] / full["flops"] for r in mine], [100 * r["accuracy"] for r in mine]
            axis.plot(
                x, y, marker="osD^v<>PX*"[i % 10], color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3], label=name, markersize=5
            )
        axis.axhline(100 * full["accuracy"], color="0.3", linewidth=1, linestyle="--")
        axis.axhline(90 * full["accuracy"], color="0.7", linewidth=1, linestyle="--")
        axis.set(xlabel="FLOPs of a prompt, % of the full model's", ylabel="accuracy, %", title=f"site {site}", ylim=(0, 101))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    made.savefig(o.out / "pareto.png", dpi=90)


if __name__ == "__main__":
    options = tyro.cli(Options)
    times(options) if options.time else accuracies(options)
