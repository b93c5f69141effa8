"""Attention of near rows, by list and by mask, against attention query by query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.near import Near, attend_near, neighbours, pictures

SIDE = 6
CELL = np.stack(np.divmod(np.arange(SIDE * SIDE), SIDE), -1)


def test_pictures_by_hand():
    """A new one where the raster begins anew, where the crop changes, and for each row without a cell."""
    cell = jnp.asarray([[[-1, -1], [-1, -1], [0, 0], [0, 2], [1, 1], [0, 0], [2, 2], [3, 0]]])
    apart = jnp.asarray([[0, 0, 0, 0, 0, 0, 0, 5]])[..., None]
    assert pictures(cell, apart).tolist() == [[0, 1, 2, 2, 2, 3, 3, 4]]


@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_are_those_of_the_grid(causal):
    """A list of 5 or 9 entries for reach 1, a mask for reach 3; dead rows are in none; two pictures do not meet."""
    cell = jnp.asarray(np.stack([CELL, np.tile(CELL[:18], (2, 1))]))
    picture = pictures(cell, jnp.zeros((2, 36, 1), jnp.int32))
    live = jnp.asarray(np.random.default_rng(0).random((2, 36)) < 0.8)
    for reach, entries in ((1, 5 if causal else 9), (3, None), (0, 1)):
        near = jax.jit(functools.partial(neighbours, reach=reach, causal=causal))(cell, picture, live)
        near = jax.tree.map(np.asarray, near)
        assert (near.index is None) == (entries is None) and (entries is None or near.index.shape[2] == entries)
        for b in range(2):
            at, number, alive = np.asarray(cell)[b], np.asarray(picture)[b], np.asarray(live)[b]
            for i in range(36):
                want = (np.abs(at - at[i]).max(-1) <= reach) & (number == number[i]) & alive
                want &= (np.arange(36) <= i) | (not causal)
                want &= alive[i]
                got = np.flatnonzero(near.mask[b, i]) if entries is None else near.index[b, i][near.index[b, i] >= 0]
                np.testing.assert_array_equal(got, np.flatnonzero(want))


def dense(q, k, v, mask, bias, softcap, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    y = q @ k.swapaxes(2, 3) * scale
    y = softcap * np.tanh(y / softcap) + np.asarray(bias, np.float64)[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.where(np.asarray(mask)[:, None], np.exp(y), 0.0)
        return np.nan_to_num(w @ v / w.sum(-1, keepdims=True)), np.log(w.sum(-1))


def test_list_and_mask_against_numpy():
    """GQA, bias, soft-cap, scale; a row that sees nothing: 0 and -inf; the gradients of both are equal and finite."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v, bias = draw(2, 4, 36, 8), draw(2, 2, 36, 8), draw(2, 2, 36, 5), draw(2, 36)
    cell = jnp.asarray(np.stack([CELL, CELL]))
    live = jnp.asarray(rng.random((2, 36)) < 0.7)
    near = neighbours(cell, pictures(cell, cell[..., :0]), live, reach=1, causal=False)
    mask = np.zeros((2, 36, 37), bool)
    for b, i in np.ndindex(2, 36):
        mask[b, i, np.asarray(near.index)[b, i]] = True  # -1 is the last
    mask = mask[:, :, :36]

    @jax.jit
    def both(q, k, v, bias):
        def one(near):
            def loss(*args):
                out, lse = attend_near(*args[:3], near, bias=args[3], softcap=4.0, scale=0.5)
                return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse)), (out, lse)

            return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

        return one(near), one(Near(mask=jnp.asarray(mask)))

    (((_, a), ga), ((_, b), gb)) = both(q, k, v, bias)
    want = dense(q, k, v, mask, bias, 4.0, 0.5)
    for got in (a, b):
        np.testing.assert_allclose(got[0], want[0], atol=2e-6)
        np.testing.assert_allclose(got[1], want[1], atol=2e-6)
    for x, y in zip(ga, gb, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=2e-5)
    assert np.isneginf(a[1]).any() and (np.asarray(a[0])[np.isneginf(np.asarray(a[1]))] == 0).all()


def test_refused():
    x = jnp.zeros((1, 2, 4, 3))
    with pytest.raises(ValueError, match="who sees whom None"):
        attend_near(x, x, x, Near())
    with pytest.raises(ValueError, match=r"who sees whom \[1, 3, 4\]"):
        attend_near(x, x, x, Near(mask=jnp.ones((1, 3, 4), bool)))
    with pytest.raises(ValueError, match="reach must be >= 0"):
        neighbours(jnp.zeros((1, 4, 2), jnp.int32), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool), reach=-1)
