"""Gated retention: causal linear attention whose memory fades, over whole sequences and a row at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxtok.core import check
from jaxtok.ops._chunked import bounded

CHUNK = 64
MOST = 1e36  # of what a state holds and what is read from it: sums of these stay finite


def retention(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n c"],
    fade: Float32[Array, "b g n"],
    *,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Float32[Array, "b h n c"]:
    """Retention of whole sequences, float32.

        S_i = exp(fade_i) S_(i-1) + k_i v_i^T,   out_i = scale q_i S_i = scale sum_(j <= i) exp(fade_(j+1) + ... + fade_i) (q_i . k_j) v_j

    S [d c] is one a KV head, 0 at the start, read by all query heads of the head's group. fade <= 0 is the logarithm of what stays of the
    state from one row to the next; scale None = d**-0.5. Inside a chunk the sum is taken pair by pair, earlier chunks are read from S:
    O(n (chunk + d) (d + c)), no exponent is ever positive, one chunk exists at a time in the backward pass too. fade = 0 is linear
    attention without a normaliser. What overflows is cut at 1e36.

    Raises ValueError where shapes are wrong.

    Source: arXiv:2405.05254 (YOCO), gated retention, its parallel, chunkwise and recurrent forms; without gates arXiv:2307.08621 (RetNet).
    """
    check.count("chunk", chunk)
    _fit(q, k, v, fade)
    (b, h, n, d), g, c = q.shape, k.shape[1], v.shape[3]
    if not n or not q.size or not v.size:
        return jnp.zeros((b, h, n, c), jnp.float32)
    chunk = min(chunk, n)
    times = d**-0.5 if scale is None else scale

    def cut(x):  # [b e n ...] -> [chunks b e chunk ...]; rows added at the end are read by nobody
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -n % chunk), *((0, 0) for _ in x.shape[3:])))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]

    def one(state, part):
        q, k, v, fade = part
        q = q.reshape(b, g, h // g, chunk, d)
        total = jnp.cumsum(fade, -1)
        stay = jnp.exp(jnp.where(causal, total[..., None] - total[..., None, :], -jnp.inf))
        y = bounded(jnp.einsum("bgrtd,bgsd->bgrts", q, k, preferred_element_type=jnp.float32) * times, MOST) * stay[:, :, None]
        out = jnp.einsum("bgrts,bgsc->bgrtc", _as(y, v), v, preferred_element_type=jnp.float32)
        old = jnp.einsum("bgrtd,bgdc->bgrtc", q.astype(jnp.float32) * times, state) * jnp.exp(total)[:, :, None, :, None]
        state = bounded(jnp.exp(total[..., -1])[..., None, None] * state + retained(k, v, fade), MOST)
        return state, bounded(out + old, MOST).reshape(b, h, chunk, c)

    _, out = jax.lax.scan(jax.checkpoint(one), jnp.zeros((b, g, d, c), jnp.float32), tuple(cut(x) for x in (q, k, v, fade)))
    return jnp.moveaxis(out, 0, 2).reshape(b, h, -1, c)[:, :, :n]


def retained(k: Float[Array, "b g n d"], v: Float[Array, "b g n c"], fade: Float32[Array, "b g n"]) -> Float32[Array, "b g d c"]:
    """The state behind the last row; 0 behind none. A row with k = 0 and fade = 0 leaves it as it is."""
    _fit(k, k, v, fade)
    if not k.shape[2]:
        return jnp.zeros((*k.shape[:2], k.shape[3], v.shape[3]), jnp.float32)
    total = jnp.cumsum(fade, -1)
    left = jnp.exp(total[..., -1:] - total)
    return bounded(jnp.einsum("bgnd,bgnc->bgdc", k.astype(jnp.float32) * left[..., None], v.astype(jnp.float32)), MOST)


def retain(
    state: Float32[Array, "b g d c"],
    q: Float[Array, "b h 1 d"],
    k: Float[Array, "b g 1 d"],
    v: Float[Array, "b g 1 c"],
    fade: Float32[Array, "b g 1"],
    *,
    scale: float | None = None,
) -> tuple[Float32[Array, "b h 1 c"], Float32[Array, "b g d c"]]:
    """One more row: what it reads, and the state behind it."""
    _fit(q, k, v, fade)
    (b, h, n, d), g, c = q.shape, k.shape[1], v.shape[3]
    if n != 1 or state.shape != (b, g, d, c):
        raise ValueError(f"state is {list(state.shape)}, q {list(q.shape)}; one row a sequence and a state of {[b, g, d, c]} go together")
    state = bounded(jnp.exp(fade)[..., None] * state + jnp.einsum("bgnd,bgnc->bgdc", k.astype(jnp.float32), v.astype(jnp.float32)), MOST)
    times = d**-0.5 if scale is None else scale
    out = jnp.einsum("bgrd,bgdc->bgrc", q.reshape(b, g, h // g, d).astype(jnp.float32) * times, state)
    return bounded(out, MOST).reshape(b, h, 1, c), state


def _fit(q: Array, k: Array, v: Array, fade: Array) -> None:
    shapes = [list(x.shape) for x in (q, k, v, fade)]
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q, k, v, fade are {shapes}; they must be [b h n d], [b g n d], [b g n c], [b g n], h a multiple of g")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or v.shape[:3] != k.shape[:3] or fade.shape != k.shape[:3]:
        raise ValueError(f"q, k, v, fade are {shapes}; they must be [b h n d], [b g n d], [b g n c], [b g n]")
    if fade.dtype != jnp.float32 or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError(f"q, k, v, fade are {[str(x.dtype) for x in (q, k, v, fade)]}; they must be floats, fade float32")


def _as(y: Array, like: Array) -> Array:
    """y in the dtype that it meets, inside its range."""
    most = float(jnp.finfo(like.dtype).max)
    return y if like.dtype == y.dtype else jnp.clip(y, -most, most).astype(like.dtype)
