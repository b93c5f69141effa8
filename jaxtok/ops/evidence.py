"""What attention tells about its keys, recomputed from q, k and the saved logsumexp in a second pass; nothing of size n x n exists."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtok_kernels.column_sum import column_sum
from jaxtyping import Array, Float, Float32, Int32, UInt32

from jaxtok.ops._chunked import (
    FAR,
    Spec,
    as_static,
    as_window,
    bounded,
    check,
    finite,
    group,
    level,
    logits,
    make_spec,
    pad,
    prepare,
    probs,
    put,
    take,
    walk,
)
from jaxtok.ops._impl import chosen, settings, unfit
from jaxtok.ops._shared import Impl, Shared
from jaxtok.ops.noise import gumbel


def received(
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
    impl: Impl = "auto",
) -> Float32[Array, "b h s"]:
    """Attention that each key receives: column sums of the attention matrix over all live queries.

        received[j] = sum_i exp(logit(i, j) - lse_i)   over the queries i that see j

    `lse` and every other argument are those of the `attention` call. Dead keys and dead queries give zero; the sum over j is the number
    of queries that see something. Memory O(block) in t and s, in the gradient too. impl: as in `attention`; the kernel, `jaxtok_kernels.column_sum`,
    has no gradient.

    Raises:
      ValueError: shapes, dtypes or window are wrong.
    """
    if isinstance(impl, Shared):
        see = dict(q_pos=q_pos, k_pos=k_pos, bias=bias, causal=causal, window=window, softcap=softcap, scale=scale)
        return impl.received(q, k, lse, **see, diagonal=diagonal)
    check(q, k, q_pos, k_pos, bias=bias, lse=lse, softcap=softcap, diagonal=diagonal)
    kind = chosen(
        "column_sum", impl, "its window is a static int or None, not an array" if isinstance(window, jax.Array) else None, unfit(q, k)
    )
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
    if kind != "xla":
        see = dict(q_pos=q_pos, k_pos=k_pos, bias=bias, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
        sizes: Any = settings("column_sum") or {}
        return column_sum(q, k, lse, **see, window=as_static(window), impl=kind, **sizes)
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    return _columns(spec, False, *level(q, k, lse, q_pos, k_pos, bias, as_window(window)))


def peak(
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
) -> Float32[Array, "b h s"]:
    """The largest attention that each key receives from any live query: column maxima of the attention matrix.

    Arguments, errors and memory as `received`; dead keys give zero.
    """
    check(q, k, q_pos, k_pos, bias=bias, lse=lse, softcap=softcap, diagonal=diagonal)
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    return _columns(spec, True, *level(q, k, lse, q_pos, k_pos, bias, as_window(window)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _columns(spec: Spec, largest: bool, q, k, lse, *rest):
    """Column sums of the attention matrix, or its column maxima."""
    x = prepare(spec, q, k, *rest)
    saved = pad(finite(group(lse, k.shape[1])), spec.chunk, 3)

    @jax.checkpoint  # the gradient recomputes a block rather than keeping all of them
    def columns(x, saved, i, j):
        p = probs(spec, x, saved, i, j)[0]
        return p.max(3) if largest else p.sum(3)

    def step(total, i, j, first, guard):
        old = take(total, j, spec.block, 3)
        new = guard(columns, x, saved, i, j, otherwise=jnp.zeros_like(old))
        return put(total, jnp.maximum(old, new) if largest else old + new, j, 3)

    total = jnp.zeros_like(x.q[:, :, :, 0, :1] * x.k[:, :, None, :, 0], jnp.float32)  # the product's shape and sharding, not its values
    total = walk(spec, x, step, total)[..., : k.shape[2]]
    return total.reshape(*q.shape[:2], k.shape[2])


def perturbed(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    *,
    words: UInt32[Array, "2"] | UInt32[Array, "b 2"] | None,
    tau: float | Float32[Array, ""],
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
) -> Float32[Array, "b h s"]:
    """Column sums over all live queries of attention that was disturbed and tempered before its softmax (Keyformer).

        perturbed[j] = sum_i softmax_j((logit(i, j) + z_ij) / tau)   over the queries i that see j,   z = ops.noise.gumbel(words, ...)

    words=None: z = 0; with tau = 1 that is `received`. The noise is drawn twice (once for the rows' sums, once for the columns) rather
    than kept: memory O(block) in t and s. A choice is made of it, so it is a constant to the gradient. Other arguments as in `attention`.

    Raises:
      ValueError: shapes, dtypes, window or tau are wrong.
    """
    check(q, k, q_pos, k_pos, bias=bias, softcap=softcap, diagonal=diagonal)
    if not isinstance(tau, jax.Array) and not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}; a temperature must be positive and finite")
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    operands = level(q, k, q_pos, k_pos, bias, as_window(window), jnp.asarray(tau, jnp.float32), words)
    return _perturbed(spec, *jax.lax.stop_gradient(operands))


@functools.partial(jax.jit, static_argnums=0)
def _perturbed(spec: Spec, q, k, q_pos, k_pos, bias, window, tau, words):
    x = prepare(spec, q, k, q_pos, k_pos, bias, window)

    def block(i, j):  # f32 [b g r chunk block], -inf where not visible
        y, _ = logits(spec, x, i, j)
        if words is not None:
            far = take(x.far, j, spec.block, 2)
            z = gumbel(words, take(x.q_pos, i, spec.chunk, 1), jnp.where(far < FAR, far, -1), q.shape[1])
            y = y + group(z, k.shape[1])
        return jnp.where(y > -jnp.inf, bounded(y / tau), -jnp.inf)

    total = _sums(spec, x, block, _totals(spec, x, block))
    return total[..., : k.shape[2]].reshape(*q.shape[:2], k.shape[2])


def _totals(spec: Spec, x, block) -> Array:
    """The logsumexp of each query's blocks, f32 [b g r T]."""

    def row(total, i, j, first, guard):
        old = take(total, i, spec.chunk, 3)
        return put(
            total,
            jnp.logaddexp(old, guard(lambda i, j: jax.nn.logsumexp(block(i, j), -1), i, j, otherwise=jnp.full_like(old, -jnp.inf))),
            i,
            3,
        )

    return walk(spec, x, row, jnp.full_like(x.q[..., 0] * x.k[:, :, None, :1, 0], -jnp.inf, jnp.float32))


def _sums(spec: Spec, x, block, lse, weight=None) -> Array:
    """Column sums of exp(block - lse), f32 [b g r S]; of the rows times `weight` [b g r T], if given."""

    def column(total, i, j, first, guard):
        old, saved = take(total, j, spec.block, 3), finite(take(lse, i, spec.chunk, 3))
        share = None if weight is None else take(weight, i, spec.chunk, 3)[..., None]
        p = lambda i, j, saved: jnp.exp(block(i, j) - saved[..., None])
        new = (lambda *at: p(*at).sum(3)) if share is None else (lambda *at: (p(*at) * share).sum(3))
        return put(total, old + guard(new, i, j, saved, otherwise=jnp.zeros_like(old)), j, 3)

    return walk(spec, x, column, jnp.zeros_like(x.q[:, :, :, 0, :1] * x.k[:, :, None, :, 0], jnp.float32))


def ranked(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    *,
    tau: float | Float32[Array, ""] = 0.1,
    rounds: int = 5,
    q_pos: Int32[Array, "b n"],
    k_pos: Int32[Array, "b n"] | Int32[Array, "b g n"],
    bias: Float32[Array, "b g n"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
) -> Float32[Array, "b h n"]:
    """PageRank of the rows of a sequence, of which q and k are the queries and the keys, over their attention with a temperature.

        rank_j = 1 / (number of live queries), of a live query;   rounds times:  rank'_j = sum_i rank_i softmax_j(logit(i, j) / tau)

    No damping. What a row holds goes to the keys that it sees, so ranks sum to 1 as long as every row that holds something sees one. A row may ask
    (q_pos >= 0) and be seen by none (k_pos = -1): it counts in the first round alone. Ranks choose rows, so they are a constant to the gradient.
    Memory O(block) in n; `rounds` + 1 walks over the blocks. Other arguments as in `attention`.

    Raises:
      ValueError: shapes, dtypes, window, tau or rounds are wrong.
    """
    check(q, k, q_pos, k_pos, bias=bias, softcap=softcap, diagonal=diagonal)
    if not isinstance(tau, jax.Array) and not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}; a temperature must be positive and finite")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= 10**6:
        raise ValueError(f"rounds is {rounds!r}; it must be an int from 0 to a million")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys; they must be of the same rows")
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
    spec = make_spec(q, k, causal=causal, softcap=softcap, scale=scale, diagonal=diagonal)
    operands = level(q, k, q_pos, k_pos, bias, as_window(window), jnp.asarray(tau, jnp.float32))
    return _ranked(spec, rounds, *jax.lax.stop_gradient(operands))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ranked(spec: Spec, rounds: int, q, k, q_pos, k_pos, bias, window, tau):
    x, n = prepare(spec, q, k, q_pos, k_pos, bias, window), k.shape[2]

    def block(i, j):
        y, _ = logits(spec, x, i, j)
        return jnp.where(y > -jnp.inf, bounded(y / tau), -jnp.inf)

    lse = _totals(spec, x, block)
    live = (q_pos >= 0).astype(jnp.float32)
    uniform = live / jnp.maximum(jnp.sum(live, -1, keepdims=True), 1.0)
    rank = jnp.broadcast_to(uniform[:, None, None], (*x.q.shape[:3], n)) + jnp.zeros_like(lse[..., :1])  # the product's sharding
    again = lambda rank, _: (_sums(spec, x, block, lse, pad(rank, spec.chunk, 3))[..., :n], None)
    rank, _ = jax.lax.scan(again, rank, None, length=rounds)
    return rank.reshape(*q.shape[:2], n)


def rows(
    q_last: Float[Array, "b h w d"],
    k: Float[Array, "b g s d"],
    lse_last: Float32[Array, "b h w"],
    *,
    q_pos: Int32[Array, "b w"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    causal: bool = True,
    window: int | Int32[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float32[Array, "b h w s"]:
    """Rows of the attention matrix: exp(logit(i, j) - lse_i) for the w queries given.

    Usually the last ones: `q[:, :, -w:]`, `lse[..., -w:]`, `q_pos[:, -w:]`; one row is w = 1. Other arguments as in `attention`.
    Dead queries and dead keys give zero; a row that sees something sums to 1.

    Raises:
      ValueError: shapes, dtypes or window are wrong.
    """
    check(q_last, k, q_pos, k_pos, bias=bias, lse=lse_last, softcap=softcap)
    if not q_last.size or not k.size:
        return jnp.zeros((*q_last.shape[:3], k.shape[2]), jnp.float32)
    # The result itself is w x s, so one block.
    spec = make_spec(q_last, k, causal=causal, softcap=softcap, scale=scale, diagonal=None, whole=True)
    return _rows(spec, q_last, k, lse_last, q_pos, k_pos, bias, as_window(window))


@functools.partial(jax.jit, static_argnums=0)
def _rows(spec: Spec, q, k, lse, *rest):
    p, _ = probs(spec, prepare(spec, q, k, *rest), finite(group(lse, k.shape[1])), 0, 0)
    return p.reshape(*q.shape[:3], k.shape[2])
