"""What a sparsifier reads of prompts and what it changes, by layer and query head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.sparsifier import Sparsifier
from jaxtok.core.types import Needs
from jaxtok.models import cached, decoder, sparsify
from jaxtok.models.config import Config
from jaxtok.ops.block_sparse import density


class Heads(NamedTuple):
    """Of each layer, on the dense model's rows; means over the prompts."""

    density: jax.Array  # f32 [l h] share of the causal blocks that are listed; rows of the tail count as dense, in whole blocks
    error: jax.Array  # f32 [l h] |sparse output - dense output| / |dense output|, 2-norms over all live rows
    keys: jax.Array  # f32 [l] of the keys of listed blocks, the share that is read: below 1 where a method lists keys one by one
    lost: jax.Array  # i32 [l] blocks that were chosen and found no room in a list, over all prompts and lists (BlockTable.lost)


def by_head(cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None, method: Sparsifier) -> Heads:
    """Density, error and overflow of `method` with params["methods"]["sparsify"], each layer on what the dense model gives it.

    ValueError for a method that reads prompts of n rows whole.
    """
    n = ids.shape[1]
    if method.whole(n):
        raise ValueError(f"{method.name} reads prompts of {n} tokens whole; measure it on longer ones")
    tokens, found, at = decoder.embed(cfg, params, ids, live), [], jnp.arange(n, dtype=jnp.int32)[None]
    learned, size = params.get("methods", {}).get("sparsify", {}), {"block_q": method.block_q, "block_k": method.block_k}
    for i, p in enumerate(params["layers"]):
        pos = tokens.pos
        tokens, ((kv, seen),) = cached.attend_rows(cfg, p, i, tokens, None, Recipe(), Needs(turned=n), False, None, "auto")
        q = check.given("turned", seen.turned)
        see: dict[str, Any] = dict(window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
        dense, _ = sparsify.attend(None, {}, i, q, kv.k, kv.v, pos, **see)
        sparse, _ = sparsify.attend(method, learned, i, q, kv.k, kv.v, pos, **see)
        alive = (pos >= 0)[:, None, :, None]
        length = lambda x, alive=alive: jnp.sqrt(jnp.sum(jnp.where(alive, x.astype(jnp.float32), 0.0) ** 2, (0, 2, 3)))
        view = sparsify.aligned(q, kv.k, pos, i, **see)
        table, before = method.table(learned, view), view.length[:, None] - method.tail
        share = density(table, jnp.where(at < before, view.pos, -1), **size)
        some, every = (_blocks(x, n, **size) for x in (before, view.length[:, None]))
        share = jnp.mean((share * some + every - some) / jnp.maximum(every, 1.0), 0)
        share = jnp.repeat(share, cfg.heads // share.shape[0])
        read = jnp.ones(())
        if table.mask is not None:
            read = jnp.sum(table.mask, dtype=jnp.float32) / jnp.maximum(jnp.sum(table.count) * method.block_k, 1).astype(jnp.float32)
        lost = jnp.zeros((), jnp.int32) if table.lost is None else jnp.sum(table.lost)
        found.append(Heads(share, length(sparse - dense) / jnp.maximum(length(dense), 1e-30), read, lost))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def _blocks(length: Int[Array, "b 1"], n: int, block_q: int, block_k: int) -> Float[Array, "b 1"]:
    """Causal blocks of the first `length` rows of n."""
    first = jnp.arange(0, n, block_q, dtype=jnp.int32)[None]
    last = jnp.minimum(first + block_q, length)
    return jnp.sum(jnp.where(first < length, (last + block_k - 1) // block_k, 0), 1, keepdims=True).astype(jnp.float32)
