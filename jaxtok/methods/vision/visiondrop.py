"""VisionDrop, encoder stage. Source: arXiv:2506.22283; Ruixxxx/VisionDrop (llava/visionzip/*), Apache-2.0: written from the formulas."""

import dataclasses

from jaxtok.core.condense import Condenser
from jaxtok.core.registry import register


@register(
    "visiondrop.select",
    site="select",
    paper="arXiv:2506.22283",
    title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
    authors="Rui Xu and Yunke Wang and Yong Luo and Bo Du",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionDropSelect(Condenser):
    """The encoder stage of VisionDrop, which is VisionZip's: what the class row attends to stays, the others merge by likeness.

        dominant: the class row and the capacity - contextual rows of largest sum over heads of A[CLS, j]
        of the n other rows every floor(n / c)-th is a target, c = contextual of them
        each other one goes to the target whose key is most like its own (mean over heads, cosine);  target' = target + mean of them

    in the last layer that ran (CLIP-L/14: the last but one). The class row stays a visual token (`with_cls`) and the paper counts it: its
    example, dominant 42 and contextual 6, is capacity=47, contextual=6. target + mean is no average: its length grows. contextual=0: the
    rows of largest class attention alone (ours: the code divides by zero). capacity >= n: all rows. Output: dominant rows in raster
    order, then the contextual ones. The stages between the decoder's layers are another method. Ties: the older row, the first target.
    """

    contextual: int = 6
