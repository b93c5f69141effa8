"""Plans as an algebra: one after another, back to the original rows, and what they cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtok.core.reduce import apply, assignment, gather, representative, segment_sum
from jaxtok.core.types import DensePlan, Plan


class PlanCost(NamedTuple):
    """Static cost of applying a plan to rows of a given width; per sequence (or per head) of the batch."""

    rows_in: int
    rows_out: int
    flops: int
    bytes: int


def dense(plan: Plan | DensePlan) -> DensePlan:
    """The same map as a matrix [*B m n]; n * m memory."""
    if isinstance(plan, DensePlan):
        return plan
    shape = (*plan.index.shape, plan.assign.shape[-1])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    hit = (plan.assign[..., None, :] == row) & (plan.index >= 0)[..., None]
    if plan.weight is None:
        return DensePlan(hit.astype(jnp.float32))
    w = jnp.where(hit, plan.weight[..., None, :], 0.0)
    mass = jnp.sum(w, -1, keepdims=True)
    return DensePlan(w / jnp.where(mass > 0, mass, 1.0))


def compose(first: Plan | DensePlan, then: Plan | DensePlan) -> Plan | DensePlan:
    """The plan that does `first` (n to m rows), then `then` (m to k rows): apply(compose(a, b), x) = apply(b, apply(a, x))."""
    if isinstance(first, DensePlan) or isinstance(then, DensePlan):
        named = any(isinstance(plan, DensePlan) and plan.index is not None for plan in (first, then))
        counted = any(isinstance(plan, DensePlan) and plan.assign is not None for plan in (first, then))
        rows = assignment(first)
        return DensePlan(
            dense(then).w @ dense(first).w,
            _through(representative(first), representative(then)) if named else None,
            jnp.where(rows < 0, -1, gather_index(assignment(then), rows)) if counted else None,
        )
    index = _through(first.index, then.index)
    assign = jnp.where(first.assign < 0, -1, gather_index(then.assign, first.assign))
    lost = first.lost + then.lost
    if first.weight is None and then.weight is None:
        return Plan(index, assign, None, lost)
    m = first.index.shape[-1]
    own = jnp.ones(first.assign.shape, jnp.float32) if first.weight is None else first.weight
    own = jnp.where(first.assign < 0, 0.0, own)
    mass = segment_sum(own, first.assign, m)
    outer = jnp.ones(then.assign.shape, jnp.float32) if then.weight is None else then.weight
    per_group = outer / jnp.where(mass > 0, mass, 1.0)
    return Plan(index, assign, own * jnp.where(first.assign < 0, 0.0, gather_index(per_group, first.assign)), lost)


def _through(first: jax.Array, then: jax.Array) -> jax.Array:
    """The rows that name the groups after both."""
    return jnp.where(then < 0, -1, gather_index(first, then))


def gather_index(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[*B index] with negative indices read as 0."""
    return jnp.take_along_axis(table, jnp.maximum(index, 0), -1)


def lift(plan: Plan | DensePlan, y: jax.Array) -> jax.Array:
    """y [*B m ...] -> [*B n ...]: every original row gets the row it is now in; dropped rows are zero.

    A dense plan that does not say where a row counts gives each original row the mean of the rows it feeds, weighted by its share.
    """
    if plan.assign is not None:
        return gather(y, plan.assign)
    assert isinstance(plan, DensePlan)
    mass = jnp.sum(plan.w, -2, keepdims=True)
    back = jnp.swapaxes(plan.w / jnp.where(mass > 0, mass, 1.0), -1, -2)
    return apply(DensePlan(back), y)


def cost(plan: Plan | DensePlan, width: int, itemsize: int = 4) -> PlanCost:
    """What applying `plan` to rows of `width` channels costs: a selection moves m rows, a merge reads all n, a dense map multiplies."""
    if isinstance(plan, DensePlan):
        m, n = plan.w.shape[-2:]
        return PlanCost(n, m, 2 * m * n * width, (n + m) * width * itemsize + 4 * m * n)
    n, m = plan.assign.shape[-1], plan.index.shape[-1]
    if plan.weight is None:
        return PlanCost(n, m, 0, 2 * m * width * itemsize + 4 * m)
    return PlanCost(n, m, 2 * n * width + m * width, (n + m) * width * itemsize + 8 * n)
