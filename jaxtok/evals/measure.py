"""One method at one budget on one group of cases: what it answers, how near it stays to the full model, what it costs."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import live_count
from jaxtok.decode import generate, prefill, replay, reread
from jaxtok.decode.prefill import Draft
from jaxtok.evals import agreement, cases, heads, perplexity, tasks
from jaxtok.evals.cases import Group, Rows
from jaxtok.evals.programs import Program, Programs, nbytes, timed
from jaxtok.models import decoder
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
    draft: Any  # a draft model's parameters; None where the recipe does without
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
    programs: Programs = dataclasses.field(default_factory=Programs)

    def __post_init__(self):
        self.key = jax.random.key(self.seed)
        self.splits = heads.Splits(self.cfg, self.params, self.tokenizer)

    def settled(self, spec: str, budget: str, n: int) -> tuple[Recipe, int, Any]:
        """(recipe, slots, parameters with those of the methods where they have any) of a budget for contexts of n tokens."""
        capacity, params = cases.slots(registry.parse_budget(budget), n), self.params
        if heads.told_apart(spec):
            recipe, params = self.splits.at(spec, capacity, n, f" at {budget}")
        else:
            recipe = recipe_of(spec, capacity)
        own = recipe.init_params(self.key, self.cfg)
        return recipe, capacity, params | {"methods": own} if jax.tree.leaves(own) else params

    def draft_of(self, recipe: Recipe) -> tuple[Config | None, Any]:
        """The draft model, where the recipe looks at one."""
        return (None, None) if self.draft is None or recipe.drafts is None else self.draft

    def programs_of(self, g: Group, spec: str, budget: str) -> Used:
        """What a method at a budget runs on the shapes of a group; compiled unless they are there already."""
        size = registry.parse_budget(budget)
        recipe, capacity, params = self.settled(spec, budget, g.context)
        later = recipe.replace(prompt=None, cache=None)
        small, draft = self.draft_of(recipe)
        _, rows = cases.batches(g, self.batch)[0]
        keep, after = keeps(recipe, cases.keep(size, rows.live), capacity)
        fn = functools.partial(_prefill, self.cfg, recipe, g.new, reread.request(self.tokenizer.encode), small)
        begin = self.programs.get(
            "prefill", (recipe, g.new), fn, (params, draft, rows, keep, self.key), trips=max((recipe.look or 0) - 1, 0)
        )
        tokens, layers, *_ = begin.out
        ask = None
        if rows.ask is not None:
            fn = functools.partial(_ask, self.cfg, later, g.new)
            ask = self.programs.get("ask", (later, g.new), fn, (params, rows.ask, rows.ask_live, layers, after, self.key))
            tokens, layers = ask.out
        fn = functools.partial(_decode, self.cfg, later, g.new)
        state = (params, tokens, layers, after, self.key)
        decode = self.programs.get("decode", (later, g.new), fn, state, donate=(2,), trips=g.new - 1)
        ids = jax.ShapeDtypeStruct((self.batch, g.new), jnp.int32)
        live = jax.ShapeDtypeStruct(ids.shape, jnp.bool)
        logits = jax.ShapeDtypeStruct((g.new, self.batch, self.cfg.vocab), jnp.float32)
        compare = self.programs.get("compare", later, functools.partial(_compare, self.cfg, later), (*state, ids, live, logits))
        return Used(recipe, capacity, params, draft, begin, ask, decode, compare, nbytes(layers))

    def begin(self, used: Used, rows: Rows, keep: Any, after: Any) -> tuple[Any, ...]:
        """(tokens, caches, kept slots, where they are) when the question has been read."""
        tokens, layers, count, where = used.prefill.call(used.params, used.draft, rows, keep, self.key)
        if used.ask is not None:
            tokens, layers = used.ask.call(used.params, rows.ask, rows.ask_live, layers, after, self.key)
        return tokens, layers, count, where

    def logits_of(self, g: Group) -> tuple[Used, Program]:
        """The full model's programs."""
        used = self.programs_of(g, FULL, "100%")
        tokens, layers, *_ = used.ask.out if used.ask is not None else used.prefill.out
        ids = jax.ShapeDtypeStruct((self.batch, g.new), jnp.int32)
        live = jax.ShapeDtypeStruct(ids.shape, jnp.bool)
        return used, self.programs.get("logits", None, functools.partial(_logits, self.cfg), (self.params, tokens, layers, ids, live))

    def reference(self, g: Group) -> Reference:
        """The full model's greedy continuation of every case, and its logits along it."""
        out = Reference([], [], [])
        used, logits = self.logits_of(g)
        for _, rows in cases.batches(g, self.batch):
            tokens, layers, *_ = self.begin(used, rows, None, None)
            said = used.decode.call(self.params, tokens, layers, None, self.key)[0]
            live, ids = said >= 0, jnp.maximum(said, 0)
            tokens, layers, *_ = self.begin(used, rows, None, None)
            out.ids.append(ids)
            out.live.append(live)
            out.logits.append(logits.call(self.params, tokens, layers, ids, live))
        return out

    def measure(self, g: Group, reference: Reference, spec: str, budget: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(the rows of a method at a budget, the map of what it kept of the first case)."""
        used = self.programs_of(g, spec, budget)
        size, params = registry.parse_budget(budget), used.params
        seconds: list[float] = []
        found: list[dict[str, Any]] = []
        map_: dict[str, Any] = {}
        todo = cases.batches(g, self.batch)
        # the first run of a program pays for its buffers and is not timed; runs beyond the batches are for the clock only
        for i in range(max(len(todo), self.repeats + 1)):
            mine, rows = todo[i % len(todo)]
            keep, after = keeps(used.recipe, cases.keep(size, rows.live), used.capacity)
            (tokens, layers, count, where), a = timed(self.begin, used, rows, keep, after)
            if i < len(todo):
                target = reference.ids[i], reference.live[i], reference.logits[i]
                kl, same = used.compare.call(params, tokens, layers, after, self.key, *target)
            (said, lost, _), b = timed(used.decode.call, params, tokens, layers, after, self.key)
            seconds += [a + b] if i else []
            if i < len(todo):
                first = jnp.sum(where[:, :SINKS], -1)
                facts = [np.asarray(x) for x in (said, lost, count, first, kl.T, same.T, reference.live[i])]
                found += _cases(mine, self.tokenizer, *facts)
            if i == 0:
                map_ = _map(spec, budget, mine[0], np.asarray(where[0]), len(mine[0].context))
        facts = self._facts(spec, budget, used, statistics.median(seconds), g.new)
        return [row(facts, [f for f in found if f["case"] == where]) for where in dict.fromkeys(f["case"] for f in found)], map_

    def _facts(self, spec: str, budget: str, used: Used, seconds: float, new: int) -> dict[str, Any]:
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
    keep = {site: jnp.minimum(share, capacity)}
    return keep, keep if site == "policy" else None


def _cases(mine, tokenizer, said, lost, count, first, kl, same, live) -> list[dict[str, Any]]:
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
                "said": text,
                "wanted": list(case.example.answers),
            }
        )
    return out


def row(facts: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: means over the cases of a task and length.

    score: string match. kl (nats), top1: on the full model's continuation. kept, lost: live slots after compression, and rows without
    room, a layer and KV head. sinks: how many of the first SINKS tokens are among the kept ones (attention sinks stand there). capacity: static slots asked for. Per sequence: cache_bytes (arrays allocated, with room for question and
    continuation), prefill_flops, prefill_bytes. Per sequence and generated token: step_flops, step_bytes. Per batch: peak_bytes,
    compile_s (of its programs, also where another row compiled them), time_s (median of prefill + generation).
    """
    task, length = found[0]["case"]
    mean = lambda name: float(np.nanmean(v)) if np.isfinite(v := [f[name] for f in found]).any() else None
    row = {"method": facts["method"], "budget": facts["budget"], "task": task, "length": length, "cases": len(found)}
    row |= {name: mean(name) for name in ("score", "kl", "top1", "kept", "lost", "sinks")} | {
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


# --- what is compiled -------------------------------------------------------------------------------------------------


def _prefill(cfg: Config, recipe: Recipe, new: int, ask: Mapping[str, Any], small: Config | None, params, draft, rows: Rows, keep, key):
    """(tokens cut to the last row or None, caches, kept slots [b], share of layers and heads that kept each position [b n])."""
    given: Any = None if small is None else (small, draft)
    room = ahead(recipe, rows, new)
    tokens, layers = prefill(cfg, params, rows.ids, rows.live, recipe, new=room, draft=given, ask=ask, keep=keep, key=key)
    pos = [part.pos for parts in layers for part in parts]
    heads = sum(p.shape[1] for p in pos)
    count = sum(jnp.sum(live_count(p), -1) for p in pos).astype(jnp.float32) / heads  # type: ignore[union-attr]
    b, n = rows.ids.shape
    where = jnp.zeros((b, n + 1), jnp.float32)
    for p in pos:
        p = p.reshape(b, -1)
        where = where.at[jnp.arange(b)[:, None], jnp.where((p < 0) | (p > n), n, p)].add(1.0)
    where = where[:, :n] / heads
    if recipe.prompt is not None:  # positions in the caches are those of the short prompt
        there, order = tokens.source >= 0, jnp.where(rows.live, jnp.cumsum(rows.live, -1, dtype=jnp.int32) - 1, n)
        short = jnp.take_along_axis(tokens.pos, jnp.maximum(tokens.source, 0), 1)
        share = jnp.where(there, jnp.take_along_axis(where, jnp.clip(short, 0, n - 1), 1), 0.0)
        where = jnp.zeros((b, n + 1), jnp.float32).at[jnp.arange(b)[:, None], order].set(share)[:, :n]
    # where a question follows, nothing reads the rows after the last layer, and the compiler drops their MLP
    return _last(tokens) if rows.ask is None else None, layers, count, where


def ahead(recipe: Recipe, rows: Rows, new: int) -> int:
    """Room that a prefill leaves behind the context: the question makes its own, but for heads that are left whole beside a step policy."""
    return new if rows.ask is None else rows.ask.shape[1] + new if recipe.heads else 0


def _ask(cfg: Config, recipe: Recipe, new: int, params, ids, live, layers, keep, key):
    """The question after the compressed context -> (tokens cut to the last row, caches)."""
    tokens = decoder.embed(cfg, params, ids, live, recipe.ends)
    if recipe.policy is not None:  # as it would be while generating: one row after another
        x, layers = decoder.step(cfg, params, tokens.x, tokens.pos >= 0, layers, recipe, keep=keep, key=key)
        return _last(tokens._replace(x=x)), layers
    tokens, layers = decoder.prefill(cfg, params, tokens, recipe, new=new, layers=layers, keep=keep, key=key)
    return _last(tokens), layers


def _last(tokens):
    return tokens._replace(x=tokens.x[:, -1:], pos=tokens.pos[:, -1:])


def _decode(cfg: Config, recipe: Recipe, new: int, params, tokens, layers, keep, key):
    """(ids i32 [b new], lost rows a layer and head f32 [b], caches)."""
    out = generate(cfg, params, tokens, layers, recipe, new=new, keep=keep, key=key)
    return out.ids, heads.average(out.layers, lambda part: part.kv.lost), out.layers


def _compare(cfg: Config, recipe: Recipe, params, tokens, layers, keep, key, ids, live, logits):
    """(KL f32 [t b], same first token bool [t b]) along the full model's continuation."""
    mine, _ = replay(cfg, params, tokens, layers, ids, recipe, live=live, keep=keep, key=key)
    return agreement.divergence(logits, mine)


def _logits(cfg: Config, params, tokens, layers, ids, live):
    return replay(cfg, params, tokens, layers, ids, live=live)[0]
