"""A step of a policy that vacates one slot for each key that comes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.types import KV, Evidence, live_count

NOTHING = Evidence()


def vacate(policy: CachePolicy, params, state: Held, kv: KV, keep=None, evidence: Evidence = NOTHING) -> tuple[KV, Held, Int[Array, "b g"]]:
    """Move the key at the cursor into a free slot, or into the slot of the victim where the budget is full (`every` = 1).

    The spare slot at the cursor, whither the cursor returns, is dead afterwards. Also returns the slots that were taken.
    """
    check.cache(kv)
    if kv.pos.shape[-1] <= policy.capacity:
        raise ValueError(f"{policy.name} needs a spare slot beside its {policy.capacity}; this cache has {kv.pos.shape[-1]} slots")
    keep = budget.per_head(keep, kv.pos.shape[:2], policy.capacity)
    protect, score = policy.victim(params, state, kv, keep)
    live, at = kv.pos >= 0, jnp.asarray(policy.capacity, jnp.int32)
    full = live_count(kv.pos) > keep
    rank = jnp.where(protect, -select.NEG, jnp.minimum(select.finite(score), -select.NEG / 2))
    rank = jnp.where(live, rank, jnp.where(full, jnp.inf, -jnp.inf)[..., None])
    slot = jnp.arange(kv.pos.shape[-1], dtype=jnp.int32)[None, None]
    rank = jnp.where(slot > at, jnp.inf, rank)
    # a spare slot that holds a dead row (a finished sequence) goes back to itself
    victim = jnp.where(jnp.take(kv.pos, at, axis=2) < 0, at, jnp.argmin(rank, -1).astype(jnp.int32))
    goes = full & jnp.take_along_axis(live, victim[..., None], 2)[..., 0] & (victim != at)
    kv, state = policy.depart(params, state, kv, jnp.where(goes, victim, -1), evidence)

    def put(x, empty):
        new = jnp.take(x, at, axis=2)
        b, g = jnp.indices(victim.shape, sparse=True)
        x = x.at[b, g, victim].set(new)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.full_like(x[:, :, :1], empty), at, 2)

    kv = kv._replace(k=put(kv.k, 0), v=put(kv.v, 0), pos=put(kv.pos, -1), bias=put(kv.bias, 0), cursor=at)
    return kv, Held(jax.tree.map(lambda x: put(x, 0), state.slots), state.rest), victim
