"""GlobalCom2. Source: arXiv:2501.05179; xuyang-liu16/GlobalCom2 (llava_arch.py, apply_customvit.py), Apache-2.0: written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.reduce import segment_sum
from jaxtok.core.registry import register
from jaxtok.core.select import choose, choose_groups
from jaxtok.core.selector import GridSelector
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "globalcom2",
    site="select",
    paper="arXiv:2501.05179",
    title="Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration",
    authors="Xuyang Liu and Ziming Wang and Yuhang Han and Yingyao Wang and Jiale Yuan and Jun Song and Bo Zheng and Linfeng Zhang and "
    "Siteng Huang and Honggang Chen",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalCom2(GridSelector):
    """Let the thumbnail say how much of each crop is kept, and with the crop's own view say what.

        g_j = mean over heads of q_CLS . k_j / sqrt(d), before the softmax, in the layer behind the last that ran, each sub-image's own
        crop ratios: s_p = sum of the thumbnail's g in the place of crop p,  sigma = softmax((s - max s) / temperature),
                     r_p = min(R (1 + sigma_p - mean sigma), 1)
        score in crop p: g / |g| over its live rows  +  G / |G|,  G = the thumbnail's g, bilinear on the joined live rows, cut to the crop
        kept: the floor(N_p r_p) best of crop p's N_p live rows, the floor(R n) best of the thumbnail

    R = `ratio`; None = image rows that may stay / image rows (the ratio that `keep` implies is never exceeded). A place is floor(side /
    grid) cells of the thumbnail's side, the last takes the rest. The thumbnail stands by falling score (rank="official") or in raster
    order (rank="raster"); crops in raster order, newlines stay. Padding rows are dead, and the joined rows are those that live; the
    official code writes indices of the un-padded list to the padded grid, a bug that is not copied. grid=None: one image, its floor(R n)
    best rows, or with `crops` the grid that the caller tells of each image, of that many sub-images at most. Equal g everywhere: r_p = R.
    R=1: the identity up to the thumbnail's order (ours: the formula lets crops below the mean go under 1). Where the floors leave more
    than `capacity` (crops of unequal size) the last crops give way. Needs `cell`; evidence of joined crops has `lead` [b h crops d].
    """

    ratio: float | None = None
    temperature: float = 10.0
    side: int = 24
    rank: str = "official"

    def __post_init__(self):
        super().__post_init__()
        check.count("side", self.side, 1, 1000)
        check.between("temperature", self.temperature, 1e-6, 1e9)
        check.one_of("rank", self.rank, ("official", "raster"))
        if self.ratio is not None:
            check.share("ratio", self.ratio)
        if self.grid is not None and max(self.grid) > self.side:
            raise ValueError(f"a thumbnail of side={self.side} has no place for crops {self.grid}")

    @property
    def needs(self) -> Needs:
        return Needs(own=True, lead=True, keys=True)

    def logits(self, tokens: Tokens, evidence: Evidence):
        """g [b n]."""
        lead, keys = check.given("lead", evidence.lead).astype(jnp.float32), check.given("keys", evidence.keys).astype(jnp.float32)
        if keys.ndim != 4 or keys.shape[2] != tokens.pos.shape[1]:
            raise ValueError(f"keys are {list(keys.shape)} for rows {list(tokens.pos.shape)}; they must be [b g n d]")
        g, d = keys.shape[1], keys.shape[3]
        if lead.ndim == 3:
            lead = lead[:, :, None]
        lead = jnp.mean(lead.reshape(lead.shape[0], g, -1, *lead.shape[2:]), 2)  # the mean over query heads of one key head
        each = jnp.einsum("bgpd,bgnd->bpn", lead, keys) / (g * d**0.5)
        if each.shape[1] == 1:
            return each[:, 0]
        group = self.group(tokens)
        return jnp.take_along_axis(each, jnp.minimum(group, each.shape[1] - 1)[:, None], 1)[:, 0]

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return jax.lax.stop_gradient(self.logits(tokens, evidence))

    def ratios(self, thumbnail, r, evidence: Evidence):
        """f32 [b crops-1] of the thumbnail's g [b side side]."""
        grid = self.crop_grid(evidence)
        edge = lambda k: jnp.minimum(jnp.arange(self.side, dtype=jnp.int32)[None] // jnp.maximum(self.side // k, 1), k - 1)
        rows, cols = edge(grid[:, :1]), edge(grid[:, 1:])
        place = (rows[:, :, None] * grid[:, 1, None, None] + cols[:, None]).reshape(len(grid), -1)
        flat = thumbnail.reshape(thumbnail.shape[0], -1)
        s = segment_sum(flat, jnp.broadcast_to(place, flat.shape), self.crops - 1)
        many = (grid[:, 0] * grid[:, 1])[:, None]
        there = jnp.arange(self.crops - 1, dtype=jnp.int32)[None] < many
        sigma = jax.nn.softmax((s - jnp.max(s, -1, keepdims=True, where=there, initial=-jnp.inf)) / self.temperature, -1, where=there)
        return jnp.where(there, jnp.minimum(r[:, None] * (1 + sigma - 1 / many), 1.0), 0.0)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        own = jnp.clip(jnp.where(free, self.score(params, tokens, evidence), 0.0), -1e15, 1e15)
        n = jnp.sum(free, -1, dtype=jnp.int32)
        r = jnp.minimum(room.astype(jnp.float32) / jnp.maximum(n, 1).astype(jnp.float32), 1.0 if self.ratio is None else self.ratio)
        floor = lambda x: jnp.floor(x + 1e-4).astype(jnp.int32)  # R n of the ratio that was written
        if self.crops == 1:
            return choose(own, free, jnp.minimum(floor(r * n.astype(jnp.float32)), room), most=self.capacity)
        group, p = self.group(tokens), jnp.arange(self.crops, dtype=jnp.int32)[None, None]
        mine = (group[..., None] == p) & free[..., None]
        size = jnp.sum(mine, 1, dtype=jnp.int32)
        thumb, crop = mine[..., 0], free & (group > 0)
        flat = jnp.clip(tokens.cell[..., 0], 0, self.side - 1) * self.side + jnp.clip(tokens.cell[..., 1], 0, self.side - 1)
        table = segment_sum(jnp.where(thumb, own, 0.0), jnp.where(thumb, flat, -1), self.side**2)
        wide = jnp.where(crop, self.cut(tokens, table, group, crop, evidence), 0.0)
        length = lambda x: jnp.sqrt(segment_sum(x * x, jnp.where(free, group, -1), self.crops))
        unit = lambda x: x / jnp.maximum(jnp.take_along_axis(length(x), group, 1), 1e-12)
        score = jnp.where(thumb, own, unit(own) + unit(wide))
        each = jnp.concatenate([r[:, None], self.ratios(table.reshape(-1, self.side, self.side), r, evidence)], 1)
        k = jnp.where(r[:, None] >= 1, size, floor(size.astype(jnp.float32) * each))
        before = jnp.cumsum(k, -1) - k
        return choose_groups(score, group, free, jnp.clip(room[:, None] - before, 0, k))

    def cut(self, tokens: Tokens, table, group, crop, evidence: Evidence):
        """The thumbnail's g [b side*side], bilinear (half-pixel centres, no corners aligned), at each crop row."""
        cols = self.crop_grid(evidence)[:, 1:]
        index = jnp.maximum(group - 1, 0)
        at = jnp.clip(tokens.cell, 0, self.side - 1) + self.side * jnp.stack([index // cols, index % cols], -1)
        low = jnp.min(jnp.where(crop[..., None], at, 2**20), 1, keepdims=True)
        span = jnp.maximum(jnp.max(jnp.where(crop[..., None], at, 0), 1, keepdims=True) - low + 1, 1).astype(jnp.float32)
        x = jnp.clip(((at - low).astype(jnp.float32) + 0.5) * (self.side / span) - 0.5, 0.0, self.side - 1.0)
        first = jnp.floor(x).astype(jnp.int32)
        part, then = x - first.astype(jnp.float32), jnp.minimum(first + 1, self.side - 1)
        pick = lambda y, z: jnp.take_along_axis(table, y[..., 0] * self.side + z[..., 1], 1)
        fy, fx = part[..., 0], part[..., 1]
        over = pick(first, first) * (1 - fx) + pick(first, then) * fx
        return over * (1 - fy) + (pick(then, first) * (1 - fx) + pick(then, then) * fx) * fy

    def order(self, tokens: Tokens, evidence: Evidence, mask):
        if self.rank == "raster":
            return None
        row = jnp.arange(tokens.pos.shape[1], dtype=jnp.int32)[None]
        falling = jnp.argsort(jnp.argsort(-self.score({}, tokens, evidence), axis=-1, stable=True), axis=-1).astype(jnp.int32)
        return jnp.where(self.group(tokens) == 0, falling, tokens.pos.shape[1] + row)
