"""Meta-tokens. Source: arXiv:2509.16278; re-implementation from the paper, no official code was found."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.attention import Attention, Rows
from jaxtok.core.layer import Halves, draw_layer
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.select import pack
from jaxtok.ops.attention import attention
from jaxtok.ops.store import Store, begin, extend, write

CAUSAL, META = 0, 1


class Marked(NamedTuple):
    """The keys of the meta-tokens so far, and how many there are."""

    store: Store
    count: jax.Array  # i32 [b]


@register(
    "meta_tokens",
    site="attention",
    paper="arXiv:2509.16278",
    title="Language Modeling with Learned Meta-Tokens",
    authors="Alok N. Shah and Khush Gupta and Keshav Ramji and Pratik Chaudhari",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTokens(Attention):
    """Special tokens strewn into the text attend to each other once more in every layer.

        layer: x += causal attention(norm x);  x += meta-attention(norm x);  x += MLP(norm x)
        meta-attention: softmax(Q K^T / sqrt(d) + causal + P) V,   P_ij = 0 where i and j are both meta-tokens, else -inf;
                        0 for ordinary tokens, whose rows are empty

    `token` is the meta-token's id: a row of the model's embedding is the one shared embedding that the paper learns. `decode.prefill` and the
    loss find them by it; whoever calls `decoder.embed` gives it special=token, else they are ordinary tokens to the prefill. Text of n tokens gets
    round(ratio n) of them at random places (`train.language.insert_meta`), at positions of their own; they are no targets.

    The meta-tokens are gathered, attend densely and are scattered back: O((ratio n)^2) beside the causal attention's O(n^2), which stays.
    Static room is ceil(ratio slots) meta-tokens for a text of `slots` rows; those beyond it (a text with more of them) are ordinary tokens
    to the meta-attention: the earliest keep their place, so that no later token matters. Decode and parallel pass agree while they fit.

    Meta-attention has a norm and q, k, v, o of its own, in `init_params`; with o = 0 the model is the plain one. Its rotary embedding is
    that of the text (our reading: the paper does not say). What the last layer's makes of them nobody reads, unless meta-tokens predict.
    """

    token: int | None = None
    ratio: float = 0.1
    times = 2

    def __post_init__(self):
        if self.token is None:
            raise ValueError("meta_tokens needs token=, the id of the meta-token in the model's vocabulary")
        check.count("token", self.token, 0)
        check.share("ratio", self.ratio)

    def layer_params(self, key: jax.Array, cfg) -> dict[str, Array]:
        return draw_layer(cfg, key, mlp=False)

    def compose(self, own, half: Halves, x: Float[Array, "b n c"], attend: Callable[..., Array]) -> Float[Array, "b n c"]:
        x = half.out(x, attend(CAUSAL, *half.qkv(x)))
        more = half.using(own)
        return half.mlp(more.out(x, attend(META, *more.qkv(x))))

    def room(self, slots: int) -> int:
        """Meta-tokens that a text of `slots` rows has room for."""
        return max(1, math.ceil(self.ratio * slots))

    def attend(self, j: int, q, k, v, rows: Rows) -> Float[Array, "b h n d"]:
        if j == CAUSAL:
            return self._read(q, k, v, rows.pos, rows.pos, rows, 0)
        plan = pack(self._first(rows), self.room(q.shape[2]))
        take = lambda x: gather(x, jnp.broadcast_to(plan.index[:, None], (*x.shape[:2], plan.index.shape[1])))
        pos = jnp.where(plan.index < 0, -1, gather(rows.pos, plan.index))
        out = self._read(take(q), take(k), take(v), pos, pos, rows, 0)
        return gather(out, jnp.broadcast_to(plan.assign[:, None], q.shape[:3]))

    def start(self, j: int, q, k, v, rows: Rows, slots: int) -> Store | Marked:
        if j == CAUSAL:
            return begin(k, v, rows.count, max(slots, 1))
        room, first = self.room(slots), self._first(rows, slots)
        count = jnp.sum(first, -1, dtype=jnp.int32)
        if not q.shape[2]:
            return Marked(begin(k, v, count, room), count)
        index = jnp.sort(jnp.where(first, rows.pos, jnp.iinfo(jnp.int32).max), -1)[:, :room]  # row i has order i
        index = jnp.where(index == jnp.iinfo(jnp.int32).max, -1, index)
        index = jnp.pad(index, ((0, 0), (0, room - index.shape[1])), constant_values=-1)
        take = lambda x: gather(x, jnp.broadcast_to(index[:, None], (*x.shape[:2], room)))
        return Marked(Store(take(k), take(v), index), count)

    def step(self, j: int, state, q, k, v, rows: Rows) -> tuple[Float[Array, "b h 1 d"], Store | Marked]:
        if j == CAUSAL:
            state = extend(state, k, v, rows.pos[:, 0])
            return self._read(q, state.k, state.v, rows.pos, state.pos, rows, None), state
        mine = rows.mark[:, 0] & (rows.pos[:, 0] >= 0) & (state.count < state.store.pos.shape[-1])
        store = write(state.store, k, v, jnp.where(mine, state.count, -1), rows.pos[:, 0])
        pos = jnp.where(mine, rows.pos[:, 0], -1)[:, None]
        return self._read(q, store.k, store.v, pos, store.pos, rows, None), Marked(store, state.count + mine.astype(jnp.int32))

    def _first(self, rows: Rows, slots: int | None = None) -> Bool[Array, "b n"]:
        """The meta-tokens that there is room for."""
        mark = rows.mark & (rows.pos >= 0)
        return mark & (jnp.cumsum(mark, -1, dtype=jnp.int32) <= self.room(mark.shape[1] if slots is None else slots))

    def _read(self, q, k, v, q_pos, k_pos, rows: Rows, diagonal: int | None) -> Array:
        see = rows.see
        return attention(q, k, v, q_pos=q_pos, k_pos=k_pos, diagonal=diagonal, softcap=see.softcap, scale=see.scale, impl=see.impl)[0]
