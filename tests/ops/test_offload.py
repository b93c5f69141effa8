"""Rows fetched from host memory: the right ones, and lowered with their placement for accelerators. Execution there is untested."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.reduce import gather
from jaxtok.ops import offload
from jaxtok.ops.cache import append
from jaxtok.ops.offload import fetch_rows, to_host
from jaxtok.ops.read import attend_slots
from tests.methods import toys


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


def halves(*rest, first=4):
    x, slots = problem(*rest)
    return offload.Halves(to_host(x[:, :, :first]), x[:, :, first:]), x, slots


@pytest.mark.parametrize("first", [0, 4, 7])
@pytest.mark.parametrize("rest", [(5,), ()])
def test_rows_of_both_halves(rest, first):
    h, x, slots = halves(*rest, first=first)
    slots = slots.at[0, 0, 1].set(-1).at[1, 2, 0].set(6)
    assert (h.shape, h.ndim, h.dtype) == (x.shape, x.ndim, x.dtype)
    np.testing.assert_array_equal(jax.jit(offload.rows)(h, slots), gather(x, slots))
    np.testing.assert_array_equal(jax.jit(offload.whole)(h), x)
    assert jax.typeof(h.host).memory_space == jax.memory.Space.Host


def cache_of(cursor, slots=10, g=2):
    kv = toys.cache(*(np.random.default_rng(i).normal(size=(2, g, slots, 3)).astype(np.float32) for i in (0, 1)))
    return kv._replace(pos=jnp.where(jnp.arange(slots, dtype=jnp.int32) < cursor, kv.pos, -1), cursor=jnp.int32(cursor))


@pytest.mark.parametrize("what", [("k", "v"), ("v",), ()])
@pytest.mark.parametrize("t", [1, 3])
def test_rows_are_written_to_the_device_and_what_finds_no_slot_is_counted(what, t):
    kv = cache_of(5)
    stowed = offload.stow(kv, 5, what)
    rng = np.random.default_rng(3)
    write = jax.jit(lambda kv, k, v, pos: append(kv, k, v, pos, jnp.zeros(k.shape[:3])))
    for n in range(5, 13, t):  # 10 slots: what comes after them is lost
        k, v = (jnp.asarray(rng.normal(size=(2, 2, t, 3)), jnp.float32) for _ in range(2))
        pos = jnp.broadcast_to(jnp.arange(n, n + t, dtype=jnp.int32)[None], (2, t))
        kv, stowed = write(kv, k, v, pos), write(stowed, k, v, pos)
        if what:
            np.testing.assert_array_equal(offload.newest(stowed.v, jnp.int32(5)), kv.v[:, :, 5])
    jax.tree.map(np.testing.assert_array_equal, kv, offload.together(stowed))
    assert int(kv.lost[0, 0]) > 0


@pytest.mark.parametrize("block", [1, 4])
def test_unused_slots_are_moved_to_the_front(block):
    kv = cache_of(5)
    got = jax.jit(functools.partial(offload.aligned, block=block))(kv)
    assert int(got.cursor) == {1: 10, 4: 9}[block]
    shift = int(got.cursor) - 5
    np.testing.assert_array_equal(got.k[:, :, shift:], kv.k[:, :, : 10 - shift])
    np.testing.assert_array_equal(got.pos[:, :, shift : shift + 5], kv.pos[:, :, :5])
    assert (np.asarray(got.pos)[:, :, :shift] == -1).all()


def test_bytes_and_errors():
    kv = cache_of(5)
    total = sum(x.nbytes for x in jax.tree.leaves(kv))
    assert offload.nbytes(kv) == (total, 0)
    assert offload.nbytes(offload.stow(kv, 5)) == (total - 2 * 2 * 2 * 5 * 3 * 4, 2 * 2 * 2 * 5 * 3 * 4)
    with pytest.raises(ValueError, match="slots"):
        offload.stow(kv, 11)
    with pytest.raises(ValueError, match="what"):
        offload.stow(kv, 5, ("pos",))
    with pytest.raises(ValueError, match=r"6 rows.*5 slots.*new="):
        append(offload.stow(kv, 5), *(jnp.zeros((2, 2, 6, 3)),) * 2, jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 2, 6)))
    with pytest.raises(NotImplementedError, match="host memory"):
        see = toys.sight(4)._replace(impl="interpret")
        attend_slots(jnp.zeros((2, 2, 1, 3)), jnp.zeros((2, 1), jnp.int32), offload.stow(kv, 5), jnp.zeros((2, 2, 1), jnp.int32), see)
