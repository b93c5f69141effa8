"""Text with the tokens that trained attentions want, associative recall, and the loss: that a method learns by `fit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok import train
from jaxtok.core.recipe import Recipe
from jaxtok.methods import CCA, SCOUT, LandmarkAttention, MetaTokens
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.train import language

IDS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)


def test_landmarks_stand_at_the_end_of_their_blocks():
    out = language.insert_landmarks(language.text(IDS), 99, 4)
    np.testing.assert_array_equal(out["ids"][0], [0, 1, 2, 99, 3, 4, 5, 99, 6])
    np.testing.assert_array_equal(out["target"][0], [1, 2, 99, 3, 4, 5, 99, 6, -1])
    silent = language.insert_landmarks(language.text(IDS), 99, 4, predict=False)
    np.testing.assert_array_equal(silent["target"][0], [1, 2, -1, 3, 4, 5, -1, 6, -1])


def test_meta_tokens_are_no_targets():
    ids = jnp.arange(40, dtype=jnp.int32)[None]
    out = language.insert_meta(language.text(ids), 99, jax.random.key(0))
    got, target = np.asarray(out["ids"][0]), np.asarray(out["target"][0])
    assert len(got) == 44 and (got == 99).sum() == 4
    np.testing.assert_array_equal(got[got != 99], np.arange(40))
    assert (target[got == 99] == -1).all() and (target >= 0).sum() == 39
    np.testing.assert_array_equal(target[got != 99], [*range(1, 40), -1])


def test_recall_asks_what_it_told():
    batch = language.recall(jax.random.key(1), 5, 40, pairs=6, asked=3, keys=8, values=4)
    ids, target = np.asarray(batch["ids"]), np.asarray(batch["target"])
    assert ids.shape == (5, 40) and (target >= 0).sum() == 15 and set(np.flatnonzero((target >= 0).any(0))) == {34, 36, 38}
    for row, want in zip(ids, target, strict=True):
        told = {row[i]: row[i + 1] for i in range(0, 34, 2) if row[i] < 8}
        assert len(told) == 6 and all(8 <= v < 12 for v in told.values()) and (row == 12).sum() == 34 - 12
        for i in (34, 36, 38):
            assert told[row[i]] == want[i] == row[i + 1]
    with pytest.raises(ValueError, match="n must be"):
        language.recall(jax.random.key(1), 5, 10, pairs=6)
    ids = np.asarray(language.recall(jax.random.key(1), 5, 40, pairs=3, asked=8, keys=8, values=4)["ids"])[:, 24::2]
    assert all(sorted(row[:3]) == sorted(row[3:6]) and len(set(row[6:])) == 2 and set(row) == set(row[:3]) for row in ids)


def test_the_first_head_begins_by_looking_one_row_back():
    cfg = Config(vocab=50, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, hidden=16, qk_norm=True, qkv_bias=True, rope_theta=1e6)
    params = blocks.stack(blocks.init(cfg, jax.random.key(0)))
    layers = jax.tree.map(lambda x: x[0], language.look_back(cfg, params, strength=8.0)["layers"])
    pos = jnp.arange(40, dtype=jnp.int32)[None]
    q, k, _ = blocks.qkv(cfg, layers, blocks.embed(cfg, params, jax.random.randint(jax.random.key(1), (1, 40), 0, 50)))
    q, k = (np.asarray(blocks.rotate(cfg, 0, x, pos))[0, 0] for x in (q, k))
    y = np.where(np.tri(40, dtype=bool), q @ k.T, -np.inf)
    np.testing.assert_array_equal(np.argmax(y, -1)[1:], np.arange(39))
    rest = jax.tree.map(np.array_equal, params["layers"], language.look_back(cfg, params)["layers"])
    assert {name for name, same in rest.items() if not same} == {"q_bias", "k_bias"}
    with pytest.raises(ValueError, match="qkv_bias"):
        language.look_back(Config(vocab=50, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, hidden=16), params)


@pytest.mark.parametrize(
    "method", [None, CCA(group=2, window=4), SCOUT(segment=3, window=4), LandmarkAttention(block=4), MetaTokens(token=13)]
)
def test_it_trains(method):
    """A few steps on one batch lower the loss, and every weight moves."""
    cfg = Config(vocab=14, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=16)
    params = blocks.stack(blocks.init(cfg, jax.random.key(0)))
    if method is not None:
        params = params | {"methods": Recipe(attention=method).init_params(jax.random.key(1), cfg)}
    batch = language.recall(jax.random.key(2), 4, 16, pairs=3, asked=2, keys=6, values=6)
    if isinstance(method, LandmarkAttention):
        batch = language.insert_landmarks(batch, 13, 4, predict=False)
    if isinstance(method, MetaTokens):
        batch = language.insert_meta(batch, 13, jax.random.key(3), ratio=0.25)
    lines = []
    state = train.fit(
        language.make_loss(cfg, method), params, lambda step: batch, optimizer=optax.adam(1e-2), steps=20, log_every=1, on_log=lines.append
    )
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3 and 0 <= lines[-1]["accuracy"] <= 1 and not lines[-1]["skipped"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) > 0, params, state.params)
    if isinstance(method, MetaTokens):  # nobody reads what the last layer makes of rows that predict nothing
        assert not any(jax.tree.leaves(moved["methods"]["attention"][-1]))
        moved["methods"]["attention"] = moved["methods"]["attention"][:-1]
    assert all(jax.tree.leaves(moved))
