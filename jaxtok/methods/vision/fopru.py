"""FoPru. Source: arXiv:2411.14164; the authors' group ships it as hydrainfer/layer/token_prunning.py: written from the formulas."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxtok.core import check
from jaxtok.core.reduce import segment_sum
from jaxtok.core.registry import register
from jaxtok.core.select import choose
from jaxtok.core.selector import Selector
from jaxtok.core.types import SPECIAL, TEXT, Evidence, Needs, Tokens


@register(
    "fopru",
    site="select",
    paper="arXiv:2411.14164",
    title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
    authors="Lei Jiang and Weizhe Huang and Tongxuan Liu and Yuting Zeng and Jing Li and Lechao Cheng and Xiaohua Xu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FoPru(Selector):
    """Keep what the patches attend to, or those that attend to patches: whichever tells them apart more.

        M = mean over heads of A among image rows (class row and column cut out, so rows need not sum to 1)
        s1_j = mean_i M_ij (received),   s2_i = mean_j M_ij (given);   s = the one of larger variance (ties: s1)
        by="rank": the `capacity` rows of largest s;   by="row": whole rows of the grid, those of largest summed s, while they fit

    Where rows of the softmax are full (no class row), s2 is constant and s1 is taken. by="row" keeps floor(capacity / width) rows of the
    grid of `width` columns (needs `cell`; ties: the upper one), so fewer image rows than the capacity may stay. Which layer and which
    ratio the paper takes was not seen; the attribution of the file is inferred. It reads the whole attention matrix of a layer. Raster
    order, positions repacked. One image a sequence.
    """

    by: str = "rank"
    width: int = 24

    def __post_init__(self):
        super().__post_init__()
        check.one_of("by", self.by, ("rank", "row"))
        check.count("width", self.width)
        if self.crops != 1:
            raise ValueError(f"FoPru scores one image, got crops={self.crops}")
        if self.by == "row" and self.capacity < self.width:
            raise ValueError(f"capacity={self.capacity} holds no grid row of width={self.width}")

    @property
    def needs(self) -> Needs:
        return Needs(probs=True)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        free = (tokens.pos >= 0) & (tokens.kind != TEXT) & (tokens.kind != SPECIAL)
        m = jnp.mean(evidence.probs.astype(jnp.float32), 1)
        m = jnp.where(free[:, :, None] & free[:, None, :], m, 0.0)
        n = jnp.maximum(jnp.sum(free, -1, keepdims=True), 1).astype(jnp.float32)
        received, given = jnp.sum(m, 1) / n, jnp.sum(m, 2) / n

        def variance(s):
            away = jnp.where(free, s - jnp.sum(jnp.where(free, s, 0.0), -1, keepdims=True) / n, 0.0)
            return jnp.sum(jnp.clip(away, -1e15, 1e15) ** 2, -1, keepdims=True)

        return jnp.where(variance(given) > variance(received), given, received)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        if self.by == "rank":
            return super().stay(params, tokens, evidence, free, room)
        score = lax.stop_gradient(self.score(params, tokens, evidence))
        n = free.shape[1]
        line = jnp.where(free, jnp.clip(tokens.cell[..., 0], 0, n - 1), -1)
        there = segment_sum(free.astype(jnp.float32), line, n) > 0
        lines = choose(segment_sum(jnp.where(free, score, 0.0), line, n), there, room // self.width, most=self.capacity // self.width)
        return free & jnp.take_along_axis(lines, jnp.maximum(line, 0), 1)
