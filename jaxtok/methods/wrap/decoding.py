"""Decoding: any compressor, every so many steps. Source: NVIDIA/kvpress DecodingPress, PrefillDecodingPress."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import budget, check
from jaxtok.core.protocols import CacheCompressor, CachePolicy, Held
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Plan

ABSENT = ("cls", "keys", "hidden", "weights", "layers", "own", "segment", "unit")  # what a step cannot tell of the whole cache


class Recent(NamedTuple):
    """The last w queries of each sequence, in a ring."""

    q: jax.Array  # [b h w d] after the rotary embedding
    pos: jax.Array  # i32 [b w]; -1 = not written yet
    count: jax.Array  # i32 [b] how many were written


@register(
    "decoding",
    site="policy",
    paper="https://github.com/NVIDIA/kvpress",
    title="KVPress",
    authors="NVIDIA",
    year=2025,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(CachePolicy):
    """Compress by `base` after the prefill, and again each time `interval` more keys have come.

    A cache has base.slots + interval slots: generation of any length takes that much memory, in one compiled program. Between two
    compressions nothing goes; the step that fills the last spare slot is attended to and then compresses. interval = 1 does so at every step.

    `base` may be any compressor: scorers, wrappers, methods that merge (EMS, CaM, Merging: what goes is folded into what stays).
    What it is told, after the prefill: what the prompt's queries saw, as at site cache. While generating: what the last w queries,
    those of the prompt's end included, make of the cache as it is at that moment: `rows` and `turned` of as many as it asks for,
    `received`, `peak` and query moments of the last `buffer`. The queries are kept (w head_dim numbers a head and sequence), not their attention.
    ValueError where it needs what a step does not know: hidden rows, unrotated keys, weights, or a prefill of its own.

    Steps count from the prefill, as in kvpress, whatever the prompt's length and padding; what is not over the capacity then stays. Its
    DecodingPress leaves the prompt whole until the first cut (target_size = capacity here,
    compression_interval = interval); PrefillDecodingPress with the same press twice is this policy. Not carried over from 0.5.5: the
    buffered queries are all rotated to the last position, so that only windows of one query are sound; moments are of the buffer less its
    first n_sink rows, at positions that count from the buffer; the buffer is emptied at each cut, so that a window longer than
    the interval is refused; what stays is left in the order of its scores, so that pooling, runs and chunks meet other neighbours from the
    second cut on (ours stays in order of the text).
    """

    base: CacheCompressor
    interval: int = 512
    buffer: int = 256

    def __post_init__(self):
        if not isinstance(self.base, CacheCompressor):
            raise TypeError(f"decoding needs a CacheCompressor as its base, got {self.base!r}")
        check.count("interval", self.interval)
        check.count("buffer", self.buffer)
        missing = [name for name in ABSENT if getattr(self.base.needs, name)]
        if missing or self.base.passes:
            what = ", ".join(missing) or self.base.passes
            raise ValueError(f"{self.base.name} needs {what}, which a step of generation does not give; use it at site cache")
        if self.base.capacity >= budget.UNLIMITED:
            raise ValueError(f"{self.base.name} drops no slots; decoding needs a base with a capacity")

    @property
    def every(self) -> int:  # type: ignore[override]
        return self.interval

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.base.capacity

    @property
    def slots(self) -> int:
        return self.base.slots

    @property
    def vacates(self) -> bool:
        return False

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        return self.base.aligned

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.base.groups

    @property
    def reads_rotated(self) -> bool:  # type: ignore[override]
        return self.base.reads_rotated or self.queries > 0

    @property
    def queries(self) -> int:
        """w, how many queries are kept."""
        needs = self.base.needs
        summed = needs.received or needs.peak or needs.queries is not None
        return max(needs.rows, needs.turned, self.buffer if summed else 0)

    @property
    def needs(self) -> Needs:
        return self.base.needs | self.step_needs

    @property
    def step_needs(self) -> Needs:
        return Needs(turned=self.queries)

    def init_params(self, key: jax.Array, cfg) -> Any:
        return self.base.init_params(key, cfg)

    def layer(self, i: int, layers: int) -> CachePolicy:
        return dataclasses.replace(self, base=self.base.layer(i, layers))

    def head_group(self, j: int) -> CachePolicy | None:
        base = self.base.head_group(j)
        return None if base is None else dataclasses.replace(self, base=base)

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        if not self.queries:
            return Held()
        turned = check.given("turned", evidence.turned)
        (b, h, _, d), w = turned.shape, self.queries
        none = Recent(jnp.zeros((b, h, w, d), turned.dtype), jnp.full((b, w), -1, jnp.int32), jnp.zeros((b,), jnp.int32))
        return self.observe(params, Held(rest=none), kv, evidence)

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        if not self.queries:
            return state
        new, old, w = check.given("turned", evidence.turned), state.rest, self.queries
        if new.shape[1] != old.q.shape[1]:
            raise ValueError(
                f"decoding kept queries of {old.q.shape[1]} heads, these are {new.shape[1]}; with Recipe.heads prefill at once"
            )
        m = min(new.shape[2], kv.pos.shape[-1], w)
        pos = jax.lax.dynamic_slice_in_dim(kv.pos[:, 0], kv.cursor - m, m, 1)  # of the rows that were written last
        live = pos >= 0
        at = jnp.where(live, (old.count[:, None] + jnp.cumsum(live, 1, dtype=jnp.int32) - 1) % w, w)
        row = jnp.arange(pos.shape[0], dtype=jnp.int32)[:, None]
        q = old.q.at[row, :, at].set(jnp.swapaxes(new[:, :, new.shape[2] - m :], 1, 2).astype(old.q.dtype), mode="drop")
        count = old.count + jnp.sum(live, 1, dtype=jnp.int32)
        return Held(rest=Recent(q, old.pos.at[row, at].set(pos, mode="drop"), count))

    def recall(self, params, state: Held) -> tuple[Needs, Float[Array, "b h w d"], Int[Array, "b w"]] | None:
        if not self.queries:
            return None
        recent = state.rest
        order = jnp.argsort(recent.pos, axis=-1)
        q = jnp.take_along_axis(recent.q, order[:, None, :, None], 2)
        return self.base.needs, q, jnp.take_along_axis(recent.pos, order, -1)

    def fit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> Plan:
        return self.base.plan(params, kv, evidence, keep)

    def refit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Held]:
        return self.base.compress(params, kv, evidence, keep)[0], state
