"""The attention that each key receives, from q, k and the saved logsumexp in one pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxtok_kernels.column_sum import gpu, tpu
from jaxtok_kernels.flash._block import check, given, make_spec


def column_sum(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    lse: Float32[Array, "b h t"],
    *,
    q_pos: Int32[Array, "b t"],
    k_pos: Int32[Array, "b s"] | Int32[Array, "b g s"],
    bias: Float32[Array, "b g s"] | None = None,
    q_segment: Int32[Array, "b t"] | None = None,
    k_segment: Int32[Array, "b s"] | Int32[Array, "b g s"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    diagonal: int | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    impl: str,
) -> Float32[Array, "b h s"]:
    """Attention that each key receives: column sums of the attention matrix over the queries given.

        received[j] = sum_i exp(logit(i, j) - lse_i)   over the queries i that see j

    `lse` and all other arguments are those of the `jaxtok_kernels.flash.flash` call; of a window of queries: those queries, with their
    lse and q_pos. Dead keys and dead queries give zero; the sum over j is the number of queries that see something. No gradient.

    Cost: one product a visible pair (flash: two). Bytes moved: k and received once, q and lse once for each block of keys that they may
    see; k is fetched once for all query heads of a group (GPUs: once for each). Blocks are skipped as in flash. Nothing of size t x s exists.

    Raises:
      ValueError: shapes, dtypes, window, blocks or impl are wrong.
      NotImplementedError: a gradient was asked for; and as in flash on GPUs.
    """
    spec = make_spec(
        q, impl, causal=causal, window=window, softcap=softcap, scale=scale, diagonal=diagonal, block_q=block_q, block_k=block_k
    )
    check(q, k, q_pos, k_pos, lse=lse, bias=bias, q_segment=q_segment, k_segment=k_segment)
    if not q.size or not k.size:
        return jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32)
    return _column_sum((gpu if "gpu" in impl else tpu).column_sum, spec, q, k, lse, bias, given(q_pos, k_pos, q_segment, k_segment))


def _run(kernel, spec, *arrays):
    return kernel(spec, *arrays)


def _refuse(kernel, spec, *arrays):
    raise NotImplementedError("column_sum has no gradient: stop_gradient its arguments, or use jaxtok.ops.evidence.received")


_refusing = jax.custom_vjp(_run, nondiff_argnums=(0, 1))
_refusing.defvjp(_refuse, _refuse)
_column_sum = jax.jit(_refusing, static_argnums=(0, 1))
