"""What a task draws from and what it gives: random numbers, an encoding, a length to fill."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtok.evals.wording import Template, values

Encode = Callable[[str], Sequence[int]]


def chars(text: str) -> list[int]:
    """The default `encode`: a token a character."""
    return list(map(ord, text))


class Source(NamedTuple):
    """What a task draws from."""

    rng: np.random.Generator
    encode: Encode
    room: int  # tokens of context + question
    depth: float | None
    text: str
    template: Template
    split: str

    def fit(self, build: Callable[[int], str], question: str, *, unit: float = 1.0) -> str:
        """The longest `build(n)` found, n >= 0, that with the question takes at most `room` tokens. unit: characters a step of n."""
        room = self.room - len(self.encode(question))
        base = build(0)
        low, used = 0, len(self.encode(base))
        if used > room:
            raise ValueError(
                f"length={self.room} tokens is too short: the case takes {used + self.room - room} without its filler; raise length"
            )
        best, high, per = base, None, 1 / unit
        guess = low + max(1, int((room - used) * per))
        for _ in range(24):
            made = build(guess)
            count = len(self.encode(made))
            if count <= room:
                low, used, best = guess, count, made
            else:
                high = guess
            if count == room or (high is not None and high - low <= 1):
                break
            per = guess / max(1, count - len(self.encode(base))) if guess > 0 else per
            guess = low + max(1, int((room - used) * per))
            if high is not None and guess >= high:  # the estimate overshoots: halve
                guess = (low + high) // 2
            if guess == low:
                break
        return best

    def window(self) -> Callable[[int], str]:
        """n characters of the haystack from a random word on, round and round."""
        text = self.text
        start = int(self.rng.integers(0, len(text)))
        start = max(text.find(" ", start), text.find("\n", start)) + 1 if text.find(" ", start) >= 0 else 0

        def take(n: int) -> str:
            out = text[start : start + n]
            while len(out) < n:
                out += text[: n - len(out)]
            return out

        return take

    def fresh(self, n: int, many: int = 1) -> tuple[list[str], list[str]]:
        """n keys and n * many values."""
        return self.template.keys(self.rng, n, self.split), values(self.rng, n * many, self.template.digits)

    def place(self) -> float:
        return float(self.rng.random()) if self.depth is None else self.depth


class Draft(NamedTuple):
    """A case without its numbers. reply: a perfect continuation."""

    context: str
    question: str
    answers: tuple[str, ...]
    reply: str
    unique: bool = True  # each answer must stand in the context exactly once
