"""HiRED. Source: arXiv:2408.10945; hasanar1f/HiRED (models/llava_next/modeling_llava_next.py, models/llava/modeling_llava.py), MIT."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.select import choose_groups, group_ranks
from jaxtok.core.selector import GridSelector, part
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "hired",
    site="select",
    paper="arXiv:2408.10945",
    title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in Resource-Constrained "
    "Environments",
    authors="Kazi Hasan Ibn Arif and JinYi Yoon and Dimitrios S. Nikolopoulos and Hans Vandierendonck and Deepu John and Bo Ji",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRED(GridSelector):
    """Share a budget out among the crops of an image by what an early layer sees in its thumbnail, keep what a late layer looks at.

        of K rows: thumbnail t = min(floor(alpha K), n);  crops together r = min(K - t, (P - 1) n)
        marks = the floor((1 - alpha) n) thumbnail rows of largest A^early[CLS, j];  m_i of them lie in the place of crop i
        k_i = floor(r m_i / sum m), n at most;   thumbnail: its t best, crop i: its k_i best, by A^late[CLS, j]     (sums over heads)

    P = 1 + grid[0] * grid[1] sub-images (crops in raster order), each of the same n rows; grid=None: one image, its K best rows by A^late,
    or with `crops` the grid that the caller tells of each image, of P sub-images at most.
    Where the floors lose rows, fewer than K are kept. `layers` = (early, late), 0-based; negative from the last that ran (the code names
    them top and bottom the other way round). spatial: "official" cuts the thumbnail's raster into P - 1 runs of equal length (the code's
    reshape: two of four crops' runs are one another's neighbours sideways, half of the rows lie outside the crop's place; its P - 1 must
    divide n, ours rounds runs down), "quadrant" takes the place of each crop (needs `cell`). The share m_i / sum m is a float32, as in
    the code. The official packing joins the crops' rows by raster and drops rows of the un-padding after the budget was spent; here
    padding rows are dead and never chosen. alpha=1: the thumbnail alone. Newline rows stay (the code has none: special=0). Raster order,
    positions repacked.
    """

    alpha: float = 0.5
    layers: tuple[int, int] = (0, -1)
    spatial: str = "official"
    side: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check.between("alpha", self.alpha, 0, 1)
        check.one_of("spatial", self.spatial, ("official", "quadrant"))
        check.kind("layers", self.layers, tuple)
        if len(self.layers) != 2:
            raise ValueError(f"layers={self.layers} must be (early, late)")
        for i in self.layers:
            check.count("layers", i, -(2**31))
        if self.side is not None:
            check.count("side", self.side)

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, layers=self.layers)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return jnp.sum(check.given("cls", evidence.cls)[1].astype(jnp.float32), 1)

    def place(self, tokens: Tokens, thumb, rank, evidence: Evidence):
        """Crop 0, 1, ... (raster) whose part of the picture each thumbnail row is in."""
        grid = self.crop_grid(evidence)
        rows, cols = grid[:, :1], grid[:, 1:]
        if self.spatial == "official":
            n = jnp.sum(thumb, -1, dtype=jnp.int32)[:, None]
            return jnp.minimum(rank // jnp.maximum(n // (rows * cols), 1), rows * cols - 1)
        cell = jnp.where(thumb[..., None], jnp.maximum(tokens.cell, 0), 0)
        side = jnp.max(cell, 1, keepdims=True) + 1 if self.side is None else jnp.full_like(cell[:, :1], self.side)
        at = jnp.clip(cell * grid[:, None] // side, 0, grid[:, None] - 1)
        return at[..., 0] * cols + at[..., 1]

    def shares(self, tokens: Tokens, evidence: Evidence, free, room):
        """i32 [b P]: how many rows of each sub-image stay."""
        group = self.group(tokens)
        size = jnp.sum((group[..., None] == jnp.arange(self.crops)[None, None]) & free[..., None], 1, dtype=jnp.int32)
        n, rest = size[:, 0], jnp.sum(size[:, 1:], 1)
        thumbnail = jnp.minimum(part(room, self.alpha), n)
        rest = jnp.minimum(room - thumbnail, rest)
        thumb = free & (group == 0)
        raster = jnp.cumsum(thumb, -1, dtype=jnp.int32) - 1
        first = jnp.sum(check.given("cls", evidence.cls)[0].astype(jnp.float32), 1)
        early = Fraction(1) - Fraction(str(self.alpha)).limit_denominator(10_000)
        marked = group_ranks(first, group, thumb) < ((n * early.numerator) // early.denominator)[:, None]
        at = jnp.where(marked & thumb, self.place(tokens, thumb, raster, evidence), -1)
        m = jnp.sum(at[..., None] == jnp.arange(self.crops - 1)[None, None], 1, dtype=jnp.int32)
        share = m.astype(jnp.float32) / jnp.maximum(jnp.sum(m, -1, keepdims=True), 1).astype(jnp.float32)
        given = jnp.floor(share * rest[:, None].astype(jnp.float32)).astype(jnp.int32)
        return jnp.concatenate([thumbnail[:, None], jnp.minimum(given, size[:, 1:])], 1)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        if self.crops == 1:
            return super().stay(params, tokens, evidence, free, room)
        return choose_groups(self.score(params, tokens, evidence), self.group(tokens), free, self.shares(tokens, evidence, free, room))
