"""What a method must supply at each site; the base class owns everything but the formula.

Every function takes `params` first: the learned weights made by `init_params` ({} where there are none). Methods are frozen
dataclasses of static hyper-parameters, so all of them hash and can be static arguments of jit.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, reduce, select
from jaxtok.core.types import KV, Evidence, Frozen, Needs, Plan, Protect


class Method:
    """Common ground: identity in the registry, what it reads, learned weights."""

    name: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[str]
    passes: ClassVar[str] = ""  # the function that prefills with it, where one pass over the prompt is not enough
    drafts: ClassVar[bool] = False  # that function has a draft model continue the prompt, by the method's `look` tokens

    @property
    def needs(self) -> Needs:
        """What `Evidence` must hold; depends on the instance (a window length is data of the instance)."""
        return Needs()

    def init_params(self, key: jax.Array, cfg) -> Any:
        """Learned weights for a model of configuration `cfg`."""
        return {}


class Held(NamedTuple):
    """State of a method: `slots` moves with the slots of a cache (every leaf [b g s ...]) or the rows of a sequence [b n ...], `rest` stays."""

    slots: Any = ()
    rest: Any = ()


class CacheCompressor(Method):
    """Site cache: once, after a prefill, layer by layer."""

    aligned: ClassVar[bool] = False  # all heads and layers keep the same tokens
    groups: ClassVar[int] = 1  # head groups that it tells apart; more than one goes with Recipe.heads
    rotates: ClassVar[bool] = False  # turns stored keys in `compress`, so its plan alone is not the method
    edits: ClassVar[bool] = False  # changes the values that stay in `compress`, so its plan alone is not the method
    reads_rotated: ClassVar[bool] = False  # compares with rotated keys
    shares: ClassVar[bool] = False  # a wrapper that decides how many of its base's best each head keeps, and nothing else
    capacity: int

    @property
    def slots(self) -> int:
        """Static slots of a KV head afterwards, at most: above the capacity where heads may have unequal budgets."""
        return self.capacity

    def resize(self, capacity: int) -> "CacheCompressor":
        """The same method with another capacity; a wrapper resizes what it holds."""
        return dataclasses.replace(self, capacity=capacity)  # type: ignore[type-var]

    def whole(self, n: int) -> bool:
        """Whether a cache of n slots stays as it is when no traced budget is given."""
        return self.capacity >= n

    def layer(self, i: int, layers: int) -> "CacheCompressor":
        """The instance for 0-based layer `i` of `layers`."""
        return self

    def head_group(self, j: int) -> "CacheCompressor | None":
        """The instance for head group `j`; None leaves its cache whole."""
        return self

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        """The plan [b g m] for this layer's cache. `keep`: int, [b], [b 1] or [b g] live slots, at most the capacity."""
        raise NotImplementedError(f"{type(self).__name__} must make a plan")

    def budgets(self, params, kvs: list[KV], evidence: list[Evidence], keep=None) -> Int[Array, "l b g"] | None:
        """Budgets of all heads and layers at once, for a method that shares them out (asked where all layers are known); None = no such."""
        return None

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        """The compressed cache, and the evidence of what stayed."""
        check.cache(kv)
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        plan = self.plan(params, kv, evidence, keep)
        return reduce.reduce_kv(plan, kv), reduce.move(plan, evidence)

    def freeze(self, params, kv: KV, evidence: Evidence) -> tuple[KV, Frozen | None]:
        """After `compress`: the slots that new tokens join, and those that are only read from now on (None = all join)."""
        return kv, None


class CacheScorer(CacheCompressor):
    """A compressor that keeps the protected slots and the best others, per KV head."""

    protect: Protect = Protect()

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        """Importance, float32, higher stays. Dead and protected slots may hold anything."""
        raise NotImplementedError(f"{type(self).__name__} must score")

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        check.cache(kv)
        return top_slots(kv, self.score(params, kv, evidence), self.protect.mask(kv.pos, kv.seen), self.capacity, keep)


def top_slots(kv: KV, score: Float[Array, "b g s"], safe: Bool[Array, "b g s"], capacity: int, keep=None) -> Plan:
    """The live slots in `safe` and the best others, at most `keep` live ones (default: the capacity) in `capacity` static slots.

    Safe slots stay even where `keep` is smaller than their number.
    """
    check.cache(kv)
    live, cap = kv.pos >= 0, min(capacity, kv.pos.shape[-1])
    safe = safe & live
    room = jnp.maximum(budget.per_head(keep, kv.pos.shape[:2], cap) - jnp.sum(safe, -1, dtype=jnp.int32), 0)
    mask = select.choose(score, live, room, safe, most=cap)
    return select.pack(mask, cap, jnp.where(safe, jnp.inf, select.finite(score)))


class CachePolicy(Method):
    """Site policy: keeps a cache at `capacity` live slots while generating.

    A new key goes to a spare slot, is attended to, and then one slot is vacated (`every` = 1: the lowest `victim` score, free
    slots first) or, each time `every` spare slots are full, `fit` makes a plan.
    """

    every: int = 1
    aligned: ClassVar[bool] = False  # one set for all heads of a layer
    groups: ClassVar[int] = 1  # head groups that it tells apart; more than one goes with Recipe.heads
    raw: bool = False  # keys stored unrotated, placed at their rank among the live ones when read
    recurrent: ClassVar[bool] = False  # a prefill in chunks fits after each of them, so that the cache never holds the prompt
    reads_rotated: ClassVar[bool] = False  # compares with rotated keys
    capacity: int

    @property
    def step_needs(self) -> Needs:
        """Evidence of a decode step; slot axis s. Rows of a prefill, of its chunks too, give that of `needs`."""
        return Needs()

    def layer(self, i: int, layers: int) -> "CachePolicy":
        """The instance for 0-based layer `i` of `layers`."""
        return self

    def head_group(self, j: int) -> "CachePolicy | None":
        """The instance for head group `j`; None lets its cache grow."""
        return self

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        """State after a prefill, before `fit`."""
        return Held()

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        """State after new rows were attended to, before anything is vacated."""
        return state

    @property
    def slots(self) -> int:
        """Static slots of a KV head after a fit, at most."""
        return self.capacity

    @property
    def vacates(self) -> bool:
        """Whether a step vacates one slot, the `victim`'s; else `refit` makes room each time `every` spare slots are full."""
        return self.every == 1

    def recall(self, params, state: Held) -> tuple[Needs, Float[Array, "b h w d"], Int[Array, "b w"]] | None:
        """Past queries, after the rotary embedding, with their positions (-1 = none), and which evidence about them `refit` wants."""
        return None

    def refit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Held]:
        """The cache brought down to its slots, after a prefill and when the spare slots are full; the state moves along."""
        plan = self.fit(params, state, kv, evidence, keep)
        slots = jax.tree.map(lambda x: reduce.gather(x, reduce.representative(plan)), state.slots)
        return reduce.reduce_kv(plan, kv), Held(slots, state.rest)

    def fit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> Any:
        """The plan [b g capacity] (`Plan` or `DensePlan`) that brings a cache down to the capacity."""
        check.cache(kv)
        protect, score = self.victim(params, state, kv, budget.per_head(keep, kv.pos.shape[:2], self.capacity))
        return top_slots(kv, score, protect, self.capacity, keep)

    def victim(self, params, state: Held, kv: KV, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Float[Array, "b g s"]]:
        """Slots that must stay, and scores: the lowest other one goes. `keep` is the budget of live slots in force."""
        raise NotImplementedError(f"{type(self).__name__} must score")

    def depart(self, params, state: Held, kv: KV, slot: Int[Array, "b g"], evidence: Evidence) -> tuple[KV, Held]:
        """Before what is in `slot` goes (-1 = nothing does): a place to keep something of it in other slots."""
        return kv, state


class PromptMethod(Method):
    """Site prompt: which tokens of a prompt the model gets at all, numbered anew from 0; `decode.prefill` asks it."""

    passes: ClassVar[str] = "decode.prefill"
    capacity: int
    sees: int = -1  # the layer that `look` gives the attention of

    def run(self, params, look, ids: Int[Array, "b n"], live: Bool[Array, "b n"], keep=None) -> Plan:
        """The plan [b m] for packed ids, m = min(capacity, n), with at most `keep` live rows.

        look(ids, live, rows) -> tuple of f32 [b h rows n]: attention of the last `rows` tokens in the model's layer `sees`; where it `drafts`,
        in each layer of the draft, with the rows of the `look` tokens that it goes on with after them.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which tokens stay")
