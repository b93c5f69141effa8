"""Which device holds which tokens of a sequence: contiguous, striped and zigzag cuts, and the way back."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

KINDS = ("contiguous", "striped", "zigzag")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A sequence in n equal shards.

        contiguous   shard r holds tokens r c .. (r + 1) c - 1,   c = tokens / n
        striped      shard r holds tokens r, r + n, r + 2n, ...
        zigzag       of 2n equal chunks shard r holds chunks r and 2n - 1 - r, in this order

    Positions, labels, masks, segment ids and rotary ids are laid out like the tokens, once, before the model; nothing else has to know the
    layout, since attention masks by positions. What is padded at the end to make the shards equal has position -1.

    Source: Ring Attention, arXiv:2310.01889; Striped Attention, arXiv:2311.09431; zigzag, zhuzilin/ring-flash-attention.
    """

    kind: str
    n: int

    unit: ClassVar[dict[str, int]] = {"contiguous": 1, "striped": 1, "zigzag": 2}

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"layout {self.kind!r} must be one of {', '.join(KINDS)}")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"a layout's n counts shards: an int >= 1, got {self.n!r}")

    def padded(self, t: int) -> int:
        """Rows that t tokens take: the next multiple of n (zigzag: 2n)."""
        every = self.n * self.unit[self.kind]
        return -(-t // every) * every

    def order(self, t: int) -> np.ndarray:
        """order[i] = which of the padded(t) tokens row i in memory holds; shard r is rows r c .. (r + 1) c - 1."""
        rows = np.arange(self.padded(t))
        if self.kind == "striped":
            return rows.reshape(-1, self.n).T.reshape(-1)
        if self.kind == "zigzag":
            chunks = rows.reshape(2 * self.n, -1)
            return np.stack([chunks[: self.n], chunks[self.n :][::-1]], 1).reshape(-1)
        return rows

    def place(self, x: Array, *, axis: int = 1, fill: int | float = 0) -> Array:
        """x with its token axis in the order of memory, padded by `fill`."""
        t = x.shape[axis]
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.padded(t) - t)
        return jnp.take(jnp.pad(x, widths, constant_values=fill), jnp.asarray(self.order(t)), axis)

    def restore(self, x: Array, t: int, *, axis: int = 1) -> Array:
        """The t tokens of a placed x in their own order."""
        if x.shape[axis] != self.padded(t):
            raise ValueError(f"{x.shape[axis]} rows cannot hold {t} tokens: {self.kind} over {self.n} takes {self.padded(t)}")
        return jnp.take(x, jnp.asarray(np.argsort(self.order(t))[:t]), axis)

    def positions(self, t: int) -> Int32[Array, " n"]:
        """The token that each row holds, -1 for padding."""
        order = self.order(t)
        return jnp.asarray(np.where(order < t, order, -1), jnp.int32)

    def pairs(self, t: int) -> np.ndarray:
        """Visible (query, key) pairs of causal attention that each shard's queries have: the work of each device, i64 [n]."""
        order = self.order(t).astype(np.int64).reshape(self.n, -1)
        return np.where(order < t, order + 1, 0).sum(1)
