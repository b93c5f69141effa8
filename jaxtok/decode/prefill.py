"""The prefill that a recipe takes: in one pass, read twice, or with a draft of the answer in sight."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxtok.core.check import given
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack
from jaxtok.core.types import Needs, Tokens
from jaxtok.decode.lookahead import look_ahead, prefill_lookahead, same_ids
from jaxtok.decode.reread import prefill_reread
from jaxtok.decode.retrieve import through
from jaxtok.models import cached, decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import Layers
from jaxtok.ops.attention import Impl

Draft = tuple[Config, Any]  # configuration and parameters of a model with the same token ids


def check_draft(cfg: Config, recipe: Recipe, draft: Config | Draft | None) -> None:
    """ValueError where a method of the recipe looks at a draft and there is none, or one with other token ids."""
    if recipe.drafts is None:
        return
    if draft is None:
        raise ValueError(
            f"{recipe.drafts} needs a draft model with the same token ids; give draft=(cfg, params), on the command line --draft"
        )
    same_ids(cfg, draft[0] if isinstance(draft, tuple) else draft)


def prefill(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    recipe: Recipe,
    *,
    new: int,
    draft: Draft | None = None,
    ask: Mapping[str, Any] | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[Tokens, Layers]:
    """Embed and prefill a batch of padded prompts with any recipe; what `generate` takes comes out. One compiled program.

    A method that one pass over the prompt is not enough for gets the prefill that it names in `passes`: `prefill_reread` with the options
    in `ask` (`reread.request` makes them), `prefill_lookahead` with `draft`, (cfg, params) of a model with the same token ids; any other
    recipe gets the decoder's. A method of site prompt first chooses the tokens that the model gets: what it looks at comes from the draft,
    or from the model itself; what follows sees a short prompt with positions from 0, and the draft's continuation of the whole one.

    `keep`: as in `decoder.prefill`, and "prompt": i32 [b] tokens. Returns the tokens, of which row -1 is the prompt's last and `source` says
    where the prompt's tokens went, and the caches with room for `new` more.
    ValueError: a method needs a draft and there is none; what the function that runs refuses.
    """
    recipe.validate(cfg)
    check_draft(cfg, recipe, draft)
    options: dict[str, Any] = {"new": new, "key": key, "impl": impl}
    if recipe.prompt is None:
        return _prefill(cfg, params, ids, live, recipe, draft, ask, None, keep=keep, **options)
    keep = dict(keep or {})
    live = jnp.ones(ids.shape, bool) if live is None else live
    packed = pack(live)
    ids, live = gather(ids, packed.index), packed.index >= 0
    look, ahead = _looking(cfg, params, draft, recipe, ids, live, impl)
    budget = keep.pop("prompt", None)
    budget = None if budget is None else cached.whole("prompt", budget)
    plan = recipe.prompt.run(params.get("methods", {}).get("prompt", {}), look, ids, live, budget)
    short, there = gather(ids, plan.index), plan.index >= 0
    tokens, layers = _prefill(cfg, params, short, there, recipe.replace(prompt=None), draft, ask, ahead, keep=keep, **options)
    where = lambda inner, outer: jnp.where(outer >= 0, jnp.take_along_axis(inner, jnp.maximum(outer, 0), 1), -1)
    inner = tokens.source
    if inner.shape != short.shape:  # of a look-ahead the last row comes back
        inner = jnp.broadcast_to(jnp.where(jnp.arange(short.shape[1]) == short.shape[1] - 1, 0, -1)[None], short.shape)
    full = lambda kv: kv._replace(lost=kv.lost + plan.lost[:, None])
    layers = tuple(tuple(part._replace(kv=full(part.kv)) for part in parts) for parts in layers)
    return tokens._replace(source=where(inner, where(plan.assign, packed.assign)), lost=tokens.lost + plan.lost), layers


def _prefill(cfg, params, ids, live, recipe: Recipe, draft, ask, ahead, **options) -> tuple[Tokens, Layers]:
    """The prefill that the recipe's cache takes; `ahead`: the draft's continuation where it is known."""
    how = recipe.passes[1] if recipe.passes else None
    if how == "decode.prefill_reread":
        return prefill_reread(cfg, params, ids, live, recipe, **options, **(ask or {}))
    if how == "decode.prefill_lookahead" and draft is not None:
        look = recipe.look or 0
        ahead = None if ahead is None else ahead[:, :look]
        return prefill_lookahead(cfg, params, ids, live, recipe, draft, look=look, ahead=ahead, **options)[:2]
    return decoder.prefill(
        cfg, params, decoder.embed(cfg, params, ids, live, recipe.ends, getattr(recipe.attention, "token", None)), recipe, **options
    )


def _looking(cfg, params, draft, recipe: Recipe, ids, live, impl: Impl):
    """(what a method of site prompt looks through, the draft's continuation of packed ids or None)."""
    if recipe.look is None or draft is None or not recipe.prompt.drafts:  # type: ignore[union-attr]
        return through(cfg, params, impl, recipe.prompt.sees), None  # type: ignore[union-attr]
    small, its = draft
    ahead, mine = look_ahead(small, its, ids, live, look=recipe.look, impl=impl), recipe.prompt.look  # type: ignore[union-attr]

    def look(ids, live, rows):
        tokens = decoder.embed(small, its, ids, live)
        _, layers, before = decoder.survey(small, its, tokens, Needs(rows=rows), impl=impl)
        if not mine:
            return tuple(seen.rows for (seen,) in before)
        further = decoder.embed(small, its, jnp.maximum(ahead[:, :mine], 0), ahead[:, :mine] >= 0)
        after = decoder.probe(small, its, further, layers, Needs(rows=mine), impl=impl)
        return tuple(jnp.concatenate([given("rows", x.rows) for x in pair], 2) for (pair,) in map(zip, before, after))

    return look, ahead
