import numpy as np
import pytest

from jaxtok.methods import AShape
from tests.methods.prefill import views

small = lambda capacity: AShape(local=max(1, capacity - 2), sinks=2, block_q=4, block_k=2)


def test_by_hand():
    """12 rows, blocks of 4 by 2, sinks 2, local 2: block 0; the block before the queries; their own."""
    x = views.view(live=(12, 5), n=12)
    got = views.blocks(small(4), x)
    assert got[0] == [[{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}]] * 2
    assert got[1] == [[{0, 1}, {0, 1, 2}, set()]] * 2


@pytest.mark.parametrize("local, sinks, bq, bk", [(3, 2, 4, 2), (5, 0, 3, 4), (1, 7, 8, 8), (24, 24, 5, 3)])
def test_equals_numpy(local, sinks, bq, bk):
    x = views.view(1)
    method = AShape(local=local, sinks=sinks, block_q=bq, block_k=bk)
    want = np.zeros((24, 24), bool)
    for i, j in np.ndindex(24, 24):
        first, block = i // bq * bq, range(j // bk * bk, j // bk * bk + bk)
        want[i, j] = block[0] < sinks or block[-1] >= first - local
    np.testing.assert_array_equal(views.tokens(method, x), np.broadcast_to(want, (2, 4, 24, 24)) & views.seen(x)[:, None])


def test_reads_what_it_promises_and_everything_when_large():
    x = views.view(2)
    got, row = views.tokens(AShape(local=4, sinks=3, block_q=4, block_k=2), x), np.arange(24)
    least = (row[None] < 3) | (row[:, None] - row[None] <= 4)
    assert (got | ~(least & views.seen(x)[:, None])).all()
    assert AShape(local=20, sinks=4).whole(24) and not AShape(local=19, sinks=4).whole(24)
    with pytest.raises(ValueError, match="local must be >= 1"):
        AShape(local=0)
