"""VisionZip. Source: arXiv:2412.04467 (dvlab-research/VisionZip): written from knowledge of the paper and from VisionDrop's use of it."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.condense import condense
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


@register(
    "visionzip",
    site="select",
    paper="arXiv:2412.04467",
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    authors="Senqiao Yang and Yukang Chen and Zhuotao Tian and Chengyao Wang and Jingyao Li and Bei Yu and Jiaya Jia",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(Selector):
    """Keep the rows that the class row attends to, merge the others by likeness.

        dominant: the class row and the capacity - contextual rows of largest sum over heads of A[CLS, j]
        of the n other rows every floor(n / c)-th is a target, c = contextual of them
        each other one goes to the target whose key is most like its own (mean over heads, cosine);  target' = target + mean of them

    in the last layer that ran. target + mean is no average: its length grows. The class row stays a visual token (`with_cls`); the paper
    counts it as dominant, so its (54, 10) of 64 tokens is capacity=63. contextual=0: a selection by class attention. Output: dominant
    rows in raster order, then the contextual ones. Needs one image a sequence. capacity = all rows: they stay as they are, in another
    order. Ties: the older row, the first target.
    """

    with_cls = True

    contextual: int = 10

    def __post_init__(self):
        super().__post_init__()
        check.count("contextual", self.contextual, 0, self.capacity)
        if self.crops != 1:
            raise ValueError(f"{type(self).__name__} condenses one image, got crops={self.crops}")

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, keys=True)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, DensePlan]:
        free, stop = pictured(tokens), jax.lax.stop_gradient
        fixed = (tokens.pos >= 0) & ~free
        score = stop(jnp.sum(check.given("cls", evidence.cls).astype(jnp.float32), 1))
        metric = stop(jnp.mean(check.given("keys", evidence.keys).astype(jnp.float32), 1))
        rows = self.count(free.shape[1], free.shape[1])
        return state, condense(tokens, metric, score, free, fixed, self.room(tokens, keep), self.contextual, rows)
