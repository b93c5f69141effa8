import numpy as np
import pytest

from jaxtok.methods import VerticalSlash
from jaxtok.ops.block_sparse import lines
from tests.methods.prefill import views

small = lambda capacity: VerticalSlash(
    verticals=max(1, capacity), slashes=max(2, capacity // 2), rows=3, sinks=1, recent=2, block_q=4, block_k=2
)


def attention(x):
    q, k = np.asarray(x.q, np.float64), np.repeat(np.asarray(x.k, np.float64), 2, 1)
    logit = np.where(views.seen(x)[:, None], np.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(logit - logit.max(-1, keepdims=True))
        return np.nan_to_num(p / p.sum(-1, keepdims=True))


def reference(method, x):
    """bool [b h n n], line by line."""
    a, pos = attention(x), np.asarray(x.pos)
    out = np.zeros(a.shape, bool)
    for i, e in np.ndindex(*a.shape[:2]):
        length = int((pos[i] >= 0).sum())
        last = range(max(length - method.rows, 0), length)
        vertical = [1e9 if j < method.sinks else sum(a[i, e, r, j] for r in last) for j in range(length)]
        slash = [1e9 if o < method.recent else sum(a[i, e, r, r - o] for r in last if r >= o) for o in range(length)]
        keys = set(np.argsort(-np.array(vertical), kind="stable")[: method.verticals].tolist())
        apart = set(np.argsort(-np.array(slash), kind="stable")[: method.slashes].tolist())
        for r, j in np.ndindex(length, length):
            x0, y0 = r // method.block_q * method.block_q, j // method.block_k * method.block_k
            meets = any((s - c) in apart for s in range(x0, x0 + method.block_q) for c in range(y0, y0 + method.block_k))
            own = y0 + method.block_k > x0
            out[i, e, r, j] = j <= r and (j in keys or meets or own)
    return out


@pytest.mark.parametrize("bq, bk", [(4, 2), (3, 4)])
def test_equals_numpy(bq, bk):
    x = views.view(1, junk=1e3)
    method = VerticalSlash(verticals=5, slashes=3, rows=4, sinks=1, recent=2, block_q=bq, block_k=bk)
    np.testing.assert_array_equal(views.tokens(method, x), reference(method, x))


def test_all_verticals_are_everything():
    x = views.view(2)
    got = views.tokens(VerticalSlash(verticals=24, slashes=1, rows=4, sinks=0, recent=1, block_q=4, block_k=2), x)
    np.testing.assert_array_equal(got, np.broadcast_to(views.seen(x)[:, None], got.shape))
    assert VerticalSlash(verticals=100, slashes=100).whole(100)


def test_finds_the_lines_of_a_made_up_head():
    """Keys that all queries meet at row 5, and none else: the vertical is 5."""
    x = views.view(3, live=(24,), h=2, g=1)
    x = x._replace(q=x.q.at[:].set(1.0), k=x.k.at[:].set(0.0).at[:, :, 5].set(9.0))
    method = VerticalSlash(verticals=1, slashes=1, rows=4, sinks=0, recent=1, block_q=1, block_k=1)
    vertical, _ = lines(x.q, x.k, x.pos, last=4)
    assert np.asarray(vertical).argmax(-1).tolist() == [[5, 5]]
    got = views.tokens(method, x)[0, 0]
    np.testing.assert_array_equal(got, np.eye(24, dtype=bool) | ((np.arange(24) == 5)[None] & (np.arange(24) >= 5)[:, None]))


def test_refuses():
    with pytest.raises(ValueError, match="slashes=3 has no room for the 100"):
        VerticalSlash(verticals=64, slashes=3)
