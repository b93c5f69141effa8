"""Parts of scores: reduction over query heads, pooling, window attention, query moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import score


def test_query_head_i_reads_kv_head_i_over_group():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(score.to_kv_heads(x, 2), [[[2.0, 3.0], [8.0, 9.0]]])
    np.testing.assert_array_equal(score.to_kv_heads(x, 2, "max"), [[[4.0, 5.0], [10.0, 11.0]]])
    np.testing.assert_array_equal(score.to_kv_heads(x, 3, "sum"), [[[2.0, 4.0], [10.0, 12.0], [18.0, 20.0]]])
    assert score.to_kv_heads(x.astype(jnp.bfloat16), 2).dtype == jnp.float32
    with pytest.raises(ValueError, match="6 query heads cannot share 4 KV heads"):
        score.to_kv_heads(x, 4)
    with pytest.raises(ValueError, match="median"):
        score.to_kv_heads(x, 2, "median")


def test_pool():
    x = jnp.array([[3.0, 0.0, 6.0, -3.0]])
    np.testing.assert_allclose(score.pool(x, 3), [[1.0, 3.0, 1.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(score.pool(x, 3, "max"), [[3.0, 6.0, 6.0, 6.0]])
    np.testing.assert_array_equal(score.pool(x, 1), x)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 3, 11)).astype(np.float32)
    padded = np.pad(y, ((0, 0), (0, 0), (3, 3)))
    np.testing.assert_allclose(
        score.pool(jnp.asarray(y), 7), np.stack([padded[..., i : i + 7].sum(-1) / 7 for i in range(11)], -1), atol=1e-6
    )
    lowest = np.pad(y, ((0, 0), (0, 0), (2, 2)), constant_values=-np.inf)
    np.testing.assert_array_equal(score.pool(jnp.asarray(y), 5, "max"), np.stack([lowest[..., i : i + 5].max(-1) for i in range(11)], -1))
    for width in (0, 2):
        with pytest.raises(ValueError, match=f"odd and >= 1, got {width}"):
            score.pool(x, width)
    with pytest.raises(ValueError, match="min"):
        score.pool(x, 3, "min")


@pytest.mark.parametrize("over", ["mean", "sum", "max"])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_window_attention(over, kind):
    rng = np.random.default_rng(1)
    rows = rng.random((2, 4, 3, 9)).astype(np.float32)
    candidate = np.ones((2, 2, 9), bool)
    candidate[..., -3:] = False
    candidate[1, 1, :4] = False
    want = np.zeros((2, 2, 9), np.float32)
    for b in range(2):
        for g in range(2):
            s = sum(getattr(rows[b, h], over)(0) for h in (2 * g, 2 * g + 1)) / 2 * candidate[b, g]
            for j in range(9):
                near = s[max(0, j - 1) : j + 2]
                want[b, g, j] = near.sum() / 3 if kind == "avg" else near.max()
    got = score.window_attention(jnp.asarray(rows), jnp.asarray(candidate), 2, over=over, width=3, kind=kind)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_moments_of_the_counted_queries():
    rng = np.random.default_rng(2)
    q = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    counted = np.array([[False, False, True, True, True, True], [False] * 6])
    q[0, :, :2] = np.nan  # dead rows may hold anything
    mean, cov = score.moments(jnp.asarray(q), jnp.asarray(counted))
    for h in range(3):
        rows = q[0, h, 2:]
        np.testing.assert_allclose(mean[0, h], rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(cov[0, h], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)
    assert not np.any(mean[1]) and not np.any(cov[1])
    assert jax.eval_shape(score.moments, jnp.zeros((1, 2, 3, 4), jnp.bfloat16), jnp.ones((1, 3), bool))[1].dtype == jnp.float32


def test_output_norm_meets_each_query_heads_own_rows():
    rng = np.random.default_rng(6)
    v, o = rng.normal(size=(2, 2, 5, 3)).astype(np.float32), rng.normal(size=(4, 3, 7)).astype(np.float32)
    for power in (1, 2):
        got = score.output_norm(jnp.asarray(v), jnp.asarray(o.reshape(12, 7)), power)
        want = [[[np.linalg.norm(v[b, h // 2, j] @ o[h], power) for j in range(5)] for h in range(4)] for b in range(2)]
        np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="12 rows does not belong to 5 KV heads of 3 channels"):
        score.output_norm(jnp.ones((1, 5, 2, 3)), jnp.ones((12, 7)), 1)
    with pytest.raises(ValueError, match="power must be one of 1, 2"):
        score.output_norm(jnp.asarray(v), jnp.asarray(o.reshape(12, 7)), 3)


def test_nearest_by_cosine_in_blocks():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 3, 11, 4)).astype(np.float32), rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    there = rng.random((2, 3, 6)) < 0.6
    there[0, 0], there[1, 1] = False, [False, False, True, False, False, False]
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    like = np.where(there[:, :, None], unit(x) @ np.swapaxes(unit(y), -1, -2), -np.inf)
    for block in (4, 256):
        value, index = score.nearest(jnp.asarray(x), jnp.asarray(y), jnp.asarray(there), block)
        np.testing.assert_allclose(value, like.max(-1), rtol=1e-5)
        np.testing.assert_array_equal(np.asarray(index)[1], like.argmax(-1)[1])
    value, _ = score.nearest(jnp.zeros((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4)), jnp.ones((1, 1, 3), bool))
    assert value.tolist() == [[[0, 0]]]
