"""Keyformer. Source: arXiv:2403.09054; d-matrix-ai/keyformer-llm (models/mpt-keyformer-lib/attention.py, attention_keyformer_new_bias.py)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, score, select
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Noise
from jaxtok.ops.noise import gumbel, words


class Clock(NamedTuple):
    """The policy's state beside the scores."""

    words: jax.Array  # u32 [b 2] what the noise is drawn from
    begun: jax.Array  # i32 [b] `seen` after the last prefill: a step's number counts from there


@register(
    "keyformer",
    site="policy",
    paper="arXiv:2403.09054",
    title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    authors=("Muhammad Adnan and Akhil Arunkumar and Gaurav Jain and Prashant J. Nair and Ilya Soloveychik and Purushotham Kamath"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyformer(CachePolicy):
    """H2O with a regularised score: noise and a rising temperature keep it from betting on what has been attended to so far.

        A_j = sum over the queries i so far of  softmax over the live keys of ((x_ij + z_ij) / tau_i)_j,   x = attention logits,
        z ~ Gumbel(0, 1), fresh for each layer, head, query and key;   tau_i = tau_init in a prefill, then growing by
        (tau_end - tau_init) / steps with each step, up to tau_end;   A reduced over the h/g query heads (`group`)

    The attention output itself is the clean softmax. `recent` is the fraction of the budget in force that goes to the newest tokens
    (rounded half up, at least the newest unless it is 0), the rest to the largest A; what is evicted takes its A along.
    noise=None, tau_init = tau_end = 1 is H2O; noise=None and a temperature without end adds the same to all, so the oldest win.

    The noise hangs on the key, layer, head and the two positions alone, so padding, chunks and batch do not change it. `seed` is drawn
    from with the key of the prefill, or by itself where that has none; it lies in the state from then on. A prefill's column sums come
    from `ops.evidence.perturbed`, a step's from its attention row: x - logsumexp is as good as x before a softmax.
    `compact`: keys are stored raw and read at their rank among the live slots (the official new-bias file recomputes its bias so).

    variant="official": the token that has just left the recent window is always the one that goes, as in the released code, whose mask
    never lets it return: no token of the prompt's last `recent` and no generated one ever becomes a key token. The card and the paper
    mean no such thing; the default does without.
    Departures: capacity counts slots (the paper: a percentage of the prompt, 60 with 30 of it recent); tau stays at tau_end after
    `steps` (our reading: max_new_tokens; the official configuration's 100 for its delta of 0.01), where the formula would go on; with
    h > g, A is reduced at the KV head (the official models have h = g); the official code evicts by a mask or in every eighth step, here
    each step evicts.
    """

    capacity: int
    recent: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    steps: int = 100
    noise: str | None = "gumbel"
    seed: int = 0
    group: str = "mean"
    variant: str = "paper"
    compact: bool = False

    def __post_init__(self):
        check.between("recent", self.recent, 0.0, 1.0)
        check.between("tau_init", self.tau_init, 1e-3, 1e30)
        check.between("tau_end", self.tau_end, 1e-3, 1e30)
        check.count("steps", self.steps)
        check.one_of("noise", self.noise, ("gumbel", None))
        check.count("seed", self.seed, 0)
        check.one_of("group", self.group, tuple(score.REDUCTIONS))
        check.one_of("variant", self.variant, ("paper", "official"))
        check.budget("capacity", self.capacity)

    @property
    def needs(self) -> Needs:
        return Needs(perturbed=Noise(float(self.tau_init), None if self.noise is None else int(self.seed)))

    @property
    def step_needs(self) -> Needs:
        return Needs(rows=1)

    @property
    def raw(self) -> bool:  # type: ignore[override]
        return self.compact

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        columns = score.to_kv_heads(check.given("perturbed", evidence.perturbed), kv.k.shape[1], self.group)
        drawn = words(evidence.key, int(self.seed), 0 if evidence.layer is None else evidence.layer)
        assert drawn is not None  # a seed there always is, used or not
        return Held(columns, Clock(jnp.broadcast_to(drawn, (kv.pos.shape[0], 2)), kv.seen))

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        if evidence.perturbed is not None:  # further rows of a prefill
            more = self.start(params, kv, evidence)
            return Held(state.slots + more.slots, more.rest)
        row = check.given("rows", evidence.rows)[:, :, -1]
        seen = row > 0
        x = jnp.log(jnp.where(seen, row, 1.0))
        if self.noise is not None:
            x = x + gumbel(state.rest.words, kv.seen[:, None] - 1, kv.pos, row.shape[1])[:, :, 0]
        x = jnp.where(seen, x / self._tau(kv.seen - state.rest.begun)[:, None, None], -jnp.inf)
        e = jnp.where(seen, jnp.exp(x - jnp.max(jnp.where(seen, x, select.NEG), -1, keepdims=True)), 0.0)
        total = jnp.sum(e, -1, keepdims=True)
        share = e / jnp.where(total > 0, total, 1.0)  # a finished sequence attends to nothing
        return Held(state.slots + score.to_kv_heads(share, kv.k.shape[1], self.group), state.rest)

    def _tau(self, step: Int[Array, " b"]) -> Float[Array, " b"]:
        done = jnp.clip(step, 0, self.steps).astype(jnp.float32) / self.steps
        return self.tau_init + (self.tau_end - self.tau_init) * done

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        newest = budget.keep(self.recent, keep) if self.recent else jnp.zeros_like(keep)
        newest, age = newest[..., None], kv.seen[:, None, None] - kv.pos
        received = state.slots
        if self.variant == "official":
            received = jnp.where(age == newest + 1, select.NEG, received)
        return (kv.pos >= 0) & (age <= newest), received
