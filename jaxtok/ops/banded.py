"""Attention to the keys just before each query, at a cost linear in the length."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxtok.core import check
from jaxtok.ops._shared import Impl
from jaxtok.ops.attention import attention

CHUNK = 128


def banded(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n c"],
    first: np.ndarray,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
    impl: Impl = "auto",
) -> tuple[Float32[Array, "b h n c"], Float32[Array, "b h n"]]:
    """Attention of row i to the rows first[i] to i, and the logsumexp of its logits, both float32.

    Rows stand in order and all of them count: give those that are dead last, where no live row sees them. `first` is static (numpy, int
    [n], 0 <= first[i] <= i). A chunk of queries meets chunk + reach - 1 keys, reach = max(i - first[i]) + 1, so FLOPs and bytes are
    O(n (chunk + reach)); one chunk's logits exist at a time, in the backward pass too. Rows that see all before them, if they are several
    chunks, are `ops.attention`'s (by `impl`), which leaves out the future; with first = 0 that is all.

    Raises ValueError where shapes or `first` are wrong.
    """
    check.count("chunk", chunk)
    if q.ndim != 4 or k.ndim != 4 or v.shape[:3] != k.shape[:3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k, v are {[list(x.shape) for x in (q, k, v)]}; they must be [b h n d], [b g n d], [b g n c], h a multiple of g"
        )
    (b, h, n, d), g = q.shape, k.shape[1]
    first = np.asarray(first)
    row = np.arange(n)
    if k.shape != (b, g, n, d) or first.shape != (n,) or (first < 0).any() or (first > row).any():
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}, first {list(first.shape)}: one a row, from 0 to the row itself")
    if not n or not q.size or not v.size:
        return jnp.zeros((b, h, n, v.shape[-1]), jnp.float32), jnp.full((b, h, n), -jnp.inf, jnp.float32)
    whole = int(np.argmax(first > 0)) if first.any() else n
    head = []
    if whole >= 2 * chunk:
        pos = jnp.broadcast_to(jnp.arange(whole, dtype=jnp.int32)[None], (b, whole))
        see = dict(q_pos=pos, k_pos=pos, diagonal=0, softcap=softcap, scale=scale, impl=impl)
        head = [attention(*(x[:, :, :whole] for x in (q, k, v)), out_dtype=jnp.float32, **see)]
        if whole == n:
            return head[0]
    done = whole if head else 0
    chunk = min(chunk, n - done)
    reach = int((row - first)[done:].max()) + 1
    rest, front, size = -(n - done) % chunk, reach - 1, chunk + reach - 1
    # padded rows see themselves alone, so that nothing is empty
    begin = jnp.asarray(np.concatenate([first[done:], np.arange(n, n + rest)]).astype(np.int32).reshape(-1, chunk))
    padded = lambda x, before: jnp.pad(x, ((0, 0), (0, 0), (before, rest), (0, 0)))
    keys, values = padded(k, front), padded(v, front)
    queries = jnp.moveaxis(padded(q[:, :, done:], 0).reshape(b, g, h // g, -1, chunk, d), 3, 0)
    times = d**-0.5 if scale is None else scale

    def one(part):
        i, q, begin = part
        row = done + i * chunk
        kj, vj = (jax.lax.dynamic_slice_in_dim(x, row, size, 2) for x in (keys, values))
        y = jnp.einsum("bgrtd,bgsd->bgrts", q, kj, preferred_element_type=jnp.float32) * times
        y = y if softcap is None else softcap * jnp.tanh(y / softcap)
        at = row - front + jnp.arange(size, dtype=jnp.int32)
        query = row + jnp.arange(chunk, dtype=jnp.int32)
        see = (at[None] >= begin[:, None]) & (at[None] <= query[:, None])
        limit = jnp.finfo(jnp.float32).max  # products of finite numbers may overflow
        y = jnp.where(see[None, None, None], jnp.clip(jnp.nan_to_num(y, nan=-limit), -limit, limit), -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(y, -1))
        weight = jnp.exp(y - top[..., None])
        total = jnp.sum(weight, -1)
        out = jnp.einsum("bgrts,bgsc->bgrtc", weight.astype(vj.dtype), vj, preferred_element_type=jnp.float32)
        return out / total[..., None], top + jnp.log(total)

    out, lse = jax.lax.map(jax.checkpoint(one), (jnp.arange(begin.shape[0], dtype=jnp.int32), queries, begin))
    join = lambda x: jnp.moveaxis(x, 0, 3).reshape(b, h, begin.size, *x.shape[5:])[:, :, : n - done]
    parts = [*head, (join(out), join(lse))]
    return jnp.concatenate([x for x, _ in parts], 2), jnp.concatenate([x for _, x in parts], 2)
