"""The op against attention under the mask that it lists, its limit, its gradients; the low-bit estimate against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtok_kernels.scores import reference

from jaxtok.core.sparsifier import best_blocks, for_heads, with_tokens
from jaxtok.core.types import BlockTable
from jaxtok.ops.attention import attention
from jaxtok.ops.block_sparse import block_sparse, density, listed, low_bit
from tests.methods.prefill import views

BQ, BK = 5, 4


def problem(seed=0, lists=2, most=4):
    x = views.view(seed)
    rng = np.random.default_rng(seed + 100)
    nq, nk = x.blocks(BQ), x.blocks(BK)
    score = jnp.asarray(rng.normal(size=(2, lists, nq, nk)), jnp.float32)
    every = jnp.ones((2, 1, nq, nk), bool)
    return x, jnp.asarray(rng.normal(size=x.k.shape), jnp.float32), best_blocks(score, every, ~every, most)


def run(x, v, table, **more):
    return block_sparse(x.q, x.k, v, table, q_pos=x.pos, k_pos=x.pos, block_q=BQ, block_k=BK, **more)


@pytest.mark.parametrize("lists", [2, 4])
def test_equals_attention_under_the_listed_mask(lists):
    x, v, table = problem(1, lists)
    mask = np.repeat(np.asarray(listed(table, t=24, s=24, block_q=BQ, block_k=BK)), 4 // lists, 1) & views.seen(x)[:, None]
    out, lse = run(x, v, table)
    want, norm = views.attend(x, v, mask)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, norm, atol=2e-5)


def test_keys_within_blocks():
    x, v, table = problem(2)
    chosen = np.random.default_rng(3).random((2, 1, 5, 24)) < 0.6
    masked = with_tokens(table, jnp.asarray(chosen), BK)
    mask = np.asarray(listed(table, t=24, s=24, block_q=BQ, block_k=BK)) & np.repeat(chosen, BQ, 2)[:, :, :24]
    np.testing.assert_array_equal(listed(masked, t=24, s=24, block_q=BQ, block_k=BK), mask)
    want, norm = views.attend(x, v, np.repeat(mask, 2, 1) & views.seen(x)[:, None])
    out, lse = run(x, v, masked)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, norm, atol=2e-5)


def test_a_full_table_is_attention_gradients_too():
    x, v, table = problem(4, most=6)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=v.shape[:3]), jnp.float32)
    assert (np.asarray(table.count) == 6).all()

    def loss(f):
        def run(q, k, v, bias):
            out, lse = f(q, k, v, bias)
            return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

        return jax.value_and_grad(run, (0, 1, 2, 3))(x.q, x.k, v, bias)

    see = {"q_pos": x.pos, "k_pos": x.pos, "window": 9, "softcap": 5.0}
    got = loss(lambda q, k, v, bias: block_sparse(q, k, v, table, bias=bias, block_q=BQ, block_k=BK, **see))
    want = loss(lambda q, k, v, bias: attention(q, k, v, bias=bias, **see))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), got, want)


def test_best_blocks_by_hand():
    """Scores 3 1 2 0 with block 3 forced and 0 no candidate: two places are 3 and 2, three are 3, 2 and 1."""
    score = jnp.asarray([3.0, 1.0, 2.0, 0.0]).reshape(1, 1, 1, 4)
    candidate, forced = (jnp.asarray(x).reshape(1, 1, 1, 4) for x in ([False, True, True, True], [True, False, False, True]))
    two, three, nine = (best_blocks(score, candidate, forced, most) for most in (2, 3, 9))
    assert two.index.ravel().tolist() == [2, 3] and three.index.ravel().tolist() == [1, 2, 3]
    assert nine.index.ravel().tolist() == [1, 2, 3, -1] and nine.count.item() == 3 and nine.lost is not None and nine.lost.item() == 0
    both = best_blocks(score, candidate, candidate, 2)
    assert both.lost is not None and both.lost.item() == 1
    assert for_heads(two, 3).index.shape == (1, 3, 1, 2)


def test_density_counts_causal_blocks_of_live_rows():
    """24 and 17 live rows in blocks of 5 by 4: 2+3+4+5+6 and 2+3+4+5 = 20 and (17 rows: 2+3+4+5) 14 causal blocks."""
    x, _, _ = problem()
    every = BlockTable(jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 1, 5, 6)), jnp.full((2, 1, 5), 6, jnp.int32))
    np.testing.assert_allclose(density(every, x.pos, block_q=BQ, block_k=BK), 1.0)
    one = every._replace(count=jnp.ones((2, 1, 5), jnp.int32))
    np.testing.assert_allclose(density(one, x.pos, block_q=BQ, block_k=BK).ravel(), [5 / 20, 4 / 14], rtol=1e-6)


@pytest.mark.parametrize("bits, tile, diagonal", [(4, 256, None), (8, 256, None), (4, 10, None), (4, 10, 0)])
def test_low_bit_is_the_kernels_definition(bits, tile, diagonal, monkeypatch):
    monkeypatch.setattr("jaxtok.ops.block_sparse.TILE", tile)
    x = views.view(6, junk=1e4)
    pos = jnp.broadcast_to(x.pos[:, None], (2, 2, 24))
    lse = attention(x.q, x.k, x.k, q_pos=x.pos, k_pos=x.pos)[1]
    how = {"block_q": BQ, "block_k": BK, "tile": 3, "bits": bits, "scale": 0.3}
    for norm in (None, lse):
        got = low_bit(x.q, x.k, q_pos=x.pos, k_pos=pos, lse=norm, diagonal=diagonal, **how)
        want = reference.low_bit(x.q, x.k, x.pos, pos, norm, **how)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        np.testing.assert_allclose(np.where(np.isfinite(got), got, 0), np.where(np.isfinite(want), want, 0), atol=1e-4, rtol=1e-5)


def test_refuses():
    x, v, table = problem()
    with pytest.raises(ValueError, match="impl is 'x'"):
        run(x, v, table, impl="x")
    with pytest.raises(ValueError, match="static int"):
        run(x, v, table, window=jnp.int32(3))
    with pytest.raises(ValueError, match="the table has 5"):
        listed(table, t=40, s=24, block_q=BQ, block_k=BK)
    with pytest.raises(ValueError, match="bits must be in 2 to 8"):
        low_bit(x.q, x.k, q_pos=x.pos, k_pos=jnp.broadcast_to(x.pos[:, None], (2, 2, 24)), bits=9, scale=1.0)
