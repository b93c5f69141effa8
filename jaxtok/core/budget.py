"""How many rows stay. The only place where ratios become counts: round half up, at least 1 (`floored`: down)."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxtok.core import check, select

UNLIMITED = 2**31 - 1  # the capacity of a method that drops no slots


def capacity(ratio: float | int, n: int) -> int:
    """Static capacity for a kept fraction `ratio` in (0, 1] of `n` rows."""
    check.share("ratio", ratio)
    check.count("n", n, 1)
    # the decimal that was written, not its binary neighbour: 0.35 * 10 is 3.5 and rounds up
    return max(1, math.floor(Fraction(str(ratio)) * n + Fraction(1, 2)))


def floored(ratio: float | int, n: int) -> int:
    """Rows that a kept fraction `ratio` from 0 to 1 of `n` rows leaves, rounded down, where a paper's schedule does so; may be 0."""
    check.between("ratio", ratio, 0, 1)
    check.count("n", n, 0)
    return math.floor(Fraction(str(ratio)) * n)


def keep(ratio: float | int, live: jax.Array) -> jax.Array:
    """i32 like `live`: the traced budget, `ratio` of each row's number of live tokens."""
    check.share("ratio", ratio)
    exact = Fraction(str(ratio)).limit_denominator(10_000)
    p, q = exact.numerator, exact.denominator
    whole, rest = live // q, live % q  # keeps 2 * p * live inside int32
    return jnp.maximum(whole * p + (2 * p * rest + q) // (2 * q), 1).astype(jnp.int32)


def per_head(keep, heads: tuple[int, ...], cap: int) -> jax.Array:
    """i32 [b g]: a budget given as int, [b], [b 1] or [b g], never above `cap`; None = `cap`. `heads` = (b, g)."""
    check.count("cap", cap, 0)
    if keep is None:
        return jnp.full(heads, cap, jnp.int32)
    keep = jnp.asarray(keep)
    if not jnp.issubdtype(keep.dtype, jnp.integer):
        raise TypeError(
            f"keep is a number of rows (int), got {keep.dtype}; turn a ratio into rows with jaxtok.core.budget.keep(ratio, live)"
        )
    keep = keep.astype(jnp.int32)
    if keep.ndim > 2:
        raise ValueError(f"keep must be an int, [b] or [b g], got shape {keep.shape}")
    if keep.ndim < 2:
        keep = keep.reshape(-1, 1)
    return jnp.clip(jnp.broadcast_to(keep, heads), 0, cap)


def apportion(part: jax.Array, over) -> jax.Array:
    """i32 like `part` [... m]: part / over rounded by largest remainder (ties: the first), so the sum is exactly sum(part) / over.

    `over` [...] or int divides that sum.
    """
    over = jnp.asarray(over, jnp.int32)
    over = jnp.broadcast_to(jnp.maximum(over, 1), part.shape[:-1])[..., None]
    whole, rest = part // over, part % over
    short = jnp.sum(rest, -1, dtype=jnp.int32) // over[..., 0]
    return whole + select.choose(rest.astype(jnp.float32), rest > 0, short).astype(jnp.int32)


def pyramid(total: int, layer: int, layers: int, beta: float | int, most: int | None = None) -> int:
    """Rows of 0-based `layer` when the average layer has `total`, linear in depth: first 2*total - total/beta, last total/beta.

    PyramidKV: min = total // beta, max = 2 * total - min; if max > `most`: max = most, min = 2 * total - most. The sum over the
    layers is layers * total up to rounding; beta = 1 is uniform.
    """
    check.at_least("beta", beta, 1)
    for name, value, least in (
        ("total", total, 0),
        ("layers", layers, 1),
        ("layer", layer, 0),
        ("most", total if most is None else most, 0),
    ):
        check.count(name, value, least)
    low = int(total // beta)
    high = 2 * total - low
    if most is not None and high >= most:
        high, low = most, 2 * total - most
    if layers < 2:
        return total
    return math.floor(high - Fraction(layer * (high - low), layers - 1) + Fraction(1, 2))


def shares(weights: tuple[float, ...], total: int, least: int = 1, most: int | None = None) -> tuple[int, ...]:
    """Ints in proportion to `weights` that sum to exactly `total`, each from `least` to `most` (largest remainder)."""
    count = len(weights)
    top = total if most is None else most
    for w in weights:
        check.real("weights", w)
    if not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(f"weights must be finite, >= 0 and not all zero, got {weights}")
    for name, value in (("total", total), ("least", least), ("most", top)):
        check.count(name, value, 0)
    if not count * least <= total <= count * top:
        raise ValueError(f"{count} shares from {least} to {top} cannot sum to {total}")
    scale = sum(map(Fraction, weights))
    ideal = [Fraction(w) / scale * total for w in weights]
    near = lambda off: [min(max(math.floor(x + off), least), top) for x in ideal]
    # row by row to (or from) the layer that is furthest below (above) its share; whole rounds of it at once, by bisection
    low, high = -total, total
    while low < high:
        off = (low + high + 1) // 2
        low, high = (off, high) if sum(near(off)) <= total else (low, off - 1)
    out = near(low)
    while sum(out) != total:
        i = max((i for i in range(count) if out[i] < top), key=lambda j: ideal[j] - out[j])
        out[i] += 1
    return tuple(out)
