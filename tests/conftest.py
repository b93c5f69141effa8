"""Strictness for every test, and the shared data when it is there."""

import os
import pathlib

# Tests compile far more than they compute: skip the expensive passes of the CPU compiler. Set XLA_FLAGS to override.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # sharding laws
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The shared data folder: $JAXTOK_DATA, else data/ beside pyproject.toml; the test skips without it."""
    path = pathlib.Path(os.environ.get("JAXTOK_DATA") or pathlib.Path(__file__).parents[1] / "data")
    if not path.is_dir():
        pytest.skip("needs the shared data folder: set JAXTOK_DATA")
    return path
