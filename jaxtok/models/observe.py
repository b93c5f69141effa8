"""What a layer's attention tells about its keys, on one device or over several, and how the caches of several stand."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxtok.core.selector import asking, pictured
from jaxtok.core.types import KV, Evidence, Needs, Tokens
from jaxtok.ops.attention import Impl, Shared
from jaxtok.ops.evidence import peak, perturbed, ranked, received, rows
from jaxtok.ops.noise import words


def observe(
    needs: Needs,
    q,
    k,
    lse,
    see: dict[str, Any],
    diagonal: int | None = None,
    length: Array | None = None,
    layer: int = 0,
    key=None,
    tokens: Tokens | None = None,
    impl: Impl = "auto",
) -> dict[str, Any]:
    """Attention evidence from queries, keys and the saved logsumexp; no [n n] array exists but for `probs`.

    `tokens`: the queries' rows, for what tells their kinds apart."""
    out: dict[str, Any] = {}
    plain = {name: x for name, x in see.items() if name != "q_pos"}
    if isinstance(impl, Shared):
        return _observe_shared(needs, q, k, lse, see, plain, impl)
    if needs.rows:
        w = min(needs.rows, q.shape[2])
        out["rows"] = rows(q[:, :, -w:], k, lse[:, :, -w:], q_pos=see["q_pos"][:, -w:], **plain)
    if needs.turned:
        w = min(needs.turned, q.shape[2])
        out["turned"] = jnp.where((see["q_pos"][:, -w:] >= 0)[:, None, :, None], q[:, :, -w:], jnp.zeros((), q.dtype))
    if needs.received:
        out["received"] = received(q, k, lse, diagonal=diagonal, impl=impl, **see)
    if needs.peak:
        by = lse if length is None else lse + jnp.log(jnp.maximum(length, 1e-6))[:, None]  # exp(logit - lse) / length
        out["peak"] = peak(q, k, by, diagonal=diagonal, **see)
    if needs.perturbed is not None:
        drawn = words(key, needs.perturbed.seed, layer)
        out["perturbed"] = perturbed(q, k, words=drawn, tau=needs.perturbed.tau, diagonal=diagonal, **see)
    if needs.ranked is not None:
        out["ranked"] = ranked(q, k, tau=needs.ranked.tau, rounds=needs.ranked.rounds, diagonal=diagonal, **see)
    if needs.cls or needs.lead:
        first = jnp.argmax(see["q_pos"] >= 0, -1)[:, None]
        one = lambda x, axis: jnp.take_along_axis(x, first.reshape(-1, *(1,) * (x.ndim - 1)), axis)
        out["lead"] = one(q, 2)[:, :, 0] if needs.lead else None
        out["cls"] = rows(one(q, 2), k, one(lse, 2), q_pos=one(see["q_pos"], 1), **plain)[:, :, 0] if needs.cls else None
    if needs.probs:
        out["probs"] = rows(q, k, lse, **see)
    if (needs.asked or needs.asked_peak or needs.looked) and tokens is not None:
        text: dict[str, Any] = see | {"q_pos": jnp.where(asking(tokens), see["q_pos"], -1)}
        out["asked"] = received(q, k, lse, diagonal=diagonal, **text) if needs.asked else None
        out["asked_peak"] = peak(q, k, lse, diagonal=diagonal, **text) if needs.asked_peak else None
        image: dict[str, Any] = see | {"q_pos": jnp.where(pictured(tokens), see["q_pos"], -1)}
        out["looked"] = received(q, k, lse, diagonal=diagonal, **image) if needs.looked else None
    return out


def _observe_shared(needs: Needs, q, k, lse, see: dict[str, Any], plain: dict[str, Any], impl: Shared) -> dict[str, Any]:
    """The evidence that devices can gather together."""
    known = Needs(rows=needs.rows, turned=needs.turned, received=needs.received)
    known = known._replace(**{name: getattr(needs, name) for name in ("hidden", "weights", "keys", "values", "queries", "segment")})
    if needs != known:
        lacks = [name for name in needs._fields if getattr(needs, name) != getattr(known, name)]
        raise ValueError(f"over several devices there is no evidence of the kind {', '.join(lacks)}; run the method on one")
    out: dict[str, Any] = {}
    last = (
        (lambda x, w, axis: impl.last(x, w, axis))
        if impl.placed
        else (lambda x, w, axis: jax.lax.slice_in_dim(x, x.shape[axis] - w, None, axis=axis))
    )
    if needs.rows:
        w = min(needs.rows, q.shape[2])
        out["rows"] = impl.some_rows(last(q, w, 2), k, last(lse, w, 2), q_pos=last(see["q_pos"], w, 1), **plain)
    if needs.turned:
        w = min(needs.turned, q.shape[2])
        out["turned"] = jnp.where((last(see["q_pos"], w, 1) >= 0)[:, None, :, None], last(q, w, 2), jnp.zeros((), q.dtype))
    if needs.received:
        out["received"] = received(q, k, lse, impl=impl, **see)
    return out


def held(impl: Shared, kv: KV) -> KV:
    """A cache cut over the sequence."""
    slots = lambda x: None if x is None else impl.hold(x, "data", "tensor", "sequence", *(None,) * (x.ndim - 3))
    return kv._replace(**{name: slots(getattr(kv, name)) for name in ("k", "v", "pos", "bias", "segment")})


def in_order(impl: Shared, kv: KV, evidence: Evidence) -> tuple[KV, Evidence]:
    """A cache and its evidence in the order of the tokens, cut over the sequence."""
    slots = lambda x: None if x is None else impl.restore(x, 2)
    kv = held(impl, kv._replace(**{name: slots(getattr(kv, name)) for name in ("k", "v", "pos", "bias", "segment")}))
    named = {name: slots(getattr(evidence, name)) for name in ("received", "keys", "values")}
    rows = None if evidence.rows is None else impl.restore(evidence.rows, 3)
    hidden = None if evidence.hidden is None else impl.restore(evidence.hidden, 1)
    return kv, evidence._replace(**named, rows=rows, hidden=hidden)
