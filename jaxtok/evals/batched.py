"""Likelihoods and continuations of many ragged requests, in batches of a few static shapes, with a method at work on the cache.

A request begins with a prompt. The method acts after its context; where there is a question, it is read after that. Requests of like
lengths share a batch: lengths are rounded up to one of 16, 24, 32, 48, 64, 96, ..., and each combination compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import parse_budget
from jaxtok.decode import Sampler, prefill, reread, turns
from jaxtok.decode.prefill import Draft, check_draft
from jaxtok.evals import cases, compiled, measure
from jaxtok.evals.cases import Rows
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN
from jaxtok.models.text import pad

BLOCK = 8  # tokens between two looks at what was said


class Prompt(NamedTuple):
    """Ids of what the method may compress, and of what is read afterwards."""

    context: list[int]
    question: list[int] = []  # noqa: RUF012


class Wanted(NamedTuple):
    """How a text is to be generated: tokens at most, what ends it, how tokens are drawn."""

    new: int
    until: tuple[str, ...]
    sampler: Sampler

    def cut(self, text: str) -> str | None:
        """`text` up to the first of the stop texts, None where none is in it."""
        found = [at for at in map(text.find, self.until) if at >= 0]
        return text[: min(found)] if found else None


def wanted(options: Mapping[str, Any], new: int) -> Wanted:
    """What the options of a generation task ask for, by the names that the lm-evaluation-harness knows; `new` where they do not say.

    ValueError for options that would change what is generated and are not supported.
    """
    left = dict(options)
    until = left.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")]
    new = int(next((n for n in lengths if n is not None), new))
    temperature, drawn = float(left.pop("temperature", None) or 0.0), left.pop("do_sample", None)
    filters = {name: left.pop(name, None) for name in ("top_k", "top_p", "min_p")}
    if left.pop("num_beams", 1) != 1 or left:
        raise ValueError(
            f"generation options {dict(options)}: supported are until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p"
        )
    if drawn and not temperature:
        temperature = 1.0
    greedy = drawn is False or not temperature
    return Wanted(new, tuple(text for text in until if text), Sampler() if greedy else Sampler(temperature=temperature, **filters))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model and what acts on its cache: a recipe, or a method's spec and its budget ("25%" is that share of each context)."""

    cfg: Config
    params: Any
    method: str | Recipe = measure.FULL
    budget: str = "100%"
    batch: int = 16
    seed: int = 0
    draft: Draft | None = None  # a model with the same token ids, for methods that look at a draft of the answer
    encode: Callable[..., list[int]] | None = None  # text to ids: for methods that read the prompt twice and ask for it in words
    sizes: set = dataclasses.field(default_factory=set)  # the shapes that were compiled

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be >= 1, got {self.batch}")
        recipe, _, _ = self.recipe(1 << 20)  # what is wrong at any length
        recipe.validate(self.cfg)
        check_draft(self.cfg, recipe, self.draft)

    def recipe(self, n: int) -> tuple[Recipe, float | int | None, int]:
        """(recipe for contexts of up to n tokens, budget, slots); a recipe that was given has no budget of its own."""
        if isinstance(self.method, Recipe):
            return self.method, None, n
        size = parse_budget(self.budget)
        slots = cases.slots(size, n)
        return measure.recipe_of(self.method, slots), size, slots

    def likelihoods(
        self, requests: Sequence[tuple[Prompt, list[int]]], tick: Callable[[int], Any] = lambda n: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation after the prompt in nats, whether greedy decoding says it) of each request, as teacher forcing
        through the caches gives it: with a step policy slots are vacated and with a reader chosen token by token.

        ValueError for an empty prompt or continuation.
        """
        for prompt, said in requests:
            if not prompt.context or not said:
                raise ValueError(f"a likelihood needs a prompt and a continuation, got {len(prompt.context)} and {len(said)} tokens")
        out: dict[int, tuple[float, bool]] = {}
        plain = self.method in (PLAIN, measure.FULL)
        join = lambda prompt, said: Prompt(prompt.context + prompt.question + said) if plain else prompt
        for mine, (n, _, t), rows in self._batches([join(*r) for r in requests], [len(said) for _, said in requests]):
            given = [requests[i][1] for i in mine] + [[]] * (self.batch - len(mine))
            ids, live = map(jnp.asarray, pad(given, t, side="left" if plain else "right"))
            program = _score_at_once if plain else _score_by_steps
            recipe, keep, after = self._at(n, rows)
            params = self._learned(recipe)
            key = jax.random.key(self.seed)
            total, greedy = map(
                np.asarray, program(self.cfg, recipe, self._ask(), *self._drafted(recipe), params, rows, ids, live, keep, after, key)
            )
            out |= {i: (float(total[j]), bool(greedy[j])) for j, i in enumerate(mine)}
            tick(len(mine))
        return [out[i] for i in range(len(requests))]

    def continuations(
        self,
        requests: Sequence[tuple[Prompt, int]],
        *,
        sampler: Sampler = turns.GREEDY,
        done: Callable[[int, list[int]], bool] = lambda i, ids: False,
        tick: Callable[[int], Any] = lambda n: None,
    ) -> list[list[int]]:
        """Up to so many ids after each prompt, without the token that ends a text. `done(i, ids)` ends request i early."""
        for prompt, new in requests:
            if not prompt.context or new < 1:
                raise ValueError(f"a continuation needs a prompt and at least one token, got {len(prompt.context)} and {new}")
        out: dict[int, list[int]] = {}
        for mine, (n, _, t), rows in self._batches([prompt for prompt, _ in requests], [new for _, new in requests]):
            recipe, keep, after = self._at(n, rows)
            params, key = self._learned(recipe), jax.random.key(self.seed)
            x, layers = _begin_jit(self.cfg, recipe, self._ask(), *self._drafted(recipe), t, params, rows, keep, after, key)
            running = np.arange(self.batch) < len(mine)
            said: Any = turns.Said.start(x)._replace(running=jnp.asarray(running))
            ids, most = [[] for _ in mine], [requests[i][1] for i in mine]
            while running.any():
                left = jnp.asarray(max(most) - int(said.count), jnp.int32)
                some, said, layers = _speak_jit(
                    self.cfg,
                    params,
                    said,
                    layers,
                    recipe.replace(prompt=None, cache=None),
                    most=BLOCK,
                    left=left,
                    sampler=sampler,
                    key=key,
                    keep=after,
                )
                running = np.array(said.running)
                for j, row in enumerate(np.asarray(some)[: len(mine)]):
                    ids[j] += [int(i) for i in row if i >= 0 and int(i) not in self.cfg.eos]
                    running[j] &= len(ids[j]) < most[j] and not done(mine[j], ids[j][: most[j]])
                said = said._replace(running=jnp.asarray(running))
            out |= {i: ids[j][: most[j]] for j, i in enumerate(mine)}
            tick(len(mine))
        return [out[i] for i in range(len(requests))]

    def _at(self, n: int, rows: Rows) -> tuple[Recipe, Any, Any]:
        """(recipe, traced budgets of the prefill, and of the steps after it) for contexts of up to n tokens."""
        recipe, size, slots = self.recipe(n)
        return (recipe, *measure.keeps(recipe, None if size is None else cases.keep(size, rows.live), slots))

    def _ask(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return () if self.encode is None else tuple(reread.request(self.encode).items())

    def _drafted(self, recipe: Recipe) -> tuple[Config | None, Any]:
        return (None, None) if self.draft is None or recipe.drafts is None else self.draft

    def _learned(self, recipe: Recipe) -> Any:
        own = recipe.init_params(jax.random.key(self.seed), self.cfg)
        return self.params | {"methods": own} if jax.tree.leaves(own) else self.params

    def _batches(self, prompts: Sequence[Prompt], after: Sequence[int]) -> Iterator[tuple[list[int], tuple[int, int, int], Rows]]:
        """(which requests, padded lengths of context, question and what follows, rows) of each batch; the longest first."""
        shapes = [(up(len(p.context)), up(len(p.question)) if p.question else 0, up(k)) for p, k in zip(prompts, after, strict=True)]
        for shape in sorted(set(shapes), reverse=True):
            of_shape = [i for i, s in enumerate(shapes) if s == shape]
            self.sizes.add(shape)
            for at in range(0, len(of_shape), self.batch):
                mine = of_shape[at : at + self.batch]
                fill = [[]] * (self.batch - len(mine))
                padded = lambda rows, n, fill=fill: map(jnp.asarray, pad(rows + fill, n))
                ids, live = padded([prompts[i].context for i in mine], shape[0])
                ask, ask_live = padded([prompts[i].question for i in mine], shape[1]) if shape[1] else (None, None)
                yield mine, shape, Rows(ids, live, ask, ask_live)


def up(n: int) -> int:
    """The padded length of n tokens: 16, 24, 32, 48, 64, 96, ..."""
    size = cases.BUCKET
    while size < n:
        size *= 2
    return size * 3 // 4 if size > cases.BUCKET and n <= size * 3 // 4 else size


def _begin(cfg: Config, recipe: Recipe, again, small: Config | None, draft, room: int, params, rows: Rows, keep, after, key):
    """(the row whose logits say what comes first, caches with `room` slots); `again`: options of a prefill that reads twice, `small` and
    `draft`: configuration and parameters of a draft model."""
    new, given = compiled.ahead(recipe, rows, room), None if small is None else (small, draft)
    tokens, layers = prefill(cfg, params, rows.ids, rows.live, recipe, new=new, draft=given, ask=dict(again), keep=keep, key=key)
    if rows.ask is not None:
        tokens, layers = compiled.ask(
            cfg, recipe.replace(prompt=None, cache=None), room, params, rows.ask, rows.ask_live, layers, after, key
        )
    return tokens.x[:, -1:], layers


def _likelihood(cfg: Config, params, x, ids) -> tuple[Any, Any]:
    """(log p of ids [b], whether each is the likeliest) from rows x [b c]."""
    logits = decoder.logits(cfg, params, x[:, None])[:, 0]
    logp = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)
    return logp, jnp.argmax(logits, -1) == ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score_at_once(cfg: Config, recipe: Recipe, again, small, draft, params, rows: Rows, ids, live, keep, after, key):
    """The whole in one pass, without a method: the last `live` ids of each row are the continuation, `ids` repeats them (left-padded)."""
    tokens = decoder.embed(cfg, params, rows.ids, rows.live, recipe.ends)
    tokens, _ = decoder.prefill(cfg, params, tokens, recipe, new=0)
    t = ids.shape[1]
    x = jnp.pad(tokens.x, ((0, 0), (t + 1, 0), (0, 0)))[:, -t - 1 : -1]
    logp, best = jax.lax.map(lambda row: _likelihood(cfg, params, *row), (jnp.swapaxes(x, 0, 1), ids.T))
    return jnp.sum(jnp.where(live.T, logp, 0.0), 0), jnp.all(best | ~live.T, 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score_by_steps(cfg: Config, recipe: Recipe, again, small, draft, params, rows: Rows, ids, live, keep, after, key):
    """A prefill, and the continuation (right-padded) one token after another."""
    x, layers = _begin(cfg, recipe, again, small, draft, ids.shape[1], params, rows, keep, after, key)
    later = recipe.replace(prompt=None, cache=None)

    def one(state, row):
        (x, layers, i), (token, alive) = state, row
        found = _likelihood(cfg, params, x[:, 0], token)
        y = blocks.embed(cfg, params, token[:, None])
        own = jax.random.fold_in(key, i)
        y, layers = decoder.step(cfg, params, y, alive[:, None], layers, later, keep=after, key=own, ids=token[:, None])
        return (jnp.where(alive[:, None, None], y, x), layers, i + 1), found

    _, (logp, best) = jax.lax.scan(one, (x, layers, jnp.zeros((), jnp.int32)), (ids.T, live.T))
    return jnp.sum(jnp.where(live.T, logp, 0.0), 0), jnp.all(best | ~live.T, 0)


_begin_jit = jax.jit(_begin, static_argnums=(0, 1, 2, 3, 5))
_speak_jit = jax.jit(turns.speak, static_argnums=(0, 4), static_argnames=("most", "sampler"), donate_argnums=(3,))
