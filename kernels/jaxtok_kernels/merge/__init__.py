"""Who merges with whom and the merge itself, without an array of all pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok_kernels.merge import tpu

IMPLS = ("pallas_tpu", "interpret", "pallas_gpu", "interpret_gpu")


def match(
    a: Float[Array, "b n d"], c: Float[Array, "b m d"], bias: Float[Array, "b m"] | None = None, *, impl: str
) -> tuple[Float[Array, "b n"], Int[Array, "b n"]]:
    """For each row of a its best partner among the rows of c: (max_j s_ij f32, the first j that has it), s_ij = a_i . c_j + bias_j.

    Cosines where the rows have length one. bias = -inf forbids a row of c; where all are forbidden, or m = 0: (-inf, -1). What may not
    go anywhere among the rows of a is the caller's to mask, [b n]. No n x m array reaches memory: bytes a, and c once for each tile of a (128 to 512 rows), 8 a row out.
    float32 rows are multiplied in full precision (on GPUs as three 16-bit parts each, 12 bytes a number).

    ValueError: shapes that do not fit, dtypes that differ, an unknown impl.
    """
    _known(impl)
    (b, n, d), m = a.shape, c.shape[1]
    if c.shape != (b, m, d) or a.dtype != c.dtype or (bias is not None and bias.shape != (b, m)):
        given = [None if x is None else (list(x.shape), str(x.dtype)) for x in (a, c, bias)]
        raise ValueError(f"a, c, bias are {given}; they must be [b n d], [b m d] of the same dtype, [b m]")
    if not a.size or not m:
        return jnp.full((b, n), -jnp.inf, jnp.float32), jnp.full((b, n), -1, jnp.int32)
    bias = jnp.zeros((b, m), jnp.float32) if bias is None else bias
    best, where = _platform(impl).match(a, c, bias, interpret=impl.startswith("interpret"))
    return best, jnp.where(best > -jnp.inf, where, -1)


def segment_merge(
    x: Float[Array, "b n c"], weight: Float[Array, "b n"], assign: Int[Array, "b n"], m: int, *, mean: bool = True, impl: str
) -> Float[Array, "b m c"]:
    """Rows merged into m groups: out_j = sum of weight_i x_i / sum of weight_i over the rows i with assign_i = j, in x's dtype.

    mean=False: the sum of weight_i x_i alone, f32. assign = -1 goes nowhere; rows of weight 0 may hold anything, NaN included; a group
    of nothing is 0. Sums are f32 in the order of the rows, the same in every run. Weights are at least 0; shares are made before the product, which
    could overflow.

    Bytes: x once (on TPUs once for each tile of 2**19 numbers of the output), 8 a row, the output once.
    ValueError: shapes that do not fit, m < 0, an unknown impl.
    """
    _known(impl)
    b, n, c = x.shape
    if weight.shape != (b, n) or assign.shape != (b, n):
        raise ValueError(f"weight and assign must be [{b} {n}], got {list(weight.shape)} and {list(assign.shape)}")
    if m < 0:
        raise ValueError(f"m must be at least 0, got {m}")
    weight = jnp.where(assign < 0, 0.0, weight.astype(jnp.float32))
    if not x.size or not m:
        return jnp.zeros((b, m, c), x.dtype if mean else jnp.float32)
    if mean:
        to = jnp.where(assign < 0, m, assign)
        mass = jax.vmap(lambda w, i: jnp.zeros(m + 1, jnp.float32).at[i].add(w))(weight, to)
        mass = jnp.take_along_axis(mass, to, 1)
        weight = weight / jnp.where(mass > 0, mass, 1.0)
    out = _platform(impl).segment_sum(x, weight, assign, m, interpret=impl.startswith("interpret"))
    return out.astype(x.dtype) if mean else out


def _known(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")


def _platform(impl: str):
    if not impl.endswith("gpu"):
        return tpu
    from jaxtok_kernels.merge import gpu

    return gpu
