"""What attention tells about its keys, recomputed from q, k and the saved logsumexp in a second pass; nothing of size n x n exists."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from jaxtok.ops._chunked import (
    FAR,
    Spec,
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

    def row(total, i, j, first, guard):
        old = take(total, i, spec.chunk, 3)
        return put(
            total,
            jnp.logaddexp(old, guard(lambda i, j: jax.nn.logsumexp(block(i, j), -1), i, j, otherwise=jnp.full_like(old, -jnp.inf))),
            i,
            3,
        )

    def column(total, i, j, first, guard):
        old, saved = take(total, j, spec.block, 3), finite(take(lse, i, spec.chunk, 3))
        p = lambda i, j, saved: jnp.exp(block(i, j) - saved[..., None]).sum(3)
        return put(total, old + guard(p, i, j, saved, otherwise=jnp.zeros_like(old)), j, 3)

    lse = walk(spec, x, row, jnp.full_like(x.q[..., 0] * x.k[:, :, None, :1, 0], -jnp.inf, jnp.float32))
    total = jnp.zeros_like(x.q[:, :, :, 0, :1] * x.k[:, :, None, :, 0], jnp.float32)
    return walk(spec, x, column, total)[..., : k.shape[2]].reshape(*q.shape[:2], k.shape[2])


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
