"""Loops over `decoder.step`: generation, teacher-forced replay, chunked prefill. Each is one compiled program for a whole batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack
from jaxtok.core.types import Tokens
from jaxtok.decode.sampling import Sampler, sample
from jaxtok.models import blocks, cached, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers
from jaxtok.ops.attention import Impl

GREEDY = Sampler()


class Generated(NamedTuple):
    """What a batch of prompts was continued with."""

    ids: Array  # i32 [b new]; -1 after the end of a sequence
    count: Array  # i32 [b] ids before the end, the end token included
    layers: Layers  # the caches; the last id is not in them yet


def generate(
    cfg: Config,
    params,
    tokens: Tokens,
    layers: Layers,
    recipe: Recipe = PLAIN,
    *,
    new: int,
    sampler: Sampler = GREEDY,
    key: Array | None = None,
    eos: tuple[int, ...] | None = None,
    keep: Mapping[str, Any] | None = None,
    impl: Impl = "auto",
) -> Generated:
    """Continue every sequence by up to `new` tokens after a `prefill` that returned (tokens, layers).

    Stops a sequence at a token of `eos` (None = cfg.eos, () = never) and the loop when all have stopped. `key` is needed by a
    sampler that draws. A cache without room counts what it could not hold in `kv.lost`.
    """
    if new < 1:
        raise ValueError(f"new must be >= 1, got {new}")
    if key is None:
        if sampler.temperature > 0:
            raise ValueError(f"sampling at temperature {sampler.temperature} needs key=")
        key = jax.random.key(0)
    stop = jnp.asarray(cfg.eos if eos is None else eos, jnp.int32)
    b = tokens.seen.shape[0]
    began = tokens.pos[:, -1] >= 0  # an empty prompt generates nothing

    def draw(i, x, running):
        token = sample(sampler, jax.random.fold_in(key, i), decoder.logits(cfg, params, x[:, -1:])[:, 0])
        return token, running & ~jnp.any(token[:, None] == stop[None], -1)

    def more(state):
        i, *_, running = state
        return (i < new) & jnp.any(running)

    def one(state):
        i, token, out, count, layers, running = state
        x = blocks.embed(cfg, params, token[:, None])
        x, layers = decoder.step(
            cfg, params, x, running[:, None], layers, recipe, keep=keep, key=jax.random.fold_in(key, new + i), ids=token[:, None], impl=impl
        )
        token, still = draw(i, x, running)
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(running, token, -1)[:, None], i, 1)
        return i + 1, token, out, count + running.astype(jnp.int32), layers, still

    token, running = draw(0, tokens.x, began)
    out = jnp.full((b, new), -1, jnp.int32).at[:, 0].set(jnp.where(began, token, -1))
    start = (jnp.ones((), jnp.int32), token, out, began.astype(jnp.int32), layers, running)
    _, _, out, count, layers, _ = jax.lax.while_loop(more, one, start)
    return Generated(out, count, layers)


def replay(
    cfg: Config,
    params,
    tokens: Tokens,
    layers: Layers,
    ids: Int[Array, "b t"],
    recipe: Recipe = PLAIN,
    *,
    live: Bool[Array, "b t"] | None = None,
    take: Callable[[Array], Any] = lambda logits: logits,
    key: Array | None = None,
    keep: Mapping[str, Any] | None = None,
    impl: Impl = "auto",
) -> tuple[Any, Layers]:
    """Teacher forcing: append given ids one step at a time, as generation would.

    Returns `take(logits f32 [b vocab])` stacked on axis 0 for the t predictions of ids[:, 0], ..., ids[:, t-1] (the first comes
    from the prefill), and the caches. Ids that are not `live` are skipped: what follows is predicted from the last live one. Use `take` to keep less than the whole vocabulary.
    """
    live = jnp.ones(ids.shape, bool) if live is None else live
    key = jax.random.key(0) if key is None else key

    def one(state, row):
        x, layers, i = state
        seen = take(decoder.logits(cfg, params, x)[:, 0])
        y = blocks.embed(cfg, params, row[0][:, None])
        own = jax.random.fold_in(key, i)
        y, layers = decoder.step(cfg, params, y, row[1][:, None], layers, recipe, keep=keep, key=own, ids=row[0][:, None], impl=impl)
        return (jnp.where(row[1][:, None, None], y, x), layers, i + 1), seen

    (_, layers, _), out = jax.lax.scan(one, (tokens.x[:, -1:], layers, jnp.zeros((), jnp.int32)), (ids.T, live.T))
    return out, layers


def prefill_chunked(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    recipe: Recipe = PLAIN,
    *,
    chunk: int,
    new: int,
    read: bool = False,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[Tokens, Layers]:
    """`embed` and `prefill` of padded prompts in chunks of `chunk` rows: activations take the memory of one chunk, the cache that of the prompt.

    The caches are compressed with the last chunk, whose queries are the window that a method sees; a step policy observes all, and one
    that is `recurrent` (LoCoCo) fits after each chunk, so that the cache has room for its capacity and a chunk, whatever the prompt.
    `read`: the reader chooses for each chunk what its queries attend to (sparse prefill; without it a prefill attends to everything).
    ValueError for methods that need evidence of the whole prompt at once, and for pruning between layers.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if recipe.sparsify is not None:
        raise ValueError(f"{recipe.sparsify.name} lists the keys of a whole prompt at once; use decode.prefill, or a reader with read=True")
    if read and (recipe.reader is None or recipe.cache is not None or recipe.policy is not None):
        raise ValueError("read=True prefills through a reader: the recipe needs one, and no cache or policy beside it")
    needs = recipe.cache.needs if recipe.cache is not None else PLAIN.prefill_needs
    if (
        needs.received
        or needs.peak
        or needs.cls
        or needs.keys
        or needs.hidden
        or needs.queries is not None
        or max(needs.rows, needs.turned) > chunk
    ):
        raise ValueError(f"{recipe.cache.name} needs more of the prompt than its last chunk of {chunk} rows; prefill it at once")  # type: ignore[union-attr]
    recipe.validate(cfg)
    if recipe.passes:
        raise ValueError(f"{recipe.passes[0]} needs more than one pass over the prompt; use {recipe.passes[1]}")
    if recipe.layers or recipe.edits:
        raise ValueError("pruning between layers and edits take the whole prompt; prefill it at once")
    if recipe.reader is not None and recipe.reader.raw and not read and not (recipe.policy is not None and recipe.policy.raw):
        raise ValueError(f"{recipe.reader.name} wants keys stored unrotated from the first chunk on; prefill at once, or with read=True")
    packed = pack(jnp.ones(ids.shape, bool) if live is None else live)  # padding may stand anywhere, as for `embed`
    ids, live = gather(ids, packed.index), packed.index >= 0
    b, n = ids.shape
    extra = -n % chunk
    ids, live = (jnp.pad(x, ((0, 0), (extra, 0))) for x in (ids, live))
    count = (n + extra) // chunk
    split = lambda x: jnp.swapaxes(x.reshape(b, count, chunk), 0, 1)
    if recipe.policy is not None and recipe.policy.recurrent:
        return _in_blocks(cfg, params, split(ids), split(live), recipe, new, keep, key, impl)
    head = recipe.replace(cache=None, reader=recipe.reader if read else None)
    slots = count * chunk + new if read else (count - 1) * chunk
    slots += -slots % (head.reader.block if head.reader is not None else 1)
    layers = decoder.empty(cfg, params, b, slots, head)

    def one(state, part):
        x = blocks.embed(cfg, params, part[0])
        return decoder.step(cfg, params, x, part[1], state[1], head, key=key, evict=False, ids=part[0], impl=impl), None

    tokens = decoder.embed(cfg, params, ids[:, -chunk:], live[:, -chunk:])
    if count > 1 or read:
        here = count if read else count - 1
        (x, layers), _ = jax.lax.scan(one, (tokens.x, layers), (split(ids)[:here], split(live)[:here]))
        if read:
            return tokens._replace(x=x), cached.stow_all(recipe.reader, layers, count * chunk)
    return decoder.prefill(cfg, params, tokens, recipe, new=new, layers=layers if count > 1 else None, keep=keep, key=key, impl=impl)


def _in_blocks(cfg, params, ids, live, recipe: Recipe, new: int, keep, key, impl: Impl) -> tuple[Tokens, Layers]:
    """One prefill a chunk, each on the caches that the one before left. ids, live [count b chunk]."""
    slots = recipe.policy.capacity + recipe.policy.every  # type: ignore[union-attr]
    slots += -slots % (recipe.reader.block if recipe.reader is not None else 1)
    layers = decoder.empty(cfg, params, ids.shape[1], slots, recipe)

    def one(layers, part):
        tokens = decoder.embed(cfg, params, *part)
        tokens, layers = decoder.prefill(cfg, params, tokens, recipe, new=new, layers=layers, keep=keep, key=key, impl=impl)
        return layers, tokens.x

    layers, x = jax.lax.scan(one, layers, (ids, live))
    return decoder.embed(cfg, params, ids[-1], live[-1])._replace(x=x[-1]), layers
