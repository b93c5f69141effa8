"""Scores of pages, blocks and chunks, written plainly in float32; and the quantisation that the kernels share."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Int8

HUGE = 1e30  # stands for infinity in estimates
EXACT = "highest"


def page_bounds(q: Float[Array, "b h d"], low: Float[Array, "b g p d"], high: Float[Array, "b g p d"], *, group: str = "max"):
    """See `jaxtok_kernels.scores.page_bounds`."""
    (b, h, d), g = q.shape, low.shape[1]
    query = q.astype(jnp.float32).reshape(b, g, h // g, 1, d)
    larger = jnp.maximum(query * low.astype(jnp.float32)[:, :, None], query * high.astype(jnp.float32)[:, :, None])
    return {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}[group](jnp.sum(larger, -1), axis=2)


def chunk_means(x: Float[Array, "b h n d"], live: Bool[Array, "b h n"], *, chunk: int, bounds: bool = False):
    """See `jaxtok_kernels.scores.chunk_means`."""
    b, h, n, d = x.shape
    last = -n % chunk
    x = jnp.pad(x, ((0, 0), (0, 0), (0, last), (0, 0))).reshape(b, h, -1, chunk, d)
    live = jnp.pad(live, ((0, 0), (0, 0), (0, last))).reshape(b, h, -1, chunk, 1)
    number = jnp.sum(live, -2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(live, x.astype(jnp.float32), 0.0), -2) / jnp.maximum(number, 1.0)
    if not bounds:
        return mean
    some, big = number > 0, jnp.finfo(x.dtype).max
    low, high = jnp.min(jnp.where(live, x, big), -2), jnp.max(jnp.where(live, x, -big), -2)
    return mean, jnp.where(some, low, 0), jnp.where(some, high, 0)


class Codes(NamedTuple):
    """Queries and keys in few bits: q.k is about dq dk (q code . k code) + qk + kq."""

    q: Int8[Array, "b h t d"]
    k: Int8[Array, "b g s d"]
    dq: Float[Array, "b h t"]
    dk: Float[Array, "b g s"]
    qk: Float[Array, "b h s"]  # the mean query times what each key has beyond the mean key
    kq: Float[Array, "b h t"]  # each query times the mean key


def _coded(x, size: int, levels: int):
    """Codes int8 of the rows x [b h n d] and the step of each row: groups of `size` rows share the largest absolute value / levels."""
    b, h, n, d = x.shape
    groups = jnp.pad(x, ((0, 0), (0, 0), (0, -n % size), (0, 0))).reshape(b, h, -1, size * d)
    step = jnp.max(jnp.abs(groups), -1) / levels
    step = jnp.repeat(step, size, -1)[..., :n]
    code = jnp.round(x / jnp.where(step > 0, step, 1.0)[..., None])
    return jnp.clip(code, -levels, levels).astype(jnp.int8), step


def quantised(q: Float[Array, "b h t d"], k: Float[Array, "b g s d"], q_pos, k_pos, *, block_k: int, tile: int, bits: int) -> Codes:
    """The codes of `low_bit`. Reads q and k twice, writes one byte a number and 4 a row."""
    (b, h, t, d), g = q.shape, k.shape[1]

    def centred(x, live):
        x = jnp.where(live[..., None], x.astype(jnp.float32), 0.0)
        mean = jnp.sum(x, 2, keepdims=True) / jnp.maximum(jnp.sum(live, -1), 1).astype(jnp.float32)[..., None, None]
        return jnp.where(live[..., None], x - mean, 0.0), mean

    rest_q, mean_q = centred(q, jnp.broadcast_to((q_pos >= 0)[:, None], (b, h, t)))
    rest_k, mean_k = centred(k, k_pos >= 0)
    levels = 2 ** (bits - 1) - 1
    code_q, dq = _coded(rest_q, tile, levels)
    code_k, dk = _coded(rest_k, block_k, levels)
    qk = jnp.einsum("bgqd,bgsd->bgqs", mean_q.reshape(b, g, h // g, d), rest_k, precision=EXACT).reshape(b, h, -1)
    kq = jnp.einsum("bgqtd,bgd->bgqt", (rest_q + mean_q).reshape(b, g, h // g, t, d), mean_k[:, :, 0], precision=EXACT)
    return Codes(code_q, code_k, dq, dk, qk, kq.reshape(b, h, t))


def low_bit(
    q: Float[Array, "b h t d"], k: Float[Array, "b g s d"], q_pos: Int[Array, "b t"], k_pos: Int[Array, "b g s"],
    lse: Float[Array, "b h t"] | None = None, *, block_q: int = 64, block_k: int = 32, tile: int = 16, bits: int = 4, scale: float,
):  # fmt: skip
    """See `jaxtok_kernels.scores.low_bit`."""
    (b, h, t, _), g = q.shape, k.shape[1]
    code = quantised(q, k, q_pos, k_pos, block_k=block_k, tile=tile, bits=bits)
    wide = lambda x: jnp.repeat(x, h // g, 1)
    dot = jnp.einsum("bhtd,bhsd->bhts", code.q.astype(jnp.float32), wide(code.k).astype(jnp.float32), precision=EXACT)
    logit = scale * (dot * code.dq[..., None] * wide(code.dk)[:, :, None] + code.qk[:, :, None] + code.kq[..., None])
    logit = logit if lse is None else logit - jnp.maximum(lse, -HUGE)[..., None]
    at, of = q_pos[:, None, :, None], wide(k_pos)[:, :, None]
    logit = jnp.where((of >= 0) & (of <= at), logit, -jnp.inf)
    logit = jnp.pad(logit, ((0, 0), (0, 0), (0, -t % block_q), (0, -k.shape[2] % block_k)), constant_values=-jnp.inf)
    n = logit.shape[2] // block_q
    return jnp.max(logit.reshape(b, h, n, block_q, -1, block_k), (3, 5))
