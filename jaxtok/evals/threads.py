"""Needle threading (arXiv:2411.05000): pairs of random keys and values fill the context; a question asks for some, or follows a thread.

    single_needle       the value of a key
    multi_needle        the values of `needles`=4 keys; `clustered`: they stand side by side
    conditional_needle  the values of all keys that hold a character (`mark`="*"; `needles`=4 of them, `clustered`)
    thread              the value of a key is the next key, and so on for `links`=5 pairs: where does it end?
    multi_thread        the ends of `threads`=3 threads of `links`=4
    branched_thread     each key of a thread but the last stands `branches`=2 times, and all but one lead nowhere: the end of the longest

`direction` of threads: "forward" (each pair stands behind the one before it), "backward" or "random". A thread is asked for by its first
key. `depth` places the asked key of single_needle, the first one of multi_needle and a cluster; threads it does not concern.
Score: the share of the asked values that are found, as the paper's; of one value that is all or nothing.

Two wordings. template="ruler" is the paper's haystack: a JSON object of UUIDs (a branched key stands in it more than once); the questions
are worded anew. template="short" is a list that the embedded model reads, "mako=528, tiru=991, ", with keys of five letters so that a
small context holds many. In threads all values are words, so nothing tells a thread's pairs from the others.

The embedded model (full cache, 256 to 1,024 characters, 50 cases each) finds every value of single_needle and multi_needle, 1% of those of
conditional_needle and not one end of a thread: it was never shown those tasks, so only a larger model tells compressors apart on them.

How branches are laid is our reading of the paper: a dead end is one pair long.
"""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtok.core import check
from jaxtok.evals.source import Draft, Source
from jaxtok.evals.wording import TEMPLATES, value_range, values, word_keys

DIRECTIONS = ("forward", "backward", "random")


class Pair(NamedTuple):
    """A needle; `depth` is the share of the other pairs that stand before it."""

    depth: float
    key: str
    value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Haystack:
    """A wording of pairs. Questions end where the answer begins."""

    open: str
    row: Callable[[str, str], str]
    join: str
    close: str
    numbers: bool  # whether values that are no keys are numbers
    word: Callable[[np.random.Generator, int, str], list[str]]
    asked: Callable[[Sequence[str]], str]  # the values of keys
    marked: Callable[[str], str]  # the values of the keys with a character
    followed: Callable[[Sequence[str]], str]  # the ends of threads
    longest: Callable[[str], str]
    reply: Callable[[Sequence[str], Sequence[str]], str]  # (keys, answers)


def _uuids(rng: np.random.Generator, n: int, split: str) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]


def _words(rng: np.random.Generator, n: int, split: str) -> list[str]:
    return word_keys(rng, n, split, letters=(5, 5))  # of one length: none is a part of another


def _quoted(keys: Sequence[str]) -> str:
    return ", ".join(f'"{k}"' for k in keys)


def _ends_of(keys: Sequence[str]) -> str:
    how = "\nIn the JSON object above a value may be a key itself. Go from the key to its value, from that value, as a key, to its own, and on"
    if len(keys) == 1:
        return f'{how} until a value is no key. Start: "{keys[0]}"\nLast value: "'
    return f'{how} until a value is no key, for each of these starts: {_quoted(keys)}\nLast values, in this order: "'


_SHORT = TEMPLATES["short"]
HAYSTACKS = {
    "short": Haystack(
        open="",
        row=lambda k, v: f"{k}={v}, ",
        join="",
        close="",
        numbers=True,
        word=_words,
        asked=lambda keys: _SHORT.ask(keys, False),
        marked=lambda mark: f"\nRecall all with {mark}: ",
        followed=lambda keys: _SHORT.ask(keys, False).replace("Remember", "Follow", 1).replace("Recall", "Follow", 1),
        longest=lambda key: f"\nFollow longest {key}=",
        reply=lambda keys, answers: _SHORT.reply(keys, answers) if keys else " ".join(answers),
    ),
    "ruler": Haystack(
        open="{",
        row=lambda k, v: f'"{k}": "{v}"',
        join=", ",
        close="}",
        numbers=False,
        word=_uuids,
        asked=lambda keys: (
            f'\nWhich value does this key have in the JSON object above? Key: "{keys[0]}"\nValue: "'
            if len(keys) == 1
            else f'\nWhich values do these keys have in the JSON object above? Keys: {_quoted(keys)}\nValues, in this order: "'
        ),
        marked=lambda mark: f'\nWhich values do all the keys that contain "{mark}" have in the JSON object above?\nValues: "',
        followed=_ends_of,
        longest=lambda key: (
            "\nIn the JSON object above a value may be a key itself, and a key may stand there more than once with different values. Go from "
            f'key to value as far as any way leads. Start: "{key}"\nLast value of the longest way: "'
        ),
        reply=lambda keys, answers: '", "'.join(answers) + '"',
    ),
}


class _Draw:
    """Names that are all different, as many as are asked for."""

    def __init__(self, s: Source):
        self.s, self.hay, self.used = s, HAYSTACKS["short" if s.template is _SHORT else "ruler"], set()

    def names(self, n: int) -> list[str]:
        out: list[str] = []
        while len(out) < n:
            new = [w for w in self.hay.word(self.s.rng, n - len(out), self.s.split) if w not in self.used]
            self.used.update(new)
            out += new
        return out

    def values(self, n: int) -> list[str]:
        """Values that are no keys."""
        if not self.hay.numbers:
            return self.names(n)
        out = values(self.s.rng, n, _SHORT.digits)
        self.used.update(out)
        return out

    def number(self) -> str:
        return f"{int(self.s.rng.integers(*value_range(_SHORT.digits))):0{_SHORT.digits}d}"

    def others(self, n: int, words: bool) -> list[tuple[str, str]]:
        """Pairs that nobody asks for."""
        keys = self.names(n)
        if words or not self.hay.numbers:
            return list(zip(keys, self.names(n), strict=True))
        return [(k, next(v for v in iter(self.number, "") if v not in self.used)) for k in keys]

    def context(self, needles: Sequence[Pair], question: str, *, words: bool) -> str:
        """The needles among as many other pairs as there is room for."""
        hay, rest = self.hay, []
        placed = sorted(needles, key=lambda p: p.depth)

        def build(n: int) -> str:
            rest.extend(self.others(max(0, n - len(rest)), words))
            rows, last = [], 0
            for p in placed:
                cut = round(p.depth * n)
                rows += [*rest[last:cut], (p.key, p.value)]
                last = cut
            return hay.open + hay.join.join(hay.row(*row) for row in (*rows, *rest[last:n])) + hay.close

        unit = len(hay.row(placed[0].key, placed[0].value) + hay.join)
        return self.s.fit(build, question, unit=float(unit))


def _needles(s: Source, needles: int, clustered: bool, mark: str | None) -> Draft:
    check.count("needles", needles)
    check.kind("clustered", clustered, bool)
    draw = _Draw(s)
    keys, vals = draw.names(needles), draw.values(needles)
    where = [s.place()] * needles if clustered else [s.place(), *s.rng.random(needles - 1).tolist()]
    if mark is not None:
        at = [int(s.rng.integers(len(k) - 1)) for k in keys]
        keys = [k[:i] + mark + k[i + 1 :] for k, i in zip(keys, at, strict=True)]
    pairs = [Pair(*each) for each in zip(where, keys, vals, strict=True)]
    if mark is not None:
        pairs.sort(key=lambda p: p.depth)  # the answers as they stand in the context
    laid = [pairs[i] for i in s.rng.permutation(needles)] if clustered and mark is None else pairs
    question = draw.hay.asked(keys) if mark is None else draw.hay.marked(mark)
    answers = tuple(p.value for p in pairs)
    reply = draw.hay.reply([] if mark is not None else keys, answers)
    return Draft(draw.context(laid, question, words=False), question, answers, reply)


def _single(s: Source) -> Draft:
    return _needles(s, 1, False, None)


def _multi(s: Source, *, needles: int = 4, clustered: bool = False) -> Draft:
    return _needles(s, needles, clustered, None)


def _conditional(s: Source, *, needles: int = 4, clustered: bool = False, mark: str = "*") -> Draft:
    if not isinstance(mark, str) or len(mark) != 1 or mark.isalnum() or not mark.isprintable() or mark in ' -"\\,:;=(){}[]?.':
        raise ValueError(f'mark={mark!r} must be one character that keys and wordings do without, such as "*", "#" or "@"')
    return _needles(s, needles, clustered, mark)


def _strand(draw: _Draw, links: int, direction: str) -> tuple[list[str], list[Pair]]:
    """(a thread's names, the first key to the last value; its pairs)."""
    check.count("links", links)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}; supported: {', '.join(DIRECTIONS)}")
    names, where = draw.names(links + 1), np.sort(draw.s.rng.random(links))
    where = where[::-1] if direction == "backward" else draw.s.rng.permutation(where) if direction == "random" else where
    return names, [Pair(*each) for each in zip(where.tolist(), names[:-1], names[1:], strict=True)]


def _multi_thread(s: Source, *, threads: int = 3, links: int = 4, direction: str = "random") -> Draft:
    check.count("threads", threads)
    draw = _Draw(s)
    strands = [_strand(draw, links, direction) for _ in range(threads)]
    starts, ends = [names[0] for names, _ in strands], tuple(names[-1] for names, _ in strands)
    question = draw.hay.followed(starts)
    context = draw.context([p for _, pairs in strands for p in pairs], question, words=True)
    return Draft(context, question, ends, draw.hay.reply(starts, ends))


def _thread(s: Source, *, links: int = 5, direction: str = "random") -> Draft:
    return _multi_thread(s, threads=1, links=links, direction=direction)


def _branched(s: Source, *, links: int = 5, branches: int = 2, direction: str = "random") -> Draft:
    check.count("links", links, 2)
    check.count("branches", branches, 2)
    draw = _Draw(s)
    names, pairs = _strand(draw, links, direction)
    ways = [key for key in names[: links - 1] for _ in range(branches - 1)]
    astray = [Pair(float(s.rng.random()), key, end) for key, end in zip(ways, draw.names(len(ways)), strict=True)]
    question = draw.hay.longest(names[0])
    return Draft(draw.context([*pairs, *astray], question, words=True), question, (names[-1],), draw.hay.reply([names[0]], [names[-1]]))


TASKS: dict[str, Callable[..., Any]] = {
    "single_needle": _single,
    "multi_needle": _multi,
    "conditional_needle": _conditional,
    "thread": _thread,
    "multi_thread": _multi_thread,
    "branched_thread": _branched,
}
