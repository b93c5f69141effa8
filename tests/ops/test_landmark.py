"""The grouped softmax against the scatter form of the card, its identity, its gradient, and the official weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.ops.landmark import grouped_softmax


def reference(logit, seen, own):
    """One query, key by key: groups by dictionary."""
    nb, size = logit.shape
    weight = np.zeros((nb, size))
    first = [
        (c, j) for c in range(nb) for j in range(size) if seen[c, j] and (own[c] != (j == size - 1)) and (own[c] or seen[c, :-1].any())
    ]
    if not first:
        return weight
    e = {at: np.exp(logit[at] - max(logit[x] for x in first)) for at in first}
    for (c, j), p in e.items():
        p = p / sum(e.values())
        if own[c]:
            weight[c, j] = p
        else:
            inside = np.where(seen[c, :-1], np.exp(logit[c, :-1] - logit[c, :-1][seen[c, :-1]].max()), 0)
            weight[c, :-1] = p * inside / inside.sum()
    return weight


def problem(seed):
    rng = np.random.default_rng(seed)
    logit, seen, own = rng.normal(size=(2, 6, 4, 5)) * 3, rng.random((2, 6, 4, 5)) < 0.7, np.zeros((2, 6, 4), bool)
    own[:, :, 3] = True
    own[0, 0] = False
    seen[0, 1] = False
    seen[0, 2, :, :4] = False
    return logit, seen, own


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_groups(seed):
    """Weights sum to 1 or 0, landmarks get none; blocks without tokens or a landmark count for nothing."""
    logit, seen, own = problem(seed)
    weight, norm = grouped_softmax(jnp.asarray(logit, jnp.float32), jnp.asarray(seen), jnp.asarray(own))
    want = np.array([[reference(*x) for x in zip(*row, strict=True)] for row in zip(logit, seen, own, strict=True)])
    np.testing.assert_allclose(weight, want, atol=1e-6)
    total = np.asarray(weight).sum((-1, -2))
    assert np.allclose(total, np.isfinite(norm)) and total[0, 1] == 0 and not np.asarray(weight)[..., -1].any()


def test_landmarks_that_know_their_block_change_nothing():
    """Each landmark's logit the logsumexp of its block: the plain softmax over tokens; one block alone: the plain softmax."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(7, 4, 5)) * 2
    logit = np.concatenate([tokens, np.log(np.exp(tokens).sum(-1, keepdims=True))], -1)
    own = np.zeros((7, 4), bool)
    own[:, 3] = True
    weight, norm = grouped_softmax(jnp.asarray(logit, jnp.float32), jnp.ones(logit.shape, bool), jnp.asarray(own))
    e = np.exp(tokens)
    np.testing.assert_allclose(weight[..., :-1], e / e.sum((-1, -2), keepdims=True), atol=1e-6)
    np.testing.assert_allclose(norm, np.log(e.sum((-1, -2))), atol=1e-5)


def test_gradient():
    """Finite differences, and no NaN where nothing is seen."""
    logit, seen, own = (x[0, :3] for x in problem(1))
    rng = np.random.default_rng(1)
    value, way = rng.normal(size=logit.shape), rng.normal(size=logit.shape)
    loss = lambda x: jnp.sum(grouped_softmax(x, jnp.asarray(seen), jnp.asarray(own))[0] * value.astype(np.float32))
    slope = jax.grad(loss)(jnp.asarray(logit, jnp.float32))
    at = lambda step: sum((np.array([reference(*x) for x in zip(logit + step * way, seen, own, strict=True)]) * value).ravel())
    np.testing.assert_allclose(np.sum(np.asarray(slope) * way), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-3)
    assert np.isfinite(slope).all() and not np.asarray(slope)[1].any()


def test_official_weights(data):
    """epfml/landmark-attention: twenty tokens without a landmark are one block: the causal softmax."""
    z = np.load(data / "golden" / "landmark_attention.npz")
    q, k, v = (z[f"c4_{name}"] for name in "qkv")
    t = q.shape[2]
    assert not z["c4_is_landmark"].any()
    logit = np.pad(np.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, ((0, 0),) * 3 + ((0, 1),))[:, :, :, None]
    seen = np.pad(np.tri(t, dtype=bool), ((0, 0), (0, 1)))[None, None, :, None] & np.ones(logit.shape, bool)
    weight, _ = grouped_softmax(jnp.asarray(logit), jnp.asarray(seen), jnp.ones(logit.shape[:-1], bool))
    np.testing.assert_allclose(weight[..., 0, :-1], z["c4_weights"], atol=1e-6)
    np.testing.assert_allclose(weight[..., 0, :-1] @ v, z["c4_out"], atol=1e-5)
    # the gradient of sum(out * cotangent) by the rows that q, k, v are made of, through the official custom backward
    h = q.shape[1]

    def out(x):
        q, k, v = (y.reshape(1, t, h, -1).swapaxes(1, 2) for y in jnp.split(x @ z["c4_w_qkv"].T, 3, -1))
        logit = jnp.pad(jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, ((0, 0),) * 3 + ((0, 1),))[:, :, :, None]
        weight, _ = grouped_softmax(logit, jnp.asarray(seen), jnp.ones(logit.shape[:-1], bool))
        return jnp.sum((weight[..., 0, :-1] @ v).swapaxes(1, 2).reshape(1, t, -1) * z["c4_out_cotangent"])

    np.testing.assert_allclose(jax.grad(out)(jnp.asarray(z["c4_x"])), z["c4_grad_x"], rtol=1e-4, atol=1e-5)
