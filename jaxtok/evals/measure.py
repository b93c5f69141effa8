"""One method on one group of cases: what it answers, how near it stays to the full model, what it costs.

At one budget in programs of that budget's shapes, or at several in one program: `keep` is traced, so the arrays of the largest budget serve
all of them and the prompt is read once; what a budget costs is then counted in its own shapes, by tracing.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.decode import reread
from jaxtok.decode.prefill import Draft
from jaxtok.evals import agreement, cases, compiled, heads, oracle, perplexity, tasks
from jaxtok.evals.cases import Group, Rows
from jaxtok.evals.programs import Program, Programs, nbytes, timed
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN
from jaxtok.models.text import Tokenizer

SITES = ("prompt", "cache", "policy", "reader")
FULL = "full"
SINKS = 4  # first tokens: where attention sinks stand


def site_of(spec: str) -> str:
    """The site of the method that a spec names; ValueError unless it is one of SITES."""
    site = registry.get(spec.partition(":")[0].strip()).site
    if site not in SITES:
        raise ValueError(f"{spec!r} acts at site {site!r}; this takes methods of the sites {', '.join(SITES)}")
    return site


def recipe_of(spec: str, capacity: int) -> Recipe:
    """The recipe that puts the method of `spec` at its site; full = the plain model. ValueError for a method that must be told which heads."""
    method = registry.build(spec, capacity)
    if heads.told_apart(spec):
        raise ValueError(
            f"{method.name} leaves some heads whole and must be told which: `jaxtok compare` and `generate` look for them; "
            "elsewhere give a Recipe with heads=, made by jaxtok.core.heads.split"
        )
    return PLAIN if method.name == FULL else Recipe(**{method.site: method})


class Used(NamedTuple):
    """What a method at a budget runs."""

    recipe: Recipe
    capacity: int
    params: Any
    draft: Any  # a draft model's parameters; None where the recipe does without (the oracle: what it knows)
    prefill: Program
    ask: Program | None  # the question after it; None when the prefill has it
    decode: Program
    compare: Program
    cache_bytes: int  # of a batch, while decoding


class Reference(NamedTuple):
    """What the full model said to each batch."""

    ids: list[jax.Array]  # i32 [b new], 0 after the end
    live: list[jax.Array]  # bool [b new]
    logits: list[jax.Array]  # f32 [new b vocab]
    mass: list[oracle.Mass]  # what each key is worth to the question and to `ids`; empty unless asked for


@dataclasses.dataclass(eq=False)
class Work:
    """A model, and how it is measured: rows in a batch, timed runs, the draft model of the methods that need one."""

    cfg: Config
    params: Any
    tokenizer: Tokenizer
    batch: int
    repeats: int
    seed: int
    draft: Draft | None = None
    grade: bool = False  # how much of the oracle's mass each method holds
    learned: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # method -> parameters of its own, in the place of `init_params`
    programs: Programs = dataclasses.field(default_factory=Programs)

    def __post_init__(self):
        self.key = jax.random.key(self.seed)
        self.splits = heads.Splits(self.cfg, self.params, self.tokenizer)

    def settled(self, spec: str, budget: str, n: int) -> tuple[Recipe, int, Any]:
        """(recipe, slots, parameters with those of the methods where they have any) of a budget for contexts of n tokens."""
        capacity, params = cases.slots(registry.parse_budget(budget), n), self.params
        if spec == oracle.ORACLE:
            return Recipe(cache=oracle.Foreseen(capacity=capacity)), capacity, params
        if heads.told_apart(spec):
            recipe, params = self.splits.at(spec, capacity, n, f" at {budget}")
        else:
            recipe = recipe_of(spec, capacity)
        own = recipe.init_params(self.key, self.cfg)
        own |= {site: self.learned[m.name] for site in own if (m := getattr(recipe, site)) and getattr(m, "name", None) in self.learned}
        return recipe, capacity, params | {"methods": own} if jax.tree.leaves(own) else params

    def draft_of(self, recipe: Recipe) -> tuple[Config | None, Any]:
        """The draft model, where the recipe looks at one."""
        return (None, None) if self.draft is None or recipe.drafts is None else self.draft

    def programs_of(self, g: Group, spec: str, *budgets: str, run: bool = True) -> Used:
        """What a method at a budget, or at several at once, runs on the shapes of a group; compiled unless they are there already.

        `run`: False = only traced.
        """
        biggest = max(budgets, key=lambda b: cases.slots(registry.parse_budget(b), g.context))
        recipe, capacity, params = self.settled(spec, biggest, g.context)
        later = recipe.replace(prompt=None, cache=None)
        small, draft = self.draft_of(recipe)
        _, rows = cases.batches(g, self.batch)[0]
        keep, after = self.budgets(recipe, capacity, rows, budgets)
        get, many = functools.partial(self.programs.get, run=run), len(budgets)
        # the budget's axis leads wherever something depends on it
        over = lambda fn, *axes: fn if many == 1 else jax.vmap(fn, in_axes=axes)
        fn = functools.partial(compiled.prompt, self.cfg, recipe, g.new, reread.request(self.tokenizer.encode), small)
        if spec == oracle.ORACLE:
            draft = (jax.ShapeDtypeStruct((self.batch, self.cfg.kv_heads, g.context), jnp.float32),) * self.cfg.layers
        fn, trips = over(fn, None, None, None, 0, None), max((recipe.look or 0) - 1, 0)
        begin = get("prefill", (recipe, g.new, many), fn, (params, draft, rows, keep, self.key), trips=trips)
        tokens, layers, *_ = begin.out
        own, ask = 0 if after is not None else None, None
        if rows.ask is not None:
            fn = over(functools.partial(compiled.ask, self.cfg, later, g.new), None, None, None, 0, own, None)
            ask = get("ask", (later, g.new, many), fn, (params, rows.ask, rows.ask_live, layers, after, self.key))
            tokens, layers = ask.out
        fn = over(functools.partial(compiled.answer, self.cfg, later, g.new), None, 0, 0, own, None)
        state = (params, tokens, layers, after, self.key)
        decode = get("decode", (later, g.new, many), fn, state, donate=(2,), trips=g.new - 1)
        ids = jax.ShapeDtypeStruct((self.batch, g.new), jnp.int32)
        live = jax.ShapeDtypeStruct(ids.shape, jnp.bool)
        logits = jax.ShapeDtypeStruct((g.new, self.batch, self.cfg.vocab), jnp.float32)
        fn = over(functools.partial(compiled.compare, self.cfg, later), None, 0, 0, own, None, None, None, None)
        compare = get("compare", (later, many), fn, (*state, ids, live, logits)) if run else decode
        return Used(recipe, capacity, params, draft, begin, ask, decode, compare, nbytes(layers))

    def budgets(self, recipe: Recipe, capacity: int, rows: Rows, budgets: Sequence[str]) -> tuple[Any, Any]:
        """Traced budgets of the prefill and of the steps, those of several stacked. ValueError where several have nothing to differ in."""
        each = [keeps(recipe, cases.keep(registry.parse_budget(b), rows.live), capacity) for b in budgets]
        if len(each) == 1:
            return each[0]
        if each[0][0] is None:
            raise ValueError(f"{', '.join(budgets)}: this method takes no traced budget; measure one at a time")
        stack = lambda parts: None if parts[0] is None else jax.tree.map(lambda *x: jnp.stack(x), *parts)
        return stack([a for a, _ in each]), stack([b for _, b in each])

    def begin(self, used: Used, rows: Rows, keep: Any, after: Any, known: Any = None) -> tuple[Any, ...]:
        """(tokens, caches, kept slots, where they are, positions of the slots) when the question has been read. `known`: to the oracle."""
        tokens, layers, count, where, held = used.prefill.call(used.params, used.draft if known is None else known, rows, keep, self.key)
        if used.ask is not None:
            tokens, layers = used.ask.call(used.params, rows.ask, rows.ask_live, layers, after, self.key)
        return tokens, layers, count, where, held

    def logits_of(self, g: Group) -> tuple[Used, Program]:
        """The full model's programs."""
        used = self.programs_of(g, FULL, "100%")
        tokens, layers, *_ = used.ask.out if used.ask is not None else used.prefill.out
        ids = jax.ShapeDtypeStruct((self.batch, g.new), jnp.int32)
        live = jax.ShapeDtypeStruct(ids.shape, jnp.bool)
        return used, self.programs.get(
            "logits", None, functools.partial(compiled.logits, self.cfg), (self.params, tokens, layers, ids, live)
        )

    def reference(self, g: Group) -> Reference:
        """The full model's greedy continuation of every case, and its logits along it."""
        out = Reference([], [], [], [])
        used, logits = self.logits_of(g)
        for mine, rows in cases.batches(g, self.batch):
            tokens, layers, *_ = self.begin(used, rows, None, None)
            said = used.decode.call(self.params, tokens, layers, None, self.key)[0]
            live, ids = said >= 0, jnp.maximum(said, 0)
            tokens, layers, *_ = self.begin(used, rows, None, None)
            out.ids.append(ids)
            out.live.append(live)
            out.logits.append(logits.call(self.params, tokens, layers, ids, live))
            if self.grade:
                out.mass.append(self.mass(g, self.params, mine, rows, ids, live))
        return out

    def mass(self, g: Group, params: Any, mine: Sequence[cases.Case], rows: Rows, ids: jax.Array, live: jax.Array) -> oracle.Mass:
        """What each key of a batch is worth to the question and to what the answer takes of the continuation."""
        size = lambda count: jnp.asarray([count(c) for c in mine] + [0] * (self.batch - len(mine)), jnp.int32)
        asked = size(lambda c: 0 if g.question else len(c.question))
        live = live & (jnp.arange(live.shape[1])[None] < size(lambda c: c.example.max_new)[:, None])
        most = 0 if g.question else max(len(c.question) for c in g.cases)
        fn = functools.partial(oracle.mass, self.cfg, most=most)
        return self.programs.get("mass", most, fn, (params, rows, asked, ids, live)).call(params, rows, asked, ids, live)

    def measure(self, g: Group, reference: Reference, spec: str, *budgets: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(the rows of a method at each budget, maps of what each kept of the first case). Several budgets run as one and are not timed."""
        used, many = self.programs_of(g, spec, *budgets), len(budgets)
        seconds: list[float] = []
        found: list[list[dict[str, Any]]] = [[] for _ in budgets]
        maps: list[dict[str, Any]] = []
        todo = cases.batches(g, self.batch)
        # the first run of a program pays for its buffers and is not timed; runs beyond the batches are for the clock only
        for i in range(max(len(todo), self.repeats + 1 if self.repeats and many == 1 else 0)):
            mine, rows = todo[i % len(todo)]
            keep, after = self.budgets(used.recipe, used.capacity, rows, budgets)
            known = reference.mass[i] if spec == oracle.ORACLE else None
            (tokens, layers, count, where, held), a = timed(self.begin, used, rows, keep, after, known)
            if i < len(todo):
                target = reference.ids[i], reference.live[i], reference.logits[i]
                kl, same = used.compare.call(used.params, tokens, layers, after, self.key, *target)
            (said, lost, _), b = timed(used.decode.call, used.params, tokens, layers, after, self.key)
            seconds += [a + b] if i and many == 1 else []
            for j, budget in enumerate(budgets if i < len(todo) else ()):
                at = lambda x, j=j: np.asarray(x if many == 1 else x[j])
                grades = self._grades(g, reference, i, spec, used, mine, rows, jax.tree.map(at, held), at(where))
                facts = [
                    at(said),
                    at(lost),
                    at(count),
                    at(where)[:, :SINKS].sum(-1),
                    at(kl).T,
                    at(same).T,
                    np.asarray(reference.live[i]),
                    grades,
                ]
                found[j] += _cases(mine, self.tokenizer, *facts)
                maps += [] if i else [_map(spec, budget, mine[0], at(where)[0], len(mine[0].context))]
        out = []
        for budget, mine in zip(budgets, found, strict=True):
            own = used if many == 1 else self.programs_of(g, spec, budget, run=False)
            facts = self._facts(spec, budget, own, statistics.median(seconds) if seconds else None, g.new)
            out += [row(facts, [f for f in mine if f["case"] == where]) for where in dict.fromkeys(f["case"] for f in mine)]
        return out, maps

    def _grades(self, g: Group, reference: Reference, i: int, spec: str, used: Used, mine, rows: Rows, held, where: np.ndarray):
        """The oracle's share for each case of a batch; NaN where nobody asked, and for readers, which lose nothing."""
        if not self.grade or used.recipe.reader is not None:
            return np.full(self.batch, np.nan)
        worth = reference.mass[i]
        if used.recipe.heads:  # its heads stand in another order
            worth = self.mass(g, used.params, mine, rows, reference.ids[i], reference.live[i])
        if used.recipe.prompt is not None:  # positions in the caches are those of the short prompt, alike for all heads
            kept = np.where(where > 0.5, np.arange(where.shape[1]), -1)[:, None]
            held = [[np.repeat(kept, self.cfg.kv_heads, 1)]] * self.cfg.layers
        return oracle.share(worth, np.asarray(rows.live).sum(-1), held)

    def _facts(self, spec: str, budget: str, used: Used, seconds: float | None, new: int) -> dict[str, Any]:
        b, decode = self.batch, used.decode
        begin = [p for p in (used.prefill, used.ask) if p is not None]
        peaks = [p.peak for p in (*begin, decode) if p.peak is not None]
        return {
            "method": spec,
            "budget": budget,
            "capacity": used.capacity,
            "cache_bytes": used.cache_bytes / b,
            "prefill_flops": sum(p.flops for p in begin) / b,
            "prefill_bytes": sum(p.bytes for p in begin) / b,
            "step_flops": decode.flops / new / b,
            "step_bytes": decode.bytes / new / b,
            "uncounted": sorted({name for p in (*begin, decode) for name in p.unknown}),
            "peak_bytes": max(peaks) if peaks else None,
            "compile_s": sum(p.compile_s for p in (*begin, decode)),
            "time_s": seconds,
            "batch": b,
            "new": new,
        }

    def perplexity(self, windows: np.ndarray, spec: str, budget: str, skip: int) -> dict[str, Any]:
        """The row of a method at a budget on running text: nll in nats a token and its exponential."""
        n = windows.shape[1]
        recipe, capacity, params = self.settled(spec, budget, n)
        options: dict[str, Any] = dict(skip=skip, batch=self.batch, key=self.key, programs=self.programs, draft=self.draft)
        nll, kept, lost, program = perplexity.measure(self.cfg, params, recipe, windows, **options)
        return {
            "method": spec,
            "budget": budget,
            "task": "perplexity",
            "length": n,
            "capacity": capacity,
            "cases": len(windows),
            "skip": skip,
            "nll": float(np.mean(nll)),
            "perplexity": float(np.exp(np.mean(nll))),
            "kept": float(np.mean(kept)),
            "lost": float(np.mean(lost)),
            "compile_s": program.compile_s,
        }


def keeps(recipe: Recipe, share: jax.Array | None, capacity: int) -> tuple[dict[str, jax.Array] | None, dict[str, jax.Array] | None]:
    """Traced budgets of the prefill, and of the steps that follow."""
    site = next((name for name in ("prompt", "cache", "policy") if getattr(recipe, name) is not None), None)
    if site is None or share is None or recipe.heads:  # of head groups each has slots of its own
        return None, None
    table = getattr(getattr(recipe, site), "table", ())  # slots of each layer: a budget is that of the average one
    keep = {site: jnp.minimum(share, capacity)}
    if table:
        each = jnp.asarray(table, jnp.int32)[:, None]
        keep = {site: jnp.minimum((share[None] * each + capacity // 2) // capacity, each)}
    return keep, keep if site == "policy" else None


def _cases(mine, tokenizer, said, lost, count, first, kl, same, live, grades) -> list[dict[str, Any]]:
    """What is known of each case of a batch; rows past the cases are padding."""
    out = []
    for i, case in enumerate(mine):
        text = cases.shown(case, said[i], tokenizer)
        counted = (live[i] & (np.arange(live.shape[1]) < case.example.max_new))[None]
        out.append(
            {
                "case": (case.task, case.length),
                "depth": case.example.depth,
                "score": tasks.string_match(text, case.example.answers),
                "kl": float(agreement.mean_over(kl[i][None], counted)[0]),
                "top1": float(agreement.mean_over(same[i][None].astype(float), counted)[0]),
                "kept": float(count[i]),
                "lost": float(lost[i]),
                "sinks": float(first[i]),
                "oracle": float(grades[i]),
                "said": text,
                "wanted": list(case.example.answers),
            }
        )
    return out


def row(facts: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: means over the cases of a task and length.

    score: string match. kl (nats), top1: on the full model's continuation. kept, lost: live slots after compression, and rows without
    room, a layer and KV head. sinks: how many of the first SINKS tokens are among the kept ones. oracle: share of the oracle's mass (`evals.oracle`) in the slots that were kept; None where nobody asked, and
    for readers. capacity: static slots asked for. Per sequence: cache_bytes (arrays allocated, with room for question and
    continuation), prefill_flops, prefill_bytes. Per sequence and generated token: step_flops, step_bytes. Per batch: peak_bytes,
    compile_s (of its programs, also where another row compiled them), time_s (median of prefill + generation); None, 0 and None where
    several budgets ran as one.
    """
    task, length = found[0]["case"]
    mean = lambda name: float(np.nanmean(v)) if np.isfinite(v := [f[name] for f in found]).any() else None
    row = {"method": facts["method"], "budget": facts["budget"], "task": task, "length": length, "cases": len(found)}
    row |= {name: mean(name) for name in ("score", "kl", "top1", "kept", "lost", "sinks", "oracle")} | {
        k: v for k, v in facts.items() if k not in row
    }
    row["each"] = [{"depth": f["depth"] if math.isfinite(f["depth"]) else None, "score": f["score"]} for f in found]
    row["sample"] = {name: found[0][name] for name in ("said", "wanted")}
    return row


def _map(spec: str, budget: str, case, where: np.ndarray, n: int) -> dict[str, Any]:
    depth = case.example.depth
    return {
        "method": spec,
        "budget": budget,
        "task": case.task,
        "length": case.length,
        "answer": depth if math.isfinite(depth) else None,
        "context": n,
        "kept": [round(float(x), 3) for x in where],
    }
