"""Attention over positions and segments whose logits never leave the chip, and its gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxtok_kernels.flash import gpu, tpu
from jaxtok_kernels.flash._block import check, given, make_spec

_tpu, _gpu = (jax.jit(f, static_argnums=0) for f in (tpu.flash, gpu.flash))  # an unrolled model traces it once for all its layers


def flash(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
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
    count: bool = False,
    impl: str,
) -> tuple[Float[Array, "b h t c"], Float32[Array, "b h t"]] | tuple[Float[Array, "b h t c"], Float32[Array, "b h t"], Int32[Array, "2"]]:
    """Attention of queries to the keys that their positions let them see, and the logsumexp of the logits.

        visible(i, j) = q_pos[i] >= 0 and k_pos[j] >= 0 and (not causal or k_pos[j] <= q_pos[i])
                        and (window is None or q_pos[i] - k_pos[j] < window) and (no segments or q_segment[i] == k_segment[j])
        logit(i, j)   = softcap(scale * q_i . k_j) + bias[j],   softcap(x) = c tanh(x / c)
        out_i         = sum_j exp(logit(i, j) - lse_i) v_j,     lse_i = log sum_j exp(logit(i, j)),   both over visible j

    Query head i reads KV head i // (h/g). Positions and segments are the only mask: order in memory does not matter, and -1 is a dead
    row. A query that sees nothing gets out 0 and lse -inf; what lies in dead rows never matters as long as it is finite.

    Args:
      q, k, v: one of float32, bfloat16, float16; values may be wider or narrower than keys. Logits, softmax and sums are float32;
        probabilities meet v in v's dtype. float32 products are at full precision. Any head dim: TPUs
        pad one that is no multiple of 128 inside the chip, GPUs one that is no multiple of 64 in memory.
      bias: added after the soft-cap, always finite (the log of the number of tokens that a slot stands for).
      window: a static number of positions that a query sees, its own included; None = all.
      scale: of q . k; None = d ** -0.5.
      diagonal: promises that key row j > query row i + diagonal is never visible, so blocks beyond it are not computed: 0 for causal
        self-attention over packed rows, the number of earlier rows for a chunk after a prefix. A false promise drops those keys. Without
        it the same blocks are found at run time, from the positions.
      block_q, block_k: query rows and key rows of a block, multiples of 16; None = chosen by the kernel. On GPUs a block is 128 rows, the
        query heads of a group one after another, and 64 or 128 keys: block_q is not used.
      count: also return i32 [2]: the tiles that were computed and the K/V blocks that were fetched, counted inside the kernel. A tile is
        block_q rows of each query head of a group (GPUs: 128 rows) times block_k keys.
      impl: "pallas_tpu", "pallas_gpu" (Hopper), or the same kernels on any machine: "interpret" runs the TPU kernel in the Pallas
        interpreter, "interpret_gpu" the other in the GPU interpreter (jax >= 0.11.2). There, probabilities and logit gradients go to the
        second product through shared memory, as the interpreter has no product with a left side in registers; all else is the same.

    Cost: blocks that can hold no visible pair, judged by `diagonal` and by the ranges of their positions and segments, are not computed;
    those before the first and after the last block that a block of queries needs are not fetched either (GPUs: those between are
    computed, and masked; blocks all of whose pairs are visible skip the mask). Bytes moved: q, out, lse once; K and V once for each block
    of queries that needs them, shared by the query heads of a group. Nothing of size t x s exists.

    Gradients reach q, k, v and bias, from out and from lse, by kernels of their own that compute each tile again from q, k and lse (three
    products a pair for dq and four for dk and dv, against two). Logits of visible pairs must be finite.

    Raises:
      ValueError: shapes, dtypes, window, blocks or impl are wrong.
      NotImplementedError: on TPUs, float16; on GPUs, float32 (wgmma takes 16 bits), head dims over 256, a gradient with head dims over 128; "interpret_gpu"
        in a JAX that has no such interpreter.

    Source: FlashAttention-2, arXiv:2307.08691 (online softmax, recomputed backward).
    """
    spec = make_spec(
        q,
        impl,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        diagonal=diagonal,
        block_q=block_q,
        block_k=block_k,
        count=count,
    )
    check(q, k, q_pos, k_pos, v=v, bias=bias, q_segment=q_segment, k_segment=k_segment)
    if not q.size or not k.size or not v.size:  # nothing to read, or nobody to read it
        none = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return (*none, jnp.zeros(2, jnp.int32)) if count else none
    return (_gpu if "gpu" in impl else _tpu)(spec, q, k, v, bias, given(q_pos, k_pos, q_segment, k_segment))
