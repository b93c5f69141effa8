"""A prefill that knows a draft of the answer, for methods that score keys by what the answer will look at."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack
from jaxtok.core.types import Needs, Tokens
from jaxtok.decode.loop import generate
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import Layers
from jaxtok.ops.attention import Impl


class Ahead(NamedTuple):
    """A prompt and what a draft model makes of its continuation."""

    tokens: Tokens  # the prompt's, as a prefill returns them: row -1 is its last token
    layers: Layers
    draft: Array  # i32 [b look]; -1 behind the end of a sequence


def same_ids(cfg: Config, draft: Config) -> None:
    """ValueError unless a draft has as many token ids as the model."""
    if draft.vocab != cfg.vocab:
        raise ValueError(f"the draft has {draft.vocab} token ids and the model {cfg.vocab}; they must share a tokenizer")


def look_ahead(
    cfg: Config, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None, *, look: int, impl: Impl = "auto"
) -> Int[Array, "b look"]:
    """The greedy continuation by a draft model, -1 behind the end of a sequence."""
    if not look:
        return jnp.zeros((ids.shape[0], 0), jnp.int32)
    tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids, live), new=look, impl=impl)
    return generate(cfg, params, tokens, layers, new=look, impl=impl).ids


def prefill_lookahead(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    recipe: Recipe,
    draft: tuple[Config, Any],
    *,
    look: int,
    new: int,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    ahead: Int[Array, "b look"] | None = None,
    impl: Impl = "auto",
) -> Ahead:
    """Prefill with the queries of a draft of the next `look` tokens in sight, compress by what they and the prompt's end look at (SpecKV).

    draft: (configuration, parameters) of any model with the target's token ids; it continues the prompt greedily. `ahead`: a continuation
    that is known already, as `look_ahead` returns it, in the place of the draft's (SpecKV-PC: that of the prompt before it was cut). Evidence `rows` has the
    last queries of the prompt and those of the draft, each over the keys that it sees. The draft and the prompt's last token leave no keys
    in what is compressed; then the last token is run on the compressed caches, as the first input of the generation. One compiled program.

    ValueError: another vocabulary, a recipe without a compressor, with pruning, a step policy or raw keys, or one that needs other evidence
    than rows, of which more than look + 1.
    """
    check.count("look", look, 0)
    if recipe.cache is None or recipe.layers or recipe.policy is not None or (recipe.reader is not None and recipe.reader.raw):
        raise ValueError("prefill_lookahead takes a recipe with a method at site cache, and no pruning, step policy or raw keys beside it")
    same_ids(cfg, draft[0])
    if ahead is not None and ahead.shape != (ids.shape[0], look):
        raise ValueError(f"ahead is {list(ahead.shape)} for {ids.shape[0]} prompts and a look of {look}; it must be [b look]")
    needs = recipe.cache.needs
    if needs._replace(rows=0, weights=()) != Needs() or needs.rows <= look + 1:
        raise ValueError(f"{recipe.cache.name} asks for {needs}; a look-ahead of {look} gives rows, more than {look + 1} of them")
    recipe.validate(cfg)
    live = jnp.ones(ids.shape, bool) if live is None else live
    packed = pack(live)
    ids, there = gather(ids, packed.index), packed.index >= 0
    ahead = look_ahead(*draft, ids, there, look=look, impl=impl) if ahead is None else ahead
    before = needs._replace(rows=needs.rows - look - 1)
    tokens = decoder.embed(cfg, params, ids[:, :-1], there[:, :-1])
    _, layers, first = decoder.survey(cfg, params, tokens, before, key=key, impl=impl)
    rest, known = jnp.concatenate([ids[:, -1:], jnp.maximum(ahead, 0)], 1), jnp.concatenate([there[:, -1:], ahead >= 0], 1)
    after = decoder.embed(cfg, params, rest, known)
    second = decoder.probe(cfg, params, after, layers, needs._replace(rows=look + 1), key=key, impl=impl)
    joined = lambda a, b: a._replace(rows=jnp.concatenate([a.rows, b.rows], 2))
    evidence = tuple(tuple(map(joined, *pair)) for pair in zip(first, second, strict=True))
    layers = decoder.compress(cfg, params, layers, evidence, recipe, new=new + 1, keep=keep)
    last = decoder.embed(cfg, params, ids[:, -1:], there[:, -1:])
    x, layers = decoder.step(cfg, params, blocks.embed(cfg, params, ids[:, -1:]), there[:, -1:], layers, recipe, key=key, impl=impl)
    return Ahead(last._replace(x=x), layers, ahead)
