"""What every method of site prompt obeys, through `decode.prefill` with the model as its own draft."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok.methods
from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill
from jaxtok.testing.world import CAP, CFG, LENGTHS, LIVE, N, near, world
from tests.methods.laws import makers

CASES = [pytest.param(label, make, id=label) for name in registry.names("prompt") for label, make in makers(name).items()]
laws = pytest.mark.parametrize("label, make", CASES)


@functools.cache
def program(method):
    def run(params, ids, live, keep):
        params = params | {"methods": {}}
        tokens, layers = prefill(CFG, params, ids, live, Recipe(prompt=method), new=2, draft=(CFG, params), keep={"prompt": keep})
        return tokens.x[:, -1], tokens.source >= 0, [part.kv for (part,) in layers]

    return jax.jit(run)


def result(method, ids=None, live=LIVE, keep=CAP, dtype="float32"):
    params, prompt, _ = world(dtype)
    return program(method)(params, prompt if ids is None else ids, jnp.asarray(live), jnp.full((len(LENGTHS),), keep, jnp.int32))


@laws
def test_budget_is_spent_and_static(label, make):
    """min(length, budget) tokens at most, the last one among them; slots follow from the capacity; one compile for all budgets and lengths."""
    method = make(CAP)
    for keep in (CAP, CAP - 1, 3):
        _, kept, caches = result(method, keep=keep)
        count = np.asarray(kept).sum(1)
        assert (count <= np.minimum(LENGTHS, keep)).all() and (count >= 1).all() and np.asarray(kept)[:, -1].all(), keep
        for kv in caches:
            assert kv.k.shape[2] == CAP + 2 and (np.asarray(kv.pos >= 0).sum(-1) == count[:, None]).all()
            np.testing.assert_array_equal(kv.seen, count)  # positions from 0
    assert program(method)._cache_size() == 1


@laws
def test_full_budget_is_identity(label, make):
    params, ids, _ = world()
    x, kept, _ = result(make(N + 1), keep=N + 1)
    plain, _ = jax.jit(lambda: prefill(CFG, params, ids, jnp.asarray(LIVE), Recipe(), new=0))()
    np.testing.assert_array_equal(kept, LIVE)
    near(x, plain.x[:, -1], 1e-5, "the last row")


@laws
def test_rows_are_independent_and_dead_rows_do_not_matter(label, make):
    method = make(CAP)
    params, ids, _ = world()
    base = result(method)
    other = jax.random.randint(jax.random.key(9), ids.shape, 0, CFG.vocab).at[0].set(ids[0])
    changed = result(method, other)
    near(base[0][0], changed[0][0], 1e-5, "row 0 read its neighbours")
    np.testing.assert_array_equal(base[1][0], changed[1][0])
    junk = result(method, jnp.where(jnp.asarray(LIVE), ids, 5))
    near(base[0], junk[0], 1e-6, "junk in dead rows")
    right = np.stack([np.roll(row, n - N) for row, n in zip(np.asarray(ids), LENGTHS, strict=True)])
    moved = result(method, jnp.asarray(right), np.arange(N)[None] < LENGTHS[:, None])
    near(base[0], moved[0], 1e-6, "padding on the other side")
    for b, n in enumerate(LENGTHS.tolist()):
        np.testing.assert_array_equal(np.asarray(base[1])[b, N - n :], np.asarray(moved[1])[b, :n])


@laws
def test_half_precision(label, make):
    x, kept, caches = result(make(CAP), dtype="bfloat16")
    assert x.dtype == jnp.bfloat16 and caches[0].k.dtype == jnp.bfloat16 and np.isfinite(np.asarray(x, np.float32)).all()
    assert (np.asarray(kept).sum(1) >= 1).all()


@laws
def test_nothing_to_read(label, make):
    """An empty prompt in a batch: no NaN, nothing kept of it."""
    live = np.array(LIVE)
    live[2] = False
    x, kept, _ = result(make(CAP), live=live)
    assert np.isfinite(np.asarray(x)).all() and not np.asarray(kept)[2].any()


assert jaxtok.methods  # importing the package fills the registry
