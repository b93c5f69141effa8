"""A scorer whose scores can be written down, and caches for the wrappers' tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.protocols import CacheScorer
from jaxtok.core.types import KV, Evidence, Protect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(CacheScorer):
    """The score of a slot is the first channel of its value, so it moves with the slot."""

    name = "given"
    capacity: int
    protect: Protect = CacheScorer.protect

    def score(self, params, kv, evidence):
        return kv.v[..., 0].astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlike(CacheScorer):
    """Distance of the first channel of a value from its mean over the live slots: depends on which other slots there are."""

    name = "unlike"
    capacity: int
    protect: Protect = CacheScorer.protect

    def score(self, params, kv, evidence):
        x, live = kv.v[..., 0].astype(jnp.float32), kv.pos >= 0
        mean = jnp.sum(jnp.where(live, x, 0.0), -1, keepdims=True) / jnp.maximum(jnp.sum(live, -1, keepdims=True), 1).astype(jnp.float32)
        return jnp.abs(x - mean)


def cache(scores, lengths=None, dtype=jnp.float32, junk=7e3, seed=0) -> KV:
    """A cache [b g n 4] with these scores [b g n]; of sequence i only the last lengths[i] slots are live, the others hold junk."""
    scores = np.asarray(scores, np.float32)
    b, g, n = scores.shape
    lengths = np.full(b, n) if lengths is None else np.asarray(lengths)
    pos = np.arange(n)[None] - (n - lengths)[:, None]
    live = (pos >= 0)[:, None, :, None]
    k, v = np.random.default_rng(seed).normal(size=(2, b, g, n, 4)).astype(np.float32)
    v[..., 0] = scores
    return KV(
        k=jnp.asarray(np.where(live, k, junk), dtype),
        v=jnp.asarray(np.where(live, v, junk), dtype),
        pos=jnp.asarray(np.repeat(np.maximum(pos, -1)[:, None], g, 1), jnp.int32),
        bias=jnp.zeros((b, g, n), jnp.float32),
        seen=jnp.asarray(lengths, jnp.int32),
        delta=jnp.zeros((b,), jnp.int32),
        cursor=jnp.full((), n, jnp.int32),
        lost=jnp.zeros((b, g), jnp.int32),
    )


def kept(kv: KV) -> list[list[list[int]]]:
    """Live positions of each sequence and head, in the order of the slots."""
    return [[[int(p) for p in head if p >= 0] for head in row] for row in np.asarray(kv.pos)]


NOTHING = Evidence()


def run(*cases):
    """Each case (method, cache, keep=None, evidence=NOTHING) -> its compressed cache; one program for all, as compiling is what costs."""
    args = [(case[1], case[3] if len(case) > 3 else NOTHING, case[2] if len(case) > 2 else None) for case in cases]
    both = jax.jit(lambda args: [case[0].compress({}, kv, seen, keep)[0] for case, (kv, seen, keep) in zip(cases, args, strict=True)])
    return both(args)
