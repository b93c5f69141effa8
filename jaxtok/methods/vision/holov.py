"""HoloV. Source: arXiv:2510.02912; obananas/HoloV (llava/model/utils.py, llava_arch.py), Apache-2.0: written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine
from jaxtok.core.reduce import segment_sum
from jaxtok.core.registry import register
from jaxtok.core.select import choose, choose_groups, group_ranks
from jaxtok.core.selector import Selector
from jaxtok.core.types import SPECIAL, TEXT, Evidence, Needs, Tokens


@register(
    "holov",
    site="select",
    paper="arXiv:2510.02912",
    title='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention',
    authors="Xin Zou and Di Lu and Yizhou Wang and Yibo Yan and Yuanhuiyi Lyu and Xu Zheng and Linfeng Zhang and Xuming Hu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HoloV(Selector):
    """Share the budget out among stretches of the image, keep in each what the class row attends to.

        a_j = mean over heads of A[CLS, j];   `runs` stretches of consecutive image rows, one more row in the first ones
        in a run of m rows: S = cosines of its rows, 0 on the diagonal;  mu_i = sum_j S_ij / (m - 1)
            var_i = sum_j (S_ij - mu_i)^2 / (m - 1);   z_i = 1000 a_i + 0.09 mean|1000 a| / (mean|var| + 1e-6) var_i
        w = mean z of the run / (sum of them + 1e-6);   k = floor(w K), what is left over one each to the runs of largest w
        each run keeps its k rows of largest a; all of them, where it has fewer

    Called "crops" in the paper, but the stretches are one-dimensional: 36 rows of a 24 x 24 image are one and a half grid rows. A run of
    one row has z = a. Where runs are shorter than their k, fewer than K rows stay (the code fills up with zero rows that the model
    reads; here they are empty). rank: "raster", or "official": run by run, each by falling a unless it is kept whole (LLaVA; the code
    for Qwen passes its fillers on as an index, a bug that is not copied). runs=1: FasterVLM's rows. Newlines stay where there are any
    (the code drops them). Rows are compared as a projector made them. Ties: the older row.
    """

    runs: int = 16
    rank: str = "raster"

    def __post_init__(self):
        super().__post_init__()
        check.count("runs", self.runs, 1, 2**16)
        check.one_of("rank", self.rank, ("raster", "official"))
        if self.crops != 1:
            raise ValueError(f"HoloV cuts the whole sequence into runs, got crops={self.crops}")

    @property
    def needs(self) -> Needs:
        return Needs(cls=True)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        return jax.lax.stop_gradient(jnp.mean(evidence.cls.astype(jnp.float32), 1))

    def run(self, free):
        """(run of each row, rows of each run)."""
        n = jnp.sum(free, -1, dtype=jnp.int32)[:, None]
        base, more = n // self.runs, n % self.runs
        raster = jnp.cumsum(free, -1, dtype=jnp.int32) - 1
        wide = more * (base + 1)
        run = jnp.where(raster < wide, raster // (base + 1), more + (raster - wide) // jnp.maximum(base, 1))
        return jnp.where(free, run, -1), base + (jnp.arange(self.runs)[None] < more).astype(jnp.int32)

    def weights(self, x, a, free):
        """f32 [b runs]: the share of each run."""
        run, size = self.run(free)
        mine = (run[:, :, None] == run[:, None]) & free[:, None]
        other = mine & ~jnp.eye(run.shape[1], dtype=bool)[None]
        of_row = jnp.take_along_axis(size, jnp.maximum(run, 0), 1).astype(jnp.float32)
        s = jnp.where(other, cosine(x, x), 0.0)
        less = jnp.maximum(of_row - 1, 1.0)
        mu = jnp.sum(s, -1) / less
        var = jnp.sum(jnp.where(mine, s - mu[..., None], 0.0) ** 2, -1) / less
        loud = 1000 * jnp.clip(jnp.where(free, a, 0.0), -1e15, 1e15)
        mean = lambda y: segment_sum(jnp.where(free, y, 0.0), run, self.runs) / jnp.maximum(size, 1).astype(jnp.float32)
        scale = jnp.take_along_axis(mean(jnp.abs(loud)) / (mean(jnp.abs(var)) + 1e-6), jnp.maximum(run, 0), 1)
        z = mean(jnp.where(of_row > 1, loud + 0.09 * scale * var, loud / 1000))
        return z / (jnp.sum(z, -1, keepdims=True) + 1e-6)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        a = self.score(params, tokens, evidence)
        run, size = self.run(free)
        w = self.weights(jax.lax.stop_gradient(tokens.x), a, free)
        k = jnp.floor(jnp.clip(w, 0.0, 1.0) * room[:, None].astype(jnp.float32)).astype(jnp.int32)
        spare = jnp.clip(room - jnp.sum(k, -1), 0, self.runs)
        k = k + choose(w, size > 0, spare).astype(jnp.int32)
        return choose_groups(a, run, free, k)

    def order(self, tokens: Tokens, evidence: Evidence):
        if self.rank == "raster":
            return None
        free = (tokens.pos >= 0) & (tokens.kind != TEXT) & (tokens.kind != SPECIAL)
        run, size = self.run(free)
        n = free.shape[1]
        a = self.score({}, tokens, evidence)
        falling = group_ranks(a, run, free)
        mask = self.stay({}, tokens, evidence, free, jnp.full((free.shape[0],), self.capacity, jnp.int32))
        taken = segment_sum(mask.astype(jnp.float32), run, self.runs).astype(jnp.int32)
        whole = jnp.take_along_axis(taken >= size, jnp.maximum(run, 0), 1)
        row = group_ranks(jnp.broadcast_to(-jnp.arange(n, dtype=jnp.float32)[None], free.shape), run, free)
        return jnp.maximum(run, 0) * n + jnp.minimum(jnp.where(whole, row, falling), n - 1)
