"""Heads told apart: some keep their whole cache, the others a streaming one. Which, in what order, and what the others have in common."""

from fractions import Fraction
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.types import KV, Protect


class HeadSplit(NamedTuple):
    """Static tuples: full heads are the first group of each layer, the others the second."""

    sizes: tuple[tuple[int, int], ...]  # for Recipe.heads
    order: tuple[tuple[int, ...], ...]  # for models.blocks.reorder_heads: the KV heads of each layer, the full ones first


def split(full: Bool[np.ndarray, "l g"]) -> HeadSplit:
    """The split that leaves the heads marked in `full` their whole cache; each group keeps the order of its heads."""
    full = _table("full", full)
    if full.dtype != bool:
        raise TypeError(f"full marks heads (bool [l g]), got {full.dtype}; compare scores with a threshold, or take `best`")
    order = np.argsort(~full, axis=1, kind="stable")
    sizes = tuple((int(row.sum()), int((~row).sum())) for row in full)
    return HeadSplit(sizes, tuple(tuple(map(int, row)) for row in order))


def best(score: Float[np.ndarray, "l g"], count: int) -> Bool[np.ndarray, "l g"]:
    """The `count` heads of largest score over all layers, exactly as many (ties: the lower layer, then the lower head; NaN last)."""
    score = _table("score", score).astype(np.float64)
    check.count("count", count, 0, score.size)
    flat = np.where(np.isnan(score), -np.inf, score).reshape(-1)
    out = np.zeros(score.size, bool)
    out[np.argsort(-flat, kind="stable")[:count]] = True
    return out.reshape(score.shape)


def _table(name: str, x) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or not x.size or x.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be one number for each layer and KV head, [l g], got {x.dtype} {list(x.shape)}")
    return x


def allot(capacity: int, n: int, heads: int, most: float | int) -> int:
    """How many of `heads` may keep n slots where the average head has `capacity`: the share `most` of them (rounded half up), while that takes
    three quarters of all slots at most or the capacity covers n.
    """
    for name, value in (("capacity", capacity), ("n", n), ("heads", heads)):
        check.count(name, value, 1)
    check.between("most", most, 0, 1)
    whole = int(Fraction(str(most)) * int(heads) + Fraction(1, 2))
    return whole if capacity >= n else min(3 * int(capacity) * int(heads) // (4 * int(n)), whole)


class Streaming(CachePolicy):
    """The first of two head groups keeps everything; in the second the first `sinks` tokens and the newest stay.

    With Recipe.heads, which says how many heads of each layer are in which group (`split`).
    """

    groups: ClassVar[int] = 2
    most: ClassVar[float]  # share of the heads that the method leaves whole, at most
    sinks: int

    def head_group(self, j: int) -> "Streaming | None":
        return self if j else None

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        return oldest(kv, self.sinks)


def oldest(kv: KV, sinks: int) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
    """(the first `sinks` tokens, a score by which the oldest other goes): what `CachePolicy.victim` returns for a window with sinks."""
    check.cache(kv)
    age = kv.pos - kv.seen[:, None, None]  # small where it decides, so float32 holds it exactly in texts of any length
    return Protect(sinks=sinks).mask(kv.pos, kv.seen), age.astype(jnp.float32)
