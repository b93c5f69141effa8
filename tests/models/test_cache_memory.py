"""What head groups save in the compiled step: the caches of 8 layers of 8 KV heads at 32k tokens, ten of the 64 heads whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import heads
from jaxtok.core.recipe import Recipe
from jaxtok.methods import DuoAttention, RazorAttention
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config

CFG = Config(vocab=64, width=64, layers=8, heads=16, kv_heads=8, head_dim=64, hidden=64)
N, NEW, SHARE = 32_768, 128, 0.15


@functools.cache
def split():
    """15% of all heads, anywhere."""
    return heads.split(heads.best(np.random.default_rng(0).random((CFG.layers, CFG.kv_heads)), round(SHARE * CFG.layers * CFG.kv_heads)))


@functools.cache
def measured(recipe):
    """(bytes of the caches that the compiled step holds, of what it holds besides) for a bf16 model, batch 1, nothing allocated."""
    params = jax.eval_shape(lambda: blocks.init(CFG, jax.random.key(0), jnp.bfloat16))

    def fill(params, ids):
        return decoder.prefill(CFG, params, decoder.embed(CFG, params, ids), recipe, new=NEW)[1]

    def step(params, layers, ids):
        x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, ids), jnp.ones((1, 1), bool), layers, recipe)
        return decoder.logits(CFG, params, x), layers

    layers = jax.eval_shape(fill, params, jax.ShapeDtypeStruct((1, N), jnp.int32))
    compiled = jax.jit(step, donate_argnums=1).lower(params, layers, jax.ShapeDtypeStruct((1, 1), jnp.int32)).compile()
    stats = compiled.memory_analysis()
    if stats is None:
        pytest.skip("no memory analysis here")
    asked = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    cache = stats.argument_size_in_bytes - weights - 4
    assert 0.99 < cache / asked < 1.01, "the compiled caches are not the arrays of the split"
    assert stats.alias_size_in_bytes > 0.99 * asked, "the step writes the caches elsewhere"
    return cache, stats.temp_size_in_bytes


@pytest.mark.parametrize(
    "policy, most",
    [(RazorAttention.at(N), 0.35), (RazorAttention(capacity=4 + 1 + 256), 0.20), (DuoAttention(capacity=64 + 256), 0.20)],
    ids=["razor_attention", "razor_attention, window of 256", "duo_attention"],
)
def test_compiled_memory_of_the_cache(policy, most, record_property):
    assert sum(full for full, _ in split().sizes) == 10
    full, temp = measured(Recipe())
    cache, rest = measured(Recipe(policy=policy, heads=split().sizes))
    record_property("share", cache / full)
    print(f"{policy}: {cache:,} of {full:,} bytes = {cache / full:.4f}; temporaries {rest:,} against {temp:,}")
    assert cache / full <= most
    # the whole heads and, of the others, the slots of the method: nothing else
    want = (10 * (N + NEW) + 54 * (policy.capacity + 1)) / (64 * (N + NEW))
    assert abs(cache / full - want) < 2e-3
    assert rest < temp
