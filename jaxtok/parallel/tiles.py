"""What the schemes share: shards of queries and of keys, attention between two of them, and how they are handed on."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxtok.ops._chunked import level
from jaxtok.ops.attention import attention, gradients, merge
from jaxtok.parallel.layout import KINDS


class Queries(NamedTuple):
    q: Array  # [b h c d]
    pos: Array  # i32 [b c]
    segment: Array | None  # i32 [b c]


class Keys(NamedTuple):
    k: Array  # [b g c d]
    v: Array  # [b g c e]
    pos: Array  # i32 [b c] or [b g c]
    bias: Array | None  # f32 [b g c]
    segment: Array | None  # i32 [b c]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """The static part of a call."""

    layout: str
    causal: bool
    window: int | None
    softcap: float | None
    scale: float | None

    def __post_init__(self):
        if self.layout not in KINDS:
            raise ValueError(f"layout {self.layout!r} must be one of {', '.join(KINDS)}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window is {self.window!r}; over several devices it must be a static int >= 1, or None")

    @property
    def tiled(self) -> bool:
        """Whether shards of other devices are attended to in two tiles."""
        return self.layout == "zigzag" and self.causal

    def diagonal(self, own: bool) -> int | None:
        """What `attention` may take for granted of two shards: rows of one and of striped shards rise together."""
        return 0 if self.causal and (own or self.layout == "striped") else None


def sides(sight: Sight, q, k, v, q_pos, k_pos, bias, q_segment, k_segment) -> tuple[Queries, Keys]:
    """The shards of a device; ValueError where they cannot be those of one sequence in this layout."""
    if sight.tiled and q.shape[2] % 2:
        raise ValueError(f"a zigzag shard is two chunks: {q.shape[2]} tokens a device must be an even number")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys a device: queries and keys must be of the same tokens")
    q, k, v, q_pos, k_pos, bias, q_segment, k_segment = level(q, k, v, q_pos, k_pos, bias, q_segment, k_segment)
    return Queries(q, q_pos, q_segment), Keys(k, v, k_pos, bias, k_segment)


def over(x: Any, axis: str, steps: int) -> Any:
    """x handed to the device `steps` further."""
    n = lax.axis_size(axis)
    return jax.tree.map(lambda a: lax.ppermute(a, axis, [(i, (i + steps) % n) for i in range(n)]), x) if steps % n else x


def _half(x: Any, i: int) -> Any:
    """The first or second half of the tokens."""

    def cut(a):
        axis = 2 if a.ndim == 4 else a.ndim - 1
        return lax.slice_in_dim(a, i * a.shape[axis] // 2, (i + 1) * a.shape[axis] // 2, axis=axis)

    return jax.tree.map(cut, x)


def _pick(first, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def _stack(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _tiles(queries: Any, keys: Any, first) -> tuple[Any, Any]:
    """(q1, k0) and, if `first` (these keys begin before these queries do), (q0, k0), else (q1, k1), one below the other in the batch.

    0 and 1 are halves: with zigzag shards the other pairs have nothing visible.
    """
    q0, q1, k0, k1 = _half(queries, 0), _half(queries, 1), _half(keys, 0), _half(keys, 1)
    return _stack(q1, _pick(first, q0, q1)), _stack(k0, _pick(first, k0, k1))


def _see(sight: Sight, queries: Queries, keys: Keys, diagonal: int | None) -> dict[str, Any]:
    rest = dict(causal=sight.causal, window=sight.window, softcap=sight.softcap, scale=sight.scale, diagonal=diagonal)
    return dict(q_pos=queries.pos, k_pos=keys.pos, bias=keys.bias, q_segment=queries.segment, k_segment=keys.segment, **rest)


def attend(sight: Sight, queries: Queries, keys: Keys, mine, theirs, own: bool = False) -> tuple[Array, Array]:
    """(out f32, lse) of one device's queries over one device's keys; mine, theirs: whose they are."""
    f32 = jnp.float32
    if own or not sight.tiled:
        return attention(queries.q, keys.k, keys.v, out_dtype=f32, **_see(sight, queries, keys, sight.diagonal(own)))
    first, h = theirs < mine, queries.q.shape[2] // 2
    a, b = _tiles(queries, keys, first)
    out, lse = attention(a.q, b.k, b.v, out_dtype=f32, **_see(sight, a, b, h))
    (out_a, out_b), (lse_a, lse_b) = jnp.split(out, 2), jnp.split(lse, 2)
    nothing = jnp.full_like(lse_b, -jnp.inf)
    late = merge(out_a, lse_a, out_b, jnp.where(first, nothing, lse_b))
    early = jnp.where(first, out_b, 0), jnp.where(first, lse_b, nothing)
    return tuple(jnp.concatenate(x, 2) for x in zip(early, late, strict=True))  # type: ignore[return-value]


def backward(sight: Sight, queries: Queries, keys: Keys, saved: tuple, mine, theirs, own: bool = False) -> tuple:
    """(dq, dk, dv, dbias) f32 that one device's keys have to do with; saved: out, lse, dout, dlse of its queries [b h c ...]."""
    if own or not sight.tiled:
        return gradients(queries.q, keys.k, keys.v, *saved, **_see(sight, queries, keys, sight.diagonal(own)))
    first, h, b = theirs < mine, queries.q.shape[2] // 2, queries.q.shape[0]
    wide = tuple(x if x.ndim == 4 else x[..., None] for x in saved)  # halves are cut off axis 2
    (x, held), y = _tiles((queries, wide), keys, first)
    held = tuple(a if s.ndim == 4 else a[..., 0] for a, s in zip(held, saved, strict=True))
    dq, *rest = gradients(x.q, y.k, y.v, *held, **_see(sight, x, y, h))
    back = lambda a, one, two: jnp.concatenate([one(a), two(a)], 2)
    zero = lambda a: jnp.where(first, 0, a)  # belongs to the second half
    dq = back(dq, lambda a: a[b:] - zero(a[b:]), lambda a: a[:b] + zero(a[b:]))
    rest = [None if a is None else back(a, lambda a: a[:b] + a[b:] - zero(a[b:]), lambda a: zero(a[b:])) for a in rest]
    return dq, *rest
