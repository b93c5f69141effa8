"""SpecPC: a draft says which tokens of a prompt matter. Source: arXiv:2506.08373; furiosa-ai/draft-based-approx-llm, specpc/."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import PromptMethod
from jaxtok.core.registry import register
from jaxtok.core.types import Plan


@register(
    "specpc",
    site="prompt",
    paper="arXiv:2506.08373",
    title="Draft-based Approximate Inference for LLMs",
    authors="Kevin Galim and Ethan Ewer and Wonjun Kang and Minjae Lee and Hyung Il Koo and Kangwook Lee",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecPC(PromptMethod):
    """Give the model the tokens that a draft model attends to most, with their neighbours and the end of the prompt, and nothing else.

        s_j = max over the draft's layers >= first, its heads and rows i of  u_i A_ij,     then pooled: max over `pool` tokens around j

    Rows: the last `window` tokens of the prompt with u = 0, ..., 1 in equal steps (`ramp`; without it 1), and the `look` tokens that the
    draft goes on with, u = 1. A: softmax over all keys that row i sees; only the prompt's are scored. The last `window` tokens stay. Then
    the `capacity` best tokens go in by falling s, each followed by its `neighbours`, nearest first (offsets 0, -1, 1, -2, 2, ..., from
    -((k - 1) // 2) on, k in all: an even k reaches one further to the right; clipped to the prompt), until `capacity` tokens are in. They
    stand in the order of the prompt, and their positions are those of a prompt of that length.

    capacity >= prompt: everything stays. neighbours=0, pool=1: the window and the best others. Exactly min(capacity, length) tokens stay.
    pool and neighbours: 32 for Llama, 64 for Qwen in the paper (None = pool). Pools are centred as the offsets are, zeros past both ends.
    first: 8 in the paper, whose drafts have 16 and 24 layers; None = 8, but half of the draft's layers where it has fewer (our reading).
    over="mean": sums in the place of the maxima; kind="avg": mean pooling.

    With SpecKV at site cache this is the cascade SpecKV-PC (capacity=2048 here and 256 there): one continuation by the draft, of the whole
    prompt, serves both.

    Departures: ties go to the older token. The official loop never feeds the last token that it draws, so that its lookahead of k looks
    through k - 1; `look` counts tokens that are looked through. A prompt shorter than the window, refused there, stays whole.
    """

    drafts: ClassVar[bool] = True
    capacity: int
    window: int = 64
    look: int = 1
    pool: int = 32
    neighbours: int | None = None
    first: int | None = None
    ramp: bool = True
    over: str = "max"
    kind: str = "max"

    def __post_init__(self):
        check.count("window", self.window)
        check.count("look", self.look, 0)
        check.count("pool", self.pool)
        check.one_of("ramp", self.ramp, (True, False))
        check.one_of("over", self.over, ("max", "mean"))
        check.one_of("kind", self.kind, ("avg", "max"))
        for name, value in (("neighbours", self.neighbours), ("first", self.first)):
            if value is not None:
                check.count(name, value, 0)
        check.budget("capacity", self.capacity, self.window)

    def score(self, seen: tuple[Float[Array, "b h r n"], ...]) -> Float[Array, "b n"]:
        """s before pooling, from the rows of all layers of a draft: the prompt's last ones and then those of `look` tokens."""
        layers = len(seen)
        first = min(8, layers // 2) if self.first is None else self.first
        if first >= layers:
            raise ValueError(f"specpc reads the draft's layers from {first} on; this draft has {layers}: give first={layers // 2}")
        count = seen[0].shape[2] - self.look
        ramp = jnp.linspace(0.0, 1.0, count) if self.ramp and count > 1 else jnp.ones((count,))
        # rows before a short prompt's first attend to nothing
        u = jnp.concatenate([ramp, jnp.ones((self.look,))]).astype(jnp.float32)
        reduced = jnp.max if self.over == "max" else jnp.sum
        per_layer = [reduced(rows.astype(jnp.float32) * u[None, None, :, None], (1, 2)) for rows in seen[first:]]
        return reduced(jnp.stack(per_layer), 0)

    def pooled(self, score: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Pooling of width `pool`, the token itself among them; one more to the right where that is even."""
        around = ((0, 0), ((self.pool - 1) // 2, self.pool - 1 - (self.pool - 1) // 2))
        if self.kind == "max":
            return lax.reduce_window(score, 0.0, lax.max, (1, self.pool), (1, 1), around)
        return lax.reduce_window(score, 0.0, lax.add, (1, self.pool), (1, 1), around) / self.pool

    def plan(self, score: Float[Array, "b n"], live: Bool[Array, "b n"], keep=None) -> Plan:
        """The plan [b min(capacity, n)] for pooled scores of packed tokens."""
        b, n = score.shape
        cap, length = min(self.capacity, n), jnp.sum(live, -1, dtype=jnp.int32)
        room = budget.per_head(keep, (b, 1), cap)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        # the best tokens by falling score, as many as there is room for
        best = lax.top_k(jnp.where(live, select.finite(score), -jnp.inf), cap)[1].astype(jnp.int32)
        rank = jnp.arange(cap, dtype=jnp.int32)[None]
        ok = (rank < room) & (rank < length[:, None])
        k = self.pool if self.neighbours is None else self.neighbours
        offsets = sorted(range(-((k - 1) // 2), k - (k - 1) // 2), key=lambda o: (abs(o), o)) if k else [0]
        spread = best[..., None] + jnp.asarray(offsets, jnp.int32)[None, None]
        spread = jnp.clip(spread, (n - length)[:, None, None], n - 1).reshape(b, -1)
        turn = jnp.where(jnp.repeat(ok, len(offsets), 1), jnp.arange(spread.shape[1], dtype=jnp.int32)[None], 2**30)
        # when each token comes up first; the window before all others
        when = jax.vmap(lambda i, t: jnp.full((n,), 2**30, jnp.int32).at[i].min(t))(spread, turn)
        when = jnp.where(live, jnp.where(row >= n - self.window, -1 - row, when), 2**31 - 1)
        place = jnp.argsort(jnp.argsort(when, axis=-1, stable=True), axis=-1)
        return select.pack(live & (place < room), cap)

    def run(self, params, look, ids: Int[Array, "b n"], live: Bool[Array, "b n"], keep=None) -> Plan:
        if keep is None and self.capacity >= ids.shape[1]:
            return select.pack(live)
        score = self.score(look(ids, live, min(self.window, ids.shape[1])))
        return self.plan(self.pooled(score), live, keep)
