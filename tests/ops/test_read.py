"""Attention of readers: gathered, whole, with its logits; against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.read import attend_all, attend_blocks, attend_scores, attend_slots, take
from tests.methods import toys


@pytest.mark.parametrize("heads", [2, 4])
def test_listed_slots_per_kv_head_or_per_query_head(heads):
    q, kv = toys.problem(1, live=(24, 5), junk=1e3)
    rng = np.random.default_rng(0)
    slots = np.stack([np.stack([rng.permutation(24)[:7] for _ in range(heads)]) for _ in range(2)])
    slots[:, :, 0] = -1
    out, lse = attend_slots(jnp.asarray(q[:, :, -1:]), toys.newest(kv), kv, jnp.asarray(slots, jnp.int32), toys.sight())
    sets = [[row[head * heads // 4].tolist() for head in range(4)] for row in slots]
    np.testing.assert_allclose(out[:, :, 0], toys.attend_to(q[:, :, -1], kv, sets), atol=2e-5)
    rows = take(kv.k, jnp.asarray(slots, jnp.int32))
    assert rows.shape == (2, heads, 7, 8) and not np.asarray(rows[:, :, 0]).any()
    np.testing.assert_array_equal(rows[0, -1, 3], kv.k[0, -1, slots[0, -1, 3]])
    with pytest.raises(ValueError, match="slots of 3 heads"):
        take(kv.k, jnp.zeros((2, 3, 1), jnp.int32))


@pytest.mark.parametrize("window", [None, 6])
def test_scores_come_with_the_attention(window):
    """One pass: the same values and logsumexp as attention, and the logits, -inf where a query does not see."""
    q, kv = toys.problem(2, junk=1e3)
    kv = kv._replace(pos=kv.pos.at[1].set(-1).at[0, 0, 3].set(-1), bias=kv.bias.at[0, 1, 2].set(0.7))
    see = toys.sight(window=window, softcap=3.0, scale=0.4)
    pos = jnp.asarray([[20, 21, -1], [-1, -1, -1]], jnp.int32)
    many = jnp.asarray(q[:, :, -3:])
    out, lse, logit = attend_scores(many, pos, kv, see)
    want, norm = attend_all(many, pos, kv, see)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(lse, norm, atol=2e-5)
    seen = np.isfinite(logit[0, 0, 1])
    assert seen.tolist() == [(window is None or 21 - j < window) and j <= 21 and j != 3 for j in range(24)]
    np.testing.assert_allclose(np.log(np.exp(np.asarray(logit[0, :, :2], np.float64)).sum(-1)), lse[0, :, :2], atol=2e-5)
    assert not np.isfinite(logit[1]).any() and not np.asarray(out[1]).any()


@pytest.mark.parametrize("heads", [2, 4])
def test_the_kernel_reads_what_xla_gathers(heads):
    """Pages, rows and everything, ragged, GQA, for one query and three: `impl="interpret"` equals the gather."""
    q, kv = toys.problem(2, live=(24, 17), n=24, junk=1e3)
    rng = np.random.default_rng(0)
    for t, block in ((1, 1), (3, 8)):
        index = np.stack([rng.permutation(24 // block)[:3] for _ in range(2 * heads)]).reshape(2, heads, 3)
        index = jnp.asarray(np.where(rng.random(index.shape) < 0.2, -1, index), jnp.int32)
        pos = kv.seen[:, None] - t + jnp.arange(t, dtype=jnp.int32)[None]
        rows = jnp.asarray(q[:, :, -t:])
        for window in (None, 6):
            see = toys.sight()._replace(window=window)
            fast = see._replace(impl="interpret")
            for want, got in (
                (attend_blocks(rows, pos, kv, index, see, block), attend_blocks(rows, pos, kv, index, fast, block)),
                (attend_all(rows, pos, kv, see), attend_all(rows, pos, kv, fast)),
            ):
                np.testing.assert_allclose(got[0], want[0], atol=5e-6)
                np.testing.assert_allclose(got[1], want[1], atol=5e-6)


def test_the_kernel_refuses():
    q, kv = toys.problem(1, live=(24, 17), n=24)
    see = toys.sight()._replace(impl="interpret", window=jnp.int32(3))
    with pytest.raises(NotImplementedError, match="static window"):
        attend_all(jnp.asarray(q[:, :, -1:]), toys.newest(kv), kv, see)
