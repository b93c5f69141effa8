"""Accuracy of three small trained encoders against tokens, FLOPs and time, for every method inside an encoder or at its output.

Claim: off the shelf, half of the FLOPs of a ViT on digits go for at most 1.5 points, a third of a ViT on CIFAR-10 for at most 2.
Command: python experiments/vit_pareto.py            (accuracies; killed and started again, it goes on after the last method done)
         python experiments/vit_pareto.py --time     (adds the times of the settings chosen; on a machine with nothing else to do)
Hardware and time: two cores of a 2.6 GHz Xeon, half an hour beside other work, and seven minutes for the times. Data: the folder that JAXTOK_DATA names.
Expected: README.md, results.json and pareto.png in experiments/results/vit_pareto.

A method has a few variants (which layers, proportional attention, its own fields). Each gets the least reduction whose counted FLOPs
(jaxtok.evals.cost, the method's own work included) fall to the goal's share of the full model's. The variant with the most right answers
on the images of even number is chosen (the first --choose of them; ties: the first), and scored on those of odd number, at the goal's
FLOPs and, on the first --curve of these, at another share. With d_i = [full model right on i] - [method right on i] of n scored images,

    points lost = 100 mean(d)   and   95% interval = 100 (mean(d) +- 1.96 sd(d) / sqrt(n)),   sd with n - 1

Methods of site select act behind layer `at`; the layers after it run on the rows that they leave. The keyword spotter has four clips:
nothing is chosen or graded there, the first variant that comes down to half of the FLOPs is compared with the full model, logit by logit.
Nothing is trained: what needs training or something that a classifier lacks is left out and named. Programs for accuracies are compiled
without optimising, those for times with.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxtok.methods as m
from jaxtok.core import registry
from jaxtok.core.matching import even_odd, movable, packed_order, removal
from jaxtok.core.recipe import Recipe
from jaxtok.core.score import by_order, drawing_key
from jaxtok.evals import cost, encoders, report
from jaxtok.models import vit

SKIPPED = {
    "catp.select": "needs the text that goes with an image",
    "code_merge": "needs the lexer's units of a text",
    "dynamicvit": "needs its trained predictor",
    "maelre.vit": "merges for encoders that are trained with it (train_attention.py)",
    "mustdrop.select": "drops nothing: it marks the rows that MustDrop's later stages keep",
}
MOST = 4  # a schedule may ask for so many times the rows that there are: a merging layer takes half of them at most
GOALS = {"vit_mnist": (0.5, 1.5), "vit_cifar10": (2 / 3, 2.0)}  # share of the FLOPs, points that may go
LEVELS = {"vit_mnist": (0.5, 0.7), "vit_cifar10": (2 / 3, 0.5), "kwt1": (0.5,)}  # the first: where variants are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """time: measure the settings chosen before, on `batch` images, in `repeats` rounds. again: do not go on from what is there."""

    time: bool = False
    again: bool = False
    data: pathlib.Path = pathlib.Path(os.environ.get("JAXTOK_DATA") or pathlib.Path(__file__).parents[1] / "data")
    models: tuple[str, ...] = ("vit_mnist", "vit_cifar10", "kwt1")
    methods: tuple[str, ...] = ()
    choose: int = 500
    curve: int = 1000  # of the scored images, at the FLOPs that are not the goal's
    batch: int = 250
    repeats: int = 7
    threads: int = os.cpu_count() or 1
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "vit_pareto"


class World(NamedTuple):
    name: str
    task: encoders.Task

    @property
    def layers(self) -> int:
        return self.task.cfg.layers

    @property
    def grid(self) -> tuple[int, int]:
        return self.task.cfg.grid

    @property
    def n(self) -> int:
        """Rows that may be reduced."""
        return math.prod(self.grid)

    @property
    def early(self) -> int:
        return max(1, self.layers // 6)

    @property
    def late(self) -> int:
        return 2 * self.early


class Setting(NamedTuple):
    """vit: as of Recipe. select acts behind layer `at`."""

    vit: tuple = ()
    select: Any = None
    at: int | None = None
    proportional: bool = False

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for k, method in self.vit:
            shown = ", ".join(
                f"{f.name}={getattr(method, f.name)!r}" for f in dataclasses.fields(method) if getattr(method, f.name) != f.default
            )
            groups.setdefault(f"{type(method).__name__}({shown})", []).append(str(k))
        parts = [f"{name} at {'+'.join(ks)}" for name, ks in groups.items()]
        if self.select is not None:
            shown = ", ".join(f"{f.name}={getattr(self.select, f.name)!r}" for f in dataclasses.fields(self.select) if getattr(self.select, f.name) != f.default)  # fmt: skip
            parts.append(f"{type(self.select).__name__}({shown}) behind layer {self.at}")
        return "; ".join(parts) + ("; proportional" if self.proportional else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPairs(m.ToMe):
    """ToMe with similarities drawn at random: what its matching must beat."""

    def plan(self, params, state, tokens, evidence, keep=None):
        _, n = tokens.pos.shape
        room, live = self.count(n, n), tokens.pos >= 0
        draw = by_order(drawing_key(evidence, 0), jnp.take_along_axis(tokens.pos, packed_order(live), 1))
        score = jnp.mod(draw[:, ::2, None] * 997 + draw[:, None, 1::2] * 1009, 1.0)
        remove = removal(live, keep, n - room, room, jnp.sum(movable(tokens), -1, dtype=jnp.int32) // 2)
        return state, even_odd(tokens, score, remove, n - room, room)


# --- the grid of settings: a variant makes a Setting of a number s = 1, 2, ...: the larger, the less is left; None past the end ------------------

Variant = Callable[[World, int], Setting | None]


def spread(total: int, places: tuple[int, ...]) -> dict[int, int]:
    """`total` rows over the places, as evenly as whole numbers go."""
    many = len(places)
    return {k: total * (i + 1) // many - total * i // many for i, k in enumerate(places)}


def merging(make: Callable[[World, int], Any], where: str = "every", proportional: bool = True) -> Variant:
    """s rows go in all, equally many in every layer, in the first half of them, in all but the first, in the two behind that
    (or a third of all), or in three stages."""

    def build(w: World, s: int) -> Setting | None:
        count = w.layers
        places = {
            "every": range(count),
            "early": range(-(-count // 2)),
            "later": range(1, count),
            "front": range(1, 1 + max(2, count // 3)),
            "stages": sorted({count // 4, count // 2, 3 * count // 4}),
        }[where]
        entries = tuple((k, make(w, r)) for k, r in spread(s, tuple(places)).items() if r)
        return Setting(entries, proportional=proportional)

    return build


def cutting(make: Callable[[World, int], Any], when: str = "early", behind: bool = False, proportional: bool = False) -> Variant:
    """One cut to n - s rows: before layer early or late (site vit), or behind it (site select)."""

    def build(w: World, s: int) -> Setting | None:
        rows, k = w.n - s, {"first": 0, "early": w.early, "late": w.late}[when]
        method = make(w, rows) if rows > 0 else None
        if method is None:
            return None
        return Setting(select=method, at=k, proportional=proportional) if behind else Setting(((k, method),), proportional=proportional)

    return build


def stages(make: Callable[[World, int], Any], proportional: bool = False) -> Variant:
    """Three cuts, each to the same share of the rows before it."""

    def build(w: World, s: int) -> Setting | None:
        share = 1 - s / w.n
        places = sorted({max(w.layers // 4, 1), w.layers // 2, 3 * w.layers // 4})
        rows = [math.floor(w.n * share ** (i + 1)) for i in range(len(places))]
        if share <= 0 or not rows[-1]:
            return None
        return Setting(tuple((k, make(w, r)) for k, r in zip(places, rows, strict=True)), proportional=proportional)

    return build


def selecting(make: Callable[[World, int], Any], **others: Callable[[World, int], Any]) -> dict[str, Variant]:
    out = {"early": cutting(make, "early", True), "late": cutting(make, "late", True)}
    return out | {f"early, {name}": cutting(other, "early", True) for name, other in others.items()}


def grids(w: World) -> list[tuple[int, int]]:
    """Coarser grids by falling number of cells, as square as they come."""
    high, wide = w.grid
    if wide == 1:
        return [(a, 1) for a in range(high - 1, 0, -1)]
    return sorted({(a, b) for a in range(1, high + 1) for b in range(1, wide + 1) if abs(a - b) <= 1 and a * b < w.n}, key=lambda g: (-g[0] * g[1], g))  # fmt: skip


def gridded(make: Callable[[World, tuple[int, int]], Any], when: str, behind: bool, proportional: bool = False) -> Variant:
    def build(w: World, s: int) -> Setting | None:
        if s > len(grids(w)):
            return None
        method, k = make(w, grids(w)[s - 1]), w.early if when == "early" else w.late
        return Setting(select=method, at=k, proportional=proportional) if behind else Setting(((k, method),), proportional=proportional)

    return build


def kth(w: World, s: int) -> Setting | None:
    """Every second row of one layer, the last at first; then of two."""
    places = [(k,) for k in reversed(range(w.layers))] + [(0, k) for k in reversed(range(1, w.layers))]
    return Setting(tuple((k, m.KthToMe(k=2)) for k in places[s - 1]), proportional=True) if s <= len(places) else None


def flowcut(last: str) -> Variant:
    def build(w: World, s: int) -> Setting | None:
        end = w.early if last == "early" else w.late
        method = m.FlowCutVit(capacity=w.n - s, last=end) if s < w.n else None
        return None if method is None else Setting(tuple((k, method) for k in range(1, end + 1)))

    return build


def mustdrop(where: str, window: int, proportional: bool = False) -> Variant:
    def build(w: World, s: int) -> Setting | None:
        most = w.grid[0] // window * (w.grid[1] // window)
        k = 0 if where == "first" else w.early
        return Setting(((k, m.MustDropVit(most=s, window=window)),), proportional=proportional) if s <= most else None

    return build


def quarter(c: int) -> int:
    return max(c // 4, 1)


FAMILIES: dict[str, dict[str, Variant]] = {
    # inside the encoder
    "tome": {
        "every layer, proportional": merging(lambda w, r: m.ToMe(remove=r)),
        "every layer": merging(lambda w, r: m.ToMe(remove=r), proportional=False),
        "first half, proportional": merging(lambda w, r: m.ToMe(remove=r), "early"),
    },
    "tome.kth": {"k=2, proportional": kth},
    "tome.random": {"every layer, proportional": merging(lambda w, r: m.RandomToMe(remove=r))},
    "pitome": {
        "every layer, margin 0.9": merging(lambda w, r: m.PiToMe(remove=r, margin=0.9), proportional=False),
        "first half, margin 0.9, proportional": merging(lambda w, r: m.PiToMe(remove=r, margin=0.9), "early"),
        "every layer, bsm, margin 0.75": merging(lambda w, r: m.PiToMe(remove=r, split="bsm"), proportional=False),
        "every layer, bsm, margin 0.75, proportional": merging(lambda w, r: m.PiToMe(remove=r, split="bsm")),
    },
    "mctf": {
        "ahead, proportional": merging(lambda w, r: m.MCTF(remove=r, least=4), "later"),
        "ahead, two layers or a third, proportional": merging(lambda w, r: m.MCTF(remove=r, least=4), "front"),
        "behind, two layers or a third, proportional": merging(lambda w, r: m.MCTF(remove=r, least=4, when="behind"), "front"),
    },
    "crossget": {
        "image, no cross token, proportional": merging(lambda w, r: m.CrossGET(remove=r, cross=False, special=1)),
        "llava, no cross token, proportional": merging(lambda w, r: m.CrossGET(remove=r, cross=False, special=1, mode="llava")),
    },
    "turbo": {
        "every layer, alpha 1, proportional": merging(lambda w, r: m.Turbo(remove=r, threshold=0)),
        "every layer, alpha 0.1, proportional": merging(lambda w, r: m.Turbo(remove=r, threshold=0, alpha=0.1)),
    },
    "zero_tprune": {
        "stages": merging(lambda w, r: m.ZeroTPrune(remove=r, similar=r // 3), "stages", proportional=False),
        "first half, 5 iterations": merging(lambda w, r: m.ZeroTPrune(remove=r, similar=r // 3, iterations=5), "early", proportional=False),
    },
    "token_transforming": {
        "early, tau 10": cutting(lambda w, c: m.TokenTransforming(capacity=c)),
        "late, tau 10": cutting(lambda w, c: m.TokenTransforming(capacity=c), "late"),
        "early, tau 30": cutting(lambda w, c: m.TokenTransforming(capacity=c, tau=30.0)),
        "stages, tau 30": stages(lambda w, c: m.TokenTransforming(capacity=c, tau=30.0)),
    },
    "expedit": {
        f"{when}, tau {tau}": gridded(
            lambda w, g, tau=tau: m.Expedit(grid=w.grid, clusters=g, restore=None, special=1, tau=tau), when, False
        )
        for when, tau in (("early", 0.01), ("early", 1.0), ("late", 0.01))
    },
    "flowcut.vit": {"early": flowcut("early"), "late": flowcut("late")},
    "mustdrop.vit": {
        "first layer, window 2": mustdrop("first", 2),
        "first layer, window 2, proportional": mustdrop("first", 2, True),
        "early, window 3": mustdrop("early", 3),
    },
    "evit": {
        "stages": stages(lambda w, c: m.EViT(capacity=c)),
        "in the first layer": cutting(lambda w, c: m.EViT(capacity=c), "first"),
        "early": cutting(lambda w, c: m.EViT(capacity=c)),
        "early, nothing fused": cutting(lambda w, c: m.EViT(capacity=c, fuse=False)),
    },
    "tomesd": {"every layer": merging(lambda w, r: m.ToMeSD(remove=r * w.layers, random=False, special=1), proportional=False)},
    # at its output: behind a layer, here
    "aim.select": selecting(lambda w, c: m.AIMSelect(capacity=c)),
    "divprune": selecting(lambda w, c: m.DivPrune(capacity=c)),
    "fastervlm": selecting(lambda w, c: m.FasterVLM(capacity=c)),
    "fopru": selecting(
        lambda w, c: m.FoPru(capacity=c),
        row=lambda w, c: m.FoPru(capacity=c, by="row", width=w.grid[1]) if c >= w.grid[1] and c % w.grid[1] == 0 else None,
    ),
    "globalcom2": selecting(lambda w, c: m.GlobalCom2(capacity=c)),
    "hiprune": selecting(
        lambda w, c: m.HiPrune(capacity=c, layers=(0, -1)), alpha_1=lambda w, c: m.HiPrune(capacity=c, layers=(0, -1), alpha=1.0)
    ),
    "hired": selecting(lambda w, c: m.HiRED(capacity=c, layers=(0, -1))),
    "holov": selecting(lambda w, c: m.HoloV(capacity=c, runs=4), runs_8=lambda w, c: m.HoloV(capacity=c, runs=8)),
    "pool_rows": {
        "early": gridded(lambda w, g: m.PoolRows(grid=w.grid, out=g), "early", True),
        "late": gridded(lambda w, g: m.PoolRows(grid=w.grid, out=g), "late", True),
        "early, proportional": gridded(lambda w, g: m.PoolRows(grid=w.grid, out=g), "early", True, True),
    },
    "prumerge": {
        "early, plus": cutting(lambda w, c: m.PruMerge(capacity=c, plus=True) if c > 1 else None, "early", True),
        "late, plus": cutting(lambda w, c: m.PruMerge(capacity=c, plus=True) if c > 1 else None, "late", True),
        "early, not adaptive, near 4": cutting(
            lambda w, c: m.PruMerge(capacity=c, adaptive=False, near=4) if c > 1 else None, "early", True
        ),
    },
    "random_rows": selecting(lambda w, c: m.RandomRows(capacity=c)),
    "todre.select": selecting(lambda w, c: m.ToDRESelect(capacity=c)),
    "tokencorr": selecting(
        lambda w, c: m.TokenCorr(capacity=c, layers=(0, -1), sample=False), sampled=lambda w, c: m.TokenCorr(capacity=c, layers=(0, -1))
    ),
    "vflowopt.select": selecting(
        lambda w, c: m.VFlowOptSelect(capacity=c, shape=w.grid, t=1.0, m=3.0),
        no_recycling=lambda w, c: m.VFlowOptSelect(capacity=c, shape=w.grid, t=1.0, recycle=False),
    ),
    "visiondrop.select": selecting(lambda w, c: m.VisionDropSelect(capacity=c, contextual=min(6, c))),
    "visionzip": selecting(lambda w, c: m.VisionZip(capacity=c, contextual=quarter(c))),
    "vtc_cls": {
        "early": cutting(lambda w, c: m.VTCCLS(capacity=c, layers=(-1,)), "early", True),
        "late, two layers": cutting(lambda w, c: m.VTCCLS(capacity=c, layers=(-2, -1)), "late", True),
    },
    "random pairs": {"every layer, proportional": merging(lambda w, r: RandomPairs(remove=r))},
}


# --- what a setting costs ------------------------------------------------------------------------------------------------------------------------


def widths(w: World, setting: Setting) -> tuple[list[tuple[int, int]], int]:
    """(rows that each layer's attention and MLP see, rows at the end); static ones, class row counted."""
    n, out = w.n + w.task.cfg.prefix, []
    for i in range(w.layers):
        if setting.select is not None and i == setting.at:
            n = setting.select.count(n, n)
        here = [method.layer(i, w.layers) for k, method in setting.vit if k == i]
        for method in (x for x in here if x.at in ("block", "ahead")):
            n = method.count(n, n)
        around = n
        for method in (x for x in here if x.at == "around"):
            around = method.count(n, n)
        first = around
        for method in (x for x in here if x.at == "attn"):
            n = method.count(n, n)
        out.append((first, n))
    for k, method in setting.vit:
        n = method.layer(k, w.layers).count(n, n) if k == w.layers else n
    return out, n


def estimate(w: World, setting: Setting) -> float:
    """FLOPs of the products in the layers, over those of the full model."""
    c = w.task.cfg
    inner = c.inner or c.width
    of = lambda pairs: sum(8 * a * c.width * inner + 4 * a * a * inner + 4 * b * c.width * c.hidden for a, b in pairs)
    return of(widths(w, setting)[0]) / of([(w.n + c.prefix,) * 2] * w.layers)


def classify(w: World, setting: Setting, params, images):
    """(logits, rows lost) of a batch."""
    cfg, recipe = w.task.cfg, Recipe(vit=setting.vit, select=setting.select)
    rows, options = vit.embed(cfg, params, images), {"proportional": setting.proportional}
    if setting.select is None:
        tokens = vit.encode(cfg, params, rows, recipe, **options).tokens
    else:
        tokens = vit.select(params, vit.encode(cfg, params, rows, recipe, until=setting.at, **options), recipe)
        rest = dataclasses.replace(cfg, layers=cfg.layers - setting.at)
        tail = {**params, "layers": params["layers"][setting.at :]}
        tokens = vit.encode(rest, tail, tokens, **options).tokens
    return vit.head(cfg, params, tokens), tokens.lost


def trace(w: World, setting: Setting, batch: int):
    """(traced program, FLOPs of an image)."""
    images = jax.ShapeDtypeStruct((batch, *w.task.images.shape[1:]), jnp.float32)
    traced = jax.jit(lambda params, images: classify(w, setting, params, images)).trace(w.task.params, images)
    return traced, cost.count_jaxpr(traced.jaxpr).flops / batch


class Found(NamedTuple):
    setting: Setting
    traced: Any
    share: float  # of the full model's FLOPs
    above: float  # what the method's own work adds to the estimate


def reach(w: World, variant: Variant, level: float, full: float, batch: int, above: float = 0.01) -> Found | None:
    """The least reduction whose counted FLOPs come down to `level`; None where none does. `above`: a guess."""
    grid = [x for x in (variant(w, s) for s in range(1, MOST * w.n)) if x is not None]
    if not grid:  # no such setting for rows of this grid
        return None
    about = [estimate(w, x) for x in grid]
    start = next((j for j, a in enumerate(about) if a + above <= level), len(grid) - 1)
    known: dict[int, tuple[Any, float]] = {}

    def fits(j: int) -> bool:
        if j not in known:
            traced, flops = trace(w, grid[j], batch)
            known[j] = traced, flops / full
        return known[j][1] <= level + 1e-9

    i = start
    while i < len(grid) and (about[i] > level or not fits(i)):
        own = known[i][1] - about[i] if i in known else 0.0
        i = next((j for j in range(i + 1, len(grid)) if about[j] + own <= level), len(grid))
    if i >= len(grid):
        return None
    while i and about[i - 1] + known[i][1] - about[i] <= level and about[i - 1] <= level and fits(i - 1):  # the guess was too careful
        i -= 1
    return Found(grid[i], *known[i], known[i][1] - about[i])


# --- what it gets right ----------------------------------------------------------------------------------------------------------------------------

QUICK = {"xla_backend_optimization_level": 0}


def batches(images: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for i in range(0, len(images), batch):
        part = images[i : i + batch]
        yield np.concatenate([part, np.repeat(part[:1], batch - len(part), 0)])


def logits(w: World, program, images: np.ndarray, batch: int) -> tuple[np.ndarray, int]:
    """(logits of the images, rows lost in all)."""
    out = [program(w.task.params, x) for x in batches(images, batch)]
    lost = np.concatenate([np.asarray(x[1]) for x in out])[: len(images)]
    return np.concatenate([np.asarray(x[0]) for x in out])[: len(images)], int(lost.sum())


def paired(full: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Points lost with their 95% interval, of two masks of right answers."""
    d = full.astype(float) - ours.astype(float)
    mean, half = 100 * d.mean(), 196 * d.std(ddof=1) / math.sqrt(len(d))
    return {"lost": mean, "low": mean - half, "high": mean + half}


class Full(NamedTuple):
    """The full model: FLOPs of an image, logits of all images."""

    flops: float
    logits: np.ndarray


def halves(w: World, o: Options) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images to choose on and of those to score on."""
    number = np.arange(len(w.task.images))
    return number[::2][: o.choose], number[1::2]


def baseline(w: World, o: Options) -> Full:
    batch = min(o.batch, len(w.task.images))
    traced, flops = trace(w, Setting(), batch)
    return Full(flops, logits(w, traced.lower().compile(), w.task.images, batch)[0])


def line(w: World, setting: Setting, share: float) -> dict[str, Any]:
    pairs, end = widths(w, setting)
    return {
        "setting": str(setting),
        "flops": share,
        "rows_mean": float(np.mean(pairs)) - w.task.cfg.prefix,
        "rows_end": end - w.task.cfg.prefix,
    }


def unit(w: World, name: str, full: Full, o: Options) -> dict[str, Any]:
    """All about one method on one model."""
    out: dict[str, Any] = {"model": w.name, "method": name, "site": site(name), "variants": [], "levels": []}
    choose, score = halves(w, o)
    labels, images, batch = w.task.labels, w.task.images, min(o.batch, len(w.task.images))
    right = full.logits.argmax(-1) == labels
    levels, clips = LEVELS[w.name], w.name == "kwt1"
    best: Any = None
    above = 0.01
    for label, variant in FAMILIES[name].items():
        found = reach(w, variant, levels[0], full.flops, batch, above)
        if found is None:
            out["variants"].append({"label": label, "reached": False})
            continue
        setting, traced, share, above = found
        program = traced.lower().compile(compiler_options=QUICK)
        row = {"label": label, "reached": True, **line(w, setting, share)}
        if clips:
            z, lost = logits(w, program, images, batch)
            p, q = (np.exp(a - a.max(-1, keepdims=True)) for a in (full.logits, z))
            p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
            row |= {"top1": float((z.argmax(-1) == full.logits.argmax(-1)).mean()), "difference": float(np.abs(z - full.logits).max())}
            row |= {"kl": float((p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(-1).mean()), "rows_lost": lost}
        else:
            row["chosen_on"] = float((logits(w, program, images[choose], batch)[0].argmax(-1) == labels[choose]).mean())
        out["variants"].append(row)
        if clips:
            break
        if best is None or row["chosen_on"] > best[0]["chosen_on"]:
            best = row, variant, program, share, setting
    if best is None:
        return out
    out["chosen"] = best[0]["label"]
    for level in levels:
        if level == levels[0]:
            _, variant, program, share, setting = best
        else:
            found = reach(w, best[1], level, full.flops, batch, above)
            if found is None:
                continue
            setting, traced, share, _ = found
            program = traced.lower().compile(compiler_options=QUICK)
        here = score if level == levels[0] else score[: o.curve]
        z, lost = logits(w, program, images[here], batch)
        ours = z.argmax(-1) == labels[here]
        row = {"level": level, **line(w, setting, share), "images": len(here), "accuracy": float(ours.mean()), "rows_lost": lost}
        row["full"], row["same"] = float(right[here].mean()), float((z.argmax(-1) == full.logits[here].argmax(-1)).mean())
        out["levels"].append(row | paired(right[here], ours))
    return out


def site(name: str) -> str:
    return registry.get(name).site if name in registry.names() else "vit"


# --- times -------------------------------------------------------------------------------------------------------------------------------------------


def find(w: World, name: str, label: str, shown: str) -> Setting:
    """The setting that was written as `shown`."""
    for s in range(1, MOST * w.n):
        setting = FAMILIES[name][label](w, s)
        if setting is not None and str(setting) == shown:
            return setting
    raise ValueError(f"{name} has no setting {shown!r} any more; run without --time first")


def clock(w: World, rows: list[dict[str, Any]], o: Options, tick) -> None:
    """Adds `ms` (quartiles, an image) and `faster` to the rows of one model, all measured in turn with the full model."""
    batch = min(o.batch, len(w.task.images))
    images = jnp.asarray(w.task.images[:batch])
    settings = [Setting()] + [find(w, r["method"], r.get("chosen", r["variants"][-1]["label"]), best(r)["setting"]) for r in rows]

    def program(setting):
        done = trace(w, setting, batch)[0].lower().compile()
        jax.block_until_ready(done(w.task.params, images))
        tick()
        return done

    with concurrent.futures.ThreadPoolExecutor(o.threads) as pool:
        programs = list(pool.map(program, settings))
    took = np.zeros((o.repeats, len(programs)))
    for i in range(o.repeats):
        for j, run in enumerate(programs):
            begin = time.perf_counter()
            jax.block_until_ready(run(w.task.params, images))
            took[i, j] = time.perf_counter() - begin
        tick()
    ms = np.quantile(1e3 * took / batch, (0.25, 0.5, 0.75), axis=0)
    for j, r in enumerate(rows):
        best(r)["ms"], best(r)["faster"] = ms[:, j + 1].round(4).tolist(), round(float(ms[1, 0] / ms[1, j + 1]), 3)
        best(r)["ms_full"] = ms[:, 0].round(4).tolist()


def best(r: dict[str, Any]) -> dict[str, Any]:
    """The line that a method is judged by."""
    return r["levels"][0] if r["levels"] else r["variants"][-1]


# --- tables and the figure ---------------------------------------------------------------------------------------------------------------------------


def reached(r: dict[str, Any]) -> bool:
    return bool(r["levels"]) or (bool(r["variants"]) and r["variants"][-1]["reached"])


def tables(document: dict[str, Any]) -> str:
    """README.md: a table a model, best first."""
    out = ["# Encoders: accuracy against FLOPs", "", *(__doc__ or "").split("\n\n", 2)[2].rstrip().splitlines(), ""]
    for name in document["models"]:
        rows = [r for r in document["rows"] if r["model"] == name]
        good, none = [r for r in rows if reached(r)], [r["method"] for r in rows if not reached(r)]
        timed = any("ms" in best(r) for r in good)
        if name == "kwt1":
            out += [f"## kwt1: four clips, {100 * LEVELS[name][0]:.0f}% of the FLOPs at most", ""]
            head = [
                "method",
                "site",
                "setting",
                "FLOPs",
                "rows, mean",
                "rows, end",
                "same word",
                "largest difference of logits",
                "KL, nats",
            ]
            good.sort(key=lambda r: best(r)["kl"])
            cells = lambda r: [f"{best(r)['top1']:.2f}", f"{best(r)['difference']:.3f}", f"{best(r)['kl']:.4f}"]
        else:
            share, most = GOALS[name]
            full = best(good[0])
            out += [
                f"## {name}: {100 * share:.1f}% of the FLOPs at most; full model {100 * full['full']:.2f}% of {full['images']} images",
                "",
            ]
            head = [
                "method",
                "site",
                "setting",
                "FLOPs",
                "rows, mean",
                "rows, end",
                "accuracy",
                "points lost (95%)",
                f"at most {most}",
                "same answer",
            ]
            good.sort(key=lambda r: best(r)["lost"])
            cells = lambda r: [
                f"{100 * best(r)['accuracy']:.2f}",
                f"{best(r)['lost']:.2f} ({best(r)['low']:.2f} to {best(r)['high']:.2f})",
                "yes" if best(r)["lost"] <= most else "no",  # noqa: B023
                f"{best(r)['same']:.3f}",
            ]
        head += ["ms an image", "times as fast"] if timed else []
        out += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for r in good:
            b = best(r)
            row = [r["method"], r["site"], b["setting"], f"{100 * b['flops']:.1f}%", f"{b['rows_mean']:.1f}", str(b["rows_end"]), *cells(r)]
            if timed:
                row += [f"{b['ms'][1]:.3f} ({b['ms'][0]:.3f} to {b['ms'][2]:.3f})", f"{b['faster']:.2f}"] if "ms" in b else ["", ""]
            out.append("| " + " | ".join(row) + " |")
        out += ["", f"Come down to these FLOPs with none of their settings: {', '.join(none) or 'none'}.", ""]
        if timed:
            first = next(best(r) for r in good if "ms" in best(r))
            out += [f"The full model takes {first['ms_full'][1]:.3f} ms an image, in batches, all cores.", ""]
    out += ["Left out: " + "; ".join(f"{k}: {v}" for k, v in SKIPPED.items()) + ".", ""]
    return "\n".join(out)


def figure(document: dict[str, Any], path: pathlib.Path) -> None:
    """A row a model, a panel a site: accuracy against counted FLOPs, a line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in document["models"] if n in GOALS and any(r["levels"] for r in document["rows"] if r["model"] == n)]
    if not names:
        return
    drawn = Figure(figsize=(15, 5.2 * len(names)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(len(names), 2, squeeze=False)
    for i, name in enumerate(names):
        share, most = GOALS[name]
        for j, (where, title) in enumerate((("vit", "inside the encoder"), ("select", "rows selected behind a layer"))):
            axis = axes[i, j]
            rows = [r for r in document["rows"] if r["model"] == name and r["site"] == where and r["levels"]]
            for k, r in enumerate(rows):
                points = sorted((x["flops"], x["lost"]) for x in r["levels"])
                axis.plot(*zip(*points, strict=True), marker="osD^v<>pPX*h"[k % 12], color=f"C{k % 10}", linestyle=("-", "--")[k // 10 % 2], label=r["method"], alpha=0.85)  # fmt: skip
            axis.axhline(0, color="0.4", linestyle="--", linewidth=1)
            axis.plot([0.3, share, share], [most, most, 0], color="0.2", linewidth=1)
            axis.set_title(f"{name}, {title}: dashed the full model, corner the goal", fontsize=10)
            axis.set_xlabel("counted FLOPs, share of the full model's")
            axis.set_ylabel("points lost on the scored half")
            axis.set_ylim(min(25.0, max(x["lost"] for r in rows for x in r["levels"]) + 0.5), -1.5)
            axis.grid(alpha=0.3)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    drawn.savefig(path, dpi=90)


def main(o: Options) -> dict[str, Any]:
    every = {*registry.names("vit"), *registry.names("select")}
    if every - {*FAMILIES, *SKIPPED}:
        raise ValueError(f"no settings for {', '.join(sorted(every - {*FAMILIES, *SKIPPED}))}; add them to FAMILIES or SKIPPED")
    for name, why in SKIPPED.items():
        print(f"{name} is left out: it {why}", file=sys.stderr)
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "results.json"
    document = {"models": [], "rows": []} if o.again or not path.exists() else json.loads(path.read_text())
    worlds = [World(name, getattr(encoders, name)(o.data)) for name in o.models]
    document["models"] = list(dict.fromkeys([*document["models"], *o.models]))
    methods = [name for name in FAMILIES if not o.methods or name in o.methods]

    def save() -> None:
        order = {(a, b): i for i, (a, b) in enumerate((a, b) for a in LEVELS for b in FAMILIES)}
        document["rows"].sort(key=lambda r: order.get((r["model"], r["method"]), -1))
        report.write(path, document)

    failed: list[str] = []
    with report.bar("methods") as bar:
        done = 0

        def tick(total: int, what: str) -> None:
            nonlocal done
            done += 1
            bar(done, total, what)

        if o.time:
            for w in worlds:
                rows = [r for r in document["rows"] if r["model"] == w.name and reached(r) and r["method"] in methods]
                total, done = len(rows) + 1 + o.repeats, 0
                clock(w, rows, o, lambda total=total, w=w: tick(total, w.name))
            document["timed"] = {**report.machine(), "load": os.getloadavg(), "batch": o.batch, "repeats": o.repeats}
        else:
            known = {(r["model"], r["method"]) for r in document["rows"]}
            todo = [(w, name) for name in methods for w in worlds if (w.name, name) not in known]
            full = {w.name: baseline(w, o) for w in worlds if any(x is w for x, _ in todo)}
            with concurrent.futures.ThreadPoolExecutor(o.threads) as pool:
                jobs = {pool.submit(unit, w, name, full[w.name], o): f"{name} on {w.name}" for w, name in todo}
                for job in concurrent.futures.as_completed(jobs):
                    if job.exception() is None:
                        document["rows"].append(job.result())
                        save()
                    else:
                        failed.append(f"{jobs[job]}: {job.exception()}")
                        print(failed[-1], file=sys.stderr)
                    tick(len(todo), jobs[job])
            document["machine"] = {**report.machine(), "choose": o.choose}
    save()
    (o.out / "README.md").write_text(tables(document))
    figure(document, o.out / "pareto.png")
    if failed:
        raise SystemExit(f"{len(failed)} failed, the others are written:\n" + "\n".join(failed))
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
