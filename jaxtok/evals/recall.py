"""Associative recall as classification: the key comes first, then the pairs; which value belongs to it? For encoders.

`pairs`: symbols, one token a key and one a value; `entries`: the same, one token for a key with its value, so that one look is enough, made
to measure for small models; `texts`: the task kv_recall of `tasks`, letter by letter, question first; the class is the first figure of
the value. Functions of (seed, number of the row): numpy, the same everywhere.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxtok.evals import tasks

PAD, ASK = 0, 1  # token ids before the keys
ALPHABET = 128  # ids of `texts`: ASCII


class Batch(NamedTuple):
    """Rows of token ids, live ones left."""

    ids: Int32[np.ndarray, "b n"]
    live: Bool[np.ndarray, "b n"]
    label: Int32[np.ndarray, " b"]


def vocab(keys: int, values: int) -> int:
    """Token ids that `pairs` uses: padding, the mark of the question, keys, values."""
    return 2 + keys + values


def pairs(seed: int, count: int, *, length: int, keys: int = 64, values: int = 16, fewest: int | None = None, start: int = 0) -> Batch:
    """Rows number start to start + count - 1: ASK, the key asked, then (length - 2) // 2 pairs of a key and a value, keys all different.

    fewest: rows have from so many pairs on (None = all the same length); what is left over is padding. label: 0 .. values - 1.
    Knowing only which values occur is right in one of about min(pairs, values) rows. ValueError: fewer keys than pairs, no room for two."""
    most = (length - 2) // 2
    if most < 2 or most > keys or values < 2 or (fewest is not None and not 2 <= fewest <= most):
        raise ValueError(
            f"length={length} has room for {most} pairs; there must be 2 to keys={keys}, 2 values at least, fewest={fewest} of them"
        )
    ids, label = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for row in range(count):
        rng = np.random.default_rng((seed, start + row))
        n = most if fewest is None else int(rng.integers(fewest, most + 1))
        key, value = 2 + rng.permutation(keys)[:n], rng.integers(0, values, n)
        asked = int(rng.integers(n))
        ids[row, :2], label[row] = (ASK, key[asked]), value[asked]
        ids[row, 2 : 2 + 2 * n] = np.stack([key, 2 + keys + value], 1).reshape(-1)
    return Batch(ids, ids != PAD, label)


def entries_vocab(keys: int, values: int) -> int:
    """Token ids that `entries` uses: padding, a question for each key, each key with each value."""
    return 1 + keys + keys * values


def entries(seed: int, count: int, *, length: int, keys: int = 32, values: int = 8, fewest: int | None = None, start: int = 0) -> Batch:
    """The rows of `pairs` with the same arguments, shorter: first the question (1 + key asked), then length - 1 entries
    (1 + keys + values * key + value). ValueError: as `pairs`."""
    ids, live, label = pairs(seed, count, length=2 * length, keys=keys, values=values, fewest=fewest, start=start)
    key, value, live = ids[:, 2::2] - 2, ids[:, 3::2] - 2 - keys, live[:, 1::2]
    told = np.where(live[:, 1:], 1 + keys + values * key + value, PAD)
    return Batch(np.concatenate([ids[:, 1:2] - 1, told], 1).astype(np.int32), live, label)


def texts(seed: int, count: int, *, length: int, split: str = "eval") -> Batch:
    """Rows of the task kv_recall: question, then context, as ASCII codes; label: the first figure of the value. split: `tasks.examples`."""
    found = tasks.examples("kv_recall", count, length=length, seed=seed, split=split)
    ids, label = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for row, example in enumerate(found):
        text = example.question + example.context
        ids[row, : len(text)] = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
        label[row] = int(example.answers[0][0])
    return Batch(ids, ids != PAD, label)
