"""H2O, heavy hitters. Source: arXiv:2306.14048; FMInference/H2O (utils_real_drop/modify_llama.py); kvpress ObservedAttentionPress."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, score
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs


@register(
    "h2o",
    site="policy",
    paper="arXiv:2306.14048",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    authors=(
        "Zhenyu Zhang and Ying Sheng and Tianyi Zhou and Tianlong Chen and Lianmin Zheng and Ruisi Cai and Zhao Song and Yuandong Tian "
        "and Christopher Ré and Clark Barrett and Zhangyang Wang and Beidi Chen"
    ),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(CachePolicy):
    """Keep the newest tokens and, of the older ones, those that have received most attention.

        A_j = sum over the queries i so far of  softmax over the live keys of (q_i . k / sqrt(d))_j,   reduced over the h/g query heads

    `recent` is the fraction of the budget in force that goes to the newest tokens (the paper's even split; rounded half up, at least the
    newest token unless it is 0), the rest goes to the largest A. A starts with the column sums of the prefill and grows at each step
    before the eviction; what is evicted takes its A along. recent=1 is window attention; capacity >= the text is full attention.

    variant="kvpress": A_j is divided by the number of queries that could see j (seen - pos_j), which takes away the bias to early tokens;
    kvpress does so once, after the prefill, and keeps no recent window (recent=0).
    `compact`: keys are stored raw and read at their rank among the live slots (the official `_streaming` file).

    Departures: the official code works for h = g and one sequence only (it sums over the batch); `group` reduces A over the h/g query
    heads of a KV head. Its masking version always hides the token that leaves the recent window, which we take for a slip.
    """

    capacity: int
    recent: float = 0.5
    group: str = "mean"
    variant: str = "paper"
    compact: bool = False

    def __post_init__(self):
        check.between("recent", self.recent, 0.0, 1.0)
        check.one_of("group", self.group, tuple(score.REDUCTIONS))
        check.one_of("variant", self.variant, ("paper", "kvpress"))
        check.budget("capacity", self.capacity)

    @property
    def needs(self) -> Needs:
        return Needs(received=True)

    @property
    def step_needs(self) -> Needs:
        return Needs(received=True)

    @property
    def raw(self) -> bool:  # type: ignore[override]
        return self.compact

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        return Held(score.to_kv_heads(check.given("received", evidence.received), kv.k.shape[1], self.group))

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        return Held(state.slots + self.start(params, kv, evidence).slots)

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        newest = budget.keep(self.recent, keep) if self.recent else jnp.zeros_like(keep)
        age = kv.seen[:, None, None] - kv.pos  # 1 for the newest token: how many queries could see it
        received = state.slots / jnp.maximum(age, 1).astype(jnp.float32) if self.variant == "kvpress" else state.slots
        return (kv.pos >= 0) & (age <= newest[..., None]), received
