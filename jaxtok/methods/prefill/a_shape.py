"""A-shape: sinks and a local window. Source: arXiv:2309.17453 (the pattern), arXiv:2407.02490 (as a prefill, and its name)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.sparsifier import Sparsifier, View, best_blocks, for_heads, newest, oldest, reach
from jaxtok.core.types import BlockTable


@register("a_shape", paper="baseline", site="sparsify")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(Sparsifier):
    """Every query reads the first `sinks` tokens and about the last `local`; the baseline of sparse prefill that looks at nothing.

        block y is read by block x  <=>  it holds one of the first `sinks` keys, a key of x, or one of the `local` keys before x

    Strictly causal. Whole blocks: a query reads up to a block more than it asks for, never less. sinks + local >= n is plain attention. One list for all heads;
    its static length is ceil(sinks / block_k) + ceil((local + block_q) / block_k) + 1, so cost grows as n.
    """

    local: int
    sinks: int = 64
    block_q: int = 64
    block_k: int = 32
    tail: int = 0

    def __post_init__(self):
        for name, low in (("local", 1), ("sinks", 0), ("block_q", 1), ("block_k", 1), ("tail", 0)):
            check.count(name, getattr(self, name), low)

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        """Fields with which about `capacity` keys are read."""
        return {"local": max(1, capacity - given.get("sinks", cls.sinks))}

    def whole(self, n: int) -> bool:
        return self.sinks + self.local >= n

    def table(self, params, view: View) -> BlockTable:
        size, lists = (self.block_q, self.block_k), view.sizes[2]
        forced = newest(view, *size, self.local) | oldest(view, *size, self.sinks)
        most = -(-self.sinks // self.block_k) + -(-(self.local + self.block_q) // self.block_k) + 1
        return for_heads(best_blocks(jnp.where(forced, 0.0, -jnp.inf), reach(view, *size), forced, most), lists)
