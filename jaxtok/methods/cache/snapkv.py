"""SnapKV. Source: arXiv:2404.14469; FasterDecoding/SnapKV, snapkv_utils.py; kvpress SnapKVPress; KVCache-Factory SnapKVCluster."""

import dataclasses

from jaxtyping import Array, Float

from jaxtok.core import check, score
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Protect


@register(
    "snapkv",
    site="cache",
    paper="arXiv:2404.14469",
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    authors=(
        "Yuhong Li and Yingbing Huang and Bowen Yang and Bharat Venkitesh and Acyr Locatelli and Hanchen Ye and Tianle Cai and Patrick "
        "Lewis and Deming Chen"
    ),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(CacheScorer):
    """Keep the last `window` tokens and the keys that they attend to most.

        score_j = pool_j( reduce over the h/g query heads of  sum over the last w queries i of  A_ij ),   j before the window

    A is the softmax attention over all keys that query i sees, the window's included. Pooling is centred over `pool` slots, with zeros
    past the ends (dead slots, the window): "avg" divides by `pool` everywhere, "max" takes the largest. The window is counted in
    `capacity`. A cache of at most `capacity` slots stays whole, and so does a row with at most `window` tokens.

    window=1, pool=1 is TOVA's score for each KV head apart. Without pooling, permuting the context permutes what is kept.

    Departures: the official code repeats the keys to h heads and selects for each query head; here each of the g KV heads selects, by
    the `group` mean (kvpress, and KVCache-Factory's default) or max. kvpress averages over the window where the paper sums: the order
    is the same. The defaults are kvpress's and the code's constructor's; its configuration for LongBench has window=32, pool=7,
    kind="max". Max pooling makes plateaus, whose ties go to the older slot.
    """

    capacity: int
    window: int = 64
    pool: int = 5
    kind: str = "avg"
    group: str = "mean"

    def __post_init__(self):
        check.count("window", self.window, 1)
        check.one_of("kind", self.kind, ("avg", "max"))
        check.one_of("group", self.group, tuple(score.REDUCTIONS))
        check.budget("capacity", self.capacity, self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and >= 1, so that it stays centred; got {self.pool}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows = check.given("rows", evidence.rows)[:, :, -self.window :]
        candidate = (kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen)
        return score.window_attention(rows, candidate, kv.k.shape[1], how=self.group, over="sum", width=self.pool, kind=self.kind)
