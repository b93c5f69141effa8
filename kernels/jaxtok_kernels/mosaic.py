"""What the kernels for NVIDIA GPUs share: one way to load, swizzled tiles, and the interpreter, over the versions of JAX."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_INDEXED = getattr(inspect.signature(plgpu.load).parameters.get("idx"), "default", None) is inspect.Parameter.empty  # jax 0.10


def load(ref, layout) -> jax.Array:
    """The array that stands at a reference in GMEM or SMEM, in `layout`, however slowly."""
    return plgpu.load(ref, *([()] if _INDEXED else []), layout=layout, optimized=False)


def swizzle(width: int, dtype) -> int:
    """The widest swizzle, in bytes, for rows of `width` numbers. NotImplementedError if there is none."""
    size = width * jnp.dtype(dtype).itemsize
    wide = next((n for n in (128, 64, 32) if size % n == 0), None)
    if wide is None:
        raise NotImplementedError(f"rows of {width} {dtype} are {size} bytes; on GPUs they are a multiple of 32")
    return wide


def tile(shape: tuple[int, ...], dtype, wide: int | None = None):
    """Shared memory [... rows width], rows a multiple of 8, laid out for TMA and wgmma."""
    wide = swizzle(shape[-1], dtype) if wide is None else wide
    transforms = plgpu.TilingTransform((8, wide // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(wide)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def options(interpret: bool) -> dict[str, Any]:
    """Keywords of `plgpu.kernel`."""
    out: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane)}
    if not interpret:
        return out
    interpreter = getattr(plgpu, "InterpretGPUParams", None)
    if interpreter is None:
        raise NotImplementedError(f"jax {jax.__version__} has no GPU interpreter (0.11.2 has); use impl='interpret'")
    return out | {"interpret": interpreter()}


def product(x, y: Any, dtype=jnp.float32, turned: bool = False) -> jax.Array:
    """x @ y, or x @ y.T, of two tiles in shared memory."""
    if turned:
        y = y.transpose((1, 0)) if hasattr(y, "transpose") else plgpu.transpose_ref(y, (1, 0))

    def run(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((int(x.shape[0]), int(y.shape[1])), dtype))


def stream(n, fetch, use, state):
    """`use(step, slot, state) -> state` for n steps; `fetch(step, slot)` starts the copies of a step while the one before it is used."""

    @pl.when(n > 0)
    def _():
        fetch(jnp.int32(0), jnp.int32(0))

    def body(step, state):
        slot = lax.rem(step, jnp.int32(2))

        @pl.when(step + 1 < n)
        def _():
            fetch(step + 1, 1 - slot)

        state = use(step, slot, state)
        plgpu.commit_smem()  # all have read before the next copies write
        return state

    return lax.fori_loop(0, n, body, state)


def whole_tiles(n: int, size: int) -> tuple[int, jax.Array]:
    """How many tiles of `size` rows cover n >= size rows, and where each begins: the last one earlier where n is no multiple."""
    number = -(-n // size)
    return number, jnp.minimum(jnp.arange(number, dtype=jnp.int32) * size, n - size)


def padded(x, axis: int, least: int, fill: Any = 0):
    """x with a multiple of eight entries along `axis`, at least `least`: TMA into swizzled tiles wants that. A copy where it is not so."""
    short = -(-max(x.shape[axis], least) // 8) * 8 - x.shape[axis]
    return x if not short else jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
