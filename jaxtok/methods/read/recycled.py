"""Recycled Attention. Source: arXiv:2411.05787; carriex/recycled-attention (not seen: written from the paper's description)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check, score, select
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.registry import register
from jaxtok.core.types import KV
from jaxtok.ops.read import attend_all, attend_scores, attend_slots


class Choice(NamedTuple):
    """What the last full step of a layer left."""

    slots: jax.Array  # i32 [b g top_k]; -1 = unused
    first: jax.Array  # i32 [b] the first slot written after that step
    age: jax.Array  # i32 [b] steps since then
    query: Any  # f32 [b h d] its query; () without the dynamic rule


@register(
    "recycled",
    site="reader",
    paper="arXiv:2411.05787",
    title="Recycled Attention: Efficient inference for long-context language models",
    authors="Fangyuan Xu and Tanya Goyal and Eunsol Choi",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecycledAttention(Reader):
    """Attend to everything on every `stride`-th step; between, to the top keys of that step and to the tokens written since.

        full step     attend to the whole cache F;  R := the top_k keys of its attention, max over the query heads of a KV head
        other steps   attend to R and to all tokens since the full step (at most stride - 1)

    `threshold` adds the dynamic rule: a step is full, too, where cos(q_now, q_at_the_last_full_step) < threshold, all heads of a layer
    as one vector (our reading). Each sequence for itself; but a step that is full for any of them takes its time for all (`lax.cond`: the
    others read the whole cache and heed their own part), so with a threshold a batch saves less. Without one all are full together.

    stride = 1, threshold > 1 or top_k >= the cache: full attention. threshold < -1: the stride alone. Between full steps the output
    depends on the choice and the tail only.

    Departure: the paper fills R from the last prompt token's attention. That token belongs to the prefill, which attends to everything
    and hands a reader the cache only; so the first step after it (and after any call with several queries) is a full step.
    Needs rotated keys and, since it knows the tail by where it was written, no step policy.
    """

    top_k: int = 4096
    stride: int = 50
    threshold: float | None = None
    group: str = "max"
    attends = True

    def __post_init__(self):
        check.at_least("top_k", self.top_k, 1)
        check.at_least("stride", self.stride, 1)
        check.one_of("group", self.group, tuple(score.REDUCTIONS))

    def start(self, params, layer: int, kv: KV, h: int) -> Any:
        check.cache(kv)
        b, g, s, d = kv.k.shape
        if s <= self.top_k:
            return ()
        query = () if self.threshold is None else jnp.zeros((b, h, d), jnp.float32)
        every = lambda x: jnp.full((b,), x, jnp.int32)
        return Choice(jnp.full((b, g, self.top_k), -1, jnp.int32), every(kv.cursor), every(self.stride), query)

    def attend(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, Array, Array]:
        check.reading(q, pos, kv)
        if isinstance(state, Choice) and q.shape[2] == 1:
            full = self.due(state, q[:, :, 0])
            go = lambda branch: lambda state, full, q, pos, kv: branch(state, full, q, pos, kv, see)
            some = jnp.any(full & (pos[:, 0] >= 0))
            state, out, lse = lax.cond(some, go(self._full), go(self._sparse), state, full, q, pos, kv)
            return state, carry, out, lse
        if isinstance(state, Choice):
            state = state._replace(age=jnp.full_like(state.age, self.stride))
        return state, carry, *attend_all(q, pos, kv, see)

    def due(self, state: Choice, q: Float[Array, "b h d"]) -> Bool[Array, " b"]:
        """Whether this step is a full one, for each sequence."""
        due = state.age + 1 >= self.stride
        if self.threshold is None:
            return due
        now, then = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in (q, state.query))
        norm = jnp.linalg.norm(now, axis=-1) * jnp.linalg.norm(then, axis=-1)
        alike = jnp.sum(now * then, -1) / jnp.where(norm > 0, norm, 1.0)
        return due | (alike < self.threshold)

    def _full(self, state: Choice, full: Bool[Array, " b"], q, pos, kv: KV, see: Sight):
        read = kv
        if self.threshold is not None:
            named = full[:, None, None] | select.mark(self._slots(state, kv), kv.pos.shape[-1])
            read = kv._replace(pos=jnp.where(named, kv.pos, -1))
        out, lse, logit = attend_scores(q, pos, read, see)
        share = jnp.exp(logit - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])[:, :, 0]
        share = score.to_kv_heads(share, kv.pos.shape[1], self.group)
        best, slot = lax.top_k(jnp.where(kv.pos >= 0, share, -jnp.inf), self.top_k)
        query = () if self.threshold is None else q[:, :, 0].astype(jnp.float32)
        new = Choice(
            jnp.sort(jnp.where(best > -jnp.inf, slot, -1), -1), jnp.full_like(state.first, kv.cursor), jnp.zeros_like(state.age), query
        )
        old = state._replace(age=state.age + 1)
        return jax.tree.map(lambda x, y: jnp.where(full.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, old), out, lse

    def _sparse(self, state: Choice, full, q, pos, kv: KV, see: Sight):
        out, lse = attend_slots(q, pos, kv, self._slots(state, kv), see)
        return state._replace(age=state.age + 1), out, lse

    def _slots(self, state: Choice, kv: KV) -> Int[Array, "b g m"]:
        """The choice and the tail."""
        tail = state.first[:, None] + jnp.arange(self.stride - 1, dtype=jnp.int32)[None]
        tail = jnp.where(tail < kv.cursor, tail, -1)[:, None]
        return jnp.concatenate([state.slots, jnp.broadcast_to(tail, (*kv.pos.shape[:2], self.stride - 1))], -1)

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """A full step compares 4-byte attention on top of full attention; the others (`hit`) read `top_k` slots and the tail."""
        b, g, s, _ = kv.k.shape
        if s <= self.top_k:
            return Traffic(0, attended(kv, h))
        return Traffic(0, attended(kv, h, self.top_k + self.stride - 1)) if hit else Traffic(4 * b * s * (h + 2 * g), attended(kv, h))
