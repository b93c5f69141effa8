"""Attention of a few queries to listed blocks of a long cache, or to all of it; what is not listed is neither fetched nor computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok_kernels.read import full, tpu

IMPLS = ("pallas_tpu", "interpret", "pallas_gpu", "interpret_gpu")


def read(
    q: Float[Array, "b e r d"],
    q_pos: Int[Array, "b r"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    k_pos: Int[Array, "b g s"],
    bias: Float[Array, "b g s"],
    index: Int[Array, "b e m"] | None,
    ids: Int[Array, "b e n"] | None = None,
    freqs: Float[Array, " f"] | None = None,
    *,
    block: int = 1,
    stride: int | None = None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    split: int | None = None,
    count: bool = False,
    impl: str,
) -> tuple[Array, ...]:
    """Attention to the slots of the listed blocks: out [b e r c] in q's dtype and its logsumexp f32 [b e r].

    List j of e reads KV head j // (e/g): blocks of `block` slots, each listed once, in any order; -1 = unused. Block i begins at slot
    i * stride (None = block) and must lie inside the cache. Row i of a list's r query
    rows stands at q_pos[:, i] (-1 = dead) and sees the slots of its blocks with 0 <= k_pos <= q_pos and, with a window,
    q_pos - k_pos < window; logit = softcap(scale q.k) + bias. A row that sees nothing gets 0 and -inf.

    index=None: every slot is read, without a table, once for all e/g lists of a KV head; `block` and `stride` mean nothing then, and s may
    be any number.

    ids: rotary ids of the n = m * block listed slots, for keys that are stored unrotated (q is rotated): channels c and c + f of a key
    turn by id * freqs[c]. None = keys are used as they are. Not on GPUs.

    split: parts of a list that are read side by side (by the cores of a TPU, by blocks of threads of a GPU), each with a softmax of its
    own; they are merged by their logsumexps. None: as many as keep the chip busy and what waits in fast memory small, 1 for short lists.

    count: one more output, i32 [b e 2] counted inside the kernel: tiles of keys that were attended to, and blocks of keys that were
    fetched, the listed ones exactly (index=None: tiles; the lists of a KV head share them, and the first of them has the count).

    impl: "pallas_tpu", or "interpret", which runs that kernel in the Pallas interpreter on any machine; "pallas_gpu" (Hopper; q, k and v
    of one 16-bit type, d and c multiples of 16, of 64 where blocks or strides are no multiple of eight, 384 in all at most, else
    NotImplementedError) or "interpret_gpu" (jax >= 0.11.2). No gradients: a read-time kernel.

    Bytes: listed blocks of k, v, 8 a listed slot for positions and biases, q, out; with parts, 4 (c + 1) a row and part, there and back.
    ValueError: shapes that do not fit.
    """
    (b, g, s), e, r = k_pos.shape, q.shape[1], q.shape[2]
    if not g or e % g or q.shape[0] != b or q_pos.shape != (b, r) or bias.shape != k_pos.shape:
        shapes = [list(x.shape) for x in (q, q_pos, k, v, k_pos, bias)]
        raise ValueError(f"q, q_pos, k, v, k_pos, bias are {shapes}; e must be a multiple of g, and batch, rows and slots agree")
    if index is None and (ids is not None or freqs is not None):
        raise ValueError("ids are those of listed slots; list the blocks, or turn the keys of the cache")
    if index is not None and index.shape[:2] != (b, e):
        raise ValueError(f"index must be [{b} {e} m], got {list(index.shape)}")
    m = 1 if index is None else index.shape[2]
    if (ids is None) != (freqs is None) or (ids is not None and ids.shape != (b, e, m * block)):
        raise ValueError(f"ids must be [{b} {e} {m * block}] and come with freqs, got {None if ids is None else list(ids.shape)}")
    stride = block if stride is None else stride
    if index is not None and (block < 1 or stride < 1 or s < block or (s - block) % stride):
        raise ValueError(f"a cache of {s} slots does not end with a block of {block} at a multiple of {stride}")
    if split is not None and split < 1:
        raise ValueError(f"split must be at least 1, got {split}")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    if not m or not q.size or not s:
        nothing = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return (*nothing, jnp.zeros((b, e, 2), jnp.int32)) if count else nothing
    rest: dict[str, Any] = dict(scale=scale, softcap=softcap, window=window, split=split, count=count)
    if impl.endswith("gpu"):
        from jaxtok_kernels.read import gpu

        found = gpu.read(q, q_pos, k, v, k_pos, bias, index, ids, block=block, stride=stride, **rest, interpret=impl == "interpret_gpu")
    elif index is None:
        found = _all(q, q_pos, k, v, k_pos, bias, **rest, interpret=impl == "interpret")
    else:
        found = tpu.read(q, q_pos, k, v, k_pos, bias, index, ids, freqs, block=block, stride=stride, **rest, interpret=impl == "interpret")
    out, lse, counted = found
    out, lse = merged(out, lse) if out.shape[2] > 1 else (out[:, :, 0], lse[:, :, 0])
    return (out.astype(q.dtype), lse) if counted is None else (out.astype(q.dtype), lse, jnp.sum(counted, 2))


def merged(out: Float[Array, "b e p r c"], lse: Float[Array, "b e p r"]) -> tuple[Float[Array, "b e r c"], Float[Array, "b e r"]]:
    """Attention to all parts from attention to each of p parts."""
    top = jnp.max(lse, 2, keepdims=True)
    safe = jnp.where(top > -jnp.inf, top, 0.0)
    mass = jnp.exp(lse - safe)
    total = jnp.sum(mass, 2)
    norm = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(out.astype(jnp.float32) * (mass / norm[:, :, None])[..., None], 2)
    return out, jnp.where(total > 0, safe[:, :, 0] + jnp.log(norm), -jnp.inf)


def _all(q, q_pos, k, v, k_pos, bias, **options) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Every slot: the lists of a KV head are rows of one."""
    (b, e, r, d), g = q.shape, k.shape[1]
    out, lse, counted = full.read(q.reshape(b, g, e // g * r, d), jnp.tile(q_pos, (1, e // g)), k, v, k_pos, bias, **options)
    apart = lambda x: jnp.moveaxis(x.reshape(b, g, -1, e // g, r, *x.shape[4:]), 3, 2).reshape(b, e, -1, r, *x.shape[4:])
    if counted is not None:
        rest = ((0, 0), (0, 0), (0, e // g - 1), (0, 0), (0, 0))
        counted = jnp.pad(counted[:, :, None], rest).reshape(b, e, -1, 2)
    return apart(out), apart(lse), counted
