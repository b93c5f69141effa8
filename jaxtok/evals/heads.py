"""Methods that leave some heads whole, in a comparison: which heads of the model at hand, found once, and what is left for the others.

A budget is the slots of the average KV head, whole ones included: `core.heads.allot` says how many heads may be whole, the method's own
search which, and the others share what is left.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxtok.core import heads, registry
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Part
from jaxtok.evals import tasks
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.models.text import Tokenizer
from jaxtok.train import duo_attention, razor_attention

TEXTS = 8  # windows of running text that the mean queries and keys are taken over
ECHO = 15  # one head in so many is chosen by its echo score (0.01 of 0.15)


def told_apart(spec: str) -> bool:
    """Whether the method that a spec names tells head groups apart."""
    groups = getattr(registry.get(spec.partition(":")[0].strip()), "groups", 1)
    return (groups if isinstance(groups, int) else registry.build(spec, 1 << 20).groups) > 1  # a wrapper's are its base's


def room(spec: str, capacity: int) -> int:
    """The slots that a method's own `capacity` gets of a budget, at least."""
    return max(1, capacity // 4) if told_apart(spec) else capacity


def _razor(cfg: Config, params, tokenizer: Tokenizer, n: int) -> Callable[[int], Bool[np.ndarray, "l g"]]:
    period = max(2, min(razor_attention.PERIOD, n // razor_attention.REPEATS))
    echo, induction = razor_attention.search(cfg, params, razor_attention.repeated(cfg, period=period), period=period)
    return lambda count: heads.best(echo, count // ECHO) | heads.best(induction, count - count // ECHO)


def _duo(cfg: Config, params, tokenizer: Tokenizer, n: int) -> Callable[[int], Bool[np.ndarray, "l g"]]:
    ids = tokenizer.encode(tasks.haystack()[: 16 * TEXTS * n], special=False)
    rows = max(1, min(TEXTS, len(ids) // n))
    text = np.resize(np.asarray(ids, np.int32), (rows, n))
    scores = np.asarray(duo_attention.proxy(cfg, params, jnp.asarray(text), length=n))
    return lambda count: heads.best(scores, count)


SEARCH = {"razor_attention": _razor, "duo_attention": _duo}  # method -> how its heads are found


def validate(spec: str, capacity: int, cfg: Config, recipe_of: Callable[[str, int], Recipe]) -> None:
    """ValueError for what cannot work at this budget, before anything is searched or compiled."""
    if not told_apart(spec):
        recipe_of(spec, capacity).validate(cfg)
        return
    policy = registry.build(spec, room(spec, capacity))
    if policy.name not in SEARCH:
        raise ValueError(f"{policy.name} leaves some heads whole, and no search is known that says which; use Recipe(heads=) in Python")
    Recipe(policy=policy, heads=((0, cfg.kv_heads),) * cfg.layers).validate(cfg)


@dataclasses.dataclass(eq=False)
class Splits:
    """Recipes with head groups for one model; each search is made once a length."""

    cfg: Config
    params: Any
    tokenizer: Tokenizer
    notes: dict[str, None] = dataclasses.field(default_factory=dict)  # what was split how, in order
    _found: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def at(self, spec: str, capacity: int, n: int, label: str = "") -> tuple[Recipe, Any]:
        """(recipe, the model's parameters with the heads in its order) for `capacity` slots of the average head at contexts of n tokens."""
        with self._lock:
            name = spec.partition(":")[0].strip()
            if (name, n) not in self._found:
                self._found[name, n] = SEARCH[name](self.cfg, self.params, self.tokenizer, n)
            total = self.cfg.layers * self.cfg.kv_heads
            full = self._found[name, n](heads.allot(capacity, n, total, registry.get(name).most))  # type: ignore[attr-defined]
            count = int(full.sum())
            rest = (capacity * total - count * n) // (total - count) if count < total else capacity
            sizes, order = heads.split(full)
            self.notes[f"{spec}{label} leaves {count} of {total} heads of a context of {n} whole, {rest} slots in the others"] = None
            return Recipe(policy=registry.build(spec, rest), heads=sizes), blocks.reorder_heads(self.cfg, self.params, order)


def average(layers, count: Callable[[Part], Array]) -> Float[Array, " b"]:
    """Mean over layers and KV heads of what `count` says of each part, [b e]."""
    found = [count(part).astype(jnp.float32) for parts in layers for part in parts]
    number = sum(x.shape[1] for x in found)
    return jax.tree.reduce(jnp.add, [jnp.sum(x, -1) for x in found]) / number
