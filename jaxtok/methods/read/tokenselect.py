"""TokenSelect. Source: arXiv:2411.02886; pzs19/TokenSelect, patcher/token_retrieval.py."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check, score, select
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.rotary import rotate_by
from jaxtok.core.types import KV, KeyIndex
from jaxtok.ops.cache import block_slots


class Selection(NamedTuple):
    """The last selection of a layer and the query that made it."""

    pages: jax.Array  # i32 [b top]; -1 = unused
    query: jax.Array  # f32 [b h d]
    made: jax.Array  # bool [b]


@register(
    "tokenselect",
    site="reader",
    paper="arXiv:2411.02886",
    title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection",
    authors="Wei Wu and Zhuoshi Pan and Chao Wang and Liyi Chen and Yunchu Bai and Tianfu Wang and Kun Fu and Zheng Wang and Hui Xiong",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSelect(Reader):
    """Read the first tokens, the last tokens and those between that the heads of a layer vote for; all heads read the same.

        probe_h = mean over the call's live queries i = 0, 1, ... of rotate(q_h,i, n_local + i)
        vote_j  = sum over all query heads h of softmax over j (probe_h . k_j)     j in the middle, keys unrotated, no 1/sqrt(d)
        read    = first `n_init`  |  `top_k` of the middle by vote  |  last `n_local`, the call's own tokens among them

    Keys are stored unrotated; what is read stands at positions 0, 1, 2, ... in its order (length extrapolation), so distances between
    tokens that are read stay within n_init + top_k + n_local. `kernel` > 1 max-pools the vote over neighbours.

    `threshold` (the Selection Cache, 0.9; None selects at every call): where the cosine of the probe and the one that made the layer's
    last selection, over all heads as one vector, is at least that, its middle tokens are read again. The vote is skipped (`lax.cond`:
    its bytes are not spent) when every live sequence of the batch hits; a sequence that hits keeps its selection in any case. The
    released code switches this off.

    `block` > 1 selects pages of that many slots by the sum of their tokens' votes, top_k / block of them rounded up.
    Prefill goes through `decode.prefill_chunked(read=True)` in chunks of at most n_local (official: 512). `axis` names a mesh axis over
    which the heads are mapped (shard_map): votes and cosines are then summed over it; under jit, sharded heads need no name.
    `offload`: the prompt's values stand in host memory and a call fetches those that are read; half the cache's bytes leave the device. The
    keys stay: a vote reads them all. No step policy beside it; continuing on these caches (another prefill) brings all of them back first.
    A budget that covers a sequence reads it whole, without a vote: full attention at the usual positions. Heads of a layer must hold the
    same tokens at the same slots.

    Departures: scores are float32 (official bf16, full of ties); query head i votes by KV head i // (h/g) (the released kernel: i % g).

    Raises: ValueError for a call with more than n_local queries.
    """

    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    block: int = 1
    kernel: int = 1
    threshold: float | None = 0.9
    axis: str | None = None
    offload: bool = False
    raw: bool = True
    hosted = ("v",)

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"top_k": max(1, capacity - given.get("n_init", cls.n_init) - given.get("n_local", cls.n_local))}

    def __post_init__(self):
        for name, least in (("top_k", 1), ("n_init", 0), ("n_local", 1), ("block", 1), ("kernel", 1)):
            check.at_least(name, getattr(self, name), least)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if not self.raw:
            raise ValueError("tokenselect places keys itself: raw must be True")

    @property
    def sizes(self) -> tuple[int, int]:
        """Pages of the middle that are selected, and pages read in all; a range of tokens may begin within a page."""
        pages = lambda n: -(-n // self.block) + (self.block > 1 and n > 0)
        top = -(-self.top_k // self.block)
        return top, top + pages(self.n_init) + pages(self.n_local)

    def start(self, params, layer: int, kv: KV, h: int) -> Any:
        check.cache(kv)
        b, _, s, d = kv.k.shape
        if self._covers(s):
            return ()
        return Selection(jnp.full((b, self.sizes[0]), -1, jnp.int32), jnp.zeros((b, h, d), jnp.float32), jnp.zeros((b,), bool))

    def _covers(self, s: int) -> bool:
        if s % self.block:
            raise ValueError(f"tokenselect reads pages of {self.block} slots, but the cache has {s}; round it up to a multiple")
        return self.sizes[1] * self.block >= s

    def read(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, KeyIndex | None]:
        check.reading(q, pos, kv)
        if q.shape[2] > self.n_local:
            raise ValueError(
                f"a call of {q.shape[2]} queries does not fit into n_local={self.n_local} tokens; prefill in chunks of at most that"
            )
        if not isinstance(state, Selection):
            return state, carry, None
        at, (top, count) = kv.pos[:, 0], self.sizes
        init = (at >= 0) & (at < self.n_init)
        local = at >= jnp.maximum(kv.seen - self.n_local, 0)[:, None]
        covered = kv.seen <= self.n_init + self.top_k + self.n_local
        forced = (
            jnp.max(
                (init | local | ((at >= 0) & covered[:, None]))
                .astype(jnp.int8)
                .reshape(at.shape[0], at.shape[1] // self.block, self.block),
                -1,
            )
            > 0
        )
        probe = self.probe(q, pos, see.freqs)
        hit = jnp.zeros_like(state.made) if self.threshold is None else state.made & self.alike(probe, state.query)
        hit = hit | covered | jnp.all(pos < 0, -1)

        def again(state, probe, k):
            return state.pages

        def afresh(state, probe, k):
            vote = self.vote(probe, k, (at >= 0) & ~init & ~local).reshape(at.shape[0], at.shape[1] // self.block, self.block)
            best, page = lax.top_k(jnp.where(forced | (jnp.max(vote, -1) < 0), -jnp.inf, jnp.sum(jnp.maximum(vote, 0), -1)), top)
            return jnp.where(hit[:, None], state.pages, jnp.where(best > -jnp.inf, page, -1))

        pages = lax.cond(jnp.all(hit), again, afresh, state, probe, kv.k)
        keep = lambda old, new: jnp.where(hit.reshape(-1, *(1,) * (new.ndim - 1)), old, new)
        state = Selection(pages, keep(state.query, probe), state.made | ~hit)
        return state, carry, self._index(forced, pages, count, pos, at, kv.pos.shape[1])

    def _index(self, forced: Bool[Array, "b p"], pages: Int[Array, "b top"], count: int, pos: Int[Array, "b t"], at, g: int) -> KeyIndex:
        rank = jnp.where(forced, 2, select.mark(pages, forced.shape[1]).astype(jnp.int32))
        best, page = lax.top_k(rank, count)
        index = jnp.sort(jnp.where(best > 0, page, -1), -1)[:, None]
        slots = block_slots(index, self.block)[:, 0]
        alive = jnp.cumsum(((slots >= 0) & (gather(at, slots) >= 0)).astype(jnp.int32), -1)
        later = jnp.cumsum((pos >= 0).astype(jnp.int32)[:, ::-1], -1)[:, ::-1]  # the call's tokens are the last ones read
        heads = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], g, x.shape[1]))
        return KeyIndex(heads(index[:, 0]), heads(jnp.maximum(alive - 1, 0)), heads(jnp.maximum(alive[:, -1:] - later, 0)))

    def probe(self, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], freqs) -> Float[Array, "b h d"]:
        """The mean of the live queries at the positions that follow the local window."""
        live = pos >= 0
        first = jnp.min(jnp.where(live, pos, jnp.iinfo(jnp.int32).max), -1, keepdims=True)
        turned = rotate_by(q.astype(jnp.float32), self.n_local + jnp.where(live, pos - first, 0), freqs)
        turned = jnp.where(live[:, None, :, None], turned, 0.0)
        return lax.stop_gradient(jnp.sum(turned, 2) / jnp.maximum(jnp.sum(live, -1), 1).astype(jnp.float32)[:, None, None])

    def vote(self, probe: Float[Array, "b h d"], k: Float[Array, "b g s d"], middle: Bool[Array, "b s"]) -> Float[Array, "b s"]:
        """Votes of all heads for the slots of the middle; -1 elsewhere."""
        g = k.shape[1]
        logit = jnp.einsum("bgqd,bgsd->bgqs", score.grouped(probe, g), lax.stop_gradient(k).astype(jnp.float32))
        logit = jnp.where(middle[:, None, None], logit, select.NEG)
        top = jnp.max(logit, -1, keepdims=True)
        mass = jnp.where(middle[:, None, None], jnp.exp(logit - top), 0.0)
        total = jnp.sum(mass, -1, keepdims=True)
        vote = self._heads(jnp.sum(mass / jnp.where(total > 0, total, 1.0), (1, 2)))
        return jnp.where(middle, score.pool(vote, self.kernel, "max"), -1.0)

    def alike(self, a: Float[Array, "b h d"], b: Float[Array, "b h d"]) -> Bool[Array, " b"]:
        """Whether two probes are as close as the threshold asks."""
        inner, one, two = (self._heads(jnp.sum(x * y, (1, 2))) for x, y in ((a, b), (a, a), (b, b)))
        return inner >= (self.threshold or 0.0) * jnp.sqrt(one * two)

    def _heads(self, x):
        return x if self.axis is None else lax.psum(x, self.axis)

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """Heads share positions and page marks, and each has a probe in f32; a vote reads every key, and its 4-byte scores go to memory
        and back twice."""
        b, g, s, d = kv.k.shape
        if self._covers(s):
            return Traffic(0, attended(kv, h))
        shared = 20 * b * s + 20 * b * s // self.block + 24 * b * h * d
        return Traffic(
            shared if hit else shared + b * s * (g * d * kv.k.dtype.itemsize + 16 * h),
            attended(kv, h, self.sizes[1] * self.block, placed=True),
        )
