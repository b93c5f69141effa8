"""The head search of RazorAttention against rows of attention, and on a model that looks back by construction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.methods.policy.razor_attention import full_heads
from jaxtok.models import cached, decoder
from jaxtok.testing.world import CFG, world
from jaxtok.train import razor_attention

PERIOD, REPEATS = 5, 3
BOS = dataclasses.replace(CFG, bos=2)


def reference(cfg, params, ids):
    """f64 (echo, induction) [l g] from whole rows of attention."""
    n, first, out = ids.shape[1], 0 if cfg.bos is None else 1, []

    @jax.jit
    def rows(params, ids):
        tokens, found = decoder.embed(cfg, params, ids), []
        for i, p in enumerate(params["layers"]):
            tokens, each = cached.attend_rows(cfg, p, i, tokens, None, Recipe(), Needs(rows=n), False, None, "auto")
            found.append(each[0][1].rows)
        return found

    for p in rows(params, jnp.asarray(ids)):
        p, scores = np.asarray(p, np.float64), []
        for after in (0, 1):
            total = np.zeros(p.shape[:2])
            for i in range(first + PERIOD, n):
                for m in range(1, REPEATS):
                    if i - m * PERIOD >= first:
                        total += p[:, :, i, i - m * PERIOD + after]
            total = total / ((REPEATS - 1) * PERIOD)
            scores.append(total.reshape(len(p), cfg.kv_heads, -1).max(2).mean(0))
        out.append(scores)
    return np.moveaxis(np.array(out), 1, 0)


@pytest.mark.parametrize("cfg", [BOS, dataclasses.replace(CFG, window=8, local=(True, False), softcap=3.0)], ids=["bos", "window"])
def test_equals_the_rows_of_attention(cfg):
    """GQA, two rows of a batch, bos, a sliding window, a soft-cap: the scores are those shares of attention, the group's largest."""
    ids = razor_attention.repeated(cfg, period=PERIOD, repeats=REPEATS, batch=2)
    found = razor_attention.search(cfg, world()[0], ids, period=PERIOD, repeats=REPEATS)
    np.testing.assert_allclose(np.stack(found), reference(cfg, world()[0], ids), atol=2e-6)


def test_a_head_that_echoes_is_found():
    """Layer 0 has one head whose queries are its keys: every token looks for itself, whatever the distance."""
    cfg = dataclasses.replace(CFG, rope_theta=1e12, rotary_dim=2, qk_norm=True)
    params, gain = world()[0], {name: jnp.full((8,), 3.0) for name in ("q_norm", "k_norm")}
    first, second = (p | gain for p in params["layers"])
    k = first["k"].at[:, 8:10].set(0)  # the only channels that turn
    same = first["q"].at[:, 24:32].set(k[:, 8:16])  # query head 3 reads KV head 1
    params = params | {"layers": (first | {"q": same, "k": k}, second)}
    found = razor_attention.search(cfg, params, period=8, repeats=3)
    assert found.echo.argmax() == 1 and found.echo[0, 1] > 2 * np.delete(found.echo.ravel(), 1).max()
    full = full_heads(found.echo, found.induction, echo_ratio=0.25, induction_ratio=0.25)
    assert full[0, 1] and 1 <= full.sum() <= 2


def test_the_tokens():
    big = dataclasses.replace(CFG, vocab=20_000, bos=1)
    ids = razor_attention.repeated(big, batch=2)
    assert ids.shape == (2, 10_001) and (ids[:, 0] == 1).all() and ids[:, 1:].min() >= 10_000 and ids[:, 1:].max() < 12_500
    np.testing.assert_array_equal(ids[:, 1:2501], ids[:, 7501:])
    assert len(set(ids[0, 1:2501].tolist())) == 2500 and (ids[0] != ids[1]).any()
    few = razor_attention.repeated(CFG, period=40, repeats=2)
    assert few.shape == (1, 80) and few.max() < CFG.vocab
    np.testing.assert_array_equal(few, razor_attention.repeated(CFG, period=40, repeats=2))


def test_refuses():
    for match, make in {
        "repeats must be >= 2": lambda: razor_attention.repeated(CFG, repeats=1),
        "period must be >= 1": lambda: razor_attention.repeated(CFG, period=0),
        r"ids \[1, 10\] must be \[b 15\]": lambda: razor_attention.search(
            CFG, world()[0], np.zeros((1, 10), np.int32), period=PERIOD, repeats=REPEATS
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
