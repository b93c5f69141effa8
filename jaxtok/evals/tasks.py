"""Long-context tasks: seeded generators of any length, and the scores.

A case is a context, a question that the model continues, and the answers. The two are apart so that a cache can be
compressed after the context (question unseen) or after context + question (query-aware). Two wordings:

    "short"  made for a small character model and easy to read: a fact is the sentence " Remember mako=528.", the question
             "\\nRemember mako=". Several at once: "\\nRecall (a) mako= (b) tiru=: (a) mako=", continued "528 (b) tiru=991".
    "ruler"  the wording of RULER (arXiv:2404.06654), for language models; of the threading tasks, UUIDs in a JSON object (`threads`).

Keys of the short wording are random letters, split by a checksum: those for training (`split="train"`) and those for
evaluation never meet. The default haystack is `haystack()`, text that the embedded model was not trained on.
"""

import functools
import importlib.resources
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtok.evals import threads
from jaxtok.evals.source import Draft, Encode, Source, chars
from jaxtok.evals.wording import TEMPLATES, value_range, values, word_keys


class Example(NamedTuple):
    """One case."""

    context: str
    question: str  # follows the context; the model continues it
    answers: tuple[str, ...]  # in the order in which a perfect continuation gives them
    depth: float  # where in the context the (first) answer stands, 0 start .. 1 end; nan where answers are spread
    length: int  # tokens of context + tokens of question
    task: str
    max_new: int  # tokens that a perfect continuation takes


@functools.cache
def haystack() -> str:
    """The text inside the package that the embedded model never saw: 150 KB of Shakespeare (public domain, see haystack.md)."""
    return importlib.resources.files("jaxtok.evals").joinpath("haystack.txt").read_text("utf-8")


# --- facts in text -----------------------------------------------------------------------------------------------------


def _hide(text: str, facts: Sequence[tuple[float, str]]) -> str:
    """Insert each fact at its depth (a fraction of the text), moved back to the end of a word."""
    out, last = [], 0
    for depth, fact in sorted(facts):
        cut = round(depth * len(text))
        if cut < len(text):
            cut = max(text.rfind(" ", 0, cut + 1), text.rfind("\n", 0, cut + 1), 0)
        cut = max(cut, last)
        out += [text[last:cut], fact]
        last = cut
    return "".join(out) + text[last:]


def _needles(s: Source, asked: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]], several: bool = False) -> Draft:
    """Facts in text, some of which are asked; the first asked one stands at the wanted depth."""
    t = s.template
    facts = [(s.place() if i == 0 else float(s.rng.random()), t.fact(k, v)) for i, (k, v) in enumerate([*asked, *others])]
    keys, answers = [k for k, _ in asked], [v for _, v in asked]
    question = t.ask(keys, several)
    take, intro = s.window(), t.intro(len(facts))
    return Draft(s.fit(lambda n: intro + _hide(take(n), facts), question), question, tuple(answers), t.reply(keys, answers))


def _needle(s: Source) -> Draft:
    keys, vals = s.fresh(1)
    return _needles(s, [(keys[0], vals[0])], [])


def _multi_key(s: Source, *, needles: int = 8) -> Draft:
    keys, vals = s.fresh(needles)
    pairs = list(zip(keys, vals, strict=True))
    return _needles(s, pairs[:1], pairs[1:])


def _multi_value(s: Source, *, asked: int = 2, needles: int = 4) -> Draft:
    """`asked` facts with one key, the rest with others; all values of that key are wanted."""
    keys, vals = s.fresh(needles - asked + 1, asked)
    return _needles(s, [(keys[0], v) for v in vals[:asked]], list(zip(keys[1:], vals[asked:])), several=True)  # noqa: B905


def _multi_query(s: Source, *, asked: int = 2, needles: int = 8) -> Draft:
    keys, vals = s.fresh(needles)
    pairs = list(zip(keys, vals, strict=True))
    return _needles(s, pairs[:asked], pairs[asked:])


def _kv_recall(s: Source) -> Draft:
    """A list of pairs that fills the context, one of them asked: associative recall."""
    t = s.template
    keys = t.keys(s.rng, s.room // 2 + 2, s.split)  # a pair takes two tokens or more
    (answer,) = values(s.rng, 1, t.digits)
    # other values may repeat, the asked one must not
    low, high = value_range(t.digits)
    others = [f"{v:0{t.digits}d}" for v in s.rng.integers(low, high, len(keys)).tolist()]
    spare = values(s.rng, 2, t.digits)
    others = [v if v != answer else next(x for x in spare if x != answer) for v in others]
    rows = [t.row(k, v) for k, v in zip(keys, others, strict=True)]
    place = s.place()
    # no question is longer than that of the longest key, so the list can be fitted before the pair is chosen
    longest = t.ask([max(keys, key=len)], False)
    intro = t.intro(2)
    context = s.fit(lambda n: intro + "".join(rows[: n + 1]), longest, unit=len("".join(rows)) / len(rows))
    n = next(i for i in range(len(rows) + 1) if len(intro) + sum(map(len, rows[:i])) == len(context))
    i = min(n - 1, int(place * n))
    rows[i] = t.row(keys[i], answer)
    return Draft(intro + "".join(rows[:n]), t.ask([keys[i]], False), (answer,), t.reply([keys[i]], [answer]))


def _variable_tracking(s: Source, *, hops: int = 4) -> Draft:
    """A chain x1 = value, x2 = x1, ...: which keys hold the value? Links in order, at random places (`depth` is of no consequence)."""
    short = s.template is TEMPLATES["short"]
    keys, vals = word_keys(s.rng, hops + 1, s.split), values(s.rng, 1, s.template.digits if short else 5)
    if not short:
        keys = [k.upper() for k in keys]
    sources = [vals[0], *keys[:-1]]
    if short:
        links = [f" Remember {k}={v}." for k, v in zip(keys, sources, strict=True)]
        question = f"\nRecall keys of {vals[0]}:"
    else:
        links = [f" VAR {k} = {v if i == 0 else 'VAR ' + v}." for i, (k, v) in enumerate(zip(keys, sources, strict=True))]
        question = (
            f"\nQuestion: Find all variables that are assigned the value {vals[0]} in the text above. Answer: According to the chain(s) of "
            f"variable assignment in the text above, {len(keys)} variables are assigned the value {vals[0]}, they are:"
        )
    intro = "" if short else "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    facts = list(zip(np.sort(s.rng.random(len(links))).tolist(), links, strict=True))
    take = s.window()
    return Draft(s.fit(lambda n: intro + _hide(take(n), facts), question), question, tuple(keys), " " + " ".join(keys), unique=False)


def _shuffled(words: list[str], join: Callable[[list[str]], str]) -> str:
    # the same order at each call, so that `fit` sees a function of n
    order = np.random.default_rng(zlib.crc32(words[0].encode())).permutation(len(words))
    return join([words[i] for i in order])


def _common_words(s: Source, *, common: int | None = None, times: int | None = None, rare: int | None = None) -> Draft:
    """`common` words stand `times` times each, the others `rare` times: which are common? (10, 30, 3 in RULER; 3, 8, 1 short.)"""
    short = s.template is TEMPLATES["short"]
    common, times, rare = (d if x is None else x for x, d in zip((common, times, rare), (3, 8, 1) if short else (10, 30, 3), strict=True))
    if times <= rare:
        raise ValueError(f"times={times} must be over rare={rare}")
    words = word_keys(s.rng, s.room + common, s.split)
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    )
    intro = "" if short else intro
    join = " ".join if short else lambda w: " ".join(f"{i + 1}. {x}" for i, x in enumerate(w))
    question = "\nRecall the most common words:"
    if not short:
        question = (
            f"\nQuestion: What are the {common} most common words in the above list? "
            f"Answer: The top {common} words that appear most often in the list are:"
        )

    def build(n: int) -> str:
        return intro + _shuffled(words[:common] * times + words[common : common + n] * rare, join)

    return Draft(s.fit(build, question, unit=6.0 * rare), question, tuple(words[:common]), " " + " ".join(words[:common]), unique=False)


def _frequent_words(s: Source, *, alpha: float = 2.0, top: int = 3) -> Draft:
    """Words whose counts fall as rank ** -alpha amid dots (the most frequent "word"): which are the `top` most frequent?"""
    short = s.template is TEMPLATES["short"]
    number = {2: "two", 3: "three", 4: "four", 5: "five"}.get(top, str(top))
    words = word_keys(s.rng, 50, s.split, letters=(6, 6))
    share = np.arange(2, 52) ** -float(alpha)
    share = share / (1 + share.sum())
    intro = (
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the {number} most frequently appeared coded words. "
    )
    intro = "" if short else intro
    question = "\nRecall the most frequent words:"
    if not short:
        question = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            f"What are the {number} most frequently appeared words in the above coded text? "
            f"Answer: According to the coded text above, the {number} most frequently appeared words are:"
        )

    def build(n: int) -> str:
        counts = np.round(share * (n + 20)).astype(int)
        counts[: top + 1] += np.arange(top, -1, -1)  # strictly ordered however short the text
        listed = [w for w, c in zip(words, counts, strict=True) for _ in range(c)]
        return intro + _shuffled(listed + ["..."] * max(0, n + 20 - len(listed)), " ".join)

    return Draft(s.fit(build, question, unit=5.0), question, tuple(words[:top]), " " + " ".join(words[:top]), unique=False)


TASKS: dict[str, Callable[..., Draft]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "kv_recall": _kv_recall,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    **threads.TASKS,
}


def examples(
    task: str,
    count: int,
    *,
    length: int,
    encode: Encode = chars,
    seed: int = 0,
    depth: float | None = None,
    text: str | None = None,
    template: str = "short",
    split: str = "eval",
    **options: Any,
) -> list[Example]:
    """`count` cases of a task, each a function of (task, seed, its index) alone.

    length: tokens of context + question under `encode`, each encoded by itself, no special tokens; a case is at most that long and as
        close as its filler allows (a character, a word or a pair).
    depth: where the asked fact stands, 0 the start .. 1 the end of the context; None = uniform, drawn for each case.
    text: the haystack; None = `haystack()`. template: a wording of `TEMPLATES`. split: which keys ("train" is for training).
    options: multi_key needles=8; multi_value asked=2, needles=4; multi_query asked=2, needles=8 (facts in all); variable_tracking hops=4;
        common_words common, times, rare; frequent_words alpha=2, top=3; those of the threading tasks: see `threads`.
    Raises ValueError for an unknown name, a depth outside 0..1, an option the task lacks, or a length with no room for the facts.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r}; supported: {', '.join(TEMPLATES)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be between 0 (start) and 1 (end)")
    known = set(inspect.signature(TASKS[task]).parameters) - {"s"}
    if not known >= set(options):
        raise ValueError(
            f"task {task} has no option {', '.join(sorted(set(options) - known))}; it has: {', '.join(sorted(known)) or 'none'}"
        )
    text = haystack() if text is None else text
    if not text.strip():
        raise ValueError("the haystack text is empty")
    return [_case(task, i, length, encode, seed, depth, text, template, split, options) for i in range(count)]


def _case(
    task: str, i: int, length: int, encode: Encode, seed: int, depth: float | None, text: str, name: str, split: str, options: Any
) -> Example:
    template = TEMPLATES[name]
    for attempt in range(50):
        rng = np.random.default_rng([seed, zlib.crc32(task.encode()), i, attempt])
        draft = TASKS[task](Source(rng, encode, length, depth, text, template, split), **options)
        if not draft.unique or all(draft.context.count(a) == 1 for a in draft.answers):
            break
    else:
        raise ValueError(f"the haystack holds so many numbers of {template.digits} digits that no answer is unique in it; use another text")
    found = draft.context.find(draft.answers[0]) if draft.unique else -1
    return Example(
        context=draft.context,
        question=draft.question,
        answers=draft.answers,
        depth=found / len(draft.context) if found >= 0 else math.nan,
        length=len(encode(draft.context)) + len(encode(draft.question)),
        task=task,
        max_new=len(encode(draft.reply)),
    )


def needle_grid(count: int, *, lengths: Sequence[int], depths: Sequence[float], **options: Any) -> list[Example]:
    """`count` needles for each length and depth: the cases of a heat map, lengths outermost. Options as `examples`."""
    return [e for n in lengths for d in depths for e in examples("needle", count, length=n, depth=d, **options)]


# --- scores -----------------------------------------------------------------------------------------------------------


def string_match(prediction: str, answers: Iterable[str]) -> float:
    """RULER's score: the fraction of the answers that the prediction contains, case ignored."""
    found = [a.lower() in prediction.lower() for a in answers]
    return sum(found) / len(found)


def exact_first(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction, blanks in front apart, begins with the first answer, else 0.0."""
    return float(prediction.lstrip().startswith(answers[0]))
