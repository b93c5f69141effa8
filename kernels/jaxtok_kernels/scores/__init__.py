"""Cheap scores of pages, blocks and chunks of keys, from which what is read is chosen."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxtok_kernels.scores import reference, tpu

IMPLS = ("pallas_tpu", "interpret", "pallas_gpu", "interpret_gpu")
GROUPS = ("max", "mean", "sum")


def page_bounds(
    q: Float[Array, "b h d"], low: Float[Array, "b g p d"], high: Float[Array, "b g p d"], *, group: str = "max", impl: str
) -> Float[Array, "b g p"]:
    """The largest q.k that a page can hold, f32: sum over channels c of max(q_c low_pc, q_c high_pc), which is
    max(q, 0) . high_p + min(q, 0) . low_p; then the max, mean or sum (`group`) over the h/g query heads of a KV head (head i reads i // (h/g)).

    low = high = the key gives q.k. Made and reduced in one pass: bytes: low, high, q once, 4 a page and KV head; the bounds of the
    single query heads never reach memory. On GPUs q, low and high are of one 16-bit type and
    d is a multiple of 16 up to 256 (NotImplementedError).
    ValueError: shapes that do not fit, an unknown group or impl.
    """
    _known(impl)
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    (b, h, d), (g, p) = q.shape, low.shape[1:3]
    if low.shape != high.shape or low.shape[::3] != (b, d) or not g or h % g:
        raise ValueError(
            f"q, low, high are {[list(x.shape) for x in (q, low, high)]}; they must be [b h d], [b g p d] twice, h a multiple of g"
        )
    if not q.size or not p:
        return jnp.zeros((b, g, p), jnp.float32)
    return _platform(impl).page_bounds(q, low, high, group=group, interpret=impl.startswith("interpret"))


def chunk_means(
    x: Float[Array, "b h n d"], live: Bool[Array, "b h n"], *, chunk: int, bounds: bool = False, impl: str
) -> Float[Array, "b h p d"] | tuple[Array, Array, Array]:
    """The mean f32 of the live rows of each of the ceil(n / chunk) chunks; zeros where none is live.

    bounds: also the smallest and the largest live row, channel by channel, in x's dtype (zeros where none is live), from the same one
    read of x: (mean, low, high), for chunks of 256 rows at most and not on GPUs (NotImplementedError).

    Bytes: x once, 4 a row for `live`, the outputs. On GPUs x is of a 16-bit type and d a multiple of 16 up to 256 (NotImplementedError). ValueError: shapes that do not fit, chunk < 1.
    """
    _known(impl)
    b, h, n, d = x.shape
    if live.shape != (b, h, n):
        raise ValueError(f"live must be [{b} {h} {n}], got {list(live.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not x.size:
        zero = jnp.zeros((b, h, -(-n // chunk), d), jnp.float32)
        return (zero, zero.astype(x.dtype), zero.astype(x.dtype)) if bounds else zero
    if bounds and (chunk > 256 or impl.endswith("gpu")):
        raise NotImplementedError(f"bounds of chunks of {chunk} rows with impl={impl!r}; the TPU kernel has them for 256 at most")
    return _platform(impl).chunk_means(x, live, chunk=chunk, bounds=bounds, interpret=impl.startswith("interpret"))


def low_bit(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    q_pos: Int[Array, "b t"],
    k_pos: Int[Array, "b g s"],
    lse: Float[Array, "b h t"] | None = None,
    *,
    block_q: int = 64,
    block_k: int = 32,
    tile: int = 16,
    bits: int = 4,
    scale: float,
    impl: str,
) -> Float[Array, "b h x y"]:
    """SALE's estimate of how much each block of queries attends to each block of keys, f32, x = ceil(t / block_q), y = ceil(s / block_k).

        k' = k - mean of the live keys, q' = q - mean of the live queries (of a head)
        code = round(x' / step) in -(2^(bits-1) - 1) ..., step = largest |x'| / (2^(bits-1) - 1), one a `tile` of queries and a block of keys
        logit_ij = scale (dq_i dk_j (q code_i . k code_j) + mean q . k'_j + q_i . mean k)
        out_xy = max over the pairs of the block with 0 <= k_pos_j <= q_pos_i of  logit_ij - lse_i;   -inf where there is none

    With the logsumexp of attention to the keys read in any case (sinks and a local window), out is the log of the largest relative
    attention score r = exp(logit - m) / Z of the block: SALE keeps it if out > log(tau). None: lse = 0, the largest logit. A row that
    saw nothing (lse = -inf) makes its blocks 1e30. |error of logit| <= scale (|q'|_1 dk + |k'|_1 dq) / 2 + scale d dq dk / 4.

    Codes are stored in int8 whatever `bits` (2 to 8) and multiplied exactly. Quantising is a pass of its own, since a key is read once
    for each 8 blocks of queries: bytes: q, k in and their codes out; then per 8 blocks of queries d + 8 a key, and 4 (h/g) for its mean-query term.
    Positions are below 2^24. ValueError: shapes that do not fit, sizes < 1.
    """
    _known(impl)
    (b, h, t, d), (g, s) = q.shape, k_pos.shape[1:]
    if not g or h % g or k.shape != (b, g, s, d) or q_pos.shape != (b, t) or (lse is not None and lse.shape != (b, h, t)):
        shapes = [None if x is None else list(x.shape) for x in (q, k, q_pos, k_pos, lse)]
        raise ValueError(
            f"q, k, q_pos, k_pos, lse are {shapes}; they must be [b h t d], [b g s d], [b t], [b g s], [b h t], h a multiple of g"
        )
    for name, size, least, most in (
        ("block_q", block_q, 1, 2**16),
        ("block_k", block_k, 1, 512),
        ("tile", tile, 1, 2**16),
        ("bits", bits, 2, 8),
    ):
        if not least <= size <= most:
            raise ValueError(f"{name} must be in {least} to {most}, got {size}")
    if not q.size or not s:
        return jnp.full((b, h, -(-t // block_q), -(-s // block_k)), -jnp.inf, jnp.float32)
    code = reference.quantised(q, k, q_pos, k_pos, block_k=block_k, tile=tile, bits=bits)
    row = -scale * code.kq if lse is None else jnp.maximum(lse, -reference.HUGE) - scale * code.kq
    code = code._replace(dq=scale * code.dq, qk=scale * code.qk, kq=row)
    out = _platform(impl).low_bit(code, q_pos, k_pos, block_q=block_q, block_k=block_k, interpret=impl.startswith("interpret"))
    return jnp.where(out > -2 * reference.HUGE, out, -jnp.inf)


def _known(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")


def _platform(impl: str):
    if not impl.endswith("gpu"):
        return tpu
    from jaxtok_kernels.scores import gpu

    return gpu
