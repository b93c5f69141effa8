"""PerLayer: budgets of the layers by hand, exact sums, the decoder's caches, official per-layer outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Protect
from jaxtok.methods import AdaKV, KeyDiff, KeyRerotation, KNorm, PerLayer
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from tests.methods.wrap.given import NOTHING, Given, cache, kept, run

small = lambda capacity: PerLayer(base=KNorm(capacity=capacity), capacities=(capacity + 1, capacity - 1))


def test_a_layer_is_the_base_with_another_capacity():
    method = PerLayer(base=Given(capacity=5), capacities=(3, 1, 2))
    assert [method.layer(i, 3) for i in range(3)] == [Given(capacity=3), Given(capacity=1), Given(capacity=2)]
    assert method.capacity == 2 and method.slots == 3
    assert PerLayer(base=Given(capacity=5), capacities=(5, 5)).layer(1, 2) == Given(capacity=5), "equal capacities are the base"


def test_other_wrappers_go_inside():
    method = PerLayer(base=KeyRerotation(base=AdaKV(base=Given(capacity=5), slack=1.5)), capacities=(4, 2))
    assert method.layer(1, 2) == KeyRerotation(base=AdaKV(base=Given(capacity=2), slack=1.5))
    assert method.slots == 6 and method.rotates and not PerLayer(base=Given(capacity=5), capacities=(4, 2)).rotates
    assert method.needs.keys


def test_weights_share_the_whole_budget_exactly():
    method = PerLayer(base=Given(capacity=10), weights=(1.0, 1.0, 2.0))
    assert method.table == (8, 7, 15) and method.capacity == 10 and method.slots == 15
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = tuple(rng.random(7).tolist())
        table = PerLayer(base=Given(capacity=9), weights=weights, least=2, most=20).table
        assert sum(table) == 63 and min(table) >= 2 and max(table) <= 20
        ideal = np.array(weights) / sum(weights) * 63
        inside = (ideal >= 2).all() and (ideal <= 20).all()
        assert not inside or (np.abs(np.array(table) - ideal) < 1).all()


def test_refused():
    base = Given(capacity=4)
    with pytest.raises(ValueError, match="2 capacities and the model 3 layers"):
        PerLayer(base=base, capacities=(4, 4)).layer(0, 3)
    for both in (dict(), dict(capacities=(1,), weights=(1.0,))):
        with pytest.raises(ValueError, match="either capacities or weights"):
            PerLayer(base=base, **both)
    with pytest.raises(ValueError, match="capacities must be >= 1, got 0"):
        PerLayer(base=base, capacities=(3, 0))
    with pytest.raises(ValueError, match="2 shares from 5 to 8 cannot sum to 8"):
        PerLayer(base=base, weights=(1.0, 1.0), least=5)
    with pytest.raises(ValueError, match="capacity=1 has no room for the 2 protected rows"):
        PerLayer(base=KeyDiff(capacity=4, protect=Protect(recent=2)), capacities=(4, 1))
    with pytest.raises(ValueError, match="around other wrappers"):
        PerLayer(base=base, capacities=(3, 2)).resize(5)
    with pytest.raises(ValueError, match="one layer at a time"):
        PerLayer(base=base, capacities=(3, 2)).plan({}, cache(np.ones((1, 1, 3))), NOTHING)


def test_the_decoder_allocates_what_each_layer_keeps():
    cfg = Config(vocab=11, width=8, layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8)
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))
    ids = jnp.arange(9, dtype=jnp.int32)[None]
    recipe = lambda *capacities: Recipe(cache=PerLayer(base=KNorm(capacity=4), capacities=capacities))
    shapes = lambda recipe: jax.eval_shape(lambda p: decoder.prefill(cfg, p, decoder.embed(cfg, p, ids), recipe, new=3)[1], params)
    assert [parts[0].kv.k.shape[2] for parts in shapes(recipe(6, 2, 4))] == [9, 5, 7]
    with pytest.raises(ValueError, match="2 capacities and the model 3 layers"):
        shapes(recipe(6, 2))


def test_official_budgets_of_a_pyramid(data):
    """AdaKV's repository, SnapKV with a pyramid: the slots of its five layers as a table, its pooled scores, its choice."""
    case = np.load(data / "golden" / "adakv_repo_snapkv_gqa.npz")
    get = lambda i, field: case[f"c0_v2_l{i}_{field}"]
    window, layers = int(get(0, "window_size")), 5
    capacities = tuple(int(get(i, "layer_capacity")) for i in range(layers))
    assert sum(capacities) == layers * int(get(0, "max_capacity_prompt"))
    method = PerLayer(base=Given(capacity=40, protect=Protect(recent=window)), capacities=capacities)
    pad = np.zeros((1, 4, window), np.float32)
    outs = run(*((method.layer(i, layers), cache(np.concatenate([get(i, "scores"), pad], -1))) for i in range(layers)))
    for i, out in enumerate(outs):
        assert kept(out)[0] == np.sort(get(i, "kept")[0], -1).tolist()
