"""Site layers: what the methods between a decoder's layers do to the rows of one prefill."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, grow_kv, reduce, reduce_kv, representative
from jaxtok.core.select import pack
from jaxtok.core.types import KV, Evidence, Needs, Part, Tokens, live_count
from jaxtok.models import cached
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl


class Pruning:
    """One prefill while it is traced: where methods act, and the state of each, shared by all its places."""

    def __init__(self, cfg: Config, params, recipe: Recipe, keep: Mapping[str, Any] | None, proportional: bool, key, impl: Impl):
        self.cfg, self.opts = cfg, (proportional, key, impl)
        self.places = {k: (j, method) for j, (k, method) in enumerate(recipe.layers)}
        self.trims = [method for _, method in recipe.layers if method.trim is not None]
        self.budgets = None if keep is None else keep.get("layers")
        self.learned = params.get("methods", {}).get("layers", {})
        self.states: dict[Any, Held] = {}

    def needs(self, i: int) -> Needs:
        """Evidence that is asked of layer i for the place behind it."""
        if i + 1 not in self.places:
            return Needs()
        needs = self.places[i + 1][1].layer(i + 1, self.cfg.layers).needs
        return Needs(change=needs.change) if needs.own else needs

    def before(self, i: int, p, tokens: Tokens, evidence: Evidence) -> Tokens:
        """The rows that go through layer i, whose parameters are p; `evidence` is layer i - 1's."""
        if i not in self.places:
            return tokens
        index, named = self.places[i]
        method, own = named.layer(i, self.cfg.layers), self.learned[index] if self.learned else {}
        if method.needs.own:
            ahead = method.needs._replace(change=False, score=False)
            evidence = cached.foresee(self.cfg, p, i, tokens, ahead, *self.opts)._replace(change=evidence.change)
        if method.needs.score and tokens.score is None:
            raise ValueError(f"{method.name} reads a score that a method at an earlier site has made, and there is none; add that method")
        state = self.states[named] if named in self.states else method.start(own, tokens)
        state, plan = method.plan(own, state, tokens, evidence, self._budget(index, tokens))
        score = method.mark(own, state, tokens, evidence)
        tokens = tokens if score is None else tokens._replace(score=score)
        self.states[named] = state
        row = representative(plan)
        self.states = {m: Held(jax.tree.map(lambda x: gather(x, row), s.slots), s.rest) for m, s in self.states.items()}
        tokens = reduce(plan, tokens, method.positions)
        if method.positions == "repack":  # rows see each other in the order in which they stand, merged ones too
            tokens = tokens._replace(pos=jnp.sort(tokens.pos, axis=-1))
        return tokens

    def _budget(self, index: int, tokens: Tokens) -> Array | None:
        if self.budgets is None or self.budgets[index] is None:
            return None
        return jnp.broadcast_to(cached.whole("layers", self.budgets[index]), tokens.seen.shape)

    def after(self, layers: tuple[tuple[Part, ...], ...], tokens: Tokens, new: int) -> tuple[tuple[Part, ...], ...]:
        """The caches of all layers, cut where a method trims them to the rows that are there in the end."""
        out = list(layers)
        for method in self.trims:
            for i in range(method.trim or 0, len(out)):
                (part,) = out[i]
                out[i] = (part._replace(kv=_trim(part.kv, tokens, new, method.positions == "repack")),)
        return tuple(out)


def _trim(kv: KV, tokens: Tokens, new: int, repack: bool) -> KV:
    """Only slots of rows that are still there, with room for `new` more; `repack`: the next rotary id is their number."""
    (b, _, s), n = kv.pos.shape, tokens.source.shape[1]
    there = jnp.zeros((b, n + 1), bool).at[jnp.arange(b)[:, None], jnp.where(tokens.pos < 0, n, tokens.pos)].set(True)[:, :n]
    alive = (kv.pos >= 0) & jnp.take_along_axis(there[:, None], jnp.clip(kv.pos, 0, n - 1), 2)
    rows = min(tokens.pos.shape[1], s)
    kv = grow_kv(reduce_kv(pack(alive, rows), kv), rows + new)
    return kv._replace(delta=live_count(kv.pos[:, 0]) - kv.seen) if repack else kv
