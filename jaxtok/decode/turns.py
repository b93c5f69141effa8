"""A conversation on one cache: what is said to the model is read at once, what it says comes a few tokens at a time.

    layers = begin(cfg, params, recipe, slots=4096, new=512)
    x, layers = listen(cfg, params, layers, ids, live, recipe, new=512)
    said = Said.start(x)
    ids, said, layers = speak(cfg, params, said, layers, recipe, most=8, left=512)    # until nothing is running; then the next turn

Shapes stay the same from turn to turn, so each of the two compiles once for a bucket of lengths: a method of site cache compresses to its
capacity again after every turn, a step policy keeps its own, and without either the cache has `slots` slots, and what finds no room in
them is counted in `kv.lost`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.recipe import Recipe
from jaxtok.decode.sampling import Sampler, sample
from jaxtok.models import blocks, cached, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers
from jaxtok.ops.attention import Impl

GREEDY = Sampler()


class Said(NamedTuple):
    """How far a reply is."""

    x: Array  # [b 1 c] the row whose logits say the next token
    running: Array  # bool [b]
    count: Array  # i32 [] tokens drawn so far, which number the draws

    @classmethod
    def start(cls, x: Float[Array, "b 1 c"]) -> "Said":
        """Nothing yet."""
        return cls(x, jnp.ones(x.shape[:1], bool), jnp.zeros((), jnp.int32))


def begin(cfg: Config, params, recipe: Recipe = PLAIN, *, slots: int, new: int, b: int = 1) -> Layers | None:
    """Empty caches. None (the first turn makes them) for a method that looks at the whole of what is compressed, which allows one turn.

    slots: of a cache that no method bounds. new: tokens of a reply at most, for which a compressed cache leaves room.
    """
    recipe.validate(cfg)
    if recipe.layers:
        raise ValueError("pruning between layers takes a prefill of its own, which a conversation does not have")
    if recipe.passes:
        raise ValueError(f"{recipe.passes[0]} needs more than one pass over a prompt, which a conversation does not make")
    if recipe.policy is not None and recipe.policy.groups > 1:
        raise ValueError(
            f"{recipe.policy.name} leaves some heads whole, whose caches would grow with every turn; use a method that bounds all"
        )
    needs = recipe.prefill_needs
    if needs.keys or needs.hidden:
        return None
    if recipe.policy is not None:
        slots = recipe.policy.slots + recipe.policy.every
    elif recipe.cache is not None:
        slots = recipe.cache.slots + new
    return decoder.empty(cfg, params, b, _whole_blocks(recipe, slots), recipe)


def _whole_blocks(recipe: Recipe, slots: int) -> int:
    return slots if recipe.reader is None else -(-slots // recipe.reader.block) * recipe.reader.block


def listen(
    cfg: Config,
    params,
    layers: Layers | None,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"],
    recipe: Recipe = PLAIN,
    *,
    new: int,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "b 1 c"], Layers]:
    """Read a turn whose padding, if any, stands behind it (right) -> (the row that the reply begins from, caches).

    The turn attends to all of itself and of the caches, and a reader acts on the reply; one that needs to know sentences acts on both.
    """
    if layers is None or recipe.cache is not None or recipe.policy is not None:
        tokens = decoder.embed(cfg, params, ids, live, recipe.ends, getattr(recipe.attention, "token", None))
        tokens, layers = decoder.prefill(cfg, params, tokens, recipe, new=new, layers=layers, key=key, impl=impl)
        return tokens.x[:, -1:], layers
    # in place: the caches keep their size, and slots that padding has taken are given back
    listens = recipe.reader is not None and recipe.reader.needs.segment  # its state cannot be made anew from the caches
    rest = recipe if listens or cached.raw(recipe) else recipe.replace(reader=None)
    before = [[part.kv.cursor for part in parts] for parts in layers]
    x, layers = decoder.step(cfg, params, blocks.embed(cfg, params, ids), live, layers, rest, key=key, ids=ids, impl=impl)
    count = jnp.sum(live, -1, dtype=jnp.int32)
    out = []
    for i, (parts, cursors) in enumerate(zip(layers, before, strict=True)):
        now = []
        for part, at in zip(parts, cursors, strict=True):
            kv = part.kv._replace(cursor=jnp.minimum(at + jnp.max(count), part.kv.k.shape[2]))
            own = params.get("methods", {}).get("reader", {})
            reading = part.reader if recipe.reader is None or listens else recipe.reader.start(own, i, kv, cfg.heads)
            now.append(part._replace(kv=kv, reader=reading))
        out.append(tuple(now))
    return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], 1), tuple(out)


def speak(
    cfg: Config,
    params,
    said: Said,
    layers: Layers,
    recipe: Recipe = PLAIN,
    *,
    most: int,
    left: int | Int[Array, ""],
    sampler: Sampler = GREEDY,
    key: Array | None = None,
    eos: tuple[int, ...] | None = None,
    keep: Mapping[str, Any] | None = None,
    impl: Impl = "auto",
) -> tuple[Int[Array, "b most"], Said, Layers]:
    """The next tokens, at most `most` (static) and `left` (traced) -> (ids, -1 where none was said, how far it is, caches).

    A sequence stops at a token of `eos` (None = cfg.eos), which is among the ids and not in the caches; all others are.
    """
    if key is None:
        if sampler.temperature > 0:
            raise ValueError(f"sampling at temperature {sampler.temperature} needs key=")
        key = jax.random.key(0)
    stop = jnp.asarray(cfg.eos if eos is None else eos, jnp.int32)

    def more(state):
        i, _, said, _ = state
        return (i < most) & (i < left) & jnp.any(said.running)

    def one(state):
        i, out, (x, running, count), layers = state
        token = sample(sampler, jax.random.fold_in(key, 2 * count), decoder.logits(cfg, params, x)[:, 0])
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(running, token, -1)[:, None], i, 1)
        running = running & ~jnp.any(token[:, None] == stop[None], -1)
        y = blocks.embed(cfg, params, token[:, None])
        own = jax.random.fold_in(key, 2 * count + 1)
        y, layers = decoder.step(cfg, params, y, running[:, None], layers, recipe, keep=keep, key=own, ids=token[:, None], impl=impl)
        return i + 1, out, Said(jnp.where(running[:, None, None], y, x), running, count + 1), layers

    out = jnp.full((said.running.shape[0], most), -1, jnp.int32)
    _, out, said, layers = jax.lax.while_loop(more, one, (jnp.zeros((), jnp.int32), out, said, layers))
    return out, said, layers
