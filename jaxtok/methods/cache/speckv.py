"""SpecKV: a draft looks ahead. Source: arXiv:2506.08373; furiosa-ai/draft-based-approx-llm, speckv/util.py."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from jaxtok.core import check, score
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Protect


@register(
    "speckv",
    site="cache",
    paper="arXiv:2506.08373",
    title="Draft-based Approximate Inference for LLMs",
    authors="Kevin Galim and Ethan Ewer and Wonjun Kang and Minjae Lee and Hyung Il Koo and Kangwook Lee",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecKV(CacheScorer):
    """Keep the keys that the end of the prompt or a draft of the answer attends to most.

        score_j = pool_j( max over the h/g query heads and the last window + look + 1 queries i of A_ij ),   j before the window

    The queries: `window` tokens, the last token of the prompt, `look` tokens that a draft model continues it with. A: softmax over all keys
    that query i sees, the draft's included. The cache holds the prompt without its last token, which is fed again as the first input of the
    generation, and nothing of the draft: its `window` newest tokens stay, so capacity - window others do. Positions stay.
    `decode.prefill_lookahead` makes the draft and these caches; a plain prefill is refused. What a draft leaves short attends to nothing.

    over="mean" averages over the queries and the group (`group` follows `over`). look=0 with over="mean", pool=1 is SnapKV with a window
    (and a capacity) one larger. kind "max" and pool=7 as in the paper; ties of its plateaus go to the older slot.

    Departures: the official code repeats keys to h heads and is run on one sequence; its sparse prefill (vertical slash) is another method.
    """

    passes: ClassVar[str] = "decode.prefill_lookahead"
    drafts: ClassVar[bool] = True
    capacity: int
    window: int = 32
    look: int = 32
    pool: int = 7
    kind: str = "max"
    over: str = "max"

    def __post_init__(self):
        check.count("window", self.window)
        check.count("look", self.look, 0)
        check.one_of("kind", self.kind, ("avg", "max"))
        check.one_of("over", self.over, ("max", "mean"))
        check.count("pool", self.pool)
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and >= 1, so that it stays centred; got {self.pool}")
        check.budget("capacity", self.capacity, self.window)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window + self.look + 1)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows = check.given("rows", evidence.rows)[:, :, -self.needs.rows :]
        candidate = (kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen)
        return score.window_attention(rows, candidate, kv.k.shape[1], how=self.over, over=self.over, width=self.pool, kind=self.kind)
