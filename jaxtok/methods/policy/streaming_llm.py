"""StreamingLLM. Source: arXiv:2309.17453; mit-han-lab/streaming-llm (kv_cache.py, pos_shift/modify_llama.py)."""

import dataclasses

from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check, heads
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.registry import register
from jaxtok.core.types import KV


@register(
    "streaming_llm",
    site="policy",
    paper="arXiv:2309.17453",
    title="Efficient Streaming Language Models with Attention Sinks",
    authors="Guangxuan Xiao and Yuandong Tian and Beidi Chen and Song Han and Mike Lewis",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(CachePolicy):
    """Keep the first `sinks` tokens and the newest others; no score is computed.

        live = {j : j < sinks} and the (keep - sinks) largest j

    `compact` (the paper): keys are stored before the rotary embedding and read at their rank among the live slots, the query at its own,
    so no distance exceeds the cache in a step (a prefill, the first or a continued one, attends to all its rows before it evicts). `compact=False`: keys stay at their positions in the text (kvpress's StreamingLLMPress, which is not
    the paper's method unless its keys are re-rotated). A step attends to its own key as well, keep + 1 in all; then the oldest
    non-sink goes. `sinks` = 0 is window attention; up to `capacity` tokens it is full attention, both ways.

    Departure: where several tokens come at once, the official code makes room for all of them before it attends; here they run one after
    another, which is what its evaluation does.
    """

    capacity: int
    sinks: int = 4
    compact: bool = True

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.budget("capacity", self.capacity, self.sinks + 1)

    @property
    def raw(self) -> bool:  # type: ignore[override]
        return self.compact

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        return heads.oldest(kv, self.sinks)
