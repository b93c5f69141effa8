"""RazorAttention: retrieval heads whole, one compensation token in the others. Source: arXiv:2407.15891; mindspore_gs (razor_attention.py)."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, heads
from jaxtok.core.protocols import Held
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan

ECHO, INDUCTION = 0.01, 0.14  # shares of all heads of the model


class Rest(NamedTuple):
    """What rounding the compensation token to the cache's dtype has left over; it belongs to the token at `pos`."""

    k: jax.Array  # f32 [b g d]
    v: jax.Array  # f32 [b g d]
    pos: jax.Array  # i32 [b g]; -1 = none


def full_heads(
    echo: Float[np.ndarray, "l g"],
    induction: Float[np.ndarray, "l g"],
    *,
    echo_ratio: float | int = ECHO,
    induction_ratio: float | int = INDUCTION,
) -> Bool[np.ndarray, "l g"]:
    """The retrieval heads: the best `induction_ratio` by induction score and the best `echo_ratio` by echo score, of all heads of all layers.

    Ratios are of the number of KV heads (rounded half up, at least one head unless 0); where both scores name a head, there are fewer in all.
    Exactly so many, ties or not (the released code compares values and can take more; it also joins the echo heads of its first layer only).
    `train.razor_attention.search` measures the scores.
    """
    if np.shape(echo) != np.shape(induction):
        raise ValueError(f"echo {list(np.shape(echo))} and induction {list(np.shape(induction))} must have one shape, [l g]")
    count = lambda name, ratio: check.between(name, ratio, 0, 1) or (budget.capacity(ratio, np.size(echo)) if ratio else 0)
    return heads.best(echo, count("echo_ratio", echo_ratio)) | heads.best(induction, count("induction_ratio", induction_ratio))


def reaching_heads(
    bound: Float[np.ndarray, "l h"], slopes: Float[np.ndarray, " h"], window: int, kv_heads: int, *, epsilon: float = 1.0
) -> Bool[np.ndarray, "l g"]:
    """The heads of a model with ALiBi that must keep everything: those that reach beyond the window (our reading of the paper's rule).

        reach = (2 bound - log epsilon) / slope,     bound >= |q . k| / sqrt(d) for all queries and keys of the head (max |q| |k|, say)

    A key `distance` tokens back gets at most exp(2 bound - slope distance) of what the query's own key gets, so beyond the reach less than
    `epsilon` of it. A KV head keeps everything where one of its query heads reaches beyond `window` tokens.
    """
    bound, slopes = np.asarray(bound, np.float64), np.asarray(slopes, np.float64)
    check.count("window", window)
    check.between("epsilon", epsilon, 1e-300, 1.0)
    if bound.ndim != 2 or slopes.shape != bound.shape[1:] or bound.shape[1] % kv_heads or not (slopes > 0).all() or not (bound >= 0).all():
        raise ValueError(
            f"bound {list(bound.shape)} and slopes {list(slopes.shape)} must be [l h] >= 0 and [h] > 0, h a multiple of {kv_heads} KV heads"
        )
    reach = (2 * bound - np.log(epsilon)) / slopes
    return (reach > window).reshape(len(bound), kv_heads, -1).any(-1)


@register(
    "razor_attention",
    site="policy",
    paper="arXiv:2407.15891",
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    authors="Hanlin Tang and Yang Lin and Jing Lin and Qingsen Han and Shikuan Hong and Yiwu Yao and Gongyi Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RazorAttention(heads.Streaming):
    """Retrieval heads keep everything; the others `sinks` tokens, the newest `capacity - sinks - 1`, and the mean of all between.

        k_c = mean of the N_d dropped keys (as they are stored, rotated),   v_c = mean of their values,   bias_c = log N_d,
        so that it weighs N_d exp(q . k_c / sqrt(d)) <= the sum of exp(q . k / sqrt(d)) over the dropped (Jensen)

    In a step the token that leaves the window joins the mean: k_c += (k - k_c) / (N_d + 1), which is kept exact for bf16 caches too by
    carrying what rounding left over in float32. A prefill attends to everything and then drops.

    With `Recipe.heads`: group 0 are the retrieval heads, made contiguous by `models.blocks.reorder_heads`; `train.razor_attention.search`
    and `full_heads` find them, `core.heads.split` makes both. `at(n)` has the paper's window max(4000, n / 5); the released code takes 256.

    Nothing dropped: no compensation token, the head streams. One dropped: it is that token, exactly. All dropped keys alike: exact attention.
    The compensation token stands at the position of the newest token in it (our reading; positions matter in layers with a sliding window
    only, where it counts as long as that one is inside, with what has already left the window). In models with ALiBi the heads
    that keep everything are those that reach beyond the window, `reaching_heads`; no model here has ALiBi.
    """

    most: ClassVar[float] = ECHO + INDUCTION
    capacity: int
    sinks: int = 4

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.budget("capacity", self.capacity, self.sinks + 1)

    @classmethod
    def at(cls, n: int, *, sinks: int = 4, least: int = 4000, share: int = 5) -> "RazorAttention":
        """The paper's size for a prompt of n tokens: a window of max(`least`, n // `share`) tokens."""
        for name, value, low in (("n", n, 1), ("least", least, 0), ("share", share, 1)):
            check.count(name, value, low)
        return cls(capacity=sinks + 1 + max(least, n // share), sinks=sinks)

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        zeros = lambda x: jnp.zeros((*x.shape[:2], x.shape[3]), jnp.float32)
        return Held(rest=Rest(zeros(kv.k), zeros(kv.v), jnp.full(kv.pos.shape[:2], -1, jnp.int32)))

    def fit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> Plan:
        plan = super().fit(params, state, kv, evidence, keep)
        kept = jnp.where(plan.index >= 0, gather(kv.pos, plan.index), -1)
        heir, found = self._eldest(kept)
        gone = (kv.pos >= 0) & (plan.assign < 0) & found[..., None]
        weight = jnp.where(kv.pos >= 0, jnp.exp(jnp.minimum(kv.bias, 60.0)), 0.0)
        return plan._replace(assign=jnp.where(gone, heir[..., None], plan.assign), weight=weight)

    def depart(self, params, state: Held, kv: KV, slot: Int[Array, "b g"], evidence: Evidence) -> tuple[KV, Held]:
        """`slot` has the eldest of all but the sinks, which is the compensation token; the next one takes it in and takes its place."""
        gone, number = jnp.maximum(slot, 0), jax.lax.broadcasted_iota(jnp.int32, kv.pos.shape, 2)
        heir, found = self._eldest(jnp.where(number == slot[..., None], -1, kv.pos))
        found = found & (slot >= 0)
        one = lambda x, at: jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), 2)[:, :, 0]
        put = lambda x, new: x.at[(*jnp.indices(heir.shape, sparse=True), heir)].set(new)
        ours, theirs, rest = one(kv.bias, gone), one(kv.bias, heir), state.rest
        known = (one(kv.pos, gone) == rest.pos)[..., None]
        share = jax.nn.sigmoid(ours - theirs)[..., None]  # N / (N + 1)

        def mean(x, left):
            new = one(x, heir).astype(jnp.float32)
            old = one(x, gone).astype(jnp.float32) + jnp.where(known, left, 0.0)
            exact = share * old + (1.0 - share) * new
            stored = jnp.where(found[..., None], exact, new).astype(x.dtype)
            return put(x, stored), jnp.where(found[..., None], exact - stored.astype(jnp.float32), left)

        (k, left_k), (v, left_v) = mean(kv.k, rest.k), mean(kv.v, rest.v)
        bias = put(kv.bias, jnp.where(found, jnp.logaddexp(ours, theirs), theirs))
        rest = Rest(left_k, left_v, jnp.where(found, one(kv.pos, heir), rest.pos))
        return kv._replace(k=k, v=v, bias=bias), Held(state.slots, rest)

    def _eldest(self, pos: Int[Array, "b g s"]) -> tuple[Int[Array, "b g"], Bool[Array, "b g"]]:
        """(slot of the oldest token behind the sinks, whether there is one)."""
        behind = pos >= self.sinks
        return jnp.argmin(jnp.where(behind, pos, 2**31 - 1), -1).astype(jnp.int32), jnp.any(behind, -1)
