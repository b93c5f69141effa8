"""VisionZip. Source: arXiv:2412.04467 (dvlab-research/VisionZip): written from knowledge of the paper and from VisionDrop's use of it."""

import dataclasses

from jaxtok.core.condense import Condenser
from jaxtok.core.registry import register


@register(
    "visionzip",
    site="select",
    paper="arXiv:2412.04467",
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    authors="Senqiao Yang and Yukang Chen and Zhuotao Tian and Chengyao Wang and Jingyao Li and Bei Yu and Jiaya Jia",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(Condenser):
    """Keep the rows that the class row attends to, merge the others by likeness.

        dominant: the class row and the capacity - contextual rows of largest sum over heads of A[CLS, j]
        of the n other rows every floor(n / c)-th is a target, c = contextual of them
        each other one goes to the target whose key is most like its own (mean over heads, cosine);  target' = target + mean of them

    in the last layer that ran. target + mean is no average: its length grows. The class row stays a visual token (`with_cls`); the paper
    counts it as dominant, so its (54, 10) of 64 tokens is capacity=63. contextual=0: a selection by class attention. Output: dominant
    rows in raster order, then the contextual ones. Needs one image a sequence. capacity = all rows: they stay as they are, in another
    order. Ties: the older row, the first target.
    """

    contextual: int = 10
