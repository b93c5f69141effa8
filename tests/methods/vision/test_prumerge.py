"""PruMerge against its formulas (our reading) and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import PruMerge
from tests.methods.vision.select import best, images, left

small = {
    "prumerge": lambda n: PruMerge(capacity=n, near=3),
    "prumerge:plus": lambda n: PruMerge(capacity=n, near=3, plus=True),
}


def reference(x, lead, keys, capacity, near, adaptive=True, plus=False):
    """Rows: class row, kept ones in raster order, the rest's; x [1+n c], lead [h d], keys [h 1+n d]."""
    wide = keys.transpose(1, 0, 2).reshape(len(x), -1)
    logits = wide @ lead.reshape(-1) / np.sqrt(lead.size)
    a = np.exp(logits - logits.max())
    a /= a.sum()
    q1, q3 = np.percentile(a[1:], [25, 75])
    k = min(int((a[1:] > q3 + 1.5 * (q3 - q1)).sum()), capacity - 1) if adaptive else capacity - 1
    stays = best(a[1:], k)
    if plus:
        spread = range(0, len(x) - 1, max((len(x) - 1) // max(k, 1) // 3, 1))
        both = sorted({*stays, *spread})
        stays = sorted(sorted(both, key=lambda j: (-a[1 + j], j))[: capacity - 1])
    stays = [1 + j for j in stays]
    unit = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    out = [x[0]]
    for i in stays:
        others = sorted((j for j in range(1, len(x)) if j != i), key=lambda j: -unit[i] @ unit[j])[:near]
        out.append(x[i] + sum(a[j] * x[j] for j in others))
    rest = [j for j in range(1, len(x)) if j not in stays]
    return np.array([*out, *([sum(a[j] * x[j] for j in rest)] if rest else [])]), k


def world(seed, n=24, loud=3):
    rng = np.random.default_rng(seed)
    x, keys, lead = rng.normal(size=(1, n, 4)), rng.normal(size=(1, 2, n, 3)), rng.normal(size=(1, 2, 3))
    keys[0, :, 5 : 5 + loud] += 2 * lead[0][:, None]
    return (*(a.astype(np.float32) for a in (x, lead, keys)),)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("near", [4, 32])
def test_reference(near, plus):
    x, lead, keys = world(near)
    want, k = reference(*(a[0].astype(np.float64) for a in (x, lead, keys)), 12, near, plus=plus)
    assert 0 < k < 12  # outliers there are, and fewer than have room
    out = left(PruMerge(capacity=12, near=near, plus=plus), images(x), Evidence(lead=lead, keys=keys))
    assert (np.asarray(out.pos[0]) >= 0).sum() == len(want)
    np.testing.assert_allclose(out.x[0, -len(want) :], want, atol=1e-5)


def test_a_fixed_number_and_a_traced_one():
    x, lead, keys = world(1)
    for keep, capacity in ((None, 7), (jnp.asarray([6]), 5)):
        want, _ = reference(*(a[0].astype(np.float64) for a in (x, lead, keys)), capacity, 3, adaptive=False)
        out = left(PruMerge(capacity=7, near=3, adaptive=False), images(x), Evidence(lead=lead, keys=keys), keep)
        np.testing.assert_allclose(out.x[0, -len(want) :], want, atol=1e-5)
        assert (np.asarray(out.pos[0]) >= 0).sum() == capacity + 1


def test_without_neighbours_the_kept_rows_are_themselves():
    x, lead, keys = world(2)
    method = PruMerge(capacity=9, near=0, adaptive=False)
    out = left(method, images(x), Evidence(lead=lead, keys=keys))
    a = np.asarray(method.attention(images(x), Evidence(lead=jnp.asarray(lead), keys=jnp.asarray(keys))))[0]
    stay = [0] + [1 + j for j in best(a[1:], 8)]
    np.testing.assert_allclose(out.x[0, :-1], x[0, stay], atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="capacity"):
        PruMerge(capacity=1)
