import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import SnapKV, SpecKV
from jaxtok.models import decoder
from jaxtok.testing.world import CFG, tokens_of, world
from tests.methods import toys


class Once(SpecKV):
    """The formula by itself, on the prompt's own last queries: what the laws can run."""

    passes = ""


small = lambda capacity: Once(capacity=capacity, window=2, look=1, pool=3)


def ahead(q, kv, behind):
    """(cache without the last `behind` tokens, evidence of all queries over it): what `prefill_lookahead` hands to the method."""
    n = q.shape[2]
    seen = toys.look(q, kv, n)
    cut = kv._replace(
        k=kv.k[:, :, : n - behind], v=kv.v[:, :, : n - behind], pos=kv.pos[:, :, : n - behind], bias=kv.bias[:, :, : n - behind]
    )
    return cut._replace(seen=kv.seen - behind), Evidence(rows=seen.rows[..., : n - behind])


def reference(q, kv, window, look, pool, kind, over):
    """The card's score over the tokens before the window (nan elsewhere), numpy float64; the cache is without the last look + 1 tokens."""
    rows = toys.softmax_rows(q, kv.k, kv.pos)
    (b, h, n, _), g = rows.shape, kv.k.shape[1]
    out = np.full((b, g, n - look - 1), np.nan)
    for i in range(b):
        first, stop = n - int(kv.seen[i]), n - look - 1 - window
        for e in range(g):
            block = rows[i, e * (h // g) : (e + 1) * (h // g), -(window + look + 1) :, first:stop]
            flat = block.max((0, 1)) if over == "max" else block.mean((0, 1))
            near = [flat[max(j - pool // 2, 0) : j + pool // 2 + 1] for j in range(len(flat))]
            out[i, e, first:stop] = [x.max() if kind == "max" else x.sum() / pool for x in near]
    return out


def test_by_hand():
    """Four tokens in the cache, a window of one, two more queries: the largest of each column, then of its neighbours."""
    rows = jnp.asarray([[[[0.1, 0.0, 0.3, 0.6], [0.0, 0.2, 0.1, 0.1], [0.5, 0.0, 0.1, 0.0]]]])
    kv = toys.cache(np.zeros((1, 1, 4, 2)), np.zeros((1, 1, 4, 2)))
    run = lambda **options: np.asarray(toys.scorer(SpecKV(capacity=2, window=1, look=1, **options))(kv, Evidence(rows=rows)))[0, 0, :3]
    np.testing.assert_allclose(run(pool=1), [0.5, 0.2, 0.3])
    np.testing.assert_allclose(run(pool=3), [0.5, 0.5, 0.3])
    np.testing.assert_allclose(run(pool=1, over="mean"), [0.2, 0.2 / 3, 0.5 / 3], rtol=1e-6)
    assert toys.kept(toys.run(SpecKV(capacity=2, window=1, look=1, pool=1), kv, Evidence(rows=rows))) == [[{0, 3}]]


@pytest.mark.parametrize("window, look, pool, kind, over", [(4, 3, 3, "max", "max"), (3, 0, 5, "avg", "mean"), (2, 5, 1, "max", "max")])
def test_equals_numpy(window, look, pool, kind, over):
    q, kv = toys.problem(2, junk=1e4)
    method = SpecKV(capacity=9, window=window, look=look, pool=pool, kind=kind, over=over)
    want, (cut, seen) = reference(q, kv, window, look, pool, kind, over), ahead(q, kv, look + 1)
    got = np.asarray(toys.scorer(method)(cut, seen))
    np.testing.assert_allclose(got[~np.isnan(want)], want[~np.isnan(want)], rtol=2e-5)
    if pool == 1 or kind == "avg":  # max pooling ties
        assert toys.kept(toys.run(method, cut, seen)) == toys.top(np.nan_to_num(want), cut.pos, 9, lambda p, seen: p >= seen - window)


def test_without_a_look_it_is_snapkv_with_a_window_one_larger():
    q, kv = toys.problem(3)
    cut, seen = ahead(q, kv, 1)
    mine = toys.kept(toys.run(SpecKV(capacity=9, window=4, look=0, pool=1, over="mean"), cut, seen))
    snap = toys.kept(toys.run(SnapKV(capacity=10, window=5, pool=1), kv, toys.look(q, kv, 5)))
    assert [[head | {live - 1} for head in row] for row, live in zip(mine, toys.LIVE, strict=True)] == snap


@pytest.mark.parametrize("v", range(4))
def test_official_outputs(data, v):
    """The authors' compress_kv: its tokens after the crop; where max pooling ties, the scores at the kept places."""
    z = np.load(data / "golden" / "speckv.npz")
    get = lambda name: z[f"c0_v{v}_{name}"]
    window, look = int(get("window_size")), int(get("lookahead"))
    kind = {"max": "max", "mean": "avg"}[str(get("pool"))]
    method = SpecKV(
        capacity=int(get("max_capacity_prompt")),
        window=window,
        look=look,
        pool=int(get("kernel_size")),
        kind=kind,
        over=str(get("reduction")),
    )
    cut, seen = ahead(z["c0_q"], toys.cache(z["c0_k"], z["c0_v"]), look + 1)
    score = np.asarray(toys.scorer(method)(cut, seen))[0, :, :-window]
    np.testing.assert_allclose(score, get("scores")[0], atol=2e-6)
    for head, mine in enumerate(toys.kept(toys.run(method, cut, seen))[0]):
        official = {int(p) for p in get("kept_after_crop")[0, head]}
        assert len(mine) == method.capacity
        if get("gap")[0, head] > 1e-6:
            assert mine == official
        else:
            ours, theirs = (np.sort([score[head, p] for p in x if p < score.shape[1]]) for x in (mine, official))
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_plain_prefill_is_refused():
    params, ids, _ = world()
    with pytest.raises(ValueError, match=r"speckv needs more than one pass over the prompt; use decode\.prefill_lookahead"):
        decoder.prefill(CFG, params, tokens_of(params, ids), Recipe(cache=SpecKV(capacity=6, window=2)), new=1)


def test_checks_of_a_scorer():
    make = lambda capacity: SpecKV(capacity=capacity, window=3, look=2, pool=3)
    toys.check_scorer(make, lambda q, kv: toys.look(q, kv, 6), protected=lambda p, seen: p >= seen - 3)
    assert SpecKV(capacity=90).needs.rows == 65 and SpecKV(capacity=90, look=0).needs.rows == 33
    for match, options in {
        "capacity=8 has no room for the 32": dict(capacity=8),
        "pool must be odd and >= 1": dict(capacity=80, pool=4),
        "look must be >= 0": dict(capacity=80, look=-1),
        "over must be one of max, mean": dict(capacity=80, over="sum"),
        "kind must be one of avg, max": dict(capacity=80, kind="mean"),
    }.items():
        with pytest.raises(ValueError, match=match):
            SpecKV(**options)
    with pytest.raises(ValueError, match=r"evidence\.rows is missing"):
        SpecKV(capacity=8, window=4).score({}, toys.problem()[1], Evidence())
