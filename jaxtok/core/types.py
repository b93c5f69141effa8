"""The objects that every transform takes and returns. State is arrays only; hyper-parameters live on methods and recipes.

Shape letters of the whole library: b batch, n tokens, m kept tokens, h query heads, g KV heads, e = g or h, d head dim,
c width, s cache slots, t new queries, l layers, w window rows, a = 1 or 3 rotary axes. `*B` is `b` for sequences, `b g` for caches.
Rows are packed dead first, live last: the last row of a sequence is always its last token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtok.core import check

TEXT, IMAGE, CROP, FRAME, SPECIAL = range(5)  # values of Tokens.kind


class Tokens(NamedTuple):
    """A batch of token rows with everything that must move with them."""

    x: jax.Array  # [b n c] embeddings or hidden states
    pos: jax.Array  # i32 [b n] order in the sequence and who may see whom; -1 = dead, and nothing else says so
    rope: jax.Array  # i32 [b n a] rotary ids
    size: jax.Array  # f32 [b n] how many source tokens a row stands for; 0 where dead
    kind: jax.Array  # i8 [b n] TEXT, IMAGE, CROP, FRAME, SPECIAL
    segment: jax.Array  # i32 [b n] crop, frame, sentence or lexer span; -1 = none
    cell: jax.Array  # i32 [b n 2] row and column in its grid; -1 = none
    source: jax.Array  # i32 [b n0] the row in which original token j is now; -1 = dropped
    seen: jax.Array  # i32 [b] the next order; never the number of live rows
    delta: jax.Array  # i32 [b] the next rotary id minus `seen`
    lost: jax.Array  # i32 [b] live rows that a static cap had no room for
    score: jax.Array | None = None  # f32 [b n] what a method at an earlier site made of each row, for one at a later site (`Reducer.mark`)


class Plan(NamedTuple):
    """How n rows become m. `weight is None` (static) = a selection, applied as a gather; else a segment merge."""

    index: jax.Array  # i32 [*B m] the row whose pos, rope and kind group i takes; -1 = empty row
    assign: jax.Array  # i32 [*B n] the group that row j goes to; -1 = dropped
    weight: jax.Array | None  # f32 [*B n] final merge weights (size already in), or None
    lost: jax.Array  # i32 [*B] rows that were chosen and found no room


class DensePlan(NamedTuple):
    """A many-to-many map of n rows to m; row `index` of a group gives pos, rope and kind, or the one of largest weight."""

    w: jax.Array  # f32 [*B m n], rows sum to 1 (an empty row sums to 0)
    index: jax.Array | None = None  # i32 [*B m], all different; -1 = empty row
    assign: jax.Array | None = None  # i32 [*B n] the group that row j counts in, -1 = dropped; None = that of its largest weight
    lost: jax.Array | None = None  # i32 [*B] rows that were chosen and found no room; None = none


class KV(NamedTuple):
    """The cache of one layer, or of one group of its heads. Keys are stored rotated unless the policy is `raw`."""

    k: jax.Array  # [b g s d]
    v: jax.Array  # [b g s d]
    pos: jax.Array  # i32 [b g s]; -1 = dead slot
    bias: jax.Array  # f32 [b g s] log of the number of tokens that a slot stands for; always finite
    seen: jax.Array  # i32 [b] the next order; never the number of live slots
    delta: jax.Array  # i32 [b] the next rotary id minus `seen`
    cursor: jax.Array  # i32 [] the slot that the next key is written to
    lost: jax.Array  # i32 [b g] live tokens that a static cap had no room for
    segment: jax.Array | None = None  # i32 [b g s] that of the prompt's tokens, until a reader that asks for it has started


class Frozen(NamedTuple):
    """Slots that are read and never written again, apart from a part's own: thinned in channels, or one copy for a whole batch."""

    kv: KV  # k [b g s r] of r channels; b may be 1: shared by all sequences
    channels: jax.Array | None = None  # i32 [b g r] which channels of a query meet those of k; None = all
    gate: jax.Array | None = None  # f32 [b h] factor of what each query head takes from these slots, after the softmax; None = 1


class Part(NamedTuple):
    """One head group of one layer: its cache, the state of the step policy and of the reader. A layer is a tuple of parts."""

    kv: KV
    policy: Any = ()
    reader: Any = ()
    frozen: Frozen | None = None
    attention: Any = ()  # states of a trained attention (site attention), which keeps keys of its own: those of `kv` have no channels then

    @property
    def pos(self) -> jax.Array:
        """i32 [b g s]: the orders of all slots that are read, the frozen ones first."""
        if self.frozen is None:
            return self.kv.pos
        frozen = self.frozen.kv.pos
        return jnp.concatenate([jnp.broadcast_to(frozen, (*self.kv.pos.shape[:2], frozen.shape[2])), self.kv.pos], 2)


class Noise(NamedTuple):
    """What becomes of attention before it is summed as `Evidence.perturbed`: softmax((logit + z) / tau) over the keys a query sees.

    z ~ Gumbel(0, 1), a fresh one for each layer, head, query and key, drawn from the call's key, or from `seed` where it has none;
    seed=None: z = 0.
    """

    tau: float = 1.0
    seed: int | None = 0


class Rank(NamedTuple):
    """PageRank over a layer's attention, summed up as `Evidence.ranked`: `rounds` times from uniform, of softmax(logit / tau), undamped."""

    tau: float = 0.1
    rounds: int = 5


class Evidence(NamedTuple):
    """What a model tells a method. Each field is None unless a method's `Needs` asks for it; n = the rows or slots looked at.

    Evidence of several layers (`Needs.layers`) has a leading axis l on every field.
    """

    rows: jax.Array | None = None  # f32 [b h w n] attention of the last w queries
    received: jax.Array | None = None  # f32 [b h n] attention summed over all live queries of this call
    peak: jax.Array | None = None  # f32 [b h n] largest attention that any live query of this call gives
    perturbed: jax.Array | None = None  # f32 [b h n] like `received`, of attention with noise and a temperature (`Needs.perturbed`)
    ranked: jax.Array | None = None  # f32 [b h n] the rank of each row in attention with a temperature (`Needs.ranked`); sums to 1
    cls: jax.Array | None = None  # f32 [b h n] attention of the first live row
    keys: jax.Array | None = None  # [b g n d] keys before the rotary embedding
    queries: tuple[jax.Array, jax.Array] | None = None  # f32 mean [b h d], covariance [b h d d], before the rotary embedding
    turned: jax.Array | None = None  # [b h w d] the last w queries, after the rotary embedding; 0 where dead
    values: jax.Array | None = None  # [b g n d] values
    probs: jax.Array | None = None  # f32 [b h n n] the whole attention matrix: short sequences only
    lead: jax.Array | None = None  # [b h d] the first live row's query, before the rotary embedding; of p crops side by side [b h p d]
    asked: jax.Array | None = None  # f32 [b h n] like `received`, from the live TEXT rows behind the last image row only
    asked_peak: jax.Array | None = None  # f32 [b h n] the largest of it
    looked: jax.Array | None = None  # f32 [b h n] like `received`, from rows that are neither TEXT nor SPECIAL
    change: jax.Array | None = (
        None  # f32 [b n 2 2] of the attention block, of the MLP: |out| / |in|, cos(out, in); before the residual, in: normed
    )
    hidden: jax.Array | None = None  # [b n c] rows that enter the layer
    text: jax.Array | None = None  # [b c] site select: mean embedding of the text beside the image, in the space of the rows to choose from
    detail: jax.Array | None = None  # f32 [b n] site select: what the caller measured on each row's pixels (their entropy)
    grid: jax.Array | None = None  # i32 [b 2] site select: rows and columns of each image's crops, where the caller knows; 0 = no crops
    weights: dict[str, jax.Array] | None = None  # the layer's parameters that were asked for by name
    freqs: jax.Array | None = None  # f32 [rotary_dim / 2] angle per unit of rotary id; always given by a rotary model
    layer: jax.Array | None = None  # i32 [] 0-based
    key: jax.Array | None = None  # PRNG key, another for each layer


class Needs(NamedTuple):
    """What a method reads of `Evidence`; `a | b` is what serves both."""

    rows: int = 0  # how many last queries
    received: bool = False
    peak: bool = False
    unit: bool = False  # `peak` of attention divided by the length of the row that the query was made of (normed, as it enters the layer)
    perturbed: Noise | None = None  # which noise
    ranked: Rank | None = None  # with which temperature, how many rounds
    cls: bool = False
    keys: bool = False
    queries: int | None = None  # moments over the live queries from this order on (None = not needed)
    turned: int = 0  # how many last queries, after the rotary embedding
    values: bool = False
    probs: bool = False
    lead: bool = False
    asked: bool = False
    asked_peak: bool = False
    looked: bool = False
    change: bool = False
    hidden: bool = False
    text: bool = False
    detail: bool = False
    weights: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # evidence of these 0-based layers instead of the one at hand (site select: -1 is the last that ran)
    own: bool = False  # of the layer that follows, computed on its own input (a decoder's `change`: always of the layer that ran)
    score: bool = False  # site layers: `Tokens.score`, which a method at an earlier site has made
    segment: bool = False  # readers: the segment of each slot, when they start

    def __or__(self, other: "Needs") -> "Needs":  # type: ignore[override]
        if None not in (self.queries, other.queries) and self.queries != other.queries:
            raise ValueError(
                f"one recipe asks for query moments from order {self.queries} and from {other.queries}; give both methods the same sinks"
            )
        if self.peak and other.peak and self.unit != other.unit:
            raise ValueError("one recipe asks for the peak of attention as it is and by unit rows; use one of the methods")
        if None not in (self.perturbed, other.perturbed) and self.perturbed != other.perturbed:
            raise ValueError(
                f"one recipe asks for attention under {self.perturbed} and under {other.perturbed}; give both methods the same"
            )
        if None not in (self.ranked, other.ranked) and self.ranked != other.ranked:
            raise ValueError(f"one recipe asks for the ranks of {self.ranked} and of {other.ranked}; give both methods the same")
        either = {name: getattr(self, name) or getattr(other, name) for name, value in Needs._field_defaults.items() if value is False}
        return Needs(
            **either,
            rows=max(self.rows, other.rows),
            turned=max(self.turned, other.turned),
            perturbed=other.perturbed if self.perturbed is None else self.perturbed,
            ranked=other.ranked if self.ranked is None else self.ranked,
            queries=other.queries if self.queries is None else self.queries,
            weights=tuple(dict.fromkeys(self.weights + other.weights)),
            layers=tuple(sorted({*self.layers, *other.layers})),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protect:
    """Rows that a selection may not drop: the first `sinks` and the last `recent` by order."""

    sinks: int = 0
    recent: int = 0

    def __post_init__(self):
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"protect needs sinks >= 0 and recent >= 0, got sinks={self.sinks}, recent={self.recent}")
        check.count("sinks", self.sinks, 0)
        check.count("recent", self.recent, 0)

    @property
    def total(self) -> int:
        return self.sinks + self.recent

    def mask(self, pos: jax.Array, seen: jax.Array) -> jax.Array:
        """bool like `pos` [b ... n]; `seen` [b]. Dead rows are False."""
        edge = seen.reshape(seen.shape + (1,) * (pos.ndim - 1)) - self.recent
        return (pos >= 0) & ((pos < self.sinks) | (pos >= edge))


class KeyIndex(NamedTuple):
    """Which blocks of slots a query reads; entries are ascending where `>= 0`."""

    index: jax.Array  # i32 [b e nb] block numbers; -1 = unused entry; e = g, or h: each query head reads its own
    rope: jax.Array | None = None  # i32 [b e nb*block] rotary ids to place raw keys at
    query: jax.Array | None = None  # i32 [b e t] rotary ids of the queries among them; goes with `rope`


class BlockTable(NamedTuple):
    """Blocks of keys that each block of queries attends to in a prefill; e = g, or h: each query head has a list of its own."""

    index: jax.Array  # i32 [b e nq m]; the first `count` entries name blocks, each once; -1 behind them
    count: jax.Array  # i32 [b e nq]
    mask: jax.Array | None = None  # bool [b e nq m block_k]: which keys of each listed block; None = all
    lost: jax.Array | None = None  # i32 [b e nq] blocks that were chosen and found no room


def live_count(pos: jax.Array) -> jax.Array:
    """i32 [...]: how many of the last axis' rows are live."""
    return jnp.sum(pos >= 0, axis=-1, dtype=jnp.int32)
