"""KL and top-1 against numbers worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.evals import agreement


def test_divergence_by_hand():
    full = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]))
    other = jnp.log(jnp.array([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])) + 7.0  # a constant does not matter
    kl, same = agreement.divergence(full, other)
    # 0.5 ln 2 + 0.25 ln 0.5 ; ln 2 ; 0
    np.testing.assert_allclose(kl, [0.25 * np.log(2), np.log(2), 0.0], atol=1e-6)
    assert same.tolist() == [False, False, True]


def test_mean_over_what_counts():
    values, counted = np.array([[1.0, 3.0, np.nan], [5.0, 5.0, 5.0]]), np.array([[True, True, False], [False] * 3])
    got = agreement.mean_over(values, counted)
    assert got[0] == pytest.approx(2.0) and np.isnan(got[1])
