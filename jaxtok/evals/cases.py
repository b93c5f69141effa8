"""The cases of a comparison: tasks by name or file, as token ids in a few static shapes."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import budget
from jaxtok.evals import ruler, tasks
from jaxtok.evals.tasks import Example
from jaxtok.models import text
from jaxtok.models.text import Tokenizer

BUCKET = 16  # shapes are rounded up to a multiple of this
DEPTHS = 5  # needles stand evenly at this many depths


class Case(NamedTuple):
    """One example as ids."""

    task: str
    length: int  # the length that was asked for (of a file: of its group)
    example: Example
    context: list[int]
    question: list[int]


class Group(NamedTuple):
    """Cases that run in the same programs: static lengths of context, question and continuation."""

    cases: tuple[Case, ...]
    context: int
    question: int  # 0 = the question is part of the context (query-aware)
    new: int


class Rows(NamedTuple):
    """A batch. Context and question are left-padded; `ask` is None when the question is part of the context."""

    ids: jax.Array  # i32 [b n]
    live: jax.Array  # bool [b n]
    ask: jax.Array | None  # i32 [b q]
    ask_live: jax.Array | None  # bool [b q]


def make(task: str, tokenizer: Tokenizer, *, lengths: Sequence[int], count: int, seed: int, template: str = "short") -> list[Case]:
    """`count` cases of a task for each length, or the first `count` rows of a RULER-style .jsonl file.

    Needles stand at the middles of DEPTHS equal parts in turn. Lengths count tokens of context + question, bos apart.
    """

    def encode(s: str) -> list[int]:
        return tokenizer.encode(s, special=False)

    def case(length: int, e: Example) -> Case:
        return Case(e.task, length, e, tokenizer.encode(e.context, special=True), encode(e.question))

    if task.endswith(".jsonl"):
        rows = ruler.read_jsonl(pathlib.Path(task), encode=encode, limit=count)
        longest = max(e.length for e in rows)
        return [case(longest, e) for e in rows]
    if task not in tasks.TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(tasks.TASKS)}, perplexity, or a .jsonl file")
    out = []
    for n in lengths:
        if task == "needle":
            made = [
                tasks.examples(
                    task, 1, length=n, encode=encode, seed=seed * 10_000 + i, depth=(i % DEPTHS + 0.5) / DEPTHS, template=template
                )[0]
                for i in range(count)
            ]
        else:
            made = tasks.examples(task, count, length=n, encode=encode, seed=seed, template=template)
        out += [case(n, e) for e in made]
    return out


def group(cases: Sequence[Case], *, query_aware: bool, new: int | None = None) -> list[Group]:
    """Cases by static shape: lengths from half the longest on share its programs, padded. `new`: None = what the answers take."""
    left, out = sorted(cases, key=lambda c: -c.length), []
    while left:
        longest = left[0].length
        mine = [c for c in left if 2 * c.length >= longest]
        left = left[len(mine) :]
        up = lambda sizes: -(-max(1, *sizes, 1) // BUCKET) * BUCKET
        if query_aware:
            shape = up([len(c.context) + len(c.question) for c in mine]), 0
        else:
            shape = up([len(c.context) for c in mine]), up([len(c.question) for c in mine])
        take = max(2, *(c.example.max_new for c in mine)) if new is None else new
        out.append(Group(tuple(mine), *shape, take))
    return out


def batches(group: Group, size: int) -> list[tuple[tuple[Case, ...], Rows]]:
    """The group in batches of exactly `size` rows; the last one is filled up with empty rows."""
    out = []
    for i in range(0, len(group.cases), size):
        mine = group.cases[i : i + size]
        fill = [[]] * (size - len(mine))
        if group.question:
            ask = _pad([c.question for c in mine] + fill, group.question)
            out.append((mine, Rows(*_pad([c.context for c in mine] + fill, group.context), *ask)))
        else:
            out.append((mine, Rows(*_pad([c.context + c.question for c in mine] + fill, group.context), None, None)))
    return out


def _pad(rows: Sequence[Sequence[int]], length: int) -> tuple[jax.Array, jax.Array]:
    ids, live = text.pad(rows, bucket=length)
    return jnp.asarray(ids), jnp.asarray(live)


def slots(size: float | int, n: int) -> int:
    """Static capacity of a budget (ratio or tokens) in a bucket of n rows."""
    return budget.capacity(size, n) if isinstance(size, float) else size


def keep(size: float | int, live: jax.Array) -> jax.Array | None:
    """i32 [b]: how many slots a row keeps: its share of its own live tokens; None = the capacity (a budget in tokens)."""
    return budget.keep(size, jnp.sum(live, -1, dtype=jnp.int32)) if isinstance(size, float) else None


def shown(case: Case, ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a continuation, cut to what a perfect one takes."""
    cut = ids[: case.example.max_new]
    return tokenizer.decode([int(i) for i in cut if i >= 0])
