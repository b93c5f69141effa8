"""The oracle that scores are held against: what leaving out each key would do to the queries that are still to come.

    mass_j = sum over the queries i of the question and of the full model's own continuation  |o_i without key j - o_i|^2

for each layer and KV head, summed over its query heads: DropKV's formula (`jaxtok.methods.DropKV`) with the future in its window. No
method can know it. `share` says how much of it a method's slots hold; `prefill` keeps the slots of largest mass, as one more row of a table.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import CacheCompressor, Held, top_slots
from jaxtok.core.reduce import grow_kv, reduce_kv
from jaxtok.core.types import Evidence, Needs, Part, Tokens
from jaxtok.evals.cases import Rows
from jaxtok.methods.cache.drop_kv import DropKV
from jaxtok.models import cached, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers

ORACLE = "oracle"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreseen(CacheCompressor):
    """Stands in a recipe for `prefill`; no method, since what it needs no model can tell it."""

    name: ClassVar[str] = ORACLE
    capacity: int


Mass = tuple[jax.Array, ...]  # f32 [b g n] a layer, over the packed slots of the context


def mass(
    cfg: Config, params: Any, rows: Rows, asked: Int[Array, " b"], ids: Int[Array, "b t"], live: Bool[Array, "b t"], *, most: int
) -> Mass:
    """What each key of the context is worth to the question and to the continuation `ids`.

    `asked`: tokens of the question at the context's end, at most `most` (0 where the question comes after it, in rows.ask). A token of
    the continuation counts as a query where the one after it is live, which is the one that it predicts.
    """
    n = rows.ids.shape[1]
    near = Needs(rows=most) if most else Needs()
    _, layers, before = decoder.survey(cfg, params, decoder.embed(cfg, params, rows.ids, rows.live), near)
    text, there = ids[:, :-1], live[:, 1:]
    if rows.ask is not None and rows.ask_live is not None:
        text, there = jnp.concatenate([rows.ask, text], 1), jnp.concatenate([rows.ask_live, there], 1)
    tokens, t, out = decoder.embed(cfg, params, text, there), text.shape[1], []
    worth = lambda kv, seen, w: DropKV(capacity=n, window=w, recent=0).score({}, kv, seen)
    for i, p in enumerate(params["layers"]):
        tokens, ((kv, seen),) = cached.attend_rows(cfg, p, i, tokens, layers[i], PLAIN, Needs(rows=t), False, None, "auto")
        total = worth(kv, seen, t)[..., :n]
        if most:
            mine = jnp.arange(most)[None] >= most - asked[:, None]
            (own,) = before[i]
            given = Evidence(rows=jnp.where(mine[:, None, :, None], check.given("rows", own.rows), 0.0))
            total = total + worth(layers[i][0].kv, given, most)
        out.append(total)
    return tuple(out)


def prefill(cfg: Config, params: Any, rows: Rows, worth: Mass, capacity: int, new: int, keep: Any) -> tuple[Tokens, Layers]:
    """What `decoder.prefill` returns with a compressor that keeps each head's slots of largest mass, none of them protected."""
    tokens, layers, _ = decoder.survey(cfg, params, decoder.embed(cfg, params, rows.ids, rows.live), Needs())
    out = []
    for (part,), score in zip(layers, worth, strict=True):
        limit = None if keep is None else keep["cache"][:, None]
        kv = reduce_kv(top_slots(part.kv, score, jnp.zeros(score.shape, bool), capacity, limit), part.kv)
        out.append((Part(grow_kv(kv, kv.pos.shape[-1] + new), Held()),))
    return tokens, tuple(out)


def share(worth: Mass, length: np.ndarray, held: Sequence[Sequence[np.ndarray]]) -> Float[np.ndarray, " b"]:
    """The part of the mass that slots hold, mean over layers and KV heads. `held`: a layer's positions [b g s], a head group each, -1 = dead;
    `length` [b]: tokens of the context (later positions do not count). NaN where nothing has mass."""
    shares = []
    for score, groups in zip(worth, held, strict=True):
        score = np.asarray(score, np.float64)
        b, g, n = score.shape
        kept, first = np.zeros((b, g, n + 1), bool), 0
        for pos in groups:
            here = slice(first, first + pos.shape[1])
            slot = np.where((pos < 0) | (pos >= length[:, None, None]), n, pos + (n - length)[:, None, None])
            np.put_along_axis(kept[:, here], slot, True, -1)
            first += pos.shape[1]
        total = score.sum(-1)
        shares.append(np.where(total > 0, (score * kept[..., :n]).sum(-1) / np.where(total > 0, total, 1), np.nan))
    every = np.concatenate(shares, 1)
    known = np.isfinite(every)
    return np.where(known.any(1), np.where(known, every, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)
