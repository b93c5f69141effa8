"""The small model that the laws run a method in. Programs are compiled once a method and shared by its laws."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import KV, Needs, Noise, Part, Tokens
from jaxtok.models import blocks, cached, decoder
from jaxtok.models.config import Config

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
B, N, T, CAP = 4, 12, 14, 6  # T > 2 * CAP: a step policy turns its cache over twice
LENGTHS = np.array([12, 7, 9, 3])
P = N + T  # positions that exist
IMPL = "auto"  # of attention; whoever changes it calls `forget` before and after
LIVE = np.arange(N)[None] >= N - LENGTHS[:, None]


@functools.cache
def world(dtype="float32"):
    """(params with peaked attention, prompt ids, forced continuation)."""
    params = blocks.init(CFG, jax.random.key(0), jnp.dtype(dtype), embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    ids = jax.random.randint(jax.random.key(1), (B, N), 0, CFG.vocab)
    return params, ids, jax.random.randint(jax.random.key(2), (B, T), 0, CFG.vocab)


def recipe_of(method) -> Recipe:
    if method.site not in ("cache", "policy", "reader"):
        raise ValueError(
            f"there are laws for the sites cache, policy and reader, and for those of rows; {method!r} acts at {method.site!r}"
        )
    groups = getattr(method, "groups", 1)  # of several head groups all heads are in the last, which is the one to ask
    return Recipe(**{method.site: method}, heads=((*(0,) * (groups - 1), CFG.kv_heads),) * CFG.layers if groups > 1 else ())


def weights(method, params):
    return params | {"methods": recipe_of(method).init_params(jax.random.key(3), CFG)}


def budgets(method, keep):
    return {method.site: keep} if method.site in ("cache", "policy") else None


def live_set(pos):
    """bool [b g P]: which positions are in a cache."""
    hit = pos[..., None] == jnp.arange(P).reshape((1,) * pos.ndim + (P,))
    return jnp.any(hit, axis=2)


def record(layers):
    return jnp.stack([live_set(parts[-1].pos) for parts in layers])


def seen_whole(part: Part) -> KV:
    """A part's cache with the positions of all that is read, frozen slots included."""
    old = part.frozen
    bias = part.kv.bias if old is None else jnp.concatenate([old.kv.bias, part.kv.bias], 2)
    return part.kv._replace(pos=part.pos, bias=bias)


def run(recipe, params, tokens: Tokens, force, keep, key):
    """Prefill, then T forced steps -> everything that the laws look at."""
    tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=T, keep=keep, key=key, impl=IMPL)
    first = decoder.logits(CFG, params, tokens.x[:, -1:])[:, 0]
    filled = [seen_whole(parts[-1]) for parts in layers]

    def one(layers, ids):
        x = blocks.embed(CFG, params, ids[:, None])
        x, new = decoder.step(CFG, params, x, jnp.ones(ids.shape, bool)[:, None], layers, recipe, keep=keep, key=key, impl=IMPL)
        return new, (decoder.logits(CFG, params, x)[:, 0], record(layers))

    layers, (logits, sets) = jax.lax.scan(one, layers, force.T)
    return dict(first=first, logits=logits, sets=sets, filled=filled, final=[seen_whole(parts[-1]) for parts in layers])


@functools.cache
def program(method, dtype):
    """The jitted `run` of a method and a counter of its traces."""
    traces = [0]

    def traced(params, tokens, force, keep, key):
        traces[0] += 1
        return run(recipe_of(method), params, tokens, force, budgets(method, keep), key)

    return jax.jit(traced), traces


@functools.cache
def plain():
    return jax.jit(lambda params, tokens, force: run(Recipe(), params, tokens, force, None, None))


@functools.cache
def masked_replay():
    """The full cache with, before each step, only the recorded positions alive."""

    def replay(params, tokens, force, sets):
        _, layers = decoder.prefill(CFG, params, tokens, Recipe(), new=T)

        def mask(kv: KV, allowed):
            index = jnp.maximum(kv.pos, 0)
            return kv._replace(pos=jnp.where(jnp.take_along_axis(allowed, index, 2), kv.pos, -1))

        def one(layers, row):
            ids, allowed = row
            layers = tuple((parts[0]._replace(kv=mask(parts[0].kv, allowed[i])),) for i, parts in enumerate(layers))
            x = blocks.embed(CFG, params, ids[:, None])
            x, layers = decoder.step(CFG, params, x, jnp.ones(ids.shape, bool)[:, None], layers, Recipe())
            return layers, decoder.logits(CFG, params, x)[:, 0]

        return jax.lax.scan(one, layers, (force.T, sets))[1]

    return jax.jit(replay)


def forget() -> None:
    """Drop the programs that were compiled, and what they gave."""
    for made in (program, plain, masked_replay, usual):
        made.cache_clear()


def tokens_of(params, ids, live=LIVE, ends=()) -> Tokens:
    return decoder.embed(CFG, params, ids, jnp.asarray(live), ends)


def result(method, *, dtype="float32", live=LIVE, ids=None, keep=CAP, change=lambda tokens: tokens):
    params, prompt, force = world(dtype)
    tokens = change(tokens_of(params, prompt if ids is None else ids, live, recipe_of(method).ends))
    fn, _ = program(method, dtype)
    return jax.device_get(fn(weights(method, params), tokens, force, jnp.full((B,), keep, jnp.int32), jax.random.key(4)))


@functools.cache
def usual(method):
    return result(method)


def near(a, b, tol, what):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all() and np.isfinite(b).all(), f"{what}: not finite"
    worst = np.abs(a - b).max(initial=0.0)
    assert worst <= tol, f"{what}: differs by {worst:.3g} > {tol:.3g}"


# --- a layer's cache by itself -----------------------------------------------------------------------------------------


@functools.cache
def layer_state(dtype="float32", n=N) -> tuple[KV, Any]:
    """A cache and all evidence about it, from the real first layer."""
    params, ids, _ = world(dtype)
    needs = Needs(
        rows=n, received=True, peak=True, perturbed=Noise(), cls=True, keys=True, queries=0, turned=n, hidden=True, weights=("o",)
    )
    look = lambda tokens, key: cached.attend_rows(CFG, params["layers"][0], 0, tokens, None, Recipe(), needs, False, key, "auto")[1][0]
    return jax.jit(look)(tokens_of(params, ids), jax.random.key(4))


@functools.cache
def jitted(method) -> Any:
    return jax.jit(lambda kv, evidence, keep: call(method, kv, evidence, keep))


def call(method, kv, evidence, keep: Any = CAP):
    """What a method does to one layer's cache once: the plan's result, as (pos, k, v, bias), and (pos, k, v, channels) of what it froze."""
    own = recipe_of(method).init_params(jax.random.key(3), CFG).get(method.site, {})
    method = method.layer(0, CFG.layers).head_group(getattr(method, "groups", 1) - 1)
    if method.site == "policy":
        state = method.start(own, kv, evidence)
        kv, _ = method.refit(own, state, kv, evidence, keep)
    else:
        kv, evidence = method.compress(own, kv, evidence, keep)
        kv, frozen = method.freeze(own, kv, evidence)
        if frozen is not None:
            return kv.pos, kv.k, kv.v, kv.bias, frozen.kv.pos, frozen.kv.k, frozen.kv.v, frozen.channels
    return kv.pos, kv.k, kv.v, kv.bias


def once(method) -> bool:
    """Whether the method acts on a layer's cache by itself."""
    return method.site in ("cache", "policy")
