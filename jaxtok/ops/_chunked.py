"""What attention and its evidence share: which keys a query sees, the logits of one block, and the walk over blocks.

A block is `chunk` queries times `block` keys for all heads at once; the query heads of a group are folded into its rows, so K and V are
never repeated. The walk is one `lax.scan` over the list of blocks that `diagonal` leaves (a static list: causal costs about half), so
compile time does not depend on the length, and no array of size t x s exists.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A block of 512 x 512 logits was the fastest of some 20 sizes (64..1024 x 128..2048) on 2 CPU cores, 1.6 times faster than 256 x all keys: the
# block's logits stay in the caches between the two products. Fewer queries take more keys, so a decoding step is a single block.
CHUNK = 512
LOGITS = 2**18  # a head
MOST = float(np.finfo(np.float32).max)
FAR = np.iinfo(np.int32).max  # stands for the position of a dead key: later than any query


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of an attention call."""

    causal: bool
    softcap: float | None
    scale: float
    diagonal: int | None
    chunk: int
    block: int


class Operands(NamedTuple):
    """Arrays padded to whole chunks (T rows) and blocks (S rows). r = h/g. `far` is k_pos with FAR at dead keys; e = 1 or g."""

    q: jax.Array  # [b g r T d]
    k: jax.Array  # [b g S d]
    q_pos: jax.Array  # i32 [b T]
    far: jax.Array  # i32 [b e S]
    bias: jax.Array | None  # f32 [b g S]
    window: jax.Array | None  # i32 []
    q_segment: jax.Array | None = None  # i32 [b T]
    k_segment: jax.Array | None = None  # i32 [b S]


def _divide(n: int, most: int) -> int:
    """Size of the fewest equal parts of n, none larger than `most`; parts are multiples of 8 (vector lanes) when there are several."""
    if n <= most:
        return n
    parts = -(-n // most)
    return min(most, -(-n // parts // 8) * 8)


def make_spec(q, k, *, causal: bool, softcap: float | None, scale: float | None, diagonal: int | None, whole=False) -> Spec:
    """Static settings of a call and the block it works in (`whole`: one block)."""
    t, s = q.shape[2], k.shape[2]
    chunk = t if whole else _divide(t, CHUNK)
    block = s if whole else _divide(s, max(LOGITS // chunk, 8))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite, or None for d ** -0.5")
    softcap = None if softcap is None else float(softcap)
    return Spec(causal=causal, softcap=softcap, scale=scale, diagonal=diagonal, chunk=chunk, block=block)


def pad(x: jax.Array, size: int, axis: int, value=0) -> jax.Array:
    """Pads `axis` at its end to a multiple of `size`."""
    extra = -x.shape[axis] % size
    if not extra:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths, constant_values=value)


def group(x: jax.Array, g: int) -> jax.Array:
    """[b h ...] -> [b g h/g ...]"""
    return x.reshape(x.shape[0], g, x.shape[1] // g, *x.shape[2:])


def fold(x: jax.Array) -> jax.Array:
    """[b g r t ...] -> [b g r*t ...]"""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def unfold(x: jax.Array, t: int) -> jax.Array:
    """[b g r*t ...] -> [b g r t ...]"""
    return x.reshape(*x.shape[:2], -1, t, *x.shape[3:])


def prepare(spec: Spec, q, k, q_pos, k_pos, bias, window, q_segment=None, k_segment=None) -> Operands:
    """Pads and groups the arguments of a call; padding is dead."""
    k_pos = k_pos[:, None] if k_pos.ndim == 2 else k_pos
    far = jnp.where(k_pos >= 0, k_pos, FAR)
    return Operands(
        q=pad(group(q, k.shape[1]), spec.chunk, 3),
        k=pad(k, spec.block, 2),
        q_pos=pad(q_pos, spec.chunk, 1, -1),
        far=pad(far, spec.block, 2, FAR),
        bias=None if bias is None else pad(bias, spec.block, 2),
        window=window,
        q_segment=None if q_segment is None else pad(q_segment, spec.chunk, 1),
        k_segment=None if k_segment is None else pad(k_segment, spec.block, 1),
    )


def level(*arrays: jax.Array | None) -> list[Any]:
    """The arrays, each varying over every mesh axis of `shard_map` over which one of them does.

    So scan carries and cotangents, made like one operand, fit all others (keys sharded and queries not, or the reverse); the gradient
    of an operand that did not vary is summed over the mesh, as it must be.
    """
    zeros = [None if x is None else jnp.zeros_like(x, jnp.float32, shape=()) for x in arrays]
    zero = functools.reduce(operator.add, (z for z in zeros if z is not None))
    same = [z is None or jax.typeof(z) == jax.typeof(zero) for z in zeros]
    return [x if x is None or ok else x + zero.astype(x.dtype) for x, ok in zip(arrays, same, strict=True)]


def take(x: jax.Array, i, size: int, axis: int) -> jax.Array:
    """Part i of `axis`, cut in parts of `size`."""
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, i * size, size, axis)


def put(x: jax.Array, part: jax.Array, i, axis: int) -> jax.Array:
    """Writes part i of `axis`."""
    size = part.shape[axis]
    return part if x.shape[axis] == size else lax.dynamic_update_slice_in_dim(x, part, i * size, axis)


def add(x: jax.Array, part: jax.Array, i, axis: int) -> jax.Array:
    """Adds to part i of `axis`."""
    return put(x, take(x, i, part.shape[axis], axis) + part, i, axis)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product of [b g ...] matrices over the given axes, summed in float32."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def visible(spec: Spec, q_pos: jax.Array, far: jax.Array, window: jax.Array | None) -> jax.Array:
    """Which keys a query sees: bool [b e t s] from q_pos [b t] and far [b e s]."""
    i, j = q_pos[:, None, :, None], far[:, :, None, :]
    # A dead query is at -1 and a dead key at FAR: the causal comparison alone excludes both.
    seen = j <= i if spec.causal else (i >= 0) & (j < FAR)
    return seen if window is None else seen & (i - j < window)


def logits(spec: Spec, x: Operands, i, j) -> tuple[jax.Array, jax.Array | None]:
    """Block (i, j): float32 logits [b g r chunk block], -inf where not visible, and the soft-cap's slope (None without one)."""
    q, k = fold(take(x.q, i, spec.chunk, 3)), take(x.k, j, spec.block, 2)
    y = dot(q, k, 3, 3).reshape(*x.q.shape[:3], spec.chunk, spec.block) * spec.scale
    slope = None
    if spec.softcap is not None:
        unit = jnp.tanh(y / spec.softcap)
        y, slope = spec.softcap * unit, 1 - unit * unit
    if x.bias is not None:
        y += take(x.bias, j, spec.block, 2)[:, :, None, None]
    y = bounded(y)
    see = visible(spec, take(x.q_pos, i, spec.chunk, 1), take(x.far, j, spec.block, 2), x.window)
    if x.q_segment is not None and x.k_segment is not None:
        mine, theirs = take(x.q_segment, i, spec.chunk, 1), take(x.k_segment, j, spec.block, 1)
        see &= (mine[:, :, None] == theirs[:, None])[:, None]
    return jnp.where(see[:, :, None], y, -jnp.inf), slope


def probs(spec: Spec, x: Operands, lse: jax.Array, i, j) -> tuple[jax.Array, jax.Array | None]:
    """Block (i, j) of the attention matrix, float32 [b g r chunk block], from the finite lse [b g r T] (see `finite`), and the slope."""
    y, slope = logits(spec, x, i, j)
    return jnp.exp(y - take(lse, i, spec.chunk, 3)[..., None]), slope


def bounded(y: jax.Array, most: float = MOST) -> jax.Array:
    """Logits inside the finite range: products of finite numbers may overflow, and inf - inf counts as the lowest."""
    return jnp.minimum(jnp.where(y > -most, y, -most), most)


def finite(lse: jax.Array) -> jax.Array:
    """lse with 0 for -inf, so that exp(-inf - lse) is 0 in rows that see nothing."""
    return jnp.where(lse > -jnp.inf, lse, 0)


def _needed(spec: Spec, x: Operands, pairs: np.ndarray) -> jax.Array | None:
    """Which blocks hold a visible pair, by the ranges of their positions (bool [blocks]); None where hardly any could be skipped.

    Whatever was pruned, the range of a block's live positions bounds its differences, so a skipped block has no visible pair.
    """
    if x.window is None and (not spec.causal or spec.diagonal is not None):
        return None
    q_pos = x.q_pos.reshape(x.q_pos.shape[0], 1, -1, 1, spec.chunk)
    far = x.far.reshape(*x.far.shape[:2], 1, -1, spec.block)
    newest, first = q_pos.max(-1), far.min(-1)  # [b 1 T/chunk 1], [b e 1 S/block]
    need = first <= newest if spec.causal else (newest >= 0) & (first < FAR)
    if x.window is not None:
        oldest = jnp.where(q_pos >= 0, q_pos, FAR).min(-1)
        last = jnp.where(far < FAR, far, 0).max(-1)
        need &= oldest - last < x.window
    return need.any((0, 1))[pairs[:, 0], pairs[:, 1]]


def walk(spec: Spec, x: Operands, step: Callable[[Any, Any, Any, Any, Callable], Any], init: Any) -> Any:
    """Folds `step(carry, i, j, first, guard)` over the blocks, a chunk's blocks in a row; `first` marks the chunk's first.

    `guard(f, *args, otherwise)` is f(*args) if the block has a visible pair and `otherwise`, of the same types, if not.
    """
    nq, nk = x.q.shape[3] // spec.chunk, x.k.shape[2] // spec.block
    allowed = np.ones((nq, nk), bool)
    if spec.diagonal is not None:
        allowed = np.arange(nk)[None] * spec.block <= np.arange(1, nq + 1)[:, None] * spec.chunk - 1 + spec.diagonal
    pairs = np.argwhere(allowed).astype(np.int32)
    if not len(pairs):
        return init
    if nq == nk == 1:
        return step(init, 0, 0, True, lambda f, *args, otherwise: f(*args))
    first = np.diff(pairs[:, 0], prepend=-1) > 0

    def body(carry, block):
        i, j, start, need = block

        def guard(f, *args, otherwise):
            return f(*args) if need is None else lax.cond(need, lambda: f(*args), lambda: otherwise)

        return step(carry, i, j, start, guard), None

    return lax.scan(body, init, (jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]), jnp.asarray(first), _needed(spec, x, pairs)))[0]


def check(q, k, q_pos, k_pos, *, v=None, bias=None, lse=None, softcap=None, diagonal=None, segments=(None, None)) -> None:
    """Raises ValueError where the arguments of an attention or evidence call do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be floating [b heads tokens d]")
        if x is not None and x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} and {name} is {x.dtype}; cast them to one dtype")
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    if k.shape != (b, g, s, d):
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; batch and head dim must agree: k must be [{b} g s {d}]")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k is {list(k.shape)} and v is {list(v.shape)}; all but the last axis must be the same")
    if not g or h % g:
        raise ValueError(f"{h} query heads are no multiple of {g} KV heads; head i reads KV head i // (h/g)")
    for name, x, shapes in (("q_pos", q_pos, [(b, t)]), ("k_pos", k_pos, [(b, s), (b, g, s)])):
        if x.dtype != jnp.int32:
            raise ValueError(f"{name} is {x.dtype}; positions must be int32 (-1 = dead): cast with .astype('int32')")
        if x.shape not in shapes:
            raise ValueError(f"{name} is {list(x.shape)}; it must be " + " or ".join(str(list(p)) for p in shapes))
    for name, x, shape in (("bias", bias, (b, g, s)), ("lse", lse, (b, h, t))):
        if x is not None and (x.dtype != jnp.float32 or x.shape != shape):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be float32 {list(shape)}")
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError("q_segment and k_segment come together: a query sees the keys of its own segment")
    for name, x, shape in (("q_segment", segments[0], (b, t)), ("k_segment", segments[1], (b, s))):
        if x is not None and (x.dtype != jnp.int32 or x.shape != shape):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be int32 {list(shape)}")
    if softcap is not None and not 0 < softcap < np.inf:
        raise ValueError(f"softcap is {softcap}; it must be positive and finite, or None for no soft-cap")
    if diagonal is not None and (not isinstance(diagonal, int) or abs(diagonal) > FAR):
        raise ValueError(f"diagonal is {diagonal!r}; it must be a static int (the number of key rows before query row 0) or None")


def as_window(window) -> jax.Array | None:
    """The window as an i32 scalar; a static one must be at least 1."""
    if window is None:
        return None
    if isinstance(window, jax.Array | np.ndarray):
        if window.shape != () or window.dtype != jnp.int32:
            raise ValueError(f"window is {window.dtype} {list(window.shape)}; an array window must be an int32 scalar")
        return jnp.asarray(window)
    if operator.index(window) < 1:
        raise ValueError(f"window is {window}; it counts the keys a query sees, itself included: at least 1, or None for all")
    return jnp.int32(min(operator.index(window), FAR))


def as_static(window) -> int | None:
    """A window for a kernel, checked."""
    as_window(window)
    return None if window is None else min(operator.index(window), FAR)
