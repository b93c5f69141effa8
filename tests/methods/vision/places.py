"""What a method between a decoder's layers sees and does at each of its places."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.reducer import Reducer
from jaxtok.core.types import IMAGE, Tokens
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config

TINY = Config(vocab=32, width=16, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spied(Reducer):
    """`inner`, whose scores, plans and rows are told to `seen` while it is traced: one dict a place, in order."""

    inner: Reducer
    seen: list = dataclasses.field(compare=False)
    place: int = -1

    def __getattribute__(self, name):
        if name in ("inner", "seen", "place", "layer", "plan"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "inner"), name)

    def layer(self, i, layers):
        return Spied(inner=self.inner.layer(i, layers), seen=self.seen, place=i)

    def plan(self, params, state, tokens, evidence, keep=None):
        state, plan = self.inner.plan(params, state, tokens, evidence, keep)
        told = {"index": plan.index, "x": gather(tokens.x, plan.index), "kind": tokens.kind, "pos": tokens.pos}
        if not getattr(self.inner, "passive", False) and hasattr(self.inner, "score"):
            told["score"] = self.inner.score(params, state, tokens, evidence)
        self.seen.append(told)
        return state, plan


@functools.partial(jax.jit, static_argnums=(0, 3))
def _spy(cfg, params, tokens, recipe, keep=None):
    seen: list[dict[str, Any]] = []
    spies = {m: Spied(inner=m, seen=seen) for _, m in recipe.layers}
    recipe = recipe.replace(layers=tuple((k, spies[m]) for k, m in recipe.layers))
    end, layers = decoder.prefill(cfg, params, tokens, recipe, new=2, keep=keep)
    return seen, end, layers, blocks.norm(end.x, params["norm"], cfg.norm_eps, cfg.norm_offset)


def spy(cfg, params, tokens, recipe: Recipe, keep=None):
    """(what was told at each place, tokens in the end, caches, last hidden states after the norm), as numpy."""
    return jax.device_get(_spy(cfg, params, tokens, recipe, keep))


@functools.partial(jax.jit, static_argnums=0)
def _planned(method, tokens, evidence, state, keep):
    state, plan = method.plan({}, method.start({}, tokens) if state is None else state, tokens, evidence, keep)
    return method.score({}, state, tokens, evidence), plan


def planned(method, tokens, evidence, state=None, keep=None):
    """(score [b n], plan) of a method that scores, as numpy."""
    return jax.device_get(_planned(method, tokens, evidence, state, keep))


@functools.cache
def model(cfg: Config = TINY, dtype="float32"):
    with jax.ensure_compile_time_eval():  # asked for while something is traced, it is still kept
        params = blocks.init(cfg, jax.random.key(0), jnp.dtype(dtype), embed_std=1.0)
        return params | {"layers": tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])}


def prompt(kinds: str, b=1, cfg: Config = TINY, seed=1) -> Tokens:
    """Rows of a prompt, a letter each: t text, i image, s special, . dead."""
    kind = np.array([{"t": 0, "i": IMAGE, "s": 4, ".": 0}[c] for c in kinds], np.int8)
    live = np.broadcast_to(np.array([c != "." for c in kinds]), (b, len(kinds)))
    ids = jax.random.randint(jax.random.key(seed), (b, len(kinds)), 0, cfg.vocab)
    tokens = decoder.embed(cfg, model(cfg), ids, jnp.asarray(live))
    return tokens._replace(kind=jnp.broadcast_to(jnp.asarray(kind), (b, len(kinds))))
