"""What flash and column_sum share: their arguments in blocks, which blocks can hold a visible pair, the logits of one block."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FAR = np.iinfo(np.int32).max  # stands for the position of a dead key: later than any query
IMPLS = ("pallas_tpu", "pallas_gpu", "interpret", "interpret_gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of a call; block_q, block_k None = chosen by the kernel. `interpret`: run in that platform's interpreter."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    diagonal: int | None
    block_q: int | None
    block_k: int | None
    count: bool = False
    interpret: Any = False


class Given(NamedTuple):
    """The arrays of a call that have no gradient. e = 1 or g: one set of positions and segments for all KV heads, or one for each."""

    q_pos: jax.Array  # i32 [b t]
    far: jax.Array  # i32 [b e s], FAR at dead keys
    q_segment: jax.Array | None  # i32 [b t]
    k_segment: jax.Array | None  # i32 [b e s]


def check(q, k, q_pos, k_pos, *, v=None, lse=None, bias=None, q_segment=None, k_segment=None) -> None:
    """Raises ValueError where the arrays of a call do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.ndim != 4 or x.dtype != q.dtype or x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16)):
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}, q is {q.dtype}; all must be [b heads tokens d] in one of float32, bfloat16, float16"
            )
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    if k.shape != (b, g, s, d):
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; batch and head dim must agree: k must be [{b} g s {d}]")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k is {list(k.shape)} and v is {list(v.shape)}; all but the last axis must be the same")
    if not g or h % g:
        raise ValueError(f"{h} query heads are no multiple of {g} KV heads; head i reads KV head i // (h/g)")
    if (q_segment is None) != (k_segment is None):
        raise ValueError("segments of queries and keys come together: give both or neither")
    rows, keys = [(b, t)], [(b, s), (b, g, s)]
    for name, x, shapes in (("q_pos", q_pos, rows), ("k_pos", k_pos, keys), ("q_segment", q_segment, rows), ("k_segment", k_segment, keys)):
        if x is not None and (x.dtype != jnp.int32 or x.shape not in shapes):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be int32 " + " or ".join(str(list(p)) for p in shapes))
    for name, x, shape in (("bias", bias, (b, g, s)), ("lse", lse, (b, h, t))):
        if x is not None and (x.dtype != jnp.float32 or x.shape != shape):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be float32 {list(shape)}")


def make_spec(q, impl: str, *, causal, window, softcap, scale, diagonal, block_q, block_k, count=False) -> Spec:
    """The static settings, checked."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    for name, x in (("window", window), ("block_q", block_q), ("block_k", block_k)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 1):
            raise ValueError(f"{name} is {x!r}; it must be a static int of at least 1, or None")
    for name, x in (("block_q", block_q), ("block_k", block_k)):
        if x is not None and x % 16:
            raise ValueError(f"{name} is {x}; a block is a multiple of 16 rows")
    if softcap is not None and not 0 < softcap < np.inf:
        raise ValueError(f"softcap is {softcap}; it must be positive and finite, or None for no soft-cap")
    if diagonal is not None and (not isinstance(diagonal, int) or abs(diagonal) > FAR):
        raise ValueError(f"diagonal is {diagonal!r}; it must be a static int (the number of key rows before query row 0) or None")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite, or None for d ** -0.5")
    return Spec(
        causal=causal,
        window=None if window is None else min(window, FAR),
        softcap=None if softcap is None else float(softcap),
        scale=scale,
        diagonal=diagonal,
        block_q=block_q,
        block_k=block_k,
        count=count,
        interpret=interpreter(impl),
    )


def interpreter(impl: str) -> Any:
    """What `interpret` of a kernel call takes for this impl."""
    if impl != "interpret_gpu":
        return impl == "interpret"
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = getattr(plgpu, "InterpretGPUParams", None)
    if params is None:
        raise NotImplementedError(
            "impl='interpret_gpu': this JAX has no public GPU interpreter; jax >= 0.11.2 has, or use impl='interpret'"
        )
    return params()


def given(q_pos, k_pos, q_segment, k_segment) -> Given:
    """Positions and segments in one form."""
    k_pos = k_pos[:, None] if k_pos.ndim == 2 else k_pos
    if k_segment is not None:
        k_segment = k_segment[:, None] if k_segment.ndim == 2 else k_segment
        e = max(k_pos.shape[1], k_segment.shape[1])
        k_pos, k_segment = (jnp.broadcast_to(x, (x.shape[0], e, x.shape[2])) for x in (k_pos, k_segment))
    return Given(q_pos, jnp.where(k_pos >= 0, k_pos, FAR), q_segment, k_segment)


def round_up(n: int, size: int) -> int:
    return -(-n // size) * size


def divide(n: int, most: int, size: int) -> int:
    """Rows of the fewest equal parts of n, none larger than `most`, as a multiple of `size`."""
    return round_up(-(-n // -(-n // most)), size)


def pad(x: jax.Array, size: int, axis: int, value=0) -> jax.Array:
    """Pads `axis` at its end to a multiple of `size`."""
    extra = -x.shape[axis] % size
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths, constant_values=value) if extra else x


def group(x: jax.Array, g: int, block: int, value=0) -> jax.Array:
    """Rows of the query heads by KV head, padded to whole blocks: [b h t ...] -> [b g h/g T ...]."""
    return pad(x.reshape(x.shape[0], g, x.shape[1] // g, *x.shape[2:]), block, 3, value)


def lanes(x: jax.Array, g: int, block: int, value=0) -> jax.Array:
    """A number a query, in the order of a block's folded rows: [b h t] -> [b g T/block h/g * block]."""
    x = group(x, g, block, value)
    b, _, r, n = x.shape
    return x.reshape(b, g, r, n // block, block).swapaxes(2, 3).reshape(b, g, n // block, r * block)


class Ids(NamedTuple):
    """Positions (and segments) of rows and keys by block: i32 [b nq n r*block_q] and [b e nk n block_k], n = 1 or 2."""

    q: jax.Array
    k: jax.Array


def ids(x: Given, r: int, block_q: int, block_k: int) -> Ids:
    """Padding is dead."""
    rows = [lanes(jnp.repeat(y[:, None], r, 1), 1, block_q, -1)[:, 0] for y in (x.q_pos, x.q_segment) if y is not None]
    keys = [pad(y, block_k, 2, FAR).reshape(*y.shape[:2], -1, block_k) for y in (x.far, x.k_segment) if y is not None]
    return Ids(jnp.stack(rows, 2), jnp.stack(keys, 3))


def boxes(at: Ids) -> tuple[jax.Array, jax.Array]:
    """The range of live positions (and of segments) of each block of rows and of keys: i32 [b nq 4] and [b e nk 4]; nothing live: empty ranges."""

    def box(x, live):
        x = jnp.concatenate([x, jnp.zeros_like(x)], -2) if x.shape[-2] == 1 else x
        least = jnp.where(live, x, FAR).min(-1)
        most = jnp.where(live, x, -1 - FAR).max(-1)
        return jnp.stack([least[..., 0], most[..., 0], least[..., 1], most[..., 1]], -1)

    return box(at.q, at.q[..., :1, :] >= 0), box(at.k, at.k[..., :1, :] < FAR)


def meets(spec: Spec, q, k, i, j, block_q: int, block_k: int):
    """Whether block (i, j) may hold a visible pair, from the four bounds of its rows and of its keys: scalars or arrays.

    The ranges of a block's live positions bound their differences, so a block that fails has no visible pair.
    """
    need = (q[0] <= q[1]) & (k[0] <= k[1]) & (q[2] <= k[3]) & (k[2] <= q[3])
    if spec.causal:
        need &= k[0] <= q[1]
    if spec.window is not None:
        need &= jnp.maximum(q[0], 0) - jnp.clip(k[1], 0, FAR) < spec.window
    if spec.diagonal is not None:
        need &= j * block_k <= (i + 1) * block_q - 1 + spec.diagonal
    return need


def ranges(spec: Spec, at: Ids, r: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """need [b e nq nk], and the first and last needed key block of each block of rows, i32 [2 b e nq] ((0, -1) = none)."""
    q, k = boxes(at)
    nq, nk = q.shape[1], k.shape[2]
    i, j = jnp.arange(nq, dtype=jnp.int32)[None, None, :, None], jnp.arange(nk, dtype=jnp.int32)[None, None, None]
    over = lambda x, axes: tuple(jnp.expand_dims(x[..., n], axes) for n in range(4))
    need = meets(spec, over(q, (1, 3)), over(k, 2), i, j, at.q.shape[3] // r, at.k.shape[4])
    return need, extent(need, 3), extent(need, 2)


def extent(need: jax.Array, axis: int) -> jax.Array:
    """First and last true index along an axis, i32 [2 ...]; (0, -1) where there is none."""
    n = need.shape[axis]
    first = jnp.argmax(need, axis).astype(jnp.int32)
    last = n - 1 - jnp.argmax(jnp.flip(need, axis), axis).astype(jnp.int32)
    return jnp.where(need.any(axis)[None], jnp.stack([first, last]), jnp.array([0, -1], jnp.int32).reshape(2, *[1] * (need.ndim - 1)))


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Product of two matrices, summed in float32; float32 ones at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def seen(spec: Spec, q_at: jax.Array, k_at: jax.Array, q_segment=None, k_segment=None) -> jax.Array:
    """Which pairs are visible; arrays that broadcast, one along the rows of the tile and one along its columns, either way round."""
    # A dead query is below 0 and a dead key at FAR: the causal comparison alone excludes both.
    see = k_at <= q_at if spec.causal else (q_at >= 0) & (k_at < FAR)
    see = see if spec.window is None else see & (q_at - k_at < spec.window)
    return see if q_segment is None or k_segment is None else see & (q_segment == k_segment)


def capped(spec: Spec, y: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Products as logits without bias, and the soft-cap's slope (None without one)."""
    y = y * spec.scale
    if spec.softcap is None:
        return y, None
    unit = jnp.tanh(y / spec.softcap)
    return spec.softcap * unit, 1 - unit * unit


def cotangents_of_logits(out, lse, dout, dlse) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a backward pass takes for each row: dout, a finite lse, and shift, so that d logit = p (dout . v - shift)."""
    live = lse > -jnp.inf
    # A row that sees nothing is a constant: its cotangents, which may be NaN (log 0, 0/0 in the caller), stop here.
    dout = jnp.where(live[..., None], dout, 0)
    shift = jnp.where(live, jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse, 0)
    return dout, jnp.where(live, lse, 0), shift
