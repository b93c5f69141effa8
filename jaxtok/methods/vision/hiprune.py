"""HiPrune. Source: arXiv:2508.00553; Danielement321/HiPrune (llava_arch.py, qwen2_5_vl_HiPrune.py), MIT: written from the formulas."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.select import choose_groups, group_ranks, mark
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens


def rounded(total, share: Fraction):
    """Nearest whole number to share * total, halves to even, as Python rounds."""
    twice, whole = 2 * ((total * share.numerator) % share.denominator), (total * share.numerator) // share.denominator
    up = (twice > share.denominator) | ((twice == share.denominator) & (whole % 2 == 1))
    return whole + up.astype(jnp.int32)


@register(
    "hiprune",
    site="select",
    paper="arXiv:2508.00553",
    title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    authors="Jizhihui Liu and Feiyi Du and Guangdao Zhu and Niu Lian and Jun Li and Bin Chen",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiPrune(Selector):
    """Keep what a middle layer attends to and its neighbours, then what a deep layer attends to.

        a^l_j = mean over heads and over all queries (the class row's too) of A^l[i, j];   K rows of an image or of each of its crops
        anchors: the round(alpha K / 5) rows of largest a^middle;   buffers: j - 1, j + 1, j - w, j + w of each anchor, in raster
        A = both;   registers: the K - |A| other rows of largest a^deep.       Together: the K largest of a^deep + 2 [j in A]

    Raster numbers count a crop's live image rows; neighbours are cut to its first and last (so j + 1 wraps over the end of a grid row, as
    in the code). width w: columns of the grid; None = from `cell`. K = floor(capacity / crops) of each crop. `layers` = (middle, deep),
    0-based, negative from the last that ran: the paper's 9th of CLIP-L/14 and the last. Works without a class row. alpha=0: registers alone.
    Where A is larger than K its best by a^deep stay (the code fails).

    variant: "paper" (as above, and the code for LLaVA); "qwen": the code for Qwen2.5-VL sums over the queries, so subtracting 1 from
    a^deep does not take A out: rows of A that are picked again as registers count once and fewer than K stay (its layers: the 16th and
    the last; positions="keep_mrope"). Evidence is then about the merged rows: the mean of a merge unit's patches.
    """

    alpha: float = 0.1
    layers: tuple[int, int] = (8, -1)
    width: int | None = None
    variant: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        check.between("alpha", self.alpha, 0, 5)
        check.one_of("variant", self.variant, ("paper", "qwen"))
        check.kind("layers", self.layers, tuple)
        if len(self.layers) != 2:
            raise ValueError(f"layers={self.layers} must be (middle, deep)")
        for i in self.layers:
            check.count("layers", i, -(2**31))
        if self.width is not None:
            check.count("width", self.width, 1, 2**20)

    @property
    def needs(self) -> Needs:
        return Needs(received=True, layers=self.layers)

    def anchored(self, tokens: Tokens, group, free, anchor):
        """Anchors and buffers."""
        n = free.shape[1]
        raster = group_ranks(jnp.broadcast_to(-jnp.arange(n, dtype=jnp.float32)[None], free.shape), group, free)
        mine = (group[..., None] == jnp.arange(self.crops)[None, None]) & free[..., None]
        last = jnp.take_along_axis(jnp.sum(mine, 1, dtype=jnp.int32), group, 1) - 1
        cols = jnp.max(jnp.where(free, tokens.cell[..., 1], 0), -1, keepdims=True) + 1 if self.width is None else self.width
        hit = anchor
        for step in (1, -1, cols, -cols):
            to = group * n + jnp.clip(raster + step, 0, jnp.maximum(last, 0))
            table = mark(jnp.where(anchor, to, -1), self.crops * n)
            hit = hit | (jnp.take_along_axis(table, jnp.clip(group * n + raster, 0, self.crops * n - 1), 1) & free)
        return hit

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        queries = jnp.maximum(jnp.sum(tokens.pos >= 0, -1), 1).astype(jnp.float32)[None, :, None]
        scale = 1.0 if self.variant == "qwen" else 1.0 / queries
        middle, deep = jax.lax.stop_gradient(jnp.mean(evidence.received.astype(jnp.float32), 2) * scale)
        group = self.group(tokens)
        k = jnp.broadcast_to(jnp.minimum(room // self.crops, free.shape[1])[:, None], (free.shape[0], self.crops))
        share = Fraction(str(self.alpha)).limit_denominator(1000) / 5
        a = self.anchored(tokens, group, free, choose_groups(middle, group, free, rounded(k, share)))
        if self.variant == "paper":
            return choose_groups(deep + jnp.where(a, 2.0, 0.0), group, free, k)
        mine = (group[..., None] == jnp.arange(self.crops)[None, None]) & a[..., None]
        more = choose_groups(deep - a.astype(jnp.float32), group, free, k - jnp.sum(mine, 1, dtype=jnp.int32))
        return choose_groups(deep + jnp.where(a, 1e6, 0.0), group, a | more, k)
