"""Rows fetched from host memory: the right ones, and lowered with their placement for accelerators. Execution there is untested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.offload import fetch_rows, to_host


def program(x, slots):
    return fetch_rows(to_host(x), slots) * 2


def problem(*rest):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 3, 7, *rest)), jnp.float32), jnp.asarray(rng.integers(0, 7, (2, 3, 4)), jnp.int32)


@pytest.mark.parametrize("rest", [(5,), ()])
def test_fetches_the_rows(rest):
    x, slots = problem(*rest)
    want = 2 * np.take_along_axis(np.asarray(x), np.asarray(slots).reshape(2, 3, 4, *(1 for _ in rest)), 2)
    np.testing.assert_array_equal(jax.jit(program)(x, slots), want)


@pytest.mark.parametrize("platform, host", [("cuda", True), ("tpu", True), ("cpu", False)])
def test_lowering(platform, host):
    """On accelerators the array stands in pinned host memory, is gathered by the host, and the rows go to the device."""
    x, slots = problem(5)
    text = jax.jit(program).trace(x, slots).lower(lowering_platforms=(platform,)).as_text()
    assert ('_xla_buffer_placement = "pinned_host"' in text) == host
    gather = next(line for line in text.splitlines() if "stablehlo.gather" in line)
    assert '_xla_compute_type = "host"' in gather
    assert ('_xla_buffer_placement = "device"' in text) == host
