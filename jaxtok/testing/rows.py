"""The laws of methods that reduce rows (sites vit, select, layers): functions of a maker `make(n) -> method that leaves n of 16 image rows`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.reducer import Reducer
from jaxtok.core.select import pack
from jaxtok.core.types import IMAGE, Plan, Tokens
from jaxtok.models import blocks, decoder, encoder, vit
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.testing.world import near

VISION = EncoderConfig(width=16, layers=3, heads=4, hidden=24, image=(8, 8), patch=(2, 2), channels=3, out=5)
TEXT = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
B, ROWS, CAP, AT = 3, 16, 12, 1  # AT: the layer at or before which the method acts
BEFORE, BEHIND, T = 2, 4, 2  # decoder: text rows on both sides of the image, steps
LIVE = np.array([16, 16, 11])  # image rows


@functools.cache
def world(site: str, dtype="float32"):
    """(params, rows of a ragged batch that hold 16 image rows at most)."""
    if site == "layers":
        params = blocks.init(TEXT, jax.random.key(0), jnp.dtype(dtype), embed_std=1.0)
        params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
        n = BEFORE + ROWS + BEHIND
        tokens = decoder.embed(TEXT, params, jax.random.randint(jax.random.key(1), (B, n), 0, TEXT.vocab))
        image = (np.arange(n) >= BEFORE) & (np.arange(n) < BEFORE + ROWS)
        cell = np.where(image[:, None], np.stack([(np.arange(n) - BEFORE) // 4, (np.arange(n) - BEFORE) % 4], -1), -1)
        wide = lambda a, dtype: jnp.broadcast_to(jnp.asarray(a, dtype)[None], (B, *a.shape))
        tokens = tokens._replace(kind=wide(np.where(image, IMAGE, 0), jnp.int8), cell=wide(cell, jnp.int32))
    else:
        params = encoder.init(VISION, jax.random.key(0), jnp.dtype(dtype))
        params["layers"] = tuple(p | {"q": p["q"] * 3, "k": p["k"] * 3} for p in params["layers"])
        tokens = vit.embed(VISION, params, jax.random.normal(jax.random.key(1), (B, 8, 8, 3), jnp.dtype(dtype)))
    there = jnp.cumsum(tokens.kind == IMAGE, -1) <= jnp.asarray(LIVE)[:, None]
    mask = (tokens.kind != IMAGE) | there
    order = tokens._replace(pos=jnp.where(mask, jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, -1))
    short = reduce(pack(mask), order._replace(seen=jnp.sum(mask, -1, dtype=jnp.int32)))
    n = short.pos.shape[1]
    source = jnp.where(short.pos >= 0, jnp.arange(n, dtype=jnp.int32), -1)
    return params, short._replace(rope=jnp.maximum(short.pos, 0)[..., None], source=source)


def recipe_of(method: Reducer) -> Recipe:
    return Recipe(select=method) if method.site == "select" else Recipe(**{method.site: ((AT, method),)})  # type: ignore[arg-type]


def cfg_of(site: str):
    return TEXT if site == "layers" else VISION


def run(recipe: Recipe, site: str, params, tokens: Tokens, keep, key) -> tuple[jax.Array, Tokens, jax.Array]:
    """(logits [b .], rows at the end, loss) of the model with one reduction."""
    weighted = any(not hasattr(m, "capacity") for _, m in (*recipe.vit, *recipe.layers))
    if site == "layers":
        if any(m.needs.score for _, m in recipe.layers):  # what an earlier site would have made of the rows
            tokens = tokens._replace(score=jax.lax.stop_gradient(jnp.sin(7 * jnp.sum(tokens.x, -1, dtype=jnp.float32))))
        limit = None if keep is None else {"layers": (keep,)}
        tokens, layers = decoder.prefill(TEXT, params, tokens, recipe, new=T, keep=limit, key=key, proportional=weighted)
        logits = [decoder.logits(TEXT, params, tokens.x[:, -1:])[:, 0]]
        for i in range(T):
            x = blocks.embed(TEXT, params, jnp.full((B, 1), i + 3, jnp.int32))
            x, layers = decoder.step(TEXT, params, x, jnp.ones((B, 1), bool), layers)
            logits.append(decoder.logits(TEXT, params, x)[:, 0])
        out = jnp.concatenate(logits, -1)
    else:
        limit = None if keep is None or site != "vit" else {"vit": (keep,)}
        until = VISION.layers - (site == "select")  # a method may ask for evidence of the layer behind the last that ran
        found = vit.encode(VISION, params, tokens, recipe, until=until, keep=limit, key=key, proportional=True)
        tokens = vit.select(params, found, recipe, keep=keep, text=tokens.x[:, -1]) if site == "select" else found.tokens
        out = vit.head(dataclasses.replace(VISION, pool="cls_mean", out=None), params, tokens)
    return out, tokens, jnp.sum(out.astype(jnp.float32) ** 2)


def weights(method, params):
    return params | {"methods": recipe_of(method).init_params(jax.random.key(3), cfg_of(method.site))}


@functools.cache
def program(method, slope) -> Any:
    """The jitted run of a method, with (`slope`) its gradient with respect to the rows, and a counter of its traces."""
    traces = [0]

    def traced(params, tokens, keep, key):
        traces[0] += 1

        def loss(x):
            out, end, value = run(recipe_of(method), method.site, params, tokens._replace(x=x), keep, key)
            return value, (out, end)

        if not slope:
            return *loss(tokens.x)[1], None
        (_, (out, end)), grad = jax.value_and_grad(loss, has_aux=True)(tokens.x)
        return out, end, grad

    return jax.jit(traced), traces


def result(method, tokens=None, keep=None, slope=True):
    params, usual = world(method.site)
    tokens = usual if tokens is None else tokens
    fn, _ = program(method, slope)
    full = jnp.full((B,), 2**20, jnp.int32) if keep is None else jnp.broadcast_to(jnp.asarray(keep, jnp.int32), (B,))
    return jax.device_get(fn(weights(method, params), tokens, full, jax.random.key(4)))


@functools.cache
def plain(site: str):
    params, tokens = world(site)
    return jax.device_get(jax.jit(lambda: run(Recipe(), site, params, tokens, None, None))())


def live_images(tokens) -> np.ndarray:
    return ((np.asarray(tokens.pos) >= 0) & (np.asarray(tokens.kind) == IMAGE)).sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Reducer):
    """The law's twin of a selection: the rows that `inner` drops stay where they are, dead."""

    inner: Reducer

    def __getattribute__(self, name):
        if name in ("at", "site", "needs", "start", "name", "layer"):
            if name == "layer":
                return lambda i, layers: Masked(inner=self.inner.layer(i, layers))
            return getattr(object.__getattribute__(self, "inner"), name)
        return object.__getattribute__(self, name)

    def plan(self, params, state, tokens, evidence, keep=None):
        state, plan = self.inner.plan(params, state, tokens, evidence, keep)
        assert isinstance(plan, Plan) and plan.weight is None, "not a selection"
        rows = jnp.arange(tokens.pos.shape[1], dtype=jnp.int32)[None]
        alive = jnp.where(plan.assign >= 0, rows, -1)
        return state, Plan(alive, alive, None, plan.lost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(Reducer):
    """`inner`, whose plans are told to `seen` while they are traced."""

    inner: Reducer
    seen: list = dataclasses.field(compare=False)

    def __getattribute__(self, name):
        if name in ("plan", "layer", "seen", "inner"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "inner"), name)

    def layer(self, i, layers):
        return self

    def plan(self, params, state, tokens, evidence, keep=None):
        inner = object.__getattribute__(self, "inner")
        state, plan = inner.layer(AT, TEXT.layers).plan(params, state, tokens, evidence, keep)
        self.seen.append(plan)
        return state, plan


# --- the laws ------------------------------------------------------------------------------------------------------------


def rows_full_budget(make):
    """A method that leaves all rows changes nothing."""
    method = make(ROWS)
    want, *_ = plain(method.site)
    out, tokens, _ = result(method, slope=False)
    near(out, want, 2e-5, "logits at full budget")


def rows_budget(make):
    """The static number of rows is what `count` says; a traced budget is obeyed by live rows, dead ones never take their place."""
    method = make(CAP)
    params, tokens = world(method.site)
    n = tokens.pos.shape[1]
    out, end, _ = result(method)
    if method.at not in ("around",) and method.restore is None:
        assert end.pos.shape[1] == method.count(n, ROWS), f"{end.pos.shape[1]} rows, count says {method.count(n, ROWS)}"
        before = (np.asarray(tokens.pos) >= 0).sum(-1)
        most = (np.asarray(end.pos) >= 0).sum(-1)
        assert (most <= before).all() and (most[:2] <= end.pos.shape[1]).all()
        fewer = most - 1
        _, less, _ = result(method, keep=fewer)
        alive = (np.asarray(less.pos) >= 0).sum(-1)
        assert (alive <= fewer).all() or getattr(method, "floor", False), f"budgets {fewer} leave {alive}"
    assert (np.asarray(end.lost) == 0).all() and np.isfinite(out).all()


def rows_are_independent(make):
    """A row of the batch depends on itself only."""
    method = make(CAP)
    _, tokens = world(method.site)
    base = result(method)
    noise = jax.random.normal(jax.random.key(8), tokens.x.shape, jnp.float32).at[0].set(0).astype(tokens.x.dtype)
    other = result(method, tokens._replace(x=tokens.x + noise))
    near(base[0][0], other[0][0], 2e-5, "row 0 read its neighbours")
    assert np.array_equal(base[1].source[0], other[1].source[0]), "row 0 is reduced by what its neighbours hold"


def rows_dead(make):
    """Finite junk in dead rows changes nothing; an empty sequence gives no NaN, in its gradient neither."""
    method = make(CAP)
    _, tokens = world(method.site)
    base = result(method)
    junk = tokens._replace(x=jnp.where((tokens.pos < 0)[..., None], jnp.asarray(3e3, tokens.x.dtype), tokens.x))
    near(base[0], result(method, junk)[0], 1e-5, "junk in dead rows")
    assert np.isfinite(base[2]).all(), "NaN in a gradient"
    out, _, grad = result(method, tokens._replace(pos=tokens.pos.at[1].set(-1), size=tokens.size.at[1].set(0.0)))
    assert np.isfinite(out).all() and np.isfinite(grad).all(), "NaN from an empty row"


def rows_dropped_equals_masked(make):
    """Dropping rows gives what the same rows dead from there on give (at their own positions)."""
    method = make(CAP)
    if any(f.name == "positions" for f in dataclasses.fields(method)):  # type: ignore[arg-type]
        method = dataclasses.replace(method, positions="keep")  # type: ignore[type-var]
    params, tokens = world(method.site)
    key = jax.random.key(4)
    twin = jax.jit(lambda p, t: run(recipe_of(Masked(inner=method)), method.site, p, t, None, key)[:2])
    want, end = twin(weights(method, params), tokens)
    out, tokens, _ = result(method, slope=method == make(CAP))  # of the usual method that program is there
    assert (live_images(end) == live_images(tokens)).all()
    near(out, want, 2e-5, "dropped against masked")


def rows_repacked(make):
    """Decoder: rows that are numbered anew go on as a prompt of their own would, in the steps too."""
    method = make(CAP)
    if method.site != "layers" or all(f.name != "positions" for f in dataclasses.fields(method)):  # type: ignore[arg-type]
        return
    method = dataclasses.replace(method, positions="repack")  # type: ignore[type-var]
    params, tokens = world("layers")
    part = dataclasses.replace(TEXT, layers=1)
    halves = [weights(method, params) | {"layers": params["layers"][i : i + 1]} for i in range(2)]

    @jax.jit
    def both(tokens):
        plans: list = []
        out = run(recipe_of(Watched(inner=method, seen=plans)), "layers", weights(method, params), tokens, None, jax.random.key(4))[0]
        first, below = decoder.prefill(part, halves[0], tokens, new=T)
        left = reduce(plans[0], first)
        number = jnp.where(left.pos >= 0, jnp.cumsum(left.pos >= 0, -1, dtype=jnp.int32) - 1, -1)
        none = jnp.zeros_like(left.delta)
        anew = left._replace(pos=number, rope=jnp.maximum(number, 0)[..., None], seen=jnp.max(number, -1) + 1, delta=none)
        last, above = decoder.prefill(part, halves[1], anew, new=T, proportional=not hasattr(method, "capacity"))
        logits = [decoder.logits(TEXT, params, last.x[:, -1:])[:, 0]]
        for i in range(T):
            x, live = blocks.embed(TEXT, params, jnp.full((B, 1), i + 3, jnp.int32)), jnp.ones((B, 1), bool)
            x, below = decoder.step(part, halves[0], x, live, below)
            x, above = decoder.step(part, halves[1], x, live, above)
            logits.append(decoder.logits(TEXT, params, x)[:, 0])
        return out, jnp.concatenate(logits, -1)

    got, want = both(tokens)
    near(got, want, 2e-5, "repacked rows against a prompt of their own")


def rows_conserve(make):
    """Sizes, and for a method that says so the size-weighted sum of the rows, are what they were; every row's source is told."""
    method = make(CAP)
    _, tokens = world(method.site)
    _, end, _ = result(method)
    size, source = np.asarray(end.size), np.asarray(end.source)
    told = np.stack([np.bincount(s[s >= 0], minlength=end.pos.shape[1]) for s in source])
    live = np.asarray(end.pos) >= 0
    assert (told[~live] == 0).all(), "a dropped row still has a place"
    if method.conserves:
        near(size.sum(-1), np.asarray(tokens.size).sum(-1), 1e-4, "sizes")
        near(np.where(live, size, 0), told, 1e-4, "sizes against sources")


def rows_duplicates(make):
    """Merging rows that are the same changes nothing, when the log of the size is added to attention."""
    method = make(CAP)
    if not method.conserves:
        return
    _, tokens = world(method.site)
    image = np.asarray(tokens.kind) == IMAGE
    x = np.array(tokens.x)
    for b in range(B):
        where = np.flatnonzero(image[b] & (np.asarray(tokens.pos)[b] >= 0))
        x[b, where[1::2]] = x[b, where[: len(where) // 2 * 2 : 2]]
    pairs = tokens._replace(x=jnp.asarray(x))
    out, end, _ = result(method, pairs)
    assert (np.asarray(end.size) > 1).any(), "nothing is merged"
    near(out, result(make(ROWS), pairs, slope=False)[0], 2e-5, "duplicates merged against not")


def rows_bf16(make):
    """bf16 in, bf16 out."""
    method = make(CAP)
    params, tokens = world(method.site, "bfloat16")
    out = jax.eval_shape(
        lambda t: run(recipe_of(method), method.site, weights(method, params), t, jnp.full((B,), 9, jnp.int32), jax.random.key(4)), tokens
    )
    assert out[1].x.dtype == jnp.bfloat16, f"rows came out as {out[1].x.dtype}"


def rows_one_compile(make):
    """Any budget under the capacity and any length run in one compiled program."""
    method = make(CAP)
    _, tokens = world(method.site)
    result(method)
    for keep in (10, 7):
        result(method, tokens, keep)
    traced = program(method, True)[1][0]
    assert traced == 1, f"traced {traced} times"


LAWS = {
    law.__name__: law
    for law in (
        rows_full_budget,
        rows_budget,
        rows_are_independent,
        rows_dead,
        rows_dropped_equals_masked,
        rows_repacked,
        rows_conserve,
        rows_duplicates,
        rows_bf16,
        rows_one_compile,
    )
}
