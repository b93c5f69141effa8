"""A prefill that reads its prompt twice, for methods that score keys by the second reading."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack
from jaxtok.core.types import Needs, Tokens
from jaxtok.models import decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers
from jaxtok.ops.attention import Impl


def request(encode: Callable[..., list[int]]) -> dict[str, tuple[int, ...]]:
    """The options of `prefill_reread` that ask for the text again in English; `encode(text, special=False)` makes ids."""
    text = {
        "prompt": "\n\nRepeat the text above word by word.",
        "further": "\n\nRepeat the next part of the text above word by word, starting after",
        "suffix": "\n",
    }
    return {name: tuple(encode(x, special=False)) for name, x in text.items()}


def prefill_reread(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    recipe: Recipe,
    *,
    new: int,
    chunk: int = 2048,
    prompt: tuple[int, ...] = (),
    further: tuple[int, ...] | None = None,
    suffix: tuple[int, ...] = (),
    overlap: int = 8,
    sinks: int = 4,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[Tokens, Layers]:
    """Prefill plainly, read the prompt again behind its own cache, compress by what that looked at (KVzip).

    Each row's tokens are cut into chunks of `chunk` by order. For each chunk the rows (`prompt`, `suffix`, chunk) are run behind the
    whole cache, which they do not join; after the first chunk, (`further`, the last `overlap` tokens before the chunk, `suffix`, chunk).
    A slot's `peak` is the largest attention that any of these rows gives it in the reading of its own chunk, softmax over the first
    `sinks` tokens, the chunk and the rows themselves. Then the caches are compressed as by `decoder.compress`, with the budgets of
    `recipe.cache.budgets` where it shares them out among layers.

    prompt, further (None = prompt), suffix: token ids, e.g. of "Repeat the previous context exactly." and of what opens an answer.
    Returns as `decoder.prefill`: the tokens of the first reading, and the caches. One compiled program; chunks after the first are a scan.

    ValueError: the recipe has no compressor, prunes between layers, stores keys unrotated, or needs other evidence than `peak`.
    """
    check.count("chunk", chunk)
    check.count("overlap", overlap, 0)
    if recipe.cache is None:
        raise ValueError("prefill_reread compresses by the second reading: the recipe needs a method at site cache")
    needs = recipe.cache.needs
    if needs._replace(peak=False, unit=False, weights=()) != Needs() or not needs.peak:
        raise ValueError(f"{recipe.cache.name} asks for {needs}; a second reading gives `peak` and weights")
    if recipe.layers or recipe.policy is not None or (recipe.reader is not None and recipe.reader.raw):
        raise ValueError("prefill_reread takes a recipe without pruning between layers, without a step policy and with rotated keys")
    recipe.validate(cfg)
    live = jnp.ones(ids.shape, bool) if live is None else live
    (b, n), further = ids.shape, prompt if further is None else further
    size = min(chunk, n)
    tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids, live), PLAIN, new=0, key=key, impl=impl)
    packed, length = gather(ids, pack(live).index), tokens.seen[:, None]

    def row(first, count: int):
        """(ids, whether they are there) of the tokens first, ..., first + count - 1 of each row."""
        at = first + jnp.arange(count, dtype=jnp.int32)[None]
        there = (at >= 0) & (at < length)
        return gather(packed, jnp.where(there, at + n - length, -1)), there

    def read(c, request: tuple[int, ...], before: int):
        """Evidence of the repetition of chunk c, and which slots are the chunk's."""
        start = c * size
        mine, there = row(start, size)
        some = jnp.any(there, -1, keepdims=True)
        fixed = lambda x: (jnp.broadcast_to(jnp.asarray(x, jnp.int32)[None], (b, len(x))), jnp.broadcast_to(some, (b, len(x))))
        old, known = row(start - before, before)
        parts = [fixed(request), (old, known & some), fixed(suffix), (mine, there)]
        text, exist = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
        again = decoder.embed(cfg, params, text, exist)
        own = (tokens.pos >= start) & (tokens.pos < start + size)
        among = own | ((tokens.pos >= 0) & (tokens.pos < sinks))
        return decoder.probe(cfg, params, again, layers, needs, PLAIN, among=among, key=key, impl=impl), own

    first, own = read(jnp.zeros((), jnp.int32), prompt, 0)
    peak = lambda seen: check.given("peak", seen.peak)
    peaks = [jnp.where(own[:, None], peak(seen), 0.0) for (seen,) in first]

    def more(peaks, c):
        found, own = read(c, further, overlap)
        return [jnp.where(own[:, None], peak(seen), old) for (seen,), old in zip(found, peaks, strict=True)], None

    many = -(-n // size)
    if many > 1:
        peaks, _ = jax.lax.scan(more, peaks, jnp.arange(1, many, dtype=jnp.int32))
    evidence = tuple((part._replace(peak=peak),) for (part,), peak in zip(first, peaks, strict=True))
    own_params = params.get("methods", {}).get("cache", {})
    limit = None if keep is None or keep.get("cache") is None else decoder.cached.by_layer(keep, "cache", cfg, b)
    shared = recipe.cache.budgets(own_params, [part.kv for (part,) in layers], [seen for (seen,) in evidence], limit)
    if shared is not None:
        if recipe.heads:
            raise ValueError(f"{recipe.cache.name} shares budgets among all heads; Recipe.heads keeps groups apart")
        keep = {**(keep or {}), "cache": shared}
    return tokens, decoder.compress(cfg, params, layers, evidence, recipe, new=new, keep=keep)
