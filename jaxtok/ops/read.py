"""Attention of a step to all slots of a cache or to some of them, for readers."""

from typing import Any

import jax.numpy as jnp
from jaxtok_kernels.read import read
from jaxtyping import Array, Float, Int

from jaxtok.core.reader import Sight
from jaxtok.core.rotary import turn
from jaxtok.core.types import KV
from jaxtok.ops._chunked import as_window, bounded, check
from jaxtok.ops._impl import chosen, unfit
from jaxtok.ops._shared import Shared
from jaxtok.ops.attention import attention
from jaxtok.ops.cache import block_slots
from jaxtok.ops.offload import Halves, rows, together


def take(x: Array | Halves, slots: Int[Array, "b e m"]) -> Array:
    """The rows [b e m ...] of the listed slots of x [b g s ...], which may stand in host memory in part; e = g, or h query heads that each list their own. -1 gives zeros."""
    (b, g), (e, m) = x.shape[:2], slots.shape[1:]
    if not g or e % g:
        raise ValueError(f"slots of {e} heads cannot name those of a cache of {g} KV heads")
    return rows(x, slots.reshape(b, g, e // g * m)).reshape(b, e, m, *x.shape[3:])


def take_kv(kv: KV, slots: Int[Array, "b e m"]) -> tuple[Array, Array, Array, Array]:
    """(k, v, pos, bias) of the listed slots; pos is -1 at unused entries."""
    return take(kv.k, slots), take(kv.v, slots), jnp.where(slots < 0, -1, take(kv.pos, slots)), take(kv.bias, slots)


def in_place(see: Sight, kv: KV | None = None, ids: Array | None = None) -> bool:
    """Whether a kernel reads slots where they lie; XLA gathers them first. ids: those of keys that are stored unrotated."""
    return _kernel(see, kv, ids) != "xla"


def _kernel(see: Sight, kv: KV | None = None, ids: Array | None = None) -> str:
    if isinstance(see.impl, Shared):
        return "xla"
    others = ("pallas_gpu",) if ids is not None else ()
    if kv is not None:
        away = isinstance(kv.k, Halves) or isinstance(kv.v, Halves)
        others = ("pallas_tpu", "pallas_gpu") if away else (*others, *unfit(kv.k, kv.v))
    return chosen("read", see.impl, None if isinstance(see.window, int | None) else _TRACED, others)


_TRACED = "it takes a static window (int or None), not an array"


def attend_all(q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight) -> tuple[Array, Array]:
    """(values, logsumexp) of attention to every slot; what stands in host memory crosses to the device."""
    kv = together(kv)
    if in_place(see, kv):
        return _read(q, pos, kv, None, see)
    return _attend(q, kv.k, kv.v, pos, kv.pos, kv.bias, see)


def attend_slots(q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, slots: Int[Array, "b e m"], see: Sight) -> tuple[Array, Array]:
    """(values, logsumexp) of attention to the listed slots, each listed once; -1 = unused entry."""
    return attend_blocks(q, pos, kv, slots, see, 1)


def attend_blocks(
    q: Float[Array, "b h t d"],
    pos: Int[Array, "b t"],
    kv: KV,
    index: Int[Array, "b e m"],
    see: Sight,
    block: int,
    ids: Int[Array, "b e n"] | None = None,
    stride: int | None = None,
) -> tuple[Array, Array]:
    """(values, logsumexp) of attention to the listed blocks of `block` slots, one every `stride` (None = block); -1 = unused entry.

    ids: the rotary ids of the n = m * block listed slots, where keys are stored unrotated; q is rotated.
    With a named impl the kernel of `jaxtok_kernels.read` reads the slots where they lie; XLA gathers them first.
    """
    stride = block if stride is None else stride
    if not in_place(see, kv, ids):
        k, v, k_pos, bias = take_kv(kv, index if block == stride == 1 else block_slots(index, block, stride))
        k = k if ids is None else turn(k, ids, see.freqs)
        return _attend(q, k, v, pos, k_pos, bias, see)
    if isinstance(kv.k, Halves) or isinstance(kv.v, Halves):
        raise NotImplementedError(
            f"impl={see.impl!r} reads slots where they lie, and some stand in host memory (offload=True); use impl='xla'"
        )
    return _read(q, pos, kv, index, see, ids, block=block, stride=stride)


def _read(q, pos, kv: KV, index, see: Sight, ids=None, **how) -> tuple[Array, Array]:
    """By the kernel."""
    check(q, kv.k, pos, kv.pos, v=kv.v, bias=kv.bias, softcap=see.softcap)
    (b, h, t, d), e = q.shape, kv.k.shape[1] if index is None else index.shape[1]
    if not e or h % e:
        raise ValueError(f"{h} query heads cannot read {e} lists of blocks")
    out, lse = read(
        q.reshape(b, e, h // e * t, d), jnp.tile(pos, (1, h // e)), kv.k, kv.v, kv.pos, kv.bias, index, ids, None if ids is None else see.freqs,
        scale=d**-0.5 if see.scale is None else float(see.scale), softcap=see.softcap, window=see.window, impl=_kernel(see, kv, ids), **how,
    )  # fmt: skip
    return out.reshape(b, h, t, -1), lse.reshape(b, h, t)


def _attend(q, k, v, q_pos, k_pos, bias, see: Sight) -> tuple[Array, Array]:
    rest: dict[str, Any] = dict(window=see.window, softcap=see.softcap, scale=see.scale, impl=see.impl)
    return attention(q, k, v, q_pos=q_pos, k_pos=k_pos, bias=bias, **rest)


def attend_scores(
    q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
) -> tuple[Array, Float[Array, "b h t"], Float[Array, "b h t s"]]:
    """`attend_all` for a few queries, with the logits f32 that it made: keys are read once. -inf where a query does not see a slot.

    Stores t x s logits; for long t use attention and its evidence.
    """
    check(q, kv.k, pos, kv.pos, v=kv.v, bias=kv.bias, softcap=see.softcap)
    (b, h, t, d), (g, s), window = q.shape, kv.pos.shape[1:], as_window(see.window)
    logit = jnp.einsum("bgqtd,bgsd->bgqts", q.reshape(b, g, h // g, t, d), kv.k, preferred_element_type=jnp.float32)
    logit = logit * (d**-0.5 if see.scale is None else float(see.scale))
    if see.softcap is not None:
        logit = float(see.softcap) * jnp.tanh(logit / float(see.softcap))
    at, of = pos[:, None, None, :, None], kv.pos[:, :, None, None]
    seen = (at >= 0) & (of >= 0) & (of <= at)
    if window is not None:
        seen &= at - of < window
    logit = jnp.where(seen, bounded(logit + kv.bias[:, :, None, None]), -jnp.inf)
    top = jnp.max(logit, -1, keepdims=True)
    top = jnp.where(top > -jnp.inf, top, 0)
    mass = jnp.exp(logit - top)
    total = jnp.sum(mass, -1, keepdims=True)
    some = total > 0
    out = jnp.einsum("bgqts,bgsd->bgqtd", mass.astype(kv.v.dtype), kv.v, preferred_element_type=jnp.float32)
    out = (out / jnp.where(some, total, 1)).astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
    return out.reshape(b, h, t, -1), lse.reshape(b, h, t), logit.reshape(b, h, t, s)
