"""Which program an op runs: XLA's, or a kernel of jaxtok_kernels, by one rule."""

import functools
import importlib.resources
import json
from typing import Any

import jax
import jax.numpy as jnp

NAMES = ("auto", "xla", "pallas_tpu", "pallas_gpu", "interpret", "interpret_gpu")
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}
TABLE = "blocks.json"  # {device kind: {kernel: its settings}}, measured by experiments/tune_kernels.py


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """The kernels that were measured, and the block sizes that were fastest, by device kind."""
    return json.loads((importlib.resources.files("jaxtok_kernels") / TABLE).read_text())


def settings(kernel: str, kind: str | None = None) -> dict[str, int] | None:
    """What was measured for a kernel on the default device (or a device kind), None where nothing was."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return table().get(kind, {}).get(kernel)


def unfit(*arrays: jax.Array) -> tuple[str, ...]:
    """The platforms whose attention kernels do not take such q, k, v: float16 on TPUs; float32, or over 128 channels, on GPUs."""
    dtype = arrays[0].dtype
    gpu = dtype.itemsize > 2 or max(x.shape[3] for x in arrays) > 128
    return ("pallas_tpu",) * (dtype == jnp.float16) + ("pallas_gpu",) * gpu


def chosen(kernel: str, impl: Any, obstacle: str | None = None, unfit: tuple[str, ...] = ()) -> str:
    """The name of what runs: "xla" or a kernel's platform.

    A named kernel runs, or raises where something in the call (`obstacle`, in words) is nothing that it can do. "auto" takes the kernel
    of the default backend if it has been measured on that kind of device (the committed table), there is no obstacle, and the platform
    is none of `unfit`; else XLA.

    Raises:
      ValueError: there is no such impl.
      NotImplementedError: a kernel was named, and there is an obstacle.
    """
    if impl not in NAMES:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(NAMES)}")
    if impl == "xla":
        return "xla"
    if impl == "auto":
        own = KERNELS.get(jax.default_backend())
        fits = own is not None and own not in unfit and obstacle is None
        return own if own is not None and fits and settings(kernel) is not None else "xla"
    if obstacle is not None:
        raise NotImplementedError(f"impl={impl!r}: {obstacle}; use impl='xla' or 'auto'")
    return impl
