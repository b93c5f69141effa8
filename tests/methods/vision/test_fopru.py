"""FoPru against its formulas and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import FoPru
from tests.methods.vision.select import best, grid, images, kept

small = {"fopru": lambda n: FoPru(capacity=n), "fopru:row": lambda n: FoPru(capacity=max(n, 4), by="row", width=4)}


def world(seed, rows=4, cols=5, special=1):
    rng = np.random.default_rng(seed)
    n = rows * cols + special
    a = np.exp(2 * rng.normal(size=(2, 3, n, n)))
    cell = np.concatenate([np.full((special, 2), -1), grid(rows, cols)])
    return images(rng.normal(size=(2, n, 4)), special, cell=cell), (a / a.sum(-1, keepdims=True)).astype(np.float32)


def scores(probs, special):
    m = probs.astype(np.float64).mean(0)[special:, special:]
    received, given = m.mean(0), m.mean(1)
    return received if received.var() >= given.var() else given


def test_by_hand():
    """Row 2 is looked at by all, row 1 looks at the class row alone: received .1, .7, .1 varies more than given."""
    probs = np.array([[[[1, 0, 0, 0], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.7, 0.1]]]], np.float32)
    assert kept(FoPru(capacity=1), images(np.zeros((1, 4, 1))), Evidence(probs=probs)) == [0, 2]
    probs[0, 0, 1:] = [[0.9, 0.03, 0.03, 0.04], [0.0, 0.3, 0.3, 0.4], [0.9, 0.03, 0.03, 0.04]]  # given: .1, 1, .1
    assert kept(FoPru(capacity=1), images(np.zeros((1, 4, 1))), Evidence(probs=probs)) == [0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_reference(seed):
    tokens, probs = world(seed)
    for i in range(2):
        score = scores(probs[i], 1)
        assert kept(FoPru(capacity=7), tokens, Evidence(probs=probs), row=i) == [0] + [1 + j for j in best(score, 7)]
        lines = best(score.reshape(4, 5).sum(1), 2)
        want = [0] + [1 + 5 * r + c for r in lines for c in range(5)]  # whole rows of the grid
        assert kept(FoPru(capacity=13, by="row", width=5), tokens, Evidence(probs=probs), row=i) == want
        assert kept(FoPru(capacity=13, by="row", width=5), tokens, Evidence(probs=probs), jnp.asarray([11, 11]), row=i) == want


def test_full_softmax_rows_choose_what_is_received():
    tokens, probs = world(4, special=0)
    m = probs[0].astype(np.float64).mean(0)
    assert np.ptp(m.mean(1)) < 1e-6
    assert kept(FoPru(capacity=6, special=0), tokens, Evidence(probs=probs)) == best(m.mean(0), 6)


def test_bad_input():
    with pytest.raises(ValueError, match="no grid row"):
        FoPru(capacity=3, by="row", width=4)
    with pytest.raises(ValueError, match="by"):
        FoPru(capacity=3, by="column")
