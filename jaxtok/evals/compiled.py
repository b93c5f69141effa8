"""What a measurement compiles: the prefill, the question after it, the continuation, the full model's logits along it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import live_count
from jaxtok.decode import generate, prefill, replay
from jaxtok.evals import agreement, heads, oracle
from jaxtok.evals.cases import Rows
from jaxtok.models import decoder
from jaxtok.models.config import Config


def prompt(cfg: Config, recipe: Recipe, new: int, ask: Mapping[str, Any], small: Config | None, params, draft, rows: Rows, keep, key):
    """(tokens cut to the last row or None, caches, kept slots [b], share of layers and heads that kept each position [b n], positions
    of the slots).

    `draft`: the parameters of `small`; what the oracle knows, where it is the method.
    """
    room = ahead(recipe, rows, new)
    if isinstance(recipe.cache, oracle.Foreseen):
        return _kept(recipe, rows, *oracle.prefill(cfg, params, rows, draft, recipe.cache.capacity, room, keep))
    given: Any = None if small is None else (small, draft)
    tokens, layers = prefill(cfg, params, rows.ids, rows.live, recipe, new=room, draft=given, ask=ask, keep=keep, key=key)
    return _kept(recipe, rows, tokens, layers)


def _kept(recipe: Recipe, rows: Rows, tokens, layers):
    """What `prompt` returns, of tokens and caches."""
    pos = [part.pos for parts in layers for part in parts]
    every = sum(p.shape[1] for p in pos)
    count = sum(jnp.sum(live_count(p), -1) for p in pos).astype(jnp.float32) / every  # type: ignore[union-attr]
    b, n = rows.ids.shape
    where = jnp.zeros((b, n + 1), jnp.float32)
    for p in pos:
        p = p.reshape(b, -1)
        where = where.at[jnp.arange(b)[:, None], jnp.where((p < 0) | (p > n), n, p)].add(1.0)
    where = where[:, :n] / every
    if recipe.prompt is not None:  # positions in the caches are those of the short prompt
        there, order = tokens.source >= 0, jnp.where(rows.live, jnp.cumsum(rows.live, -1, dtype=jnp.int32) - 1, n)
        short = jnp.take_along_axis(tokens.pos, jnp.maximum(tokens.source, 0), 1)
        share = jnp.where(there, jnp.take_along_axis(where, jnp.clip(short, 0, n - 1), 1), 0.0)
        where = jnp.zeros((b, n + 1), jnp.float32).at[jnp.arange(b)[:, None], order].set(share)[:, :n]
    # where a question follows, nothing reads the rows after the last layer, and the compiler drops their MLP
    held = tuple(tuple(part.pos for part in parts) for parts in layers)
    return _last(tokens) if rows.ask is None else None, layers, count, where, held


def ahead(recipe: Recipe, rows: Rows, new: int) -> int:
    """Room that a prefill leaves behind the context: the question makes its own, but for heads that are left whole beside a step policy."""
    return new if rows.ask is None else rows.ask.shape[1] + new if recipe.heads else 0


def ask(cfg: Config, recipe: Recipe, new: int, params, ids, live, layers, keep, key):
    """The question after the compressed context -> (tokens cut to the last row, caches)."""
    tokens = decoder.embed(cfg, params, ids, live, recipe.ends)
    if recipe.policy is not None:  # as it would be while generating: one row after another
        x, layers = decoder.step(cfg, params, tokens.x, tokens.pos >= 0, layers, recipe, keep=keep, key=key)
        return _last(tokens._replace(x=x)), layers
    tokens, layers = decoder.prefill(cfg, params, tokens, recipe, new=new, layers=layers, keep=keep, key=key)
    return _last(tokens), layers


def _last(tokens):
    return tokens._replace(x=tokens.x[:, -1:], pos=tokens.pos[:, -1:])


def answer(cfg: Config, recipe: Recipe, new: int, params, tokens, layers, keep, key):
    """(ids i32 [b new], lost rows a layer and head f32 [b], caches)."""
    out = generate(cfg, params, tokens, layers, recipe, new=new, keep=keep, key=key)
    return out.ids, heads.average(out.layers, lambda part: part.kv.lost), out.layers


def compare(cfg: Config, recipe: Recipe, params, tokens, layers, keep, key, ids, live, logits):
    """(KL f32 [t b], same first token bool [t b]) along the full model's continuation."""
    mine, _ = replay(cfg, params, tokens, layers, ids, recipe, live=live, keep=keep, key=key)
    return agreement.divergence(logits, mine)


def logits(cfg: Config, params, tokens, layers, ids, live):
    return replay(cfg, params, tokens, layers, ids, live=live)[0]
