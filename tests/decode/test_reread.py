"""The second reading: what it looks at, by the rows of a joint pass; identity at full budget; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.decode import generate, prefill, prefill_reread
from jaxtok.decode.reread import request
from jaxtok.methods import H2O, AdaKV, KVzip, SnapKV, StreamingLLM
from jaxtok.models import blocks, decoder
from jaxtok.testing.world import CFG, LENGTHS, LIVE, N, near, world

ASK = {"prompt": (3, 5), "further": (7, 8, 9), "suffix": (4,), "overlap": 2}


def looked_at(params, ids, length, chunk, sinks, plus):
    """f64 [l h n]: the largest share of attention each token of one row gets in the repetition of its chunk, in numpy from the rows of a
    pass over the text and its repetition together."""
    out = np.zeros((CFG.layers, CFG.heads, length))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        again = [
            *(ASK["prompt"] if not start else [*ASK["further"], *ids[max(start - ASK["overlap"], 0) : start]]),
            *ASK["suffix"],
            *ids[start:stop],
        ]
        both = jnp.asarray([[*ids[:length], *again]], jnp.int32)
        tokens, t = decoder.embed(CFG, params, both), len(again)
        for i, p in enumerate(params["layers"]):
            x = np.asarray(blocks.normed(CFG, p, tokens.x))[0, -t:].astype(np.float64)
            tokens, ((kv, seen),) = decoder.cached.attend_rows(CFG, p, i, tokens, None, Recipe(), Needs(rows=t), False, None, "auto")
            rows = np.asarray(seen.rows, np.float64)[0]
            among = [j for j in range(length + t) if j < sinks or start <= j < stop or j >= length]
            share = rows / rows[..., among].sum(-1, keepdims=True)
            if plus:
                share = share / np.linalg.norm(x, axis=-1)[None, :, None]
            out[i, :, start:stop] = share[..., start:stop].max(1)
            if plus:
                o = np.asarray(p["o"], np.float64).reshape(CFG.heads, CFG.head_dim, -1)
                for h in range(CFG.heads):
                    v = np.asarray(kv.v, np.float64)[0, h // 2, start:stop]
                    out[i, h, start:stop] *= np.linalg.norm(v @ o[h], axis=-1)
    return out


@pytest.mark.parametrize("chunk, plus", [(99, False), (5, False), (4, True)])
def test_keeps_what_the_repetition_looks_at(chunk, plus):
    params, ids, _ = world()
    method = KVzip(capacity=5, sinks=1, plus=plus)
    _, layers = jax.jit(
        lambda: prefill_reread(CFG, params, ids, jnp.asarray(LIVE), Recipe(cache=method), new=2, chunk=chunk, sinks=1, **ASK)
    )()
    for b in (0, 1, 3):
        length = int(LENGTHS[b])
        peaks = looked_at(params, np.asarray(ids)[b, N - length :].tolist(), length, chunk, 1, plus)
        for i, (part,) in enumerate(layers):
            for g in range(CFG.kv_heads):
                score = peaks[i, 2 * g : 2 * g + 2].max(0)
                want = {0} | set(sorted(range(1, length), key=lambda p: -score[p])[: min(5, length) - 1])
                assert {int(p) for p in part.kv.pos[b, g] if p >= 0} == want, (b, i, g)


def test_full_budget_is_the_plain_prefill():
    """The card's check: nothing removed changes nothing, and the repetition leaves no trace in the cache."""
    params, ids, _ = world()
    live = jnp.asarray(LIVE)

    @jax.jit
    def both():
        tokens, layers = prefill_reread(CFG, params, ids, live, Recipe(cache=KVzip(capacity=N)), new=3, chunk=5, **ASK)
        plain_tokens, plain = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), new=3)
        return (tokens, layers), (plain_tokens, plain), generate(CFG, params, tokens, layers, new=3, eos=()).ids

    mine, plain, said = both()
    near(mine[0].x, plain[0].x, 1e-6, "rows")
    jax.tree.map(lambda a, b: near(a, b, 1e-6, "caches"), mine[1], plain[1])
    assert all(part.kv.k.shape[2] == N + 3 and part.kv.seen.tolist() == LENGTHS.tolist() for (part,) in mine[1])
    np.testing.assert_array_equal(said, generate(CFG, params, *plain, new=3, eos=()).ids)


def test_layers_share_one_budget():
    params, ids, _ = world()
    recipe = Recipe(cache=KVzip(capacity=6, sinks=1, share="model"))
    keep = {"cache": jnp.array([6, 5, 4, 3], jnp.int32)}
    run = jax.jit(lambda keep: prefill_reread(CFG, params, ids, jnp.asarray(LIVE), recipe, new=0, chunk=5, sinks=1, keep=keep, **ASK)[1])
    count = np.stack([(np.asarray(part.kv.pos) >= 0).sum(-1) for (part,) in run(keep)])
    np.testing.assert_array_equal(count.sum((0, 2)), 4 * np.minimum([6, 5, 4, 3], LENGTHS))
    assert count[:, 0].std() > 0 and all(part.kv.k.shape[2] == 12 for (part,) in run(keep))
    none = jax.jit(lambda: prefill_reread(CFG, params, ids, jnp.asarray(LIVE), recipe, new=0, chunk=5, sinks=1, **ASK)[1])()
    assert sum(int((part.kv.pos[0] >= 0).sum()) for (part,) in none) == 24


def test_a_row_does_not_depend_on_its_padding():
    params, ids, _ = world()
    recipe = Recipe(cache=KVzip(capacity=5, sinks=1))
    run = lambda ids, live: prefill_reread(CFG, params, ids, live, recipe, new=0, chunk=4, sinks=1, **ASK)[1]
    wide = jnp.pad(ids, ((0, 0), (3, 0)))
    a, b = run(ids, jnp.asarray(LIVE)), run(wide, jnp.pad(jnp.asarray(LIVE), ((0, 0), (3, 0))))
    for (x,), (y,) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.kv.pos, y.kv.pos)
        near(x.kv.v, y.kv.v, 1e-5, "values")


def test_any_prefill():
    """`prefill` is the one that the recipe takes; heads of unequal budgets by a wrapper."""
    params, ids, _ = world()
    live, options = jnp.asarray(LIVE), request(lambda text, special: [len(text) % CFG.vocab])
    assert set(options) == {"prompt", "further", "suffix"}
    for cache in (SnapKV(capacity=5, window=2), AdaKV(base=KVzip(capacity=5, sinks=1))):
        shapes = jax.eval_shape(lambda c=cache: prefill(CFG, params, ids, live, Recipe(cache=c), new=1, ask=options))[1]
        assert [part.kv.k.shape[2] for (part,) in shapes] == [cache.slots + 1] * 2


def test_refused():
    params, ids, _ = world()
    for match, recipe in {
        "needs a method at site cache": Recipe(),
        "a second reading gives `peak`": Recipe(cache=SnapKV(capacity=9, window=2)),
        "without a step policy": Recipe(cache=KVzip(capacity=5), policy=H2O(capacity=9)),
        "without a step policy and with rotated": Recipe(cache=KVzip(capacity=5), policy=StreamingLLM(capacity=9)),
        "shares budgets among all heads": Recipe(cache=KVzip(capacity=5, share="model"), heads=((1, 1), (1, 1))),
    }.items():
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda r=recipe: prefill_reread(CFG, params, ids, None, r, new=1))
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        prefill_reread(CFG, params, ids, None, Recipe(cache=KVzip(capacity=5)), new=1, chunk=0)
