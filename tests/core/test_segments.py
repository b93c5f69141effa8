"""Chunks, sentences and ranks inside them, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.core import segments

rank = jax.jit(segments.rank)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 0.5, 2.0]), st.integers(-1, 3)), min_size=8, max_size=8))
def test_rank(row):
    score, segment = zip(*row, strict=True)
    want = []
    for j in range(8):
        better = [i for i in range(8) if segment[i] == segment[j] and (-score[i], i) < (-score[j], j)]
        want.append(len(better))
    got = rank(jnp.array([score], jnp.float32), jnp.array([segment], jnp.int32))
    np.testing.assert_array_equal(got, [want])


def test_chunks_count_live_rows_from_the_oldest():
    pos = jnp.array([[-1, -1, 3, 5, 6, 9, 11], [0, 1, 2, 3, 4, 5, 6], [-1] * 7], jnp.int32)
    got = segments.chunks(pos, 2)
    assert got.tolist() == [[-1, -1, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3], [-1] * 7]


def test_a_token_that_ends_a_sentence_belongs_to_it():
    ids = jnp.array([[7, 4, 7, 7, 5, 4, 7]], jnp.int32)
    live = jnp.array([[False, True, True, True, True, True, True]])
    assert segments.sentences(ids, live, (7,)).tolist() == [[-1, 0, 0, 1, 2, 2, 2]]
    assert segments.sentences(ids, live, (5, 7)).tolist() == [[-1, 0, 0, 1, 2, 3, 3]]


def test_mean_goes_back_to_every_row():
    x = jnp.array([[1.0, 3.0, 10.0, 5.0, 9.0]])
    segment = jnp.array([[0, 0, -1, 2, 0]], jnp.int32)
    np.testing.assert_allclose(segments.mean(x, segment, 3), [[13 / 3, 13 / 3, 0.0, 5.0, 13 / 3]], rtol=1e-6)
