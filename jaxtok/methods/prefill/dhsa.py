"""DHSA. Source: arXiv:2510.24606; xiongsiheng/DHSA (legacy/utils/helper.py; Block-Sparse-Attention/DHSA_patch.py)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.select import choose, finite
from jaxtok.core.sparsifier import (
    Sparsifier,
    View,
    best_blocks,
    between,
    block_means,
    chunk_sums,
    for_heads,
    newest,
    oldest,
    reach,
    with_tokens,
)
from jaxtok.core.types import BlockTable
from jaxtok.ops import boundaries
from jaxtok.ops.block_sparse import lines


@register(
    "dhsa",
    site="sparsify",
    paper="arXiv:2510.24606",
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    authors="Siheng Xiong and Joe Zou and Faramarz Fekri and Yae Jee Cho",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DHSA(Sparsifier):
    """Read the chunks of keys that a block of queries meets best, chunks of any length.

        variant="chunks" (first version): the `chunks` most likely boundaries, none within `apart` of a likelier one, cut the keys;
            score_xc = mean of the queries of x * sqrt(their number) . mean of the keys of c * sqrt(its length), both averaged over heads
            x reads its own keys, the `local` before them, the first `sinks`, and the tokens of the best chunks up to `capacity` keys in all
        second version: blocks are the chunks, each query head has a list of its own of capacity / block_k blocks, the best by
            topk: mean of the queries of x . mean of the keys of y; future blocks take part, which the causal mask then wastes
            a:    the same among causal blocks; the first block and the block of x's last query are among them
            vs:   weight of the best keys in y + weight of the best distances between x and y, half of the capacity each, as the attention of
                  the last block_q rows weighs them (ops.block_sparse.lines); with a's forced blocks
            vsb:  the same of blocks, weights the last block of queries' scores; the first block and all of x's own blocks are among them

    The square roots make a score's variance independent of the length for i.i.d. keys. A chunk that the capacity cuts gives its older tokens
    (its tokens tie). Forced keys are taken first, so nothing counts twice (the code overwrites slots by the first tokens, and pads with repeated
    indices). `local` counts keys before the block, all of whose own keys are read (our reading: the code counts from its end). capacity >= n is dense.
    room: chunks begin anywhere, so lists of "chunks" have room * capacity / block_k blocks and 4, statically; those with the most chosen
    tokens go first, and what finds no room is counted in the table's `lost`.

    Boundaries: every n / (chunks + 1) tokens, until a predictor is given: params["predictor"] (`init_params` with predicted=True; `width` keys on both
    sides of a gap, all KV heads side by side, encoded by a depthwise and a pointwise convolution, each with a relu; [l, r, |l-r|, l r, cos(l, r)] -> MLP -> logit).
    theta: only logits above it begin a chunk (1.1 in the code). None begins in the first or last `width` - 1 rows, and none is forced in front
    of the tail (the code forces one there). The predictor is trained by `jaxtok.train.dhsa`.
    With boundaries every block_k tokens "chunks" ranks blocks as block top-k does. a, vs: where block_q > block_k a block's first queries may miss keys
    of their own block, as in the code. vs, vsb: the code reads the last block of queries whole: give tail >= block_q. Causal by blocks of
    queries is the choice of a alone; that of the others looks at the prompt (its length, boundaries, future keys, last rows).
    """

    capacity: int
    variant: str = "chunks"
    chunks: int = 128
    apart: int = 8
    local: int = 64
    sinks: int = 128
    width: int = 4
    hidden: int = 256
    predicted: bool = False
    theta: float | None = None
    room: float = 2.0
    block_q: int = 64
    block_k: int = 32
    tail: int = 64

    def __post_init__(self):
        lows = {"chunks": 1, "apart": 0, "local": 0, "sinks": 0, "width": 1, "hidden": 1, "block_q": 1, "block_k": 1, "tail": 0}
        for name, low in lows.items():
            check.count(name, getattr(self, name), low)
        check.one_of("variant", self.variant, ("chunks", "topk", "a", "vs", "vsb"))
        check.between("room", self.room, 1, 1e6)
        if self.theta is not None:
            check.between("theta", self.theta, -1e30, 1e30)
        check.kind("predicted", self.predicted, bool)
        own = (self.block_q - 1) // self.block_k + 1 + (self.block_q % self.block_k > 0)  # blocks of a block's own keys, at most
        forced = {"topk": self.block_k, "a": 2 * self.block_k, "vs": 2 * self.block_k, "vsb": (own + 1) * self.block_k}
        check.budget("capacity", self.capacity, forced.get(self.variant, self.sinks + self.local + self.block_q))

    def init_params(self, key: jax.Array, cfg) -> Any:
        """A random predictor (to be trained), where one is asked for."""
        return {"predictor": boundaries.init(key, cfg.kv_heads * cfg.head_dim, self.width, self.hidden)} if self.predicted else {}

    def whole(self, n: int) -> bool:
        return self.capacity >= n

    def table(self, params, view: View) -> BlockTable:
        return self._chunks((params or {}).get("predictor"), view) if self.variant == "chunks" else self._blocks(view)

    def _blocks(self, view: View) -> BlockTable:
        (b, h, g, _, d), size, live = view.sizes, (self.block_q, self.block_k), view.pos >= 0
        seen, most, own = reach(view, *size), self.capacity // self.block_k, newest(view, *size, 0)
        first, alive = oldest(view, *size, 1), jnp.any(seen, 2)
        recent = own & ~jnp.pad(own[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))  # the last of its own blocks
        if self.variant == "vs":
            return best_blocks(self._drawn(view), seen, first | recent, most)
        q, k = block_means(view.q, live, self.block_q), block_means(view.k, live, self.block_k)
        x, y = q.shape[2], k.shape[2]
        score = jnp.einsum("bgqxd,bgyd->bgqxy", q.reshape(b, g, h // g, x, d), k).reshape(b, h, x, y)
        if self.variant == "topk":
            return best_blocks(score, jnp.any(seen, -1, keepdims=True) & alive[:, :, None], jnp.zeros_like(seen), most)
        if self.variant == "vsb":
            score = self._drawn_by_blocks(score, view, alive)
        return best_blocks(score, seen, first | (recent if self.variant == "a" else own), most)

    def _drawn(self, view: View) -> Float[Array, "b h nq nk"]:
        """Of each block, what the chosen keys and distances weigh that it holds."""
        see: dict[str, Any] = dict(window=view.window, softcap=view.softcap, scale=view.scale, impl=view.impl)
        vertical, slash = lines(view.q, view.k, view.pos, last=self.block_q, **see)
        size, budget = (self.block_q, self.block_k), self.capacity // self.block_k * self.block_k
        live = jnp.broadcast_to((view.pos >= 0)[:, None], vertical.shape)
        vertical = jnp.where(choose(vertical, live, budget // 2), vertical, 0.0)
        slash = jnp.where(choose(slash, live, budget - budget // 2), slash, 0.0)
        start, key = (jnp.arange(view.blocks(s), dtype=jnp.int32) * s for s in size)
        apart = start[:, None] - key[None]
        return between(vertical, key[None], key[None] + size[1]) + between(slash, apart - size[1] + 1, apart + size[0])

    def _drawn_by_blocks(self, score: Float[Array, "b h nq nk"], view: View, alive: Bool[Array, "b 1 nk"]) -> Float[Array, "b h nq nk"]:
        """The same of whole blocks, by the scores of the last block of queries; distances count from the last block of keys."""
        (nq, nk), budget, length = score.shape[2:], self.capacity // self.block_k, view.length[:, None, None]
        end = jnp.broadcast_to((jnp.maximum(length - 1, 0) // self.block_q)[..., None], (*score.shape[:2], 1, nk))
        last, there = jnp.take_along_axis(score, end, 2)[:, :, 0], jnp.broadcast_to(alive, (*score.shape[:2], nk))
        away = jnp.maximum(length - 1, 0) // self.block_k - jnp.arange(nk, dtype=jnp.int32)[None, None]  # of a distance the key, and back
        turn = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(jnp.maximum(away, 0), x.shape), 2)
        vertical = jnp.where(choose(last, there, budget // 2), last + 1e-5 * jnp.abs(last), 0.0)  # a key goes before an equal distance
        slash = jnp.where(away >= 0, turn(jnp.where(choose(last, there, budget - budget // 2), last, 0.0)), 0.0)
        x, y = jnp.arange(nq, dtype=jnp.int32)[:, None], jnp.arange(nk, dtype=jnp.int32)[None]
        low, high = x * self.block_q // self.block_k, ((x + 1) * self.block_q - 1) // self.block_k
        return vertical[:, :, None] + between(slash, low - y, high - y + 1)

    def boundaries(self, logit: Float[Array, "b n"], length: Int[Array, " b"]) -> Bool[Array, "b n"]:
        """Where chunks begin: row 0 and the `chunks` largest logits of rows with `width` live keys on both sides, none within `apart` rows of a larger one."""
        row = jnp.arange(logit.shape[1], dtype=jnp.int32)[None]
        left = jnp.where((row >= self.width) & (row <= length[:, None] - self.width), finite(logit), -jnp.inf)
        left = left if self.theta is None else jnp.where(left > self.theta, left, -jnp.inf)

        def pick(_, state):
            left, found = state
            best = jnp.argmax(left, -1, keepdims=True).astype(jnp.int32)
            some = jnp.max(left, -1, keepdims=True) > -jnp.inf
            return jnp.where(jnp.abs(row - best) <= self.apart, -jnp.inf, left), found | ((row == best) & some)

        return lax.fori_loop(0, self.chunks, pick, (left, jnp.broadcast_to(row == 0, left.shape)))[1]

    def _begins(self, predictor, view: View) -> Bool[Array, "b n"]:
        row, length = jnp.arange(view.pos.shape[1], dtype=jnp.int32)[None], view.length
        if predictor is None:
            step = jnp.maximum(-(-length // (self.chunks + 1)), 1)[:, None]
            return (row % step == 0) & (row < jnp.maximum(length, 1)[:, None])
        return self.boundaries(boundaries.boundary_logits(predictor, view.k, view.pos >= 0), length)

    def _chunks(self, predictor, view: View) -> BlockTable:
        live, size, c = view.pos >= 0, (self.block_q, self.block_k), self.chunks + 1
        (b, _, g, n, _), length, number = view.sizes, view.length, jnp.cumsum(self._begins(predictor, view), -1, dtype=jnp.int32) - 1
        begin, end, k = chunk_sums(jnp.where(live[:, None, :, None], view.k.astype(jnp.float32), 0.0).mean(1), number, live, c)
        k = k / jnp.sqrt(jnp.maximum(end - begin, 1).astype(jnp.float32))[..., None]
        q = jnp.mean(block_means(view.q, live, size[0]), 1)
        first = (jnp.arange(view.blocks(size[0]), dtype=jnp.int32) * size[0])[None, :, None]
        last = jnp.minimum(first + size[0], length[:, None, None])
        score = jnp.einsum("bxd,bcd->bxc", q * jnp.sqrt(jnp.maximum(last - first, 1).astype(jnp.float32)), k)
        # free keys: behind the sinks and the edge of a sliding layer, before the window
        edge = jnp.zeros_like(first) if view.window is None else jnp.maximum(first - view.window + 1, 0)
        window = jnp.maximum(first - self.local, edge)
        low, high = jnp.maximum(begin[:, None], jnp.maximum(self.sinks, edge)), jnp.minimum(end[:, None], window)
        free = jnp.where(first < length[:, None, None], jnp.maximum(high - low, 0), 0)
        forced = jnp.maximum(jnp.minimum(self.sinks, window) - edge, 0) + jnp.maximum(last - window, 0)
        order = jnp.argsort(-jnp.where(free > 0, finite(score), -jnp.inf), -1, stable=True)
        ranked = jnp.take_along_axis(free, order, -1)
        room = jnp.maximum(self.capacity - forced, 0) - (jnp.cumsum(ranked, -1) - ranked)
        take = jnp.take_along_axis(jnp.clip(room, 0, ranked), jnp.argsort(order, -1), -1)  # tokens of each chunk that are read
        of = jnp.broadcast_to(number[:, None], (b, take.shape[1], n))
        row = jnp.arange(n, dtype=jnp.int32)[None, None]
        low = jnp.broadcast_to(low, take.shape)
        rank, allowed = row - jnp.take_along_axis(low, of, -1), jnp.take_along_axis(take, of, -1)
        tokens = (rank >= 0) & (rank < allowed) & (row < window)
        tokens = (tokens | (row < self.sinks) | (row >= window)) & (row >= edge) & (row < last) & (first < last)
        cut = jnp.pad(tokens, ((0, 0), (0, 0), (0, -n % size[1]))).reshape(b, tokens.shape[1], view.blocks(size[1]), size[1])
        many = jnp.sum(cut, -1, dtype=jnp.int32)[:, None]
        most = min(view.blocks(size[1]), math.ceil(self.room * self.capacity / size[1]) + 4)
        table = best_blocks(many.astype(jnp.float32), many > 0, newest(view, *size, 0), most)
        table = table._replace(lost=jnp.sum(many > 0, -1, dtype=jnp.int32) - table.count)
        return for_heads(with_tokens(table, tokens[:, None], size[1]), g)
