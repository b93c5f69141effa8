"""CaM: an evicted value is shared out over the survivors behind it, by the toss of a coin. Source: Zhang et al., ICML 2024; kvpress CAMPress."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import CacheCompressor, CachePolicy, Held
from jaxtok.core.reduce import gather, move, oldest_first, ranks, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.score import to_kv_heads
from jaxtok.core.types import KV, Evidence, Needs, Plan
from jaxtok.core.wrap import StepWrapper, Wrapper

PAPER: dict[str, Any] = dict(
    paper="https://openreview.net/forum?id=LCTmppB165",
    title="CaM: Cache Merging for Memory-efficient LLMs Inference",
    authors="Yuxin Zhang and Yuxuan Du and Gen Luo and Yunshan Zhong and Zhenyu Zhang and Shiwei Liu and Rongrong Ji",
    year=2024,
)


@register("cam", site="cache", **PAPER)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CaM(Wrapper):
    """Keep what `base` keeps, and add the value of each token that goes, in equal parts, to the kept tokens behind it.

        targets of j: the first `window` kept tokens newer than j (fewer near the end: m_j of them)
        p_j = min(1, A_j / mean of A over the targets),    c_j ~ Bernoulli(p_j),    v_i <- v_i + sum over the j that have i of c_j v_j / m_j

    A: attention received in this prefill, mean over the h/g query heads. A token with no kept token behind it, and one that nobody attends
    to, goes without trace. Keys, positions and counts stay. `sample=False` takes p_j itself for c_j: the mean of the draws.

    Draws are a function of (the model's key, or `seed` and the layer; the position): the same for all heads and rows of a batch.
    Here it happens once, to all that the compression evicts: our reading for this site. While generating: CaMPolicy, and every so many steps
    Decoding(base=CaM(...)), which is kvpress's CAMPress but that it merges only as many tokens as have come since the last time (the best
    of the evicted), keeps one set for all heads, and sums A over the steps. window=32 is kvpress's. Time O(n w d), one target at a time.
    """

    edits: ClassVar[bool] = True

    base: CacheCompressor
    window: int = 32
    sample: bool = True
    seed: int = 0

    def __post_init__(self):
        self.check_base()
        if self.base.edits or self.base.rotates:
            raise ValueError(f"{self.base.name} changes what it keeps; put cam inside, around the scorer")
        check.count("window", self.window)

    @property
    def needs(self) -> Needs:
        return self.base.needs | Needs(received=True)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        plan = self.plan(params, kv, evidence, keep)
        if plan.weight is not None:
            raise ValueError(f"{self.base.name} merges by itself; cam goes around a method that selects")
        return reduce_kv(plan, kv)._replace(v=self.merged(plan, kv, evidence)), move(plan, evidence)

    def merged(self, plan: Plan, kv: KV, evidence: Evidence) -> Float[Array, "b g m d"]:
        """Values of the kept slots with the shares of the evicted added."""
        return fold(plan, kv, _received(kv, evidence), self.window, draws(self.seed, evidence, kv.pos) if self.sample else None)


@register("cam.policy", site="policy", **PAPER)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CaMPolicy(StepWrapper):
    """CaM while generating: what the step policy `base` lets go at a step leaves its value to the tokens behind it.

        targets of the victim j: the first `window` live tokens newer than j (m_j of them),   p_j, c_j as in CaM
        A: attention received so far, from the prefill on, mean over the h/g query heads;    v_i <- v_i + c_j v_j / m_j

    A is taken after the newest query, which is a target too. What `base` drops at once after a prefill goes the same way. A victim with
    nothing newer behind it (the newest token itself) goes without trace. Which tokens stay is `base`'s alone; what it needs (StreamingLLM,
    H2O, TOVA, ...) it gets. `sample=False`: p_j itself, the mean of the draws. Draws: CaM's.

    variant="kvpress": A counts the queries after the first prefill only. Around TOVA(variant="kvpress"), whose heads keep one set, this is
    CAMPress with compression_interval=1. Our reading: any policy may choose. ValueError for a base that compresses only now and then.
    """

    base: CachePolicy
    window: int = 32
    sample: bool = True
    seed: int = 0
    variant: str = "paper"

    def __post_init__(self):
        self.check_base()
        check.one_of("variant", self.variant, ("paper", "kvpress"))
        if not self.base.vacates or isinstance(self.base, CaMPolicy):
            raise ValueError(f"cam.policy needs a base that vacates a slot at each step, got {self.base!r}; put cam inside decoding")
        check.count("window", self.window)

    @property
    def needs(self) -> Needs:
        return self.base.needs | Needs(received=True)

    @property
    def step_needs(self) -> Needs:
        return self.base.step_needs | Needs(received=True)

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        return self._held(self.base.start(params, kv, evidence), _received(kv, evidence) * int(self.variant == "paper"))

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        return self._held(self.base.observe(params, _inner(state), kv, evidence), state.slots[1] + _received(kv, evidence))

    def fit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> Plan:
        return self.base.fit(params, _inner(state), kv, evidence, keep)

    def refit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Held]:
        plan = self.fit(params, state, kv, evidence, keep)
        v = fold(plan, kv, state.slots[1], self.window, draws(self.seed, evidence, kv.pos) if self.sample else None)
        return reduce_kv(plan, kv)._replace(v=v), Held(jax.tree.map(lambda x: gather(x, plan.index), state.slots), state.rest)

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        return self.base.victim(params, _inner(state), kv, keep)

    def depart(self, params, state: Held, kv: KV, slot: Int[Array, "b g"], evidence: Evidence) -> tuple[KV, Held]:
        at = jnp.maximum(slot, 0)[..., None]
        mine = lambda x: jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 3)), 2)
        pos, a = mine(kv.pos), mine(state.slots[1])
        newer = (kv.pos > pos) & (slot >= 0)[..., None]
        target = oldest_first(jnp.where(newer, kv.pos, -1))[..., : self.window]
        m = jnp.maximum(jnp.sum(target >= 0, -1, keepdims=True), 1).astype(jnp.float32)
        level = jnp.sum(gather(state.slots[1], target), -1, keepdims=True) / m
        share = coin(a, level, draws(self.seed, evidence, pos) if self.sample else None) / m
        v = gather(kv.v, target).astype(jnp.float32) + share[..., None] * mine(kv.v).astype(jnp.float32)
        b, g = jnp.indices(slot.shape, sparse=True)
        into = jnp.where(target < 0, kv.v.shape[2], target)
        return kv._replace(v=kv.v.at[b[..., None], g[..., None], into].set(v.astype(kv.v.dtype), mode="drop")), state

    def _held(self, base: Held, received: Float[Array, "b g s"]) -> Held:
        return Held((base.slots, received), base.rest)


def _inner(state: Held) -> Held:
    return Held(state.slots[0], state.rest)


def _received(kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
    return to_kv_heads(check.given("received", evidence.received), kv.k.shape[1])


def draws(seed: int, evidence: Evidence, pos: Int[Array, "*B n"]) -> Float[Array, "*B n"]:
    """Uniform numbers in [0, 1), one a position."""
    if evidence.key is not None:
        key = jax.random.fold_in(evidence.key, seed)
    else:
        key = jax.random.fold_in(jax.random.key(seed), 0 if evidence.layer is None else evidence.layer)
    each = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), dtype=jnp.float32))
    return each(jnp.maximum(pos, 0).ravel()).reshape(pos.shape)


def coin(a: Float[Array, "*B n"], level: Float[Array, "*B n"], draw: Float[Array, "*B n"] | None) -> Float[Array, "*B n"]:
    """c of tokens of attention a whose targets have `level` on average; p itself without a draw. Where nobody looks at the targets p is 1,
    and 0 where nobody looks at the token.
    """
    chance = jnp.where(level > 0, jnp.minimum(a / jnp.where(level > 0, level, 1.0), 1.0), jnp.where(a > 0, 1.0, 0.0))
    return chance if draw is None else (draw < chance).astype(jnp.float32)


def fold(plan: Plan, kv: KV, attention: Float[Array, "b g s"], window: int, draw: Float[Array, "b g s"] | None) -> Float[Array, "b g m d"]:
    """Values of the slots that a selection keeps, with the shares of the others added; draw None = the mean draw."""
    live = kv.pos >= 0
    attention = jnp.where(live, attention, 0.0)
    rank, kept = ranks(kv.pos), plan.assign >= 0
    order = jnp.argsort(jnp.where(live, rank, -1), axis=-1)  # slots by age, dead ones first
    ordered = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 3)), 2)
    here, a, v = ordered(kept), ordered(attention), ordered(jnp.where(live[..., None], kv.v.astype(jnp.float32), 0.0))
    n = here.shape[-1]
    # kept token number i, counted from 0, is the target of what went since kept token number i - window
    number = jnp.cumsum(here.astype(jnp.int32), -1)  # how many kept ones up to here: of an evicted one, its first target
    m = jnp.clip(number[..., -1:] - number, 0, window)
    slot = jnp.where(here, number - 1, n)
    b, g, _ = slot.shape
    at = jnp.indices((b, g), sparse=True)
    compact = lambda x: jnp.zeros((b, g, n + 1), x.dtype).at[at[0][..., None], at[1][..., None], slot].set(x)[..., :n]
    ahead = jnp.pad(jnp.cumsum(compact(jnp.where(here, a, 0.0)), -1), ((0, 0), (0, 0), (1, 0)))  # [b g n + 1] sums over kept
    mean = (gather(ahead, number + m) - gather(ahead, number)) / jnp.maximum(m, 1).astype(jnp.float32)
    gone = ordered(live) & ~here & (m > 0)
    share = jnp.where(gone, coin(a, mean, None if draw is None else ordered(draw)), 0.0) / jnp.maximum(m, 1).astype(jnp.float32)
    sums = jnp.zeros((b, g, n + 1, v.shape[-1]), jnp.float32)

    def add(i, sums):
        into = jnp.where(gone & (i < m), number + i, n)
        return sums.at[at[0][..., None], at[1][..., None], into].add(share[..., None] * v)

    sums = jax.lax.fori_loop(0, window, add, sums)
    place = jnp.argsort(order, axis=-1)  # of each slot, in order of age
    mine = jnp.take_along_axis(jnp.where(here[..., None], v + gather(sums, jnp.maximum(number - 1, 0)), v), place[..., None], 2)
    return gather(mine, plan.index).astype(kv.v.dtype)
