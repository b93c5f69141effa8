"""Random numbers that hang on where they are used: the same for a query and a key wherever they stand in a batch, a chunk or a cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

ROUNDS = ((13, 15, 26, 6), (17, 29, 16, 24), (13, 15, 26, 6), (17, 29, 16, 24), (13, 15, 26, 6))


def words(key: Array | None, seed: int | None, layer) -> UInt32[Array, "2"] | None:
    """What `gumbel` draws from: two words of the call's key (a layer's own already) and the seed, or of seed and layer where there is none.

    None where `seed` is None: no noise.
    """
    if seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, seed)
    return jax.random.bits(jax.random.fold_in(key, layer), (2,), jnp.uint32)


def gumbel(
    words: UInt32[Array, "2"] | UInt32[Array, "b 2"], q_pos: Int[Array, "b t"], k_pos: Int[Array, "b e s"], heads: int
) -> Float32[Array, "b h t s"]:
    """Gumbel(0, 1) numbers of each of `heads` heads, each query and each key; e = 1 or a divisor of `heads` (head i's keys are i // (h/e)).

        z = -log(-log u),   u = (Threefry-2x32-20(words, (head, query); (key, 0)) >> 9 + 1/2) / 2^23

    A number hangs on `words`, the head, and the positions alone. -2.8 < z < 16.
    """
    b, e, s = k_pos.shape
    if heads % e:
        raise ValueError(f"{heads} heads do not share the keys of {e}")
    words = jnp.broadcast_to(words, (b, 2))
    head = jnp.arange(heads, dtype=jnp.uint32)[None, :, None]
    unsigned = lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    one, two = _threefry(words[:, 0, None, None], words[:, 1, None, None], head, unsigned(q_pos)[:, None])  # a key for each query
    keys = jnp.repeat(unsigned(k_pos), heads // e, 1)[:, :, None]
    bits, _ = _threefry(one[..., None], two[..., None], keys, jnp.zeros((), jnp.uint32))
    u = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(u))


def _threefry(k0, k1, x0, x1) -> tuple[Array, Array]:
    """Threefry-2x32 in 20 rounds (Salmon et al., 2011), over arrays of any shapes that broadcast."""
    shape = jnp.broadcast_shapes(*(x.shape for x in (k0, k1, x0, x1)))
    k0, k1, x0, x1 = (jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, (1,) * len(shape))) for x in (k0, k1, x0, x1))
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i, turns in enumerate(ROUNDS):
        for r in turns:
            x0 = x0 + x1
            x1 = ((x1 << r) | (x1 >> (32 - r))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
