"""Checks of static input: each raises before anything is computed, with the value and the cure."""

import math
import numbers


def real(name: str, value) -> None:
    """TypeError unless `value` is a Python or numpy number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def count(name: str, value, low: int = 1, high: int = 2**31 - 1) -> None:
    """TypeError unless `value` is an int, ValueError unless it is from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number (int), got {value!r}")
    if int(value) < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    if int(value) > high:
        raise ValueError(f"{name} must be <= {high}, got {value}")


def kind(name: str, value, cls: type) -> None:
    """TypeError unless `value` is a `cls`."""
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be a {cls.__name__}, got {value!r}")


def at_least(name: str, value: float | int, low: float | int) -> None:
    """ValueError unless `value >= low`; NaN fails."""
    real(name, value)
    if not value >= low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def between(name: str, value: float | int, low: float | int, high: float | int) -> None:
    """ValueError unless `low <= value <= high` and finite."""
    real(name, value)
    if not low <= value <= high or abs(value) == math.inf:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def share(name: str, value) -> None:
    """ValueError unless `value` is a kept fraction, in (0, 1]."""
    real(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} is the fraction kept, over 0 and at most 1; got {value}")


def one_of(name: str, value, allowed: tuple) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def budget(name: str, capacity, protected: int = 0) -> None:
    """ValueError unless `capacity` is an int >= 1 with room for what is protected and one more row."""
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(
            f"{name} is a number of rows (int), got {capacity!r}; turn a ratio into rows with jaxtok.core.budget.capacity(ratio, n)"
        )
    if capacity >= 2**31:
        raise ValueError(f"{name} must be under 2**31, got {capacity}")
    if capacity < 1:
        raise ValueError(f"{name} must be >= 1, got {capacity}")
    if capacity < protected:
        raise ValueError(f"{name}={capacity} has no room for the {protected} protected rows; raise {name} or protect fewer")


def cache(kv) -> None:
    """ValueError unless the arrays of a cache agree on batch, KV heads and slots, with at least one head and channel."""
    shape = kv.pos.shape
    rows = all(x.ndim == 4 and x.shape[:3] == shape and x.shape[3] for x in (kv.k, kv.v))
    if len(shape) != 3 or not shape[1] or not rows or kv.bias.shape != shape or kv.seen.shape != shape[:1]:
        shapes = [list(x.shape) for x in (kv.k, kv.v, kv.pos, kv.bias, kv.seen)]
        raise ValueError(
            f"k, v, pos, bias, seen of a cache are {shapes}; they must be [b g s d], [b g s d], [b g s], [b g s], [b]; g, d >= 1"
        )


def plan(plan) -> None:
    """ValueError unless the arrays of a plan agree on what is before the tokens."""
    shapes = {name: list(x.shape) for name, x in plan._asdict().items() if x is not None}
    over = {tuple(shape if name == "lost" else shape[:-2] if name == "w" else shape[:-1]) for name, shape in shapes.items()}
    if len(over) > 1:
        raise ValueError(f"the arrays of a plan are {shapes}; they must agree on what is before the tokens, and lost has only that")


def reading(q, pos, kv) -> None:
    """ValueError unless queries [b h t d] at positions [b t] can read this cache."""
    cache(kv)
    b, g = kv.pos.shape[:2]
    if q.ndim != 4 or q.shape[0] != b or not q.shape[1] * q.shape[2] or q.shape[1] % g or not q.shape[3] or pos.shape != (b, q.shape[2]):
        raise ValueError(
            f"q is {list(q.shape)} at {list(pos.shape)} for a cache {list(kv.k.shape)}; they must be [{b} h t d], [{b} t], h a multiple of {g}"
        )


def given(name: str, value):
    """`value`, or ValueError where it is None or empty: evidence that a method's `needs` asks for was not handed to it."""
    if value is None:
        raise ValueError(f"evidence.{name} is missing; compute what the method's `needs` asks for, or let the model do it")
    if hasattr(value, "shape") and 0 in value.shape:
        raise ValueError(f"evidence.{name} is empty: {list(value.shape)}")
    return value
