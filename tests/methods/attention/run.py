"""A small model with a trained attention, and what every such attention must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.attention import Rows
from jaxtok.core.reader import Sight
from jaxtok.core.recipe import Recipe
from jaxtok.decode import replay
from jaxtok.models import blocks, decoder
from jaxtok.testing import world
from jaxtok.train import language

CFG = world.CFG


CAPPED = 1.5, 0.7  # a soft-cap of logits and a scale of the model's own


def rows(b, n, mark=None, count=None, see=(None, None)):
    count = jnp.full((b,), n, jnp.int32) if count is None else jnp.asarray(count, jnp.int32)
    at = jnp.arange(n, dtype=jnp.int32)[None]
    pos = jnp.where(at < count[:, None], at, -1)
    mark = jnp.zeros((b, n), bool) if mark is None else jnp.asarray(mark)
    return Rows(pos, count, mark, Sight(jnp.ones((1,), jnp.float32), None, *see))


@functools.cache
def attender(method, j=0, see=(None, None)):
    return jax.jit(lambda q, k, v, mark, *more: method.attend(j, q, k, v, rows(q.shape[0], q.shape[2], mark, see=see), *more))


def attend(method, q, k, v, j=0, mark=None, more=(), dtype=jnp.float32, see=(None, None)):
    """Values [b h n d] of the j-th attention of whole sequences."""
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    mark = jnp.zeros((q.shape[0], q.shape[2]), bool) if mark is None else jnp.asarray(mark)
    return np.asarray(attender(method, j, see)(q, k, v, mark, *(jnp.asarray(x, jnp.float32) for x in more)))


def weights(method, q, k, j=0):
    """What each row takes of each row's value, [b h n n]: the values are unit vectors."""
    (b, g, n, _), eye = k.shape, np.eye(k.shape[2])
    return attend(method, q, k, np.broadcast_to(eye, (b, g, n, n)), j)


def in_bfloat16(method, want, j=0, mark=None):
    """Values in bfloat16 are those of `want`(q, k, v) of the rounded arrays, as near as bfloat16 comes."""
    x = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays()]
    got = attend(method, *x, j, mark, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), want(*x), atol=0.03)


def capped(method, want, j=0, mark=None):
    """With the model's own soft-cap and scale: all rows at once, and the later ones step by step."""
    x = arrays()
    want = want(*x)
    np.testing.assert_allclose(attend(method, *x, j, mark, see=CAPPED), want, atol=2e-5)
    np.testing.assert_allclose(stepwise(method, *x, 9, j, see=CAPPED, mark=mark)[0], want[:, :, 9:], atol=2e-5)


def same_gradients(method, want, j=0, mark=None, shape=None):
    """Of q, k and v, by the method and by plain autodiff of `want`(q, k, v), a form with whole matrices."""
    x = tuple(jnp.asarray(a, jnp.float32) for a in arrays(**({} if shape is None else shape)))
    mark = jnp.zeros((x[0].shape[0], x[0].shape[2]), bool) if mark is None else jnp.asarray(mark)
    here = rows(x[0].shape[0], x[0].shape[2], mark)
    grad = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(*x)
    for got, expected in zip(grad(lambda *x: method.attend(j, *x, here)), grad(want), strict=True):
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-4)


def masked(see):
    """Attention (in JAX) of whole matrices to what `see` marks, for `same_gradients`; rows that see nothing give 0."""

    def one(q, k, v):
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
        y = jnp.where(see, jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, -1e9)
        return jnp.where(see, jax.nn.softmax(y, -1), 0.0) @ v

    see = jnp.asarray(see).reshape((1,) * (4 - np.ndim(see)) + np.shape(see))
    return one


def arrays(b=2, h=4, g=2, n=23, d=8, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(b, e, n, d)) * size for e, size in ((h, 2.0), (g, 1.0), (g, 1.0)))


def logits(q, k, cap=None, scale=None):
    """In float64, of all pairs; the soft-cap comes behind the scale."""
    y = np.einsum("...id,...jd->...ij", np.asarray(q, np.float64), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return y if cap is None else cap * np.tanh(y / cap)


def dense(q, k, v, see, how=(None, None)):
    """Softmax attention in float64 over the keys that see [n n] (or [b 1 n n]) marks; rows that see nothing give 0."""
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    y = np.where(see, logits(q, k, *how), -np.inf)
    top = y.max(-1, keepdims=True)
    w = np.exp(y - np.where(np.isfinite(top), top, 0.0))
    total = w.sum(-1, keepdims=True)
    return np.einsum("bhij,bhjd->bhid", w / np.where(total > 0, total, 1.0), v)


def causal(n):
    return np.tril(np.ones((n, n), bool))


# --- the model ----------------------------------------------------------------------------------------------------------


@functools.cache
def model(method):
    params, ids, force = world.world()
    return params | {"methods": Recipe(attention=method).init_params(jax.random.key(5), CFG)}, jnp.concatenate([ids, force], 1)


@functools.cache
def program(method, remat=False):
    return jax.jit(lambda params, ids, live: blocks.forward(CFG, params, ids, live, method=method, remat=remat))


def decode_is_parallel(method, ids=None, live=None):
    """Prefill of a padded prompt and a token at a time against the parallel pass; so do stacked layers, and caches begun empty."""
    params, known = model(method)
    ids = known if ids is None else ids
    b, n = ids.shape
    split = world.N
    live = np.ones((b, n), bool) if live is None else live
    live = live & np.concatenate([world.LIVE, np.ones((b, n - split), bool)], 1)
    recipe = Recipe(attention=method)
    recipe.validate(CFG)
    want = np.asarray(program(method)(params, ids, jnp.asarray(live)))

    @jax.jit
    def run(params, ids, live):
        tokens = decoder.embed(CFG, params, ids[:, :split], live[:, :split], special=method.token)
        tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=n - split)
        first = decoder.logits(CFG, params, tokens.x)
        return first, *replay(CFG, params, tokens, layers, ids[:, split:], recipe)

    first, out, layers = run(params, ids, jnp.asarray(live))
    got = np.moveaxis(np.asarray(out), 0, 1)
    np.testing.assert_allclose(got, want[:, split - 1 : n - 1], atol=2e-5)
    np.testing.assert_array_equal(np.asarray(layers[0][0].kv.seen), live.sum(1))
    for row, count in enumerate(world.LENGTHS):
        np.testing.assert_allclose(np.asarray(first)[row, split - count :], want[row, split - count : split], atol=2e-5)

    stacked = np.asarray(program(method, True)(blocks.stack(params), ids, jnp.asarray(live)))
    np.testing.assert_allclose(np.where(live[..., None], stacked, 0), np.where(live[..., None], want, 0), atol=2e-5)

    @jax.jit
    def alone(params, ids):
        layers = decoder.empty(CFG, params, b, n, recipe)
        x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, ids), jnp.ones(ids.shape, bool), layers, recipe, ids=ids)
        return decoder.logits(CFG, params, x), layers

    got, layers = alone(params, ids)
    np.testing.assert_allclose(np.asarray(got), np.asarray(program(method)(params, ids, None)), atol=2e-5)
    assert not np.asarray(layers[0][0].kv.lost).any()


def dead_steps_leave_the_states(method, ids=None):
    """Steps whose row is dead, in one sequence or in both, are none: the others predict what the parallel pass of the tokens does."""
    params, known = model(method)
    ids, split, more = np.asarray(known if ids is None else ids)[:2, :20], 9, 5
    n = ids.shape[1]
    at = np.sort(np.stack([np.random.default_rng(i).permutation(n - split + more)[: n - split] for i in range(2)]), 1)
    wide, live = (
        np.random.default_rng(0).integers(0, CFG.vocab, (2, n - split + more)).astype(np.int32),
        np.zeros((2, n - split + more), bool),
    )
    np.put_along_axis(wide, at, ids[:, split:], 1)
    np.put_along_axis(live, at, True, 1)
    assert (~live).sum(1).min() == more and (live[0] != live[1]).any()
    recipe = Recipe(attention=method)

    @jax.jit
    def run(params, ids, wide, live):
        tokens = decoder.embed(CFG, params, ids, special=method.token)
        tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=wide.shape[1])
        return replay(CFG, params, tokens, layers, wide, recipe, live=live)

    out, layers = run(params, jnp.asarray(ids[:, :split]), jnp.asarray(wide), jnp.asarray(live))
    got = np.take_along_axis(np.moveaxis(np.asarray(out), 0, 1), at[..., None], 1)
    want = np.asarray(program(method)(params, jnp.asarray(ids), None))[:, split - 1 : -1]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert (np.asarray(layers[0][0].kv.seen) == n).all()


def padding_does_not_matter(method, ids=None):
    """Dead rows before, behind and between the tokens leave the tokens' logits what they are for each sequence alone, whatever ids they carry."""
    params, known = model(method)
    ids = np.asarray(known if ids is None else ids)[:2]
    n = ids.shape[1]
    want = np.concatenate([np.asarray(program(method)(params, jnp.asarray(ids[i : i + 1]), None)) for i in range(2)])
    for seed, at in enumerate((np.arange(n) + 5, np.arange(n), np.sort(np.random.default_rng(0).permutation(n + 5)[:n]))):
        wide = np.random.default_rng(seed).integers(0, CFG.vocab, (2, n + 5)).astype(np.int32)
        wide[:, at] = ids
        live = np.isin(np.arange(n + 5), at)[None].repeat(2, 0)
        got = np.asarray(program(method)(params, jnp.asarray(wide), jnp.asarray(live)))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[:, at], want, atol=2e-5)


def decodes_in_bfloat16(method, ids=None):
    """A model in bfloat16 (the method's weights as they are made), prefill and steps: finite, in that dtype, and about the logits of the
    same weights in float32; so is the parallel pass of stacked layers."""
    params, known = model(method)
    ids, split, recipe = known if ids is None else ids, world.N, Recipe(attention=method)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {name: x for name, x in params.items() if name != "methods"})
    half = half | {"methods": params["methods"]}

    @jax.jit
    def run(params, ids):
        tokens = decoder.embed(CFG, params, ids[:, :split], special=method.token)
        tokens, layers = decoder.prefill(CFG, params, tokens, recipe, new=ids.shape[1] - split)
        return tokens.x, replay(CFG, params, tokens, layers, ids[:, split:], recipe)[0]

    x, out = run(half, ids)
    assert x.dtype == jnp.bfloat16 and bool(jnp.isfinite(x).all())
    want = np.asarray(program(method)(jax.tree.map(lambda x: x.astype(jnp.float32), half), ids, None))
    near = lambda got, want: np.median(np.abs(got - want)) < 0.1 * np.abs(want).mean()
    assert near(np.moveaxis(np.asarray(out), 0, 1), want[:, split - 1 : -1])
    assert near(np.asarray(program(method)(blocks.stack(half), ids, None)), want)


def later_tokens_do_not_matter(method, ids=None, atol=0.0):
    """Every row's logits are, to the bit (or to `atol`), what they were before the rows behind it changed."""
    params, known = model(method)
    ids = known if ids is None else ids
    out, n = np.asarray(program(method)(params, ids, None)), ids.shape[1]
    for at in (3, n // 2, n - 2):
        other = ids.at[:, at:].set((ids[:, at:] + 1 + jnp.arange(n - at)[None] % 5) % CFG.vocab)
        changed = np.asarray(program(method)(params, other, None))
        np.testing.assert_allclose(changed[:, :at], out[:, :at], rtol=0, atol=atol)
        assert np.abs(changed[:, at:] - out[:, at:]).max() > 0.1


def gradients_are_right(method, ids=None):
    """Of the training loss along a random direction in all weights, against a central difference."""
    params, known = model(method)
    loss = language.make_loss(CFG, method)
    batch = language.text(known if ids is None else ids)
    value = jax.jit(lambda p: loss(p, batch, None)[0])
    grad = jax.jit(jax.grad(lambda p: loss(p, batch, None)[0]))(params)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    way = tree.unflatten([jax.random.normal(k, x.shape, x.dtype) * 0.1 for k, x in zip(keys, leaves, strict=True)])
    move = lambda e: float(value(jax.tree.map(lambda p, w: p + e * w, params, way)))
    along = sum(float(jnp.sum(a * b)) for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(way), strict=True))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grad))
    np.testing.assert_allclose((move(2e-3) - move(-2e-3)) / 4e-3, along, rtol=0.03, atol=2e-4)
    return grad


def stepwise(method, q, k, v, first, j=0, more=(), see=(None, None), mark=None):
    """Values of the rows after `first`, one at a time, and the state at the end: the j-th attention of whole sequences."""
    q, k, v, *more = (jnp.asarray(x, jnp.float32) for x in (q, k, v, *more))
    b, n = q.shape[0], q.shape[2]
    mark = jnp.zeros((b, n), bool) if mark is None else jnp.asarray(mark)

    @jax.jit
    def run(q, k, v, *more):
        cut = lambda a, z: (x[:, :, a:z] for x in (q, k, v, *more))
        q0, k0, v0, *more0 = cut(0, first)
        state = method.start(j, q0, k0, v0, rows(b, first, mark[:, :first], see=see), n, *more0)

        def one(state, at):
            i, parts = at
            here = rows(b, 1, jnp.take(mark, i, 1)[:, None], see=see)._replace(
                pos=jnp.full((b, 1), 0, jnp.int32) + i, count=jnp.full((b,), 1, jnp.int32) + i
            )
            q1, k1, v1, *more1 = (x[:, :, None] for x in parts)
            out, state = method.step(j, state, q1, k1, v1, here, *more1)
            return state, out[:, :, 0]

        parts = tuple(jnp.moveaxis(x, 2, 0) for x in cut(first, n))
        state, out = jax.lax.scan(one, state, (jnp.arange(first, n, dtype=jnp.int32), parts))
        return jnp.moveaxis(out, 0, 2), state

    out, state = run(q, k, v, *more)
    return np.asarray(out), state
