"""Landmark attention, training. Source: arXiv:2305.16300; epfml/landmark-attention, lm_benchmark/models/landmark.py."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.attention import Attention, Rows
from jaxtok.core.registry import register
from jaxtok.ops.landmark import grouped_softmax
from jaxtok.ops.store import Store, begin, extend


@register(
    "landmark_attention",
    site="attention",
    paper="arXiv:2305.16300",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    authors="Amirkeivan Mohtashami and Martin Jaggi",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkAttention(Attention):
    """The grouped softmax over the whole text, with which a model learns to retrieve blocks by their landmarks.

    The text holds a landmark token after every block - 1 others, at order block - 1, 2 block - 1, ... (`train.language.insert_landmarks`).

        P = softmax of the query's own block's tokens and the landmarks of the blocks before it
        token j of its own block: P(j)     of an earlier block c: P(landmark_c) softmax_c(j)     landmarks: 0, its own block's too

    (`ops.landmark.grouped_softmax`.) Weights of a row sum to 1. Within the first block it is plain causal attention, and everywhere over
    the tokens where a landmark's logit is the logsumexp of its block's. Keys stand where they stand in the text. It costs O(n^2), a chunk
    of `block` queries at a time: what it saves, the reader `landmark` saves at inference, where few blocks are retrieved; its stingy
    positions are this function's as long as all blocks are. A landmark in the first row of a text would see nothing; block >= 2 has none.

    Free generation puts none in: a model trained with `insert_landmarks(predict=True)` writes its landmarks itself, else whoever feeds the
    tokens does (`decode.replay`).

    block is the landmark's block with the landmark: 51 is the paper's mem_freq = 50 (LLaMA: 64). No group dropout (the paper's default).
    No weights of its own: the landmark is a token of the vocabulary.
    """

    block: int = 51
    token: int | None = None

    def __post_init__(self):
        check.count("block", self.block, 2)
        if self.token is not None:
            check.count("token", self.token, 0)

    def attend(self, j: int, q, k, v, rows: Rows) -> Float[Array, "b h n d"]:
        (b, h, n, d), size = q.shape, self.block
        if not n:
            return q
        padded = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -n % size), (0, 0)))
        keys, values = padded(k), padded(v)
        blocks = keys.shape[2] // size
        queries = jnp.moveaxis(padded(q).reshape(b, h, blocks, size, d), 2, 0)
        at = jnp.arange(size, dtype=jnp.int32)
        one = lambda part: self._mix(part[1], keys, values, jnp.broadcast_to((part[0] * size + at)[None], (b, size)), None, rows)
        out = jax.lax.map(jax.checkpoint(one), (jnp.arange(blocks, dtype=jnp.int32), queries))
        return jnp.moveaxis(out, 0, 2).reshape(b, h, blocks * size, v.shape[3])[:, :, :n]

    def _mix(self, q, k, v, pos, live, rows: Rows) -> Float[Array, "b h t d"]:
        """Queries at order `pos` [b t] over keys in order, whole blocks of them; live [b s]: which are there (None = all)."""
        if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}; the first must be a multiple of the second")
        (b, h, t, d), (e, s), size, see = q.shape, k.shape[1:3], self.block, rows.see
        y = jnp.einsum("bertd,besd->berts", q.reshape(b, e, h // e, t, d), k, preferred_element_type=jnp.float32)
        y = y * (d**-0.5 if see.scale is None else see.scale)
        y = y if see.softcap is None else see.softcap * jnp.tanh(y / see.softcap)
        seen = jnp.arange(s, dtype=jnp.int32)[None, None] <= pos[..., None]
        seen = seen if live is None else seen & live[:, None]
        own = jnp.arange(s // size, dtype=jnp.int32)[None, None] == (pos // size)[..., None]
        shape = (b, e, h // e, t, s // size)
        weight, _ = grouped_softmax(
            y.reshape(*shape, size),
            jnp.broadcast_to(seen.reshape(b, 1, 1, t, s // size, size), (*shape, size)),
            jnp.broadcast_to(own[:, None, None], shape),
        )
        weight = weight.reshape(b, e, h // e, t, s).astype(v.dtype)
        out = jnp.einsum("berts,besd->bertd", weight, v, preferred_element_type=jnp.float32)
        return out.reshape(b, h, t, -1).astype(q.dtype)

    def start(self, j: int, q, k, v, rows: Rows, slots: int) -> Store:
        return begin(k, v, rows.count, -(-max(slots, 1) // self.block) * self.block)

    def step(self, j: int, state: Store, q, k, v, rows: Rows) -> tuple[Float[Array, "b h 1 d"], Store]:
        state = extend(state, k, v, rows.pos[:, 0])
        return self._mix(q, state.k, state.v, rows.pos, state.pos >= 0, rows), state
