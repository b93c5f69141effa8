"""Site sparsify: which keys a query attends to in a prefill, block by block. Nothing is lost: the caches keep every row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import Method
from jaxtok.core.select import finite
from jaxtok.core.types import BlockTable


class View(NamedTuple):
    """What a sparsifier is told of a layer: its rows with the live ones first, so that row r is the r-th live token of its sequence.

    Blocks are counted from the first live row, whatever the padding. Positions ascend over live rows and may have gaps.
    """

    q: jax.Array  # [b h n d] after the rotary embedding
    k: jax.Array  # [b g n d] after the rotary embedding
    pos: jax.Array  # i32 [b n]; -1 = dead
    layer: int = 0  # 0-based
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None  # of q.k; None = head_dim ** -0.5
    impl: Any = "auto"  # as of ops.attention

    @property
    def length(self) -> Int[Array, " b"]:
        """How many rows are live: the first so many."""
        return jnp.sum(self.pos >= 0, -1, dtype=jnp.int32)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(b, h, g, n, d). ValueError where the arrays do not fit."""
        (b, n), q, k = self.pos.shape, self.q.shape, self.k.shape
        if len(q) != 4 or len(k) != 4 or not 0 < k[1] <= q[1] or q[1] % k[1] or q != (b, q[1], n, q[3]) or k != (b, k[1], n, q[3]):
            raise ValueError(f"q, k, pos are {list(q)}, {list(k)}, {[b, n]}; they must be [b h n d], [b g n d], [b n], h a multiple of g")
        return b, q[1], k[1], n, q[3]

    def blocks(self, size: int) -> int:
        """How many blocks of `size` the rows make; the last may be short."""
        return -(-self.pos.shape[1] // size)


class Sparsifier(Method):
    """Site sparsify: which blocks of keys each block of queries attends to in a prefill of its own (a decode step reads everything).

    A method supplies `table`, for one layer, from a `View`. The model aligns the rows, attends through the table (ops.block_sparse) and
    puts the rows back.

    Causality is the attention's, too: a listed block that lies in the future is masked, only its work is wasted.
    No query attends to a later key. Which earlier keys it attends to may depend on later tokens, though, by the method (each says so): on none
    (a_shape: strictly causal), on those of its own block of queries (block_topk, dhsa's variant a), or on the prompt (its last rows, means,
    boundaries: sale, vertical_slash, dhsa otherwise). That is so in the papers; it is why these methods are for prompts.

    What was chosen and found no room in a list's static length is counted in the table's `lost`; `jaxtok.evals.sparsity.by_head` adds it up by layer.
    """

    block_q: int
    block_k: int
    tail: int = 0  # the last so many rows attend to everything (the instruction behind a context)

    def layer(self, i: int, layers: int) -> "Sparsifier | None":
        """The instance for 0-based layer `i` of `layers`; None = plain attention."""
        return self

    def whole(self, n: int) -> bool:
        """Whether prompts of n static rows are read whole anyway, by plain attention."""
        return False

    def table(self, params, view: View) -> BlockTable:
        """The blocks that each block of queries reads: e = g lists (a list a KV head), or e = h."""
        raise NotImplementedError(f"{type(self).__name__} must make a block table")

    def validate(self, recipe, cfg) -> None:
        """ValueError where the method cannot work in `recipe` on a model of configuration `cfg`."""
        beside = [site for site in ("attention", "edits") if getattr(recipe, site)]
        if beside:
            raise ValueError(f"{self.name} lists keys for a layer's own attention; use it without {' and '.join(beside)}")


def reach(view: View, block_q: int, block_k: int) -> Bool[Array, "b 1 nq nk"]:
    """Blocks of which some key may be seen by some live query of the block (causal, within the window)."""
    first, last, start = _edges(view, block_q, block_k)
    seen = (first <= last) & (start <= last)
    return seen if view.window is None else seen & (first - (start + block_k - 1) < view.window)


def newest(view: View, block_q: int, block_k: int, tokens: int) -> Bool[Array, "b 1 nq nk"]:
    """Blocks that hold one of the `tokens` keys before the block's first query, or a key of the block itself."""
    first, last, start = _edges(view, block_q, block_k)
    return (first <= last) & (start <= last) & (start + block_k > first - tokens)


def oldest(view: View, block_q: int, block_k: int, tokens: int) -> Bool[Array, "b 1 nq nk"]:
    """Blocks that hold one of the first `tokens` keys."""
    first, last, start = _edges(view, block_q, block_k)
    return (first <= last) & (start <= last) & (start < tokens)


def _edges(view: View, block_q: int, block_k: int) -> tuple[Array, Array, Array]:
    """First and last live row of each block of queries, first row of each block of keys; they broadcast to [b 1 nq nk]."""
    check.count("block_q", block_q)
    check.count("block_k", block_k)
    steps = lambda size: jnp.arange(view.blocks(size), dtype=jnp.int32) * size
    first = steps(block_q)[None, None, :, None]
    last = jnp.minimum(first + block_q, view.length[:, None, None, None]) - 1
    return first, last, steps(block_k)[None, None, None]


def best_blocks(
    score: Float[Array, "b e nq nk"], candidate: Bool[Array, "b _ nq nk"], forced: Bool[Array, "b _ nq nk"], most: int
) -> BlockTable:
    """The forced candidates and the best others, at most `most` (static) in all, ascending; what finds no room of the forced is counted.

    Candidates of score -inf are not chosen. Ties: the older block. Scores are float32, NaN the lowest.
    """
    check.count("most", most)
    nk = score.shape[-1]
    value = jnp.where(jnp.isneginf(score), -jnp.inf, finite(score))
    value = jnp.where(candidate, jnp.where(forced, jnp.inf, value), -jnp.inf)
    top, where = lax.top_k(value, max(1, min(most, nk)))
    chosen = top > -jnp.inf
    count = jnp.sum(chosen, -1, dtype=jnp.int32)
    index = jnp.sort(jnp.where(chosen, where.astype(jnp.int32), nk), -1)
    wanted = jnp.sum(candidate & forced, -1, dtype=jnp.int32)
    return BlockTable(jnp.where(index < nk, index, -1), count, lost=jnp.maximum(wanted - count, 0) + jnp.zeros_like(count))


def with_tokens(table: BlockTable, tokens: Bool[Array, "b _ nq n"], block_k: int) -> BlockTable:
    """The table with the keys of its blocks that each block of queries reads, from a mask over all keys."""
    check.count("block_k", block_k)
    index = table.index
    tokens = jnp.pad(tokens, [(0, 0)] * 3 + [(0, -tokens.shape[-1] % block_k)])
    cut = tokens.reshape(*tokens.shape[:3], tokens.shape[-1] // block_k, block_k)
    cut = jnp.broadcast_to(cut, (index.shape[0], index.shape[1], *cut.shape[2:]))
    return table._replace(mask=jnp.take_along_axis(cut, jnp.maximum(index, 0)[..., None], 3) & (index >= 0)[..., None])


def for_heads(table: BlockTable, lists: int) -> BlockTable:
    """One list for all heads, as `lists` equal ones."""
    check.count("lists", lists)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], lists, *x.shape[2:])), table)


def block_means(x: Float[Array, "b e n d"], live: Bool[Array, "b n"], block: int) -> Float[Array, "b e nb d"]:
    """The mean of the live rows of each block, float32; zeros where none is live."""
    check.count("block", block)
    b, e, n, d = x.shape
    pad, blocks = -n % block, -(-n // block)
    x = jnp.pad(jnp.where(live[:, None, :, None], x.astype(jnp.float32), 0.0), ((0, 0), (0, 0), (0, pad), (0, 0)))
    count = jnp.sum(jnp.pad(live, ((0, 0), (0, pad))).reshape(live.shape[0], 1, blocks, block), -1).astype(jnp.float32)
    return jnp.sum(x.reshape(b, e, blocks, block, d), 3) / jnp.maximum(count, 1.0)[..., None]


def between(value: Float[Array, "b e n"], low: Int[Array, "nq nk"], high: Int[Array, "nq nk"]) -> Float[Array, "b e nq nk"]:
    """The sum of value[low:high], bounds clipped into 0 to n, by a running sum; 0 where low >= high."""
    total = jnp.pad(jnp.cumsum(value.astype(jnp.float32), -1), ((0, 0), (0, 0), (1, 0)))
    low, high = (jnp.clip(x, 0, value.shape[-1]) for x in (low, high))
    return jnp.where(low < high, total[:, :, high] - total[:, :, low], 0.0)


def chunk_sums(
    x: Float[Array, "b n d"], number: Int[Array, "b n"], live: Bool[Array, "b n"], chunks: int
) -> tuple[Int[Array, "b c"], Int[Array, "b c"], Float[Array, "b c d"]]:
    """First row, row behind the last, and sum of the rows of each of `chunks` chunks; those that are not there are empty, at row n.

    number: the chunk of each live row, ascending.
    """
    check.count("chunks", chunks)
    n, row = x.shape[1], jnp.arange(x.shape[1], dtype=jnp.int32)
    at = jnp.where(live & (number >= 0), jnp.minimum(number, chunks), chunks)
    one = lambda x, at: (
        jnp.full((chunks + 1,), n, jnp.int32).at[at].min(row)[:chunks],
        jnp.full((chunks + 1,), 0, jnp.int32).at[at].max(row + 1)[:chunks],
        jnp.zeros((chunks + 1, x.shape[1]), jnp.float32).at[at].add(x.astype(jnp.float32))[:chunks],
    )
    begin, end, total = jax.vmap(one)(x, at)
    return begin, jnp.maximum(begin, end), total
