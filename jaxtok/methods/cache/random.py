"""Random slots: what every score must beat."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect


@register("random", paper="baseline", site="cache")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(CacheScorer):
    """Keep slots drawn without replacement, uniformly, for each KV head apart.  score_j ~ U[0, 1).

    The draw is a function of (key, seed, head, position): the same for every row of a batch, wherever the row lies and whatever else
    is in it. The key is the model's (`evidence.key`, another for each layer); without one it comes from `seed` and the layer.
    """

    capacity: int
    seed: int = 0
    protect: Protect = CacheScorer.protect

    def __post_init__(self):
        check.kind("protect", self.protect, Protect)
        check.budget("capacity", self.capacity, self.protect.total)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        if evidence.key is not None:
            key = jax.random.fold_in(evidence.key, self.seed)
        else:
            key = jax.random.fold_in(jax.random.key(self.seed), 0 if evidence.layer is None else evidence.layer)
        head = jnp.broadcast_to(jnp.arange(kv.pos.shape[1], dtype=jnp.int32)[None, :, None], kv.pos.shape)

        def draw(head, pos):
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, head), pos), dtype=jnp.float32)

        return jax.vmap(draw)(head.ravel(), jnp.maximum(kv.pos, 0).ravel()).reshape(kv.pos.shape)
