"""Which heads stay whole, in what order, and how many a budget allows."""

import numpy as np
import pytest

from jaxtok.core import heads
from jaxtok.core.types import Evidence
from jaxtok.methods import DuoAttention, StreamingLLM
from tests.methods import toys


def test_split_by_hand():
    """Full heads first, each group in the order of the weights; a layer may have none or all."""
    full = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]) > 0
    assert heads.split(full) == heads.HeadSplit(((2, 2), (0, 4), (4, 0)), ((1, 3, 0, 2), (0, 1, 2, 3), (0, 1, 2, 3)))


def test_the_best_are_exactly_so_many():
    score = np.array([[1.0, 5.0], [5.0, np.nan], [5.0, 2.0]])
    for count, want in {0: [], 1: [1], 2: [1, 2], 4: [1, 2, 4, 5], 5: [0, 1, 2, 4, 5]}.items():
        assert np.flatnonzero(heads.best(score, count)).tolist() == want


def test_allot():
    # 3/4 of 64 heads * 8192 slots on average, 32768 a whole head: 12; at most 15% of 64 = 9.6 -> 10
    assert heads.allot(8192, 32768, 64, 1) == 12 and heads.allot(8192, 32768, 64, 0.15) == 10
    assert heads.allot(100, 100, 6, 1.0) == 6 and heads.allot(100, 100, 6, 0.15) == 1 and heads.allot(1, 100, 6, 1) == 0
    for capacity in (1, 10, 33, 99):  # the others always get a quarter of the budget
        count = heads.allot(capacity, 100, 64, 1)
        assert (capacity * 64 - count * 100) // (64 - count) >= capacity // 4


def test_a_window_with_sinks_is_what_streamingllm_keeps():
    _, kv = toys.problem()
    plans = [toys.fit(x, kv, Evidence())[1].index for x in (StreamingLLM(capacity=9, sinks=2), DuoAttention(capacity=9, sinks=2))]
    np.testing.assert_array_equal(*plans)


def test_refused():
    for match, call in {
        "score must be one number for each layer and KV head": lambda: heads.best(np.zeros((0, 2)), 0),
        "count must be <= 4": lambda: heads.best(np.zeros((2, 2)), 5),
        "most must be from 0 to 1": lambda: heads.allot(1, 2, 3, 1.5),
        "n must be >= 1": lambda: heads.allot(1, 0, 3, 1),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
