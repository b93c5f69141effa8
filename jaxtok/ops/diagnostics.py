"""Attention sinks: how spread a head's attention is, and how much of it the first token takes; nothing of size n x n exists.

Source: arXiv:2410.13835; GuoTianYu2000/Active-Dormant-Attention, LLM/src/entropy.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxtok.core import check
from jaxtok.ops._chunked import FAR, Spec, add, as_window, finite, group, level, logits, make_spec, pad, prepare, take, visible, walk
from jaxtok.ops._chunked import check as fits


class Entropies(NamedTuple):
    """What a head's attention matrix P tells of each query and each key. Entropies are shares of the largest possible: 0 to 1."""

    row: jax.Array  # f32 [b h t] of the attention that a query gives, over log(number of keys it sees)
    column: jax.Array  # f32 [b h s] of the attention that a key gets, over log(number of queries that see it)
    received: jax.Array  # f32 [b h s] attention that a key gets, summed over the live queries


class Sinks(NamedTuple):
    """A head's entropies and the attention that its first token takes."""

    row: jax.Array  # f32 [b h] mean over the live queries
    column: jax.Array  # f32 [b h] largest of the live keys
    mass: jax.Array  # f32 [b h] attention to the first live key, mean over the live queries


def entropies(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    lse: Float32[Array, "b h t"],
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
) -> Entropies:
    """Normalised entropies of the rows and columns of attention, from q, k and the saved logsumexp in one pass over blocks.

        P_ij = exp(logit(i, j) - lse_i)
        row_i    = -sum_j P_ij log P_ij / log #{j that i sees}
        column_j = -sum_i C_ij log C_ij / log #{i that see j},   C_ij = P_ij / sum_i P_ij = P_ij / received_j

    Over whole causal rows the numbers are i + 1 and n - j. A query that sees one key, a key that one query sees, and what is dead have 0
    (log 1 = 0 would divide); so have entries whose weight is 0. `lse` and every other argument are those of the `attention` call. No
    gradient flows. Memory O(block) in t and s.

    Raises:
      ValueError: shapes, dtypes or window are wrong.
    """
    fits(q, k, q_pos, k_pos, bias=bias, lse=lse, softcap=softcap, diagonal=diagonal)
    if not q.size or not k.size:
        none = jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
        return Entropies(jnp.zeros(q.shape[:3], jnp.float32), none, none)
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    return _entropies(spec, *jax.lax.stop_gradient(level(q, k, lse, q_pos, k_pos, bias, as_window(window))))


@functools.partial(jax.jit, static_argnums=0)
def _entropies(spec: Spec, q, k, lse, *rest) -> Entropies:
    x = prepare(spec, q, k, *rest)
    saved = pad(finite(group(lse, k.shape[1])), spec.chunk, 3)

    def block(i, j):
        log = jnp.minimum(logits(spec, x, i, j)[0] - take(saved, i, spec.chunk, 3)[..., None], 0)
        p = jnp.exp(log)
        spread = _times_log(p, log)
        seen = visible(spec, take(x.q_pos, i, spec.chunk, 1), take(x.far, j, spec.block, 2), x.window).astype(jnp.int32)
        return spread.sum(4), spread.sum(3), p.sum(3), seen.sum(3), seen.sum(2)

    def step(carry, i, j, first, guard):
        parts = guard(block, i, j, otherwise=jax.tree.map(jnp.zeros_like, _parts(carry, i, j)))
        rows, columns, got, keys, queries = carry
        return (
            add(rows, parts[0], i, 3),
            add(columns, parts[1], j, 3),
            add(got, parts[2], j, 3),
            add(keys, parts[3], i, 2),
            add(queries, parts[4], j, 2),
        )

    def _parts(carry, i, j):
        rows, columns, got, keys, queries = carry
        of_key = lambda y, axis: take(y, j, spec.block, axis)
        return take(rows, i, spec.chunk, 3), of_key(columns, 3), of_key(got, 3), take(keys, i, spec.chunk, 2), of_key(queries, 2)

    wide = lambda y: jnp.zeros_like(y, jnp.float32)  # the product's shape and sharding, not its values
    rows, columns = wide(x.q[..., 0] * x.k[:, :, None, :1, 0]), wide(x.q[:, :, :, 0, :1] * x.k[:, :, None, :, 0])
    count = lambda a, b: jnp.zeros_like(a * jnp.minimum(b, 0), jnp.int32)
    keys, queries = count(x.q_pos[:, None], x.far[..., :1]), count(x.q_pos[:, None, :1], x.far)
    rows, columns, got, keys, queries = walk(spec, x, step, (rows, columns, columns, keys, queries))
    (b, h, t), s = lse.shape, k.shape[2]
    cut = lambda y, n: y[..., :n].reshape(b, h, n)
    column = _column(columns, got)
    return Entropies(
        cut(_share(rows, keys[:, :, None]), t), cut(_share(column, jnp.broadcast_to(queries[:, :, None], column.shape)), s), cut(got, s)
    )


def _times_log(p: jax.Array, log: jax.Array) -> jax.Array:
    """-p log p, 0 where p is."""
    return jnp.where(p > 0, -p * jnp.where(p > 0, log, 0), 0)


def _column(spread: jax.Array, got: jax.Array) -> jax.Array:
    """-sum C log C of C = P / got from sum of -P log P."""
    some = got > 0
    total = jnp.where(some, got, 1)
    return jnp.where(some, spread / total + jnp.log(total), 0)


def _share(entropy: jax.Array, count: jax.Array) -> jax.Array:
    """An entropy as a share of the largest possible one, log(count); 0 where that is 0."""
    return jnp.where(count > 1, jnp.clip(entropy / jnp.log(jnp.maximum(count, 2).astype(jnp.float32)), 0, 1), 0)


def entropies_of(
    attn: Float[Array, "b h t s"], *, q_pos: Int32[Array, "b t"] | None = None, k_pos: Int32[Array, "b s"] | None = None
) -> Entropies:
    """`entropies` of attention matrices that are there already. Default positions: whole causal rows (0, 1, 2, ...; t = s).

    Rows are normalised to sum 1 before their entropy is taken, as the official code does.

    Raises:
      ValueError: shapes are wrong, or t != s without positions.
    """
    if attn.ndim != 4:
        raise ValueError(f"attn is {list(attn.shape)}; it must be [b h t s]")
    b, _, t, s = attn.shape
    if (q_pos is None or k_pos is None) and t != s:
        raise ValueError(f"attn is {list(attn.shape)}; without q_pos and k_pos it must have as many rows as columns")
    order = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
    q_pos, k_pos = order if q_pos is None else q_pos, order if k_pos is None else k_pos
    if q_pos.shape != (b, t) or k_pos.shape != (b, s):
        raise ValueError(f"q_pos is {list(q_pos.shape)} and k_pos {list(k_pos.shape)}; attn asks for {[b, t]} and {[b, s]}")
    see = (k_pos[:, None] >= 0) & (k_pos[:, None] <= q_pos[..., None])  # [b t s]
    p = jnp.where(see[:, None], attn.astype(jnp.float32), 0)
    got = p.sum(2)
    row, column = (p / jnp.where(x > 0, x, 1) for x in (p.sum(3, keepdims=True), got[:, :, None]))
    plain = lambda x: _times_log(x, jnp.log(jnp.where(x > 0, x, 1)))
    keys, queries = (jnp.sum(see, axis, dtype=jnp.int32)[:, None] for axis in (2, 1))
    return Entropies(_share(plain(row).sum(3), keys), _share(plain(column).sum(2), queries), got)


def first_of(received: Float32[Array, "b h s"], q_pos: Int32[Array, "b t"], k_pos, count: int) -> Float32[Array, "b h m"]:
    """Attention that the first `count` tokens take, f32 [b h count], mean over the live queries.

    The first live key of each KV head has order 0 here, whatever stood before it; an order that is not there takes 0.
    """
    check.count("count", count)
    (b, h, s), place = received.shape, _places(k_pos)
    if place.shape[0] != b or place.shape[2] != s or not place.shape[1] or h % place.shape[1] or q_pos.shape[:1] != (b,):
        raise ValueError(
            f"received is {list(received.shape)}, q_pos {list(q_pos.shape)}, k_pos {list(k_pos.shape)}; batch and keys must agree"
        )
    at = place[:, :, None] == jnp.arange(count, dtype=jnp.int32)[None, None, :, None]  # [b e m s]
    mine = received.reshape(b, place.shape[1], -1, 1, s)
    total = jnp.sum(jnp.where(at[:, :, None], mine, 0), -1).reshape(b, h, count)
    return total / jnp.maximum(jnp.sum(q_pos >= 0, -1), 1).astype(jnp.float32)[:, None, None]


def _places(k_pos: jax.Array) -> jax.Array:
    """i32 [b e s]: orders counted from the first live key; negative where dead."""
    k_pos = k_pos[:, None] if k_pos.ndim == 2 else k_pos
    first = jnp.min(jnp.where(k_pos >= 0, k_pos, FAR), -1, keepdims=True)
    return jnp.where(k_pos >= 0, k_pos - first, -1)


def sinks(found: Entropies, q_pos: Int32[Array, "b t"], k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"]) -> Sinks:
    """A head's numbers: mean row entropy, largest column entropy, and what the first live token takes of its attention.

    The mean is over all live queries, the first one (entropy 0, mass 1) with them.
    """
    live = (q_pos >= 0)[:, None]
    mean = jnp.sum(jnp.where(live, found.row, 0), -1) / jnp.maximum(jnp.sum(live, -1), 1).astype(jnp.float32)
    column = jnp.max(found.column, -1, initial=0.0)
    return Sinks(mean, column, first_of(found.received, q_pos, k_pos, 1)[..., 0])


def dormant(row: Float[Array, "*b"], column: Float[Array, "*b"], *, below: float, above: float) -> Bool[Array, "*b"]:
    """Whether heads are sinks on this input: row entropy under `below` and column entropy over `above` (both 0 to 1)."""
    for name, value in (("below", below), ("above", above)):
        check.between(name, value, 0, 1)
    return (row < below) & (column > above)


def sinks_kept(pos: Int32[Array, "*b s"], sinks: int) -> Int32[Array, "*b"]:
    """How many of the first `sinks` tokens of the text (orders 0, 1, ...) are among these slots: what a method left of the sinks."""
    check.count("sinks", sinks)
    return jnp.sum((pos >= 0) & (pos < sinks), -1, dtype=jnp.int32)
