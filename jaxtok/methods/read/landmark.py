"""Landmark attention, inference. Source: arXiv:2305.16300; epfml/landmark-attention, lm_benchmark/models/{landmark.py,caches/mem_cache.py}."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxtok.core import check, score, select
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.registry import register
from jaxtok.core.rotary import rotate_by, turn
from jaxtok.core.types import KV
from jaxtok.ops.landmark import grouped_softmax
from jaxtok.ops.read import attend_blocks, in_place, take


@register(
    "landmark",
    site="reader",
    paper="arXiv:2305.16300",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    authors="Amirkeivan Mohtashami and Martin Jaggi",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Landmark(Reader):
    """Retrieve blocks by the attention that their landmark token gets; for models trained with landmarks.

    The text holds a landmark token after every block - 1 others: the tokens at order block - 1, 2 block - 1, ... (whoever makes the
    token ids puts them there). With n blocks complete before a call, each query retrieves `top_k` of them and attends by the grouped
    softmax (ops.landmark) to those blocks, to the incomplete one, and to the call's own tokens before it:

        score of block i = softmax over the n landmarks of q . k_landmark / sqrt(d)
        share = "token_head" each query and head for itself | "heads" the largest over heads | "tokens" the largest over queries

    Keys are stored unrotated and placed in k + 1 reserved slots of `block` positions before the local ones ("stingy" positions):
    scoring places landmark i in slot max(0, i - (n - k) + 1), attending the j-th retrieved block (oldest first) in slot j + [i >= n - k];
    the incomplete block begins at min(n, k + 1) block. top_k >= n - 1 places every block where it stands in the text, and top_k >= n is
    the whole landmark attention. (For n <= k the official code moves the blocks one slot on, into the local ones; not copied.)

    A model trained so attends this way everywhere, hence its prompts go through `decode.prefill_chunked(read=True)`; plain attention is
    no limit of it, whatever the budget. The gates depend on the query and its head and come with a softmax in each block: so this
    reader attends by itself. With "heads"
    the query heads of a KV head read one set, whose bytes are spent once.
    """

    top_k: int = 4
    block: int = 51  # type: ignore[assignment]
    share: str = "token_head"
    raw: bool = True
    attends = True

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"top_k": max(1, capacity // given.get("block", cls.block))}

    def __post_init__(self):
        check.at_least("top_k", self.top_k, 1)
        check.at_least("block", self.block, 2)
        check.one_of("share", self.share, ("token_head", "heads", "tokens"))
        if not self.raw:
            raise ValueError("landmark places keys itself: raw must be True")

    def attend(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, Array, Array]:
        check.reading(q, pos, kv)
        (b, h, t, d), g, size = q.shape, kv.pos.shape[1], self.block
        k = min(self.top_k, self._most(kv))
        scale = d**-0.5 if see.scale is None else see.scale
        added = jnp.sum(pos >= 0, -1, dtype=jnp.int32)
        n = (kv.seen - added) // size  # [b] blocks complete before the call
        first = kv.cursor - kv.seen  # [b] the slot of the first token: live slots are the last ones before the cursor
        base = jnp.minimum(n, k + 1) * size
        rope = base[:, None] + pos - n[:, None] * size
        q = rotate_by(q.astype(jnp.float32), jnp.maximum(rope, 0), see.freqs)

        chosen = self.retrieve(q, pos, kv, first, n, k, scale, see.freqs)  # [b e t k]
        e = chosen.shape[1]
        row = jnp.arange(size, dtype=jnp.int32)[None, None, None, None]
        rank = jnp.cumsum((chosen >= 0).astype(jnp.int32), -1) - 1
        stand = jnp.where((n <= k)[:, None, None, None], chosen, rank + (chosen >= (n - k)[:, None, None, None]).astype(jnp.int32))
        if in_place(see, kv, rope) and t == 1:
            return state, carry, *self._step(q, pos, kv, see, first, n, base, chosen, stand, scale)
        where = lambda x, first: jnp.where(chosen[..., None] < 0, -1, x[..., None] * size + row + first).reshape(b, e, -1)
        slots = where(chosen, first[:, None, None, None, None])
        far = turn(take(kv.k, slots).astype(jnp.float32), where(stand, jnp.zeros((), jnp.int32)), see.freqs, (k + 1) * size)
        heads_last = lambda x: jnp.swapaxes(x.reshape(b, e, h // e, t, -1), 2, 3)  # [b e t h/e ...]: products that move no key or value
        x_far = jnp.einsum("betjd,betmd->betjm", heads_last(q), far.reshape(b, e, t, k * size, d))
        x_far = jnp.swapaxes(x_far, 2, 3).reshape(b, h, t, k, size) * scale
        ok_far = jnp.broadcast_to(((slots >= 0) & (take(kv.pos, slots) >= 0)).reshape(b, e, 1, t, k, size), (b, e, h // e, t, k, size))

        near = -(-(size - 1 + t) // size)
        order = n[:, None] * size + jnp.arange(near * size, dtype=jnp.int32)[None]
        at = jnp.broadcast_to(jnp.where(order < kv.seen[:, None], order + first[:, None], -1)[:, None], (b, g, near * size))
        close = rotate_by(take(kv.k, at).astype(jnp.float32), order - n[:, None] * size + base[:, None], see.freqs)
        x_near = jnp.einsum("bgjtd,bgmd->bgjtm", score.grouped(q, g), close).reshape(b, h, t, near, size) * scale
        mine = (order.reshape(b, 1, near, size)[..., 0] // size) == (pos // size)[..., None]  # [b t near]
        ok_near = (order[:, None] <= pos[..., None]) & (order < kv.seen[:, None])[:, None]

        live = (pos >= 0)[:, None, :, None, None]
        ok_near = jnp.broadcast_to(ok_near.reshape(b, 1, t, near, size), x_near.shape)
        own = jnp.broadcast_to(jnp.pad(mine, ((0, 0), (0, 0), (k, 0)))[:, None], (b, h, t, k + near))
        seen = live & jnp.concatenate([ok_far.reshape(b, h, t, k, size), ok_near], 3)
        weight, lse = grouped_softmax(jnp.concatenate([x_far, x_near], 3), seen, own)
        w_far, w_near = heads_last(weight[:, :, :, :k]), weight[:, :, :, k:].reshape(b, g, h // g, t, -1)
        v_far = take(kv.v, slots).reshape(b, e, t, k * size, -1).astype(jnp.float32)
        out = jnp.swapaxes(jnp.einsum("betjm,betmc->betjc", w_far, v_far), 2, 3).reshape(b, h, t, -1)
        out = out + jnp.einsum("bgjtm,bgmc->bgjtc", w_near, take(kv.v, at).astype(jnp.float32)).reshape(b, h, t, -1)
        return state, carry, out.astype(kv.v.dtype), lse

    def _step(self, q, pos, kv: KV, see: Sight, first, n, base, chosen, stand, scale) -> tuple[Array, Array]:
        """One query (rotated), its blocks read where they lie: each block's own attention, weighted by its gate beside the near tokens."""
        (b, h, _, d), (e, _, k), size = q.shape, chosen.shape[1:], self.block
        begin = jnp.where(chosen < 0, -1, chosen * size + first[:, None, None, None]).reshape(b, e * k, 1)
        ids = (stand * size).reshape(b, e * k, 1) + jnp.arange(size - 1, dtype=jnp.int32)[None, None]
        each = jnp.broadcast_to(q.reshape(b, e, 1, h // e, 1, d), (b, e, k, h // e, 1, d)).reshape(b, h * k, 1, d)
        far, inside = attend_blocks(each.astype(kv.k.dtype), pos, kv, begin, see, size - 1, jnp.maximum(ids, 0), 1)
        by_head = lambda x: jnp.swapaxes(x.reshape(b, e, k, h // e, -1), 2, 3).reshape(b, h, k, -1)
        mark = jnp.where(chosen < 0, -1, chosen * size + first[:, None, None, None] + size - 1)[:, :, 0]
        key = turn(take(kv.k, mark).astype(jnp.float32), jnp.maximum(stand[:, :, 0] * size + size - 1, 0), see.freqs)
        gate = jnp.einsum("bejd,bekd->bejk", q.reshape(b, e, h // e, d), key).reshape(b, h, k) * scale
        known = jnp.repeat((mark >= 0) & (take(kv.pos, mark) >= 0), h // e, 1) & (by_head(inside)[..., 0] > -jnp.inf)

        order = n[:, None] * size + jnp.arange(size - 1, dtype=jnp.int32)[None]  # the block of the query itself
        wide = lambda x: jnp.broadcast_to(x[:, None], (b, kv.pos.shape[1], size - 1))
        at = wide(jnp.where(order <= pos, order + first[:, None], -1))
        near = turn(take(kv.k, at).astype(jnp.float32), wide(base[:, None] + order - n[:, None] * size), see.freqs)
        close = jnp.einsum("bgjd,bgmd->bgjm", score.grouped(q[:, :, 0], kv.pos.shape[1]), near).reshape(b, h, -1) * scale
        logit = jnp.concatenate([jnp.where(known, gate, -jnp.inf), jnp.where((at >= 0)[:, :1], close, -jnp.inf)], -1)
        lse = jax.nn.logsumexp(logit, -1)
        weight = jnp.exp(logit - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
        out = jnp.einsum("bhk,bhkc->bhc", weight[..., :k], by_head(far).astype(jnp.float32))
        values = take(kv.v, at).astype(jnp.float32)
        out = out + jnp.einsum("bgjm,bgmc->bgjc", score.grouped(weight[..., k:], values.shape[1]), values).reshape(b, h, -1)
        return out[:, :, None].astype(kv.v.dtype), lse[:, :, None]

    def _most(self, kv: KV) -> int:
        return max(kv.pos.shape[2] // self.block, 1)

    def retrieve(self, q: Float[Array, "b h t d"], pos, kv: KV, first, n, k: int, scale, freqs) -> Int[Array, "b e t k"]:
        """The blocks that each query (rotated) retrieves, oldest first; -1 where there are fewer. e = g where all heads retrieve alike."""
        (b, h, t, _), g, size = q.shape, kv.pos.shape[1], self.block
        i = jnp.arange(self._most(kv), dtype=jnp.int32)[None]
        known = i < n[:, None]
        slot = jnp.where(known, first[:, None] + i * size + size - 1, -1)
        stand = jnp.where((n <= k)[:, None], i, jnp.maximum(i - (n - k)[:, None] + 1, 0)) * size + size - 1
        wide = lambda x: jnp.broadcast_to(x[:, None], (b, g, x.shape[1]))
        keys = rotate_by(take(kv.k, wide(slot)).astype(jnp.float32), jnp.broadcast_to(stand, slot.shape), freqs)
        logit = jnp.einsum("bgjtd,bgnd->bgjtn", score.grouped(q, g), keys).reshape(b, h, t, -1) * scale
        logit = jnp.where(known[:, None, None], select.finite(logit), -jnp.inf)
        top = jnp.max(logit, -1, keepdims=True, initial=-jnp.inf)
        mass = jnp.exp(logit - jnp.where(top > -jnp.inf, top, 0.0))
        share = mass / jnp.maximum(jnp.sum(mass, -1, keepdims=True), 1e-30)
        if self.share == "heads":
            share = jnp.broadcast_to(jnp.max(share, 1, keepdims=True), (b, g, t, share.shape[-1]))
        elif self.share == "tokens":
            live = (pos >= 0)[:, None, :, None]
            share = jnp.broadcast_to(jnp.max(jnp.where(live, share, 0.0), 2, keepdims=True), share.shape)
        best, block = lax.top_k(jnp.where(known[:, None, None], lax.stop_gradient(share), -1.0), k)
        return jnp.sort(jnp.where(best >= 0, block, -1), -1)

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """Every landmark's key, gathered (moved thrice), and its 4-byte scores, which go to memory and back thrice; the tokens of `top_k`
        blocks, for each query head unless heads share, where they lie; those of the query's own block, gathered."""
        b, g, s, d = kv.k.shape
        size, row = kv.k.dtype.itemsize, (d + kv.v.shape[-1]) * kv.k.dtype.itemsize
        marks = b * (s // self.block) * (3 * g * d * size + 24 * h)
        heads = 1 if self.share == "heads" else h // g
        far = attended(kv, h, heads * self.top_k * (self.block - 1), placed=True)
        return Traffic(marks, far + 3 * b * g * self.block * row)
