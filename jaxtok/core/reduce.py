"""What becomes of the rows of a plan: gathered, merged, moved along, and where the survivors stand."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxtok.core import check
from jaxtok.core.types import KV, DensePlan, Evidence, Plan, Tokens

ATTENTION = (
    "rows",
    "received",
    "peak",
    "perturbed",
    "ranked",
    "cls",
    "asked",
    "asked_peak",
    "looked",
)  # of `Evidence`: what a group is given in all
POSITIONS = ("keep", "repack", "keep_mrope")


def expand(a: jax.Array, like: jax.Array) -> jax.Array:
    """`a` with trailing axes of size 1 up to the rank of `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def gather(x: jax.Array, index: Int[Array, "*B m"]) -> jax.Array:
    """x [*B n ...] -> [*B m ...]; rows of negative index are zero."""
    safe = jnp.maximum(index, 0)
    out = jnp.take_along_axis(x, expand(safe, x), axis=index.ndim - 1)
    return jnp.where(expand(index >= 0, out), out, jnp.zeros((), x.dtype))


def segment_sum(x: jax.Array, assign: Int[Array, "*B n"], m: int) -> jax.Array:
    """f32 [*B m ...]: sums of the rows x [*B n ...] that go to each group; -1 goes nowhere."""
    check.count("m", m, 0)
    batch, n = assign.shape[:-1], assign.shape[-1]
    rows = jnp.where(assign < 0, m, assign).reshape(math.prod(batch), n)
    flat = x.astype(jnp.float32).reshape((rows.shape[0], n, *x.shape[assign.ndim :]))
    out = jax.vmap(lambda a, i: jnp.zeros((m, *a.shape[1:]), jnp.float32).at[i].add(a, mode="drop"))(flat, rows)
    return out.reshape((*batch, m, *x.shape[assign.ndim :]))


def apply(plan: Plan | DensePlan, x: jax.Array) -> jax.Array:
    """x [*B n ...] -> [*B m ...]: the selected rows, or the weighted mean of each group (in f32, returned in x's dtype)."""
    rows = (*plan.w.shape[:-2], plan.w.shape[-1]) if isinstance(plan, DensePlan) else plan.assign.shape
    if x.shape[: len(rows)] != rows:
        raise ValueError(f"the plan is for rows of shape {list(rows)}, got {list(x.shape)}")
    if isinstance(plan, DensePlan):
        flat = x.astype(jnp.float32).reshape((*rows, math.prod(x.shape[len(rows) :])))
        mixed = jnp.matmul(plan.w, flat, precision=jax.lax.Precision.HIGHEST)  # what a row takes from one source alone stays as it is
        return mixed.reshape((*plan.w.shape[:-1], *x.shape[plan.w.ndim - 1 :])).astype(x.dtype)
    if plan.weight is None:
        return gather(x, plan.index)
    m = plan.index.shape[-1]
    w = jnp.where(plan.assign < 0, 0.0, plan.weight)
    # a dead or dropped row may hold anything, and 0 * inf is NaN
    live = jnp.where(expand(w > 0, x), x.astype(jnp.float32), 0.0)
    mass = gather(segment_sum(w, plan.assign, m), plan.assign)
    share = w / jnp.where(mass > 0, mass, 1.0)  # before the product, which could overflow
    mean = segment_sum(live * expand(share, x), plan.assign, m)
    return jnp.where(expand(plan.index >= 0, mean), mean, 0.0).astype(x.dtype)


def total(plan: Plan | DensePlan, x: jax.Array) -> jax.Array:
    """x [*B n ...] -> [*B m ...]: what is counted (sizes, attention received) is summed over a group, gathered by a selection."""
    if isinstance(plan, DensePlan) and plan.assign is not None:
        return segment_sum(x, plan.assign, plan.w.shape[-2]).astype(x.dtype)
    if isinstance(plan, DensePlan):
        mass = jnp.sum(plan.w, -2, keepdims=True)
        share = plan.w / jnp.where(mass > 0, mass, 1.0)  # a source's count is split over the rows that it feeds
        return apply(DensePlan(share), x)
    if plan.weight is None:
        return gather(x, plan.index)
    kept = segment_sum(x, plan.assign, plan.index.shape[-1])
    return jnp.where(expand(plan.index >= 0, kept), kept, 0.0).astype(x.dtype)


def representative(plan: Plan | DensePlan) -> Int[Array, "*B m"]:
    """The row that gives each group its pos, rope and kind; -1 = empty."""
    if plan.index is not None:
        return plan.index
    assert isinstance(plan, DensePlan)
    best = jnp.argmax(plan.w, -1).astype(jnp.int32)
    return jnp.where(jnp.max(plan.w, -1) > 0, best, -1)


def assignment(plan: Plan | DensePlan) -> Int[Array, "*B n"]:
    """The group in which each row mostly is; -1 = dropped."""
    if plan.assign is not None:
        return plan.assign
    assert isinstance(plan, DensePlan)
    best = jnp.argmax(plan.w, -2).astype(jnp.int32)
    return jnp.where(jnp.max(plan.w, -2) > 0, best, -1)


def reduce(plan: Plan | DensePlan, tokens: Tokens, positions: str = "keep") -> Tokens:
    """Apply a plan [b m] to every array of `tokens` that has the token axis.

    `positions`: "keep" the rotary ids, "repack" them to 0, 1, 2, ... (then `delta` follows), or "keep_mrope": keep all three
    axes and let the next id follow the largest live one.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    index = representative(plan)
    ok = index >= 0
    pos = jnp.where(ok, gather(tokens.pos, index), -1)
    live = pos >= 0
    rope, delta = gather(tokens.rope, index), tokens.delta
    if positions == "repack":
        rank = jnp.maximum(jnp.cumsum(live.astype(jnp.int32), -1) - 1, 0)
        rope = jnp.broadcast_to(rank[..., None], rope.shape)
        delta = jnp.sum(live, -1, dtype=jnp.int32) - tokens.seen
    elif positions == "keep_mrope":
        delta = jnp.max(jnp.where(live, jnp.max(rope, -1), -1), -1) + 1 - tokens.seen
    where = jnp.take_along_axis(assignment(plan), jnp.maximum(tokens.source, 0), -1)
    return Tokens(
        x=apply(plan, tokens.x),
        pos=pos,
        rope=rope,
        size=total(plan, tokens.size),
        kind=gather(tokens.kind, index),
        segment=jnp.where(ok, gather(tokens.segment, index), -1),
        cell=jnp.where(ok[..., None], gather(tokens.cell, index), -1),
        source=jnp.where(tokens.source < 0, -1, where),
        seen=tokens.seen,
        delta=delta,
        lost=tokens.lost if plan.lost is None else tokens.lost + plan.lost,
        score=None if tokens.score is None else gather(tokens.score, index),
    )


def reduce_kv(plan: Plan | DensePlan, kv: KV, count: bool = True) -> KV:
    """Apply a plan [b g m] to a cache. `count=False` (EMS, CAM): a merged slot keeps the bias of the slot that names it."""
    index = representative(plan)
    pos = jnp.where(index >= 0, gather(kv.pos, index), -1)
    lost = kv.lost if plan.lost is None else kv.lost + plan.lost
    if not count or (isinstance(plan, Plan) and plan.weight is None):
        bias = gather(kv.bias, index)
    else:
        tokens = total(plan, jnp.where(kv.pos >= 0, jnp.exp(jnp.minimum(kv.bias, 60.0)), 0.0))  # e**60 tokens are no count
        bias = jnp.where(tokens > 0, jnp.log(jnp.where(tokens > 0, tokens, 1.0)), 0.0)
    cursor = jnp.full((), index.shape[-1], jnp.int32)
    segment = None if kv.segment is None else jnp.where(index >= 0, gather(kv.segment, index), -1)
    return kv._replace(k=apply(plan, kv.k), v=apply(plan, kv.v), pos=pos, bias=bias, cursor=cursor, lost=lost, segment=segment)


def masked_kv(plan: Plan, kv: KV) -> KV:
    """The law's twin of a selection: the same slots, those that the plan drops dead."""
    return kv._replace(pos=jnp.where(plan.assign < 0, -1, kv.pos), lost=kv.lost + plan.lost)


def move(plan: Plan | DensePlan, evidence: Evidence) -> Evidence:
    """Evidence after a plan over its token axis: [b m] for a sequence, [b g m] for a cache.

    Attention that a group receives is summed, keys and hidden rows are averaged. Under a plan per KV head `hidden`, which has no
    head axis, is gone.
    """
    check.plan(plan)
    per_head = representative(plan).ndim == 3

    def spread(heads: int) -> Plan | DensePlan:  # the plan with a head axis of `heads`
        if not per_head:
            return jax.tree.map(lambda a: jnp.repeat(a[:, None], heads, 1), plan)
        g = representative(plan).shape[1]
        if not g or heads % g:
            raise ValueError(f"a plan for {g} KV heads does not fit evidence of {heads} heads")
        return jax.tree.map(lambda a: jnp.repeat(a, heads // g, 1), plan)

    def attention(x):  # [b h n] or [b h w n]
        if x is None:
            return None
        over = spread(x.shape[1])
        return total(over, x) if x.ndim == 3 else jnp.swapaxes(total(over, jnp.swapaxes(x, -1, -2)), -1, -2)

    rows = {
        name: None if x is None else apply(spread(x.shape[1]), x)
        for name in ("keys", "values")
        if (x := getattr(evidence, name)) is not None
    }
    for name in ("hidden", "change"):
        x = getattr(evidence, name)
        rows[name] = None if x is None or per_head else apply(plan, x)
    probs = evidence.probs
    if probs is not None:  # a group's row is the mean of its rows, its column the sum of its columns
        over = spread(probs.shape[1])
        rows["probs"] = apply(over, jnp.swapaxes(total(over, jnp.swapaxes(probs, -1, -2)), -1, -2))
    seen = {name: attention(getattr(evidence, name)) for name in ATTENTION}
    return evidence._replace(**seen, **rows)


def grow_kv(kv: KV, slots: int) -> KV:
    """Append dead slots up to `slots`; the cursor stays."""
    check.count("slots", slots, 0)
    extra = slots - kv.k.shape[2]
    if extra < 0:
        raise ValueError(f"cannot grow a cache of {kv.k.shape[2]} slots to {slots}")

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3), constant_values=value)

    segment = None if kv.segment is None else pad(kv.segment, -1)
    return kv._replace(k=pad(kv.k, 0), v=pad(kv.v, 0), pos=pad(kv.pos, -1), bias=pad(kv.bias, 0), segment=segment)


def ranks(pos: Int[Array, "*B s"]) -> Int[Array, "*B s"]:
    """How many live rows are older than each row: its id after compacting. Dead rows get 0. Rows may be in any order."""
    order = jnp.argsort(pos, axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32) - jnp.sum(pos < 0, -1, dtype=jnp.int32, keepdims=True)
    return jnp.where(pos >= 0, rank, 0)


def oldest_first(pos: Int[Array, "*B s"]) -> Int[Array, "*B s"]:
    """The slot of the live row of each rank, -1 behind the last: `gather(x, oldest_first(pos))` packs live rows to the front, and a
    second gather by `ranks(pos)` takes what was computed there back to the slots (dead rows then hold anything).
    """
    order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos), axis=-1).astype(jnp.int32)
    rank = jax.lax.broadcasted_iota(jnp.int32, pos.shape, pos.ndim - 1)
    return jnp.where(rank < jnp.sum(pos >= 0, -1, dtype=jnp.int32, keepdims=True), order, -1)
