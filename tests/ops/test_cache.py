"""Slots of a cache: shapes that do not fit are refused by name (what is written where is tested with the decoder)."""

import jax.numpy as jnp
import pytest

from jaxtok.core.types import KV
from jaxtok.ops import cache

I, F = jnp.int32, jnp.float32


def empty(b=2, g=2, s=5, d=4):
    zero = jnp.zeros
    return KV(
        zero((b, g, s, d)),
        zero((b, g, s, d)),
        zero((b, g, s), I) - 1,
        zero((b, g, s)),
        zero(b, I),
        zero(b, I),
        zero((), I),
        zero((b, g), I),
    )


def test_append():
    rows = jnp.ones((2, 2, 2, 4))
    kv = cache.append(empty(), rows, rows, jnp.asarray([[0, 1], [-1, 0]], I), jnp.zeros((2, 2, 2)))
    assert kv.pos[:, 0].tolist() == [[0, 1, -1, -1, -1], [-1, 0, -1, -1, -1]] and int(kv.cursor) == 2
    for name, change in {"k": (2, 1, 2, 4), "v": (2, 2, 3, 4), "pos": (2, 3), "bias": (2, 2)}.items():
        given = {"k": rows, "v": rows, "pos": jnp.zeros((2, 2), I), "bias": jnp.zeros((2, 2, 2))}
        given[name] = jnp.zeros(change, given[name].dtype)
        with pytest.raises((ValueError, TypeError), match=name):
            cache.append(empty(), **given)
    many = jnp.ones((2, 2, 6, 4))
    with pytest.raises(ValueError, match="6 rows cannot be appended to a cache of 5 slots"):
        cache.append(empty(), many, many, jnp.zeros((2, 6), I), jnp.zeros((2, 2, 6)))


def test_blocks():
    index = jnp.asarray([[[2, -1]]], I)
    assert cache.block_slots(index, 3).tolist() == [[[6, 7, 8, -1, -1, -1]]]
    for block in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"block must be .*got {block}"):
            cache.block_slots(index, block)


def test_scatter():
    x, slots = jnp.asarray([[[1.0, 2.0, 4.0]] * 2]), jnp.asarray([[[3, -1, 0]]], I)
    assert cache.scatter(x, slots, 5).tolist() == [[[4.0, 0.0, 0.0, 1.0, 0.0]] * 2]
    assert cache.scatter(x[:, :, None], slots, 5).shape == (1, 2, 1, 5)
    for other in (jnp.zeros((1, 3, 2)), jnp.zeros((2, 2, 3))):
        with pytest.raises((ValueError, TypeError)):
            cache.scatter(other, slots, 5)
