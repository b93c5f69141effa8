"""How facts, questions and answers are worded: keys, values, and the two templates "short" and "ruler"."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

# --- keys and values --------------------------------------------------------------------------------------------------

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_ADJECTIVES = (
    "able amber brave brisk calm clever crisp daring eager early fair fancy fresh gentle glad grand green happy humble keen kind late "
    "light lively lucky mellow merry mild neat noble odd pale plain proud quick quiet rapid rare sharp shy silver sleepy smart soft steady "
    "sunny swift tidy warm wise"
).split()
_NOUNS = (
    "anchor apple arrow badge basket bell bridge button candle castle cloud comet copper crown desert dragon engine falcon feather forest "
    "garden glacier hammer harbor island jacket kettle ladder lantern marble meadow mirror orchard paper pepper pillow planet pocket "
    "rabbit ribbon river saddle shadow spoon stone summit table tiger valley window"
).split()


def word_keys(rng: np.random.Generator, n: int, split: str = "eval", *, letters: tuple[int, int] = (4, 6)) -> list[str]:
    """n different keys of `letters` (fewest, most) random letters; about one word in four is an evaluation key, the rest train.

    The sum of its letters (a = 0) modulo 4 tells: 0 = evaluation.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}; supported: train, eval")
    out: dict[str, None] = {}
    while len(out) < n:
        m = 6 * (n - len(out)) + 8
        ids, sizes = rng.integers(0, 26, (m, letters[1])), rng.integers(letters[0], letters[1] + 1, m)
        keep = (np.where(np.arange(letters[1]) < sizes[:, None], ids, 0).sum(1) % 4 == 0) == (split == "eval")
        out |= dict.fromkeys("".join(_LETTERS[i[:s]]) for i, s in zip(ids[keep], sizes[keep], strict=True))
    return list(out)[:n]


def phrase_keys(rng: np.random.Generator, n: int, split: str = "eval") -> list[str]:
    """n different keys adjective-noun, or adjective-adjective-noun where n is large. `split` is of no consequence."""
    bases = [_ADJECTIVES, _NOUNS] if n <= 1000 else [_ADJECTIVES, _ADJECTIVES, _NOUNS]
    total = math.prod(map(len, bases))
    if n > total:
        raise ValueError(f"{n} keys wanted, the ruler wording has {total}; shorten the context or use template='short'")
    picks = np.unravel_index(rng.choice(total, n, replace=False), [len(b) for b in bases])
    return ["-".join(b[i] for b, i in zip(bases, row, strict=True)) for row in zip(*picks, strict=True)]


def value_range(digits: int) -> tuple[int, int]:
    """The numbers low .. high - 1 that are values: below 5 digits leading zeros are allowed."""
    return 0 if digits < 5 else 10 ** (digits - 1), 10**digits


def values(rng: np.random.Generator, n: int, digits: int) -> list[str]:
    """n different numbers of exactly `digits` digits."""
    low, high = value_range(digits)
    if n > (high - low) // 2:
        raise ValueError(f"{n} values wanted, too many to differ in {digits} digits; give digits={digits + 2}")
    out: dict[int, None] = {}
    while len(out) < n:
        out |= dict.fromkeys(rng.integers(low, high, n - len(out)).tolist())
    return [f"{v:0{digits}d}" for v in out]


# --- wordings ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A wording. `intro(n)` opens a context with n facts; `ask` ends where the (first) answer begins; `reply` is a perfect continuation."""

    digits: int
    keys: Callable[..., list[str]]
    intro: Callable[[int], str]
    fact: Callable[[str, str], str]  # a sentence amid text, with its leading space
    row: Callable[[str, str], str]  # an entry of a list
    ask: Callable[[Sequence[str], bool], str]  # (keys, has each key more values than one?)
    reply: Callable[[Sequence[str], Sequence[str]], str]


def _label(i: int) -> str:
    return f"({chr(ord('a') + i)})" if i < 26 else f"({i + 1})"


def _short_ask(keys: Sequence[str], several: bool) -> str:
    if len(keys) == 1:
        return f"\nRemember {keys[0]}="
    return "\nRecall " + " ".join(f"{_label(i)} {k}=" for i, k in enumerate(keys)) + f": (a) {keys[0]}="


def _short_reply(keys: Sequence[str], answers: Sequence[str]) -> str:
    return answers[0] + "".join(f" {_label(i)} {k}={v}" for i, (k, v) in enumerate(zip(keys, answers, strict=True)) if i)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + (", and " if len(words) > 2 else " and ") + words[-1]


def _ruler_ask(keys: Sequence[str], several: bool) -> str:
    names = _join(list(dict.fromkeys(keys)))
    if len(keys) == 1 and not several:
        about = f"special magic number for {names} mentioned in the provided text is"
        return f"\nWhat is the special magic number for {names} mentioned in the provided text? The {about}"
    about = f"special magic numbers for {names} mentioned in the provided text are"
    return f"\nWhat are all the special magic numbers for {names} mentioned in the provided text? The {about}"


def _ruler_intro(n: int) -> str:
    some = "A special magic number is" if n == 1 else "Some special magic numbers are"
    it, number = ("it", "number") if n == 1 else ("them", "numbers")
    return f"{some} hidden within the following text. Make sure to memorize {it}. I will quiz you about the {number} afterwards.\n"


def _ruler_fact(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


TEMPLATES = {
    "short": Template(
        digits=3,
        keys=word_keys,
        intro=lambda n: "",
        fact=lambda k, v: f" Remember {k}={v}.",
        row=lambda k, v: f"{k}={v}, ",
        ask=_short_ask,
        reply=_short_reply,
    ),
    "ruler": Template(
        digits=7,
        keys=phrase_keys,
        intro=_ruler_intro,
        fact=lambda k, v: " " + _ruler_fact(k, v),
        row=lambda k, v: _ruler_fact(k, v) + "\n",
        ask=_ruler_ask,
        reply=lambda keys, answers: " " + _join(answers) + ".",
    ),
}
