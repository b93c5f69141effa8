"""PyramidKV. Source: arXiv:2406.02069; Zefan-Cai/KVCache-Factory, pyramidkv_utils.py; kvpress PyramidKVPress."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.core import budget, check, score
from jaxtok.core.protocols import CacheCompressor, CacheScorer, top_slots
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Plan, Protect

LONG = 1 << 24  # a cache too long to cut the pyramid's tip off


@register(
    "pyramidkv",
    site="cache",
    paper="arXiv:2406.02069",
    title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    authors=(
        "Zefan Cai and Yichi Zhang and Bofei Gao and Yuliang Liu and Tianyu Liu and Keming Lu and Wayne Xiong and Yue Dong and Baobao "
        "Chang and Junjie Hu and Wen Xiao"
    ),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(CacheScorer):
    """SnapKV's selection with a budget that falls with depth: early layers spread their attention, late ones do not.

        score_j = pool_j( mean over the h/g query heads of  sum over the last w queries i of  A_ij ),   j before the window
        c = capacity - w,  min = c // beta,  max = 2c - min;  where max > n - w:  max = n - w, min = 2c - max
        slots of layer i of l = round(max - i (max - min) / (l - 1)) + w;  all where n <= capacity;  `capacity` where n < 2c

    `capacity` is that of the average layer and n the static number of slots, so each layer's arrays have their own size. `layer` gives
    a layer's instance, whose `capacity` is what it keeps of a long cache; without it, and with one layer, this is SnapKV. `keep` is the
    average layer's budget too: it keeps what the same capacity would. Rounding is half up and the layers sum to l * capacity up to
    rounding; beta=1 is uniform.

    variant="official": the step between layers is (max - min) // (l - 1), so the late layers, and the sum, are larger.
    variant="kvpress": the window lies inside what is shared out (c = capacity, no + w), min is not rounded, and the layers are uniform
    unless n >= max >= min >= w, which at the usual budgets is the case. kvpress rounds half to even, and shares out n (1 - ratio) tokens
    where that is no whole number, too.

    Departures: n is the bucket's length, so that shapes are static: a row shorter than an early layer's slots leaves some of them empty
    and late layers do not make up for it. Selection at the KV heads as in SnapKV.
    """

    capacity: int
    window: int = 64
    pool: int = 5
    kind: str = "avg"
    group: str = "mean"
    beta: int = 20
    variant: str = "paper"
    place: tuple[int, int, int] | None = None  # (layer, layers, capacity of the average layer), set by `layer`

    def __post_init__(self):
        check.count("window", self.window, 1)
        check.one_of("kind", self.kind, ("avg", "max"))
        check.one_of("group", self.group, tuple(score.REDUCTIONS))
        check.at_least("beta", self.beta, 1)
        check.one_of("variant", self.variant, ("paper", "official", "kvpress"))
        check.budget("capacity", self.capacity, self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and >= 1, so that it stays centred; got {self.pool}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    @property
    def average(self) -> int:
        """Slots of the average layer."""
        return self.capacity if self.place is None else self.place[2]

    @property
    def slots(self) -> int:
        if self.place is not None:
            return max(self.capacity, self.average)
        return self.layer(0, 2).capacity  # the first layer has most, however many follow

    def resize(self, capacity: int) -> CacheCompressor:
        """Another capacity; of a layer's instance it is that layer's own, whatever the pyramid would give it."""
        return dataclasses.replace(self, capacity=capacity, place=None if self.place is None else (0, 1, capacity))

    def layer(self, i: int, layers: int) -> CacheCompressor:
        here = dataclasses.replace(self, place=(i, layers, self.capacity))
        return dataclasses.replace(here, capacity=int(here.share(self.capacity, LONG)))

    def share(self, total, n: int):
        """Slots of this layer where the average layer has `total` <= n (an int, or an i32 array) and the cache n."""
        if self.place is None or self.place[1] < 2:
            return total
        i, last, w = self.place[0], self.place[1] - 1, self.window
        xp = np if isinstance(total, int) else jnp
        inside = self.variant == "kvpress"
        unit = self.beta if inside else 1  # kvpress: exact, in steps of 1/beta of a slot
        c = (total if inside else xp.maximum(total - w, 0)) * unit
        high = xp.minimum(2 * c - c // self.beta, (n - w) * unit)
        low = 2 * c - high
        if self.variant == "official":
            count = high - i * ((high - low) // last)
        else:
            count = (2 * (high * last - i * (high - low)) + last * unit) // (2 * last * unit)
        if inside:
            return xp.where((high <= n * unit) & (low <= high) & (low >= w * unit), count, total)
        return xp.where(n < 2 * c, total, count + w)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows = check.given("rows", evidence.rows)[:, :, -self.window :]
        candidate = (kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen)
        return score.window_attention(rows, candidate, kv.k.shape[1], how=self.group, over="sum", width=self.pool, kind=self.kind)

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        b, g, n = kv.pos.shape
        most = min(self.average, n)
        if keep is not None:
            keep = self.share(budget.per_head(keep, (b, g), most), n)
        safe = self.protect.mask(kv.pos, kv.seen)
        return top_slots(kv, self.score(params, kv, evidence), safe, int(self.share(most, n)), keep)

    def whole(self, n: int) -> bool:
        return self.average >= n  # not this layer's own capacity: short caches are uniform
