import numpy as np
import pytest

from jaxtok.methods import BlockTopK
from tests.methods.prefill import views

small = {
    "block_topk": lambda capacity: BlockTopK(capacity=capacity, block_q=4, block_k=2),
    "block_topk:shared": lambda capacity: BlockTopK(capacity=capacity, sinks=1, block_q=2, block_k=2, shared=True),
}


def reference(x, bq, bk, count, sinks, shared):
    """The blocks of each list, block by block."""
    q, k, pos = (np.asarray(a, np.float64) for a in (x.q, x.k, x.pos))
    (b, h, n, _), g, out = q.shape, k.shape[1], []
    for i in range(b):
        length, rows = int((pos[i] >= 0).sum()), []
        for e in range(g if shared else h):
            heads = range(e * h // g, (e + 1) * h // g) if shared else [e]
            row = []
            for s in range(0, n, bq):
                last = min(s + bq, length) - 1
                score = {}
                for y in range(0, length, bk) if s < length else ():
                    if y <= last:
                        forced = y < sinks or y + bk > s
                        mean = np.mean([q[i, a, s : last + 1].mean(0) @ k[i, a * g // h, y : min(y + bk, length)].mean(0) for a in heads])
                        score[y // bk] = (not forced, -mean)
                row.append(set(sorted(score, key=score.get)[:count]))
            rows.append(row)
        out.append(rows)
    return out


@pytest.mark.parametrize(
    "bq, bk, count, sinks, shared", [(4, 2, 4, 0, False), (4, 3, 4, 1, False), (3, 4, 3, 4, True), (5, 2, 12, 0, True)]
)
def test_equals_numpy(bq, bk, count, sinks, shared):
    x = views.view(1, junk=1e4)
    method = BlockTopK(capacity=count * bk, sinks=sinks, block_q=bq, block_k=bk, shared=shared)
    assert views.blocks(method, x) == reference(x, bq, bk, count, sinks, shared)


def test_a_budget_of_all_is_everything():
    x = views.view(2)
    got = views.tokens(BlockTopK(capacity=24, block_q=4, block_k=2), x)
    np.testing.assert_array_equal(got, np.broadcast_to(views.seen(x)[:, None], got.shape))
    assert BlockTopK(capacity=24).whole(24) and not BlockTopK(capacity=23).whole(24)


def test_nothing_behind_a_block_of_queries_decides_what_it_reads():
    x, method = views.view(3, live=(24,)), BlockTopK(capacity=6, block_q=4, block_k=2)
    other = x._replace(q=x.q.at[:, :, 12:].set(3.0), k=x.k.at[:, :, 12:].set(-5.0))
    np.testing.assert_array_equal(views.tokens(method, x)[:, :, :12], views.tokens(method, other)[:, :, :12])


def test_refuses():
    with pytest.raises(ValueError, match="capacity must be >= 1"):
        BlockTopK(capacity=0)
    with pytest.raises(TypeError, match="shared"):
        BlockTopK(capacity=3, shared=1)
