"""What attention tells about its keys, recomputed from q, k and the saved logsumexp in a second pass; nothing of size n x n exists."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxtok.ops._chunked import Spec, as_window, check, finite, group, level, make_spec, pad, prepare, probs, put, take, walk


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
) -> Float32[Array, "b h s"]:
    """Attention that each key receives: column sums of the attention matrix over all live queries.

        received[j] = sum_i exp(logit(i, j) - lse_i)   over the queries i that see j

    `lse` and every other argument are those of the `attention` call. Dead keys and dead queries give zero; the sum over j is the number
    of queries that see something. Memory O(block) in t and s, in the gradient too.

    Raises:
      ValueError: shapes, dtypes or window are wrong.
    """
    check(q, k, q_pos, k_pos, bias=bias, lse=lse, softcap=softcap, diagonal=diagonal)
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
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
