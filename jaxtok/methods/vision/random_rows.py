"""Random rows: what every choice must beat."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Tokens


@register("random_rows", site="select", paper="baseline")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRows(Selector):
    """Keep image rows drawn without replacement, of each crop equally many.

        score_j ~ U(0, 1)

    from the call's key, or from `seed` where it has none; every sequence of a batch draws the same numbers by row, so it does not depend
    on its neighbours. Raster order, repacked. capacity = all rows: the identity.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check.count("seed", self.seed, 0)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        key = jax.random.key(self.seed) if evidence.key is None else evidence.key
        return jnp.broadcast_to(jax.random.uniform(key, tokens.pos.shape[1:])[None], tokens.pos.shape)
