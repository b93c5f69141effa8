"""Attention sinks of a decoder: what every head does with the first token, and what the loss says when a head is taken away.

A head that puts nearly all attention on the first token does nothing on this input (its value there is small): it is dormant. The same head
may be active on another kind of text. Source: arXiv:2410.13835.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.rotary import rotate_by
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.ops import diagnostics
from jaxtok.ops.attention import Impl, attention


class Diagnosis(NamedTuple):
    """All layers and heads of a decoder on a batch of sequences, float32. The first token is the first live one; means are over live ones.

    A sequence without a live token has 0 everywhere.
    """

    row: jax.Array  # [l b h] mean normalised entropy of the rows of attention
    column: jax.Array  # [l b h] largest normalised entropy of its columns
    mass: jax.Array  # [l b h] sink mass: attention to the first token, mean_i P[i, 0]
    share: jax.Array  # [l b h m] attention to each of the first m tokens, mean_i P[i, j]
    drain: jax.Array  # [l b g] value drain: |v_0| / mean_j |v_j|
    peak: jax.Array  # [l + 1 b] residual peak: |x_0| / mean_j |x_j| where layer i begins, and after the last
    loss: jax.Array  # [b] mean loss of the next token, nats


class Effects(NamedTuple):
    """How much the loss of each sequence rises, nats a token, when one head is changed and nothing else."""

    zero: jax.Array  # f32 [l h b] its attended values are 0
    first: jax.Array  # f32 [l h b] it attends to the first token alone (P = e_0): no change where it is dormant


def diagnose(
    cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, *, first: int = 8, impl: Impl = "auto"
) -> Diagnosis:
    """Entropies, sink mass, value drain and residual peak of every layer and head. Jit it with static cfg; padding may stand anywhere.

    Memory is linear in n: attention is looked at in a second pass over blocks (`ops.diagnostics.entropies`).
    """
    check.count("first", first)
    found, peaks = [], []

    def look(x, q, k, v, lse, see):
        pos = see["q_pos"]
        seen = diagnostics.entropies(q, k, lse, **see)
        sink = diagnostics.sinks(seen, pos, pos)
        found.append((*sink, diagnostics.first_of(seen.received, pos, pos, first), _ratio(v, pos[:, None])))
        peaks.append(_ratio(x, pos))

    x, pos = _layers(cfg, params, ids, live, look=look, impl=impl)
    row, column, mass, share, drain = (jnp.stack(each) for each in zip(*found, strict=True))
    peak = jnp.stack([*peaks, _ratio(x, pos)])
    return Diagnosis(row, column, mass, share, drain, peak, _loss(cfg, params, x, ids, pos))


def losses(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    *,
    zero: Bool[Array, "l h"] | None = None,
    first: Bool[Array, "l h"] | None = None,
    impl: Impl = "auto",
) -> Float[Array, " b"]:
    """Mean loss of the next token of each sequence, nats, where the heads of `zero` attend to nothing and those of `first` to the first
    token alone. Both may be traced, so one compile serves every choice of heads."""
    for name, mask in (("zero", zero), ("first", first)):
        if mask is not None and (mask.shape != (cfg.layers, cfg.heads) or mask.dtype != bool):
            raise ValueError(f"{name} is {mask.dtype} {list(mask.shape)}; it must be bool [{cfg.layers}, {cfg.heads}]")
    x, pos = _layers(cfg, params, ids, live, zero=zero, first=first, impl=impl)
    return _loss(cfg, params, x, ids, pos)


def effects(cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, *, impl: Impl = "auto") -> Effects:
    """Both interventions on every head in turn: 2 l h + 1 passes, one after another in one compiled loop."""
    each = jnp.eye(cfg.layers * cfg.heads, dtype=bool).reshape(-1, cfg.layers, cfg.heads)
    none = jnp.zeros_like(each[:1])
    zero, first = jnp.concatenate([none, each, jnp.zeros_like(each)]), jnp.concatenate([none, jnp.zeros_like(each), each])
    all_ = jax.lax.map(lambda masks: losses(cfg, params, ids, live, zero=masks[0], first=masks[1], impl=impl), (zero, first))
    rise = (all_[1:] - all_[:1]).reshape(2, cfg.layers, cfg.heads, -1)
    return Effects(rise[0], rise[1])


def _layers(
    cfg: Config, params, ids, live, *, look: Callable[..., None] | None = None, zero=None, first=None, impl: Impl = "auto"
) -> tuple[Float[Array, "b n c"], Int[Array, "b n"]]:
    """The causal pass, seen (`look`) and changed layer by layer -> (rows after the last layer, positions)."""
    live = jnp.ones(ids.shape, bool) if live is None else live
    if live.shape != ids.shape:
        raise ValueError(f"live {live.shape} must have the shape of ids {ids.shape}")
    pos, x = blocks.positions(live), blocks.embed(cfg, params, ids)
    begin = (pos == 0)[:, None, :, None]
    for i, p in enumerate(blocks.unstack(params)["layers"]):
        q, k, v = blocks.qkv(cfg, p, x)
        freqs = jnp.asarray(blocks.frequencies(cfg, i))
        q, k = rotate_by(q, pos, freqs), rotate_by(k, pos, freqs)
        see: dict[str, Any] = dict(q_pos=pos, k_pos=pos, window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale, diagonal=0)
        out, lse = attention(q, k, v, impl=impl, **see)
        if look is not None:
            look(x, q, k, v, lse, see)
        if first is not None:
            start = jnp.sum(jnp.where(begin, v, jnp.zeros((), v.dtype)), 2, keepdims=True)
            out = jnp.where(first[i][None, :, None, None], jnp.repeat(start, cfg.heads // cfg.kv_heads, 1), out)
        if zero is not None:
            out = jnp.where(zero[i][None, :, None, None], jnp.zeros((), out.dtype), out)
        x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, out))
    return x, pos


def _ratio(x: Float[Array, "*b n c"], pos: Int[Array, "*#b n"]) -> Float[Array, "*b"]:
    """Length of the first live row over the mean length of all live ones."""
    size = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    pos = jnp.broadcast_to(pos, size.shape)
    mean = jnp.sum(jnp.where(pos >= 0, size, 0), -1) / jnp.maximum(jnp.sum(pos >= 0, -1), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(pos == 0, size, 0), -1) / jnp.where(mean > 0, mean, 1)


def _loss(cfg: Config, params, x, ids, pos) -> Float[Array, " b"]:
    """Mean loss over the live tokens that follow a live one. Padding stands before, behind or between."""
    order = jnp.where(pos >= 0, pos, pos.shape[1])  # packed: live rows first
    at = jnp.argsort(order, -1)
    x, ids, live = (jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), 1) for a in (x, ids, pos >= 0))
    log = jax.nn.log_softmax(blocks.logits(cfg, params, x[:, :-1]), -1)
    nll = -jnp.take_along_axis(log, ids[:, 1:, None], -1)[..., 0]
    counts = live[:, 1:]
    return jnp.sum(jnp.where(counts, nll, 0), -1) / jnp.maximum(jnp.sum(counts, -1), 1).astype(jnp.float32)


# --- what the numbers are for ------------------------------------------------------------------------------------------


def sinks_needed(found: Diagnosis, least: float = 0.1) -> int:
    """How many first tokens a window must keep (`sinks=`): up to the last of those looked at that takes `least` of some head's attention,
    mean over the sequences. 0 where none does."""
    check.between("least", least, 0, 1)
    most = np.asarray(jnp.max(jnp.mean(found.share, 1), (0, 1)))
    return int(np.max(np.nonzero(most >= least)[0], initial=-1)) + 1


def dormant(found: Diagnosis, *, below: float, above: float, least: float = 0.0) -> Bool[Array, "l b h"]:
    """Which heads are dormant on which sequence: row entropy under `below`, column entropy over `above`, sink mass `least` or more.

    The paper has no `least`. Columns near the end are seen by few queries and are easily even, so on short texts a head that looks at its
    neighbours may pass by entropies alone: ask for some mass (0.3, say) before you act on the answer.
    """
    check.between("least", least, 0, 1)
    return diagnostics.dormant(found.row, found.column, below=below, above=above) & (found.mass >= least)


def full_heads(found: Diagnosis, *, below: float, above: float, least: float = 0.0) -> Bool[np.ndarray, "l g"]:
    """The KV heads that should keep their whole cache: those with a query head that is active on some sequence. The others can stream.

    For `core.heads.split`, which makes sizes for Recipe.heads and the order of the weights. No training; on prompts like yours. Thresholds
    as `dormant`.
    """
    layers, _, heads = found.row.shape
    asleep = np.asarray(jnp.all(dormant(found, below=below, above=above, least=least), 1))
    g = found.drain.shape[2]
    return np.asarray(~np.all(asleep.reshape(layers, g, heads // g), -1))
