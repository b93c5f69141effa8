"""Site reader: which slots a query reads. Nothing is lost."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jaxtok.core.protocols import Method
from jaxtok.core.types import KV, KeyIndex


class Sight(NamedTuple):
    """How the queries of a layer see keys, besides positions."""

    freqs: jax.Array  # f32 [rotary_dim / 2] angle per unit of rotary id
    window: int | None = None  # slots out of reach of every query of the call are dead in the `kv` that a reader is given
    softcap: float | None = None
    scale: float | None = None  # of q.k; None = head_dim ** -0.5
    impl: Any = "auto"  # as of ops.attention
    ids: jax.Array | None = None  # i32 [b t] the queries' token ids, where the caller knows them


class Traffic(NamedTuple):
    """Bytes that a reader moves in one step of one query in one layer, for the whole batch."""

    choose: int  # read and written to decide: representatives, positions, scores
    attend: int  # keys and values that are attended to, read where they lie; XLA's gather adds a copy, written and read


class Reader(Method):
    """Site reader: which slots a query reads. Nothing is lost."""

    block: int = 1
    ends: tuple[int, ...] = ()  # token ids that close a sentence
    raw: bool = False  # keys stored unrotated; `read` then says where the keys and the queries stand
    offload: bool = False  # the prompt's part of the arrays in `hosted` stands in host memory
    hosted: ClassVar[tuple[str, ...]] = ()  # of k and v, those that only chosen rows are read of
    attends: ClassVar[bool] = False  # attends itself (`attend`) instead of naming slots (`read`); no step policy beside it

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        """Fields with which about `capacity` keys are read at a step, beside those `given`."""
        return {f.name: capacity for f in dataclasses.fields(cls) if f.name in ("budget", "top_k")}  # type: ignore[arg-type]

    def start(self, params, layer: int, kv: KV, h: int) -> Any:
        """Per-layer state, kept over steps, for h query heads."""
        return ()

    def segments(self, state) -> tuple[Int[Array, "b g s"], Int[Array, " b"]] | None:
        """The segment of each slot and the next one's number, for more of a prompt to go on from; None where the state has no such."""
        return None

    def update(self, params, state, kv: KV, slot: Int[Array, "b g"]) -> Any:
        """State after the contents of `slot` changed (an append or an eviction)."""
        return state

    def read(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, KeyIndex | None]:
        """(state, carry over the layers of a step, blocks to read; None = all). Queries at pos -1 are dead; their keys are in `kv`.

        q and the keys are rotated, or neither is (`raw`).
        """
        raise NotImplementedError(f"{type(self).__name__} must say what to read")

    def attend(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, Array, Array]:
        """(state, carry, values attended to [b h t d], their logsumexp f32 [b h t]): for a reader that decides by the attention itself,
        reads all on some steps only, or attends by another rule."""
        raise NotImplementedError(f"{type(self).__name__} must attend")

    def finish(self, params, states: tuple, carry) -> tuple:
        """The states of all layers after the last layer of a step, from what was carried over the layers."""
        return states

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """The method's own formula for a step of one query with h query heads on a full cache of these shapes (arrays or structs).

        `hit`: the step on which a method that may reuse an earlier choice does so. Layers that read everything choose nothing.
        """
        return Traffic(0, attended(kv, h))


def attended(kv: KV, h: int, slots: int | None = None, placed: bool = False) -> int:
    """Bytes of attention to all slots by h query heads, or to `slots` listed ones of each KV head.

    All: keys, values, positions, biases, and a 4-byte logit a query head that goes to memory and back three times (maximum, sum, weighted
    values). Listed: keys and values, which a kernel reads where they lie; positions, biases and the list are made ready for it (48 bytes a
    slot, and 24 for the rotary ids of keys that it has to place).
    """
    b, g, s, d = kv.k.shape
    row = (d + kv.v.shape[-1]) * kv.k.dtype.itemsize
    return b * s * (g * (row + 8) + 24 * h) if slots is None else b * g * min(slots, s) * (row + (72 if placed else 48))
