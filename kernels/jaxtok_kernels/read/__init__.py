"""Attention of a few queries to listed blocks of a long cache; what is not listed is neither fetched nor computed."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok_kernels.read import tpu

IMPLS = ("pallas_tpu", "interpret")


def read(
    q: Float[Array, "b e r d"],
    q_pos: Int[Array, "b r"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s c"],
    k_pos: Int[Array, "b g s"],
    bias: Float[Array, "b g s"],
    index: Int[Array, "b e m"],
    ids: Int[Array, "b e n"] | None = None,
    freqs: Float[Array, " f"] | None = None,
    *,
    block: int,
    stride: int | None = None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    impl: str,
) -> tuple[Float[Array, "b e r c"], Float[Array, "b e r"]]:
    """Attention to the slots of the listed blocks, and its logsumexp f32.

    List j of e reads KV head j // (e/g): blocks of `block` slots, each listed once, in any order; -1 = unused. Block i begins at slot
    i * stride (None = block) and must lie inside the cache. Row i of a list's r query
    rows stands at q_pos[:, i] (-1 = dead) and sees the slots of its blocks with 0 <= k_pos <= q_pos and, with a window,
    q_pos - k_pos < window; logit = softcap(scale q.k) + bias. A row that sees nothing gets 0 and -inf.

    ids: rotary ids of the n = m * block listed slots, for keys that are stored unrotated (q is rotated): channels c and c + f of a key
    turn by id * freqs[c]. None = keys are used as they are.

    impl: "pallas_tpu", or "interpret", which runs that kernel in the Pallas interpreter on any machine.

    Bytes: listed blocks of k, v, 8 a listed slot for positions and biases, q, out. ValueError: shapes that do not fit.
    """
    (b, g, s), (e, m) = k_pos.shape, index.shape[1:]
    if not g or e % g or q.shape[:2] != (b, e) or q_pos.shape != (b, q.shape[2]) or bias.shape != k_pos.shape:
        shapes = [list(x.shape) for x in (q, q_pos, k, v, k_pos, bias, index)]
        raise ValueError(f"q, q_pos, k, v, k_pos, bias, index are {shapes}; e must be a multiple of g, and batch, rows and slots agree")
    if (ids is None) != (freqs is None) or (ids is not None and ids.shape != (b, e, m * block)):
        raise ValueError(f"ids must be [{b} {e} {m * block}] and come with freqs, got {None if ids is None else list(ids.shape)}")
    stride = block if stride is None else stride
    if block < 1 or stride < 1 or s < block or (s - block) % stride:
        raise ValueError(f"a cache of {s} slots does not end with a block of {block} at a multiple of {stride}")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    if not m or not q.size or not s:
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    interpret = impl == "interpret"
    given = q, q_pos, k, v, k_pos, bias, index, ids, freqs
    return tpu.read(*given, block=block, stride=stride, scale=scale, softcap=softcap, window=window, interpret=interpret)
