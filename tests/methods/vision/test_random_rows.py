"""Random rows: how many, how often, and that nothing else decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.types import Evidence
from jaxtok.methods import RandomRows
from tests.methods.vision.select import images, kept, left

small = lambda n: RandomRows(capacity=n)


def test_every_row_is_drawn_as_often_as_another():
    tokens, method = images(np.zeros((1, 9, 1))), RandomRows(capacity=3)

    @functools.partial(jax.vmap, in_axes=0)
    def drawn(key):
        return method.plan({}, (), tokens, Evidence(key=key))[1].assign[0] >= 0

    often = np.asarray(jax.jit(drawn)(jax.random.split(jax.random.key(1), 1000)))
    assert often[:, 0].all() and (often[:, 1:].sum(1) == 3).all()
    assert np.abs(often[:, 1:].mean(0) - 3 / 8).max() < 0.06  # 4 standard deviations


def test_a_seed_repeats_and_rows_do_not_matter():
    one, two = images(np.zeros((2, 20, 1))), images(np.ones((2, 20, 1)))
    assert kept(RandomRows(capacity=6, seed=3), one, Evidence()) == kept(RandomRows(capacity=6, seed=3), two, Evidence())
    assert kept(RandomRows(capacity=6, seed=3), one, Evidence()) != kept(RandomRows(capacity=6, seed=4), one, Evidence())
    assert len(kept(RandomRows(capacity=6), one, Evidence(), jnp.asarray([4, 4]))) == 4


def test_crops_and_all_rows():
    tokens = images(np.zeros((1, 24, 1)), 0, segment=np.repeat([0, 1, 2], 8))
    found = kept(RandomRows(capacity=6, special=0, crops=3), tokens, Evidence())
    assert np.bincount(np.array(found) // 8).tolist() == [2, 2, 2]
    assert left(RandomRows(capacity=24, special=0), tokens, Evidence()).source[0].tolist() == list(range(24))
