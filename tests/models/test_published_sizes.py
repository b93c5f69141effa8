"""The published sizes of three families, and every method's recipe on them: shapes only, nothing is allocated.

With JAXTOK_FULL=1 in the environment recipes trace through every layer (some minutes), otherwise through the first two.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxtok.methods
from jaxtok.core import heads, registry
from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill
from jaxtok.evals.heads import told_apart
from jaxtok.methods import Chain, KeyDiff, PerLayer, SentenceKV, SnapKV
from jaxtok.models import blocks, decoder, hf
from jaxtok.models.config import Config
from tests.models.test_load import LLAMA31

QWEN25 = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=131072, max_window_layers=28, sliding_window=131072, use_sliding_window=False,
    rms_norm_eps=1e-6, rope_theta=1000000.0, bos_token_id=151643, eos_token_id=151643, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
GEMMA2 = dict(
    model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, max_position_embeddings=8192, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0,
    sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh", bos_token_id=2,
    eos_token_id=1,
)  # fmt: skip
MODELS = {"Llama-3.1-8B": LLAMA31, "Qwen2.5-7B": QWEN25, "Gemma2-9B": GEMMA2}
PROMPT, CAPACITY, NEW = 4096, 1024, 16


@functools.cache
def model(name):
    cfg = hf.config_from_hf(MODELS[name])
    return cfg, jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0), jnp.bfloat16))


@functools.cache
def shallow(name, layers=2):
    cfg = model(name)[0]
    cfg = dataclasses.replace(cfg, layers=layers, local=cfg.local[:layers])
    return cfg, jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0), jnp.bfloat16))


@pytest.mark.parametrize(
    "name, count",
    [
        # head and embedding 2 * 128256 * 4096, 32 layers of 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096, norm 4096
        ("Llama-3.1-8B", 8_030_261_248),
        # 2 * 152064 * 3584, 28 layers of 2 * 3584**2 + 2 * 3584 * 512 + biases 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584, norm 3584
        ("Qwen2.5-7B", 7_615_616_512),
        # 256000 * 3584 (tied), 42 layers of 2 * 3584 * 4096 + 2 * 3584 * 2048 + 3 * 3584 * 14336 + 4 * 3584, norm 3584
        ("Gemma2-9B", 9_241_705_984),
    ],
)
def test_parameter_counts(name, count):
    cfg, params = model(name)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert jax.tree.map(lambda x: x.shape, params) == blocks.shapes(cfg)


def trace(cfg, params, method):
    """(rows, caches) as shapes, of a prefill and a step."""
    recipe = Recipe(**{method.site: method})
    if getattr(method, "groups", 1) > 1:  # another head of each layer whole
        full = np.arange(cfg.kv_heads)[None] == np.arange(cfg.layers)[:, None] % cfg.kv_heads
        recipe, order = recipe.replace(heads=heads.split(full).sizes), heads.split(full).order
        params = jax.eval_shape(lambda params: blocks.reorder_heads(cfg, params, order), params)
    recipe.validate(cfg)
    own = jax.eval_shape(lambda: recipe.init_params(jax.random.key(0), cfg))

    def run(params, ids, live, key):
        tokens, layers = prefill(cfg, params, ids, live, recipe, new=NEW, draft=(cfg, params), key=key)  # the model is its own draft
        x, layers = decoder.step(cfg, params, blocks.embed(cfg, params, ids[:, :1]), live[:, :1], layers, recipe, key=key)
        return decoder.logits(cfg, params, x), layers

    ids = jax.ShapeDtypeStruct((1, PROMPT), jnp.int32)
    return jax.eval_shape(run, params | {"methods": own}, ids, ids.update(dtype=bool), jax.eval_shape(lambda: jax.random.key(0)))


# methods that have to be told something, and what a sliding window rules out
SPECS: dict[str, Callable[[Config], Any]] = {
    "chain": lambda cfg: Chain(methods=(SnapKV(capacity=2 * CAPACITY), KeyDiff(capacity=CAPACITY))),
    "sentencekv.reader": lambda cfg: SentenceKV(ends=(13,)),
    "per_layer": lambda cfg: PerLayer(base=SnapKV(capacity=CAPACITY), weights=tuple(range(2 * cfg.layers, cfg.layers, -1))),
}
COMPACT = "compact positions and a sliding window contradict each other"
REFUSED = {  # why, and what goes instead
    ("streaming_llm", "Gemma2-9B"): (COMPACT, "streaming_llm:compact=false"),
    ("landmark", "Gemma2-9B"): (COMPACT, None),
    ("tokenselect", "Gemma2-9B"): (COMPACT, None),
}


@pytest.fixture
def untyped():
    """Shapes are checked by jaxtyping elsewhere; without it whole models trace twice as fast."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [n for n in registry.names() if registry.get(n).site in ("prompt", "cache", "policy", "reader")])
def test_every_recipe_traces(method, name, untyped):
    cfg, params = model(name) if os.environ.get("JAXTOK_FULL") else shallow(name)
    build = SPECS.get(method, lambda cfg: registry.build(method, CAPACITY))
    if (method, name) in REFUSED:
        reason, instead = REFUSED[method, name]
        with pytest.raises(ValueError, match=reason):
            trace(cfg, params, build(cfg))
        if instead is None:
            return
        build = lambda cfg: registry.build(instead, CAPACITY)
    logits, layers = trace(cfg, params, build(cfg))
    assert logits.shape == (1, 1, cfg.vocab) and logits.dtype == jnp.float32 and len(layers) == cfg.layers
    if told_apart(method):
        shapes = {tuple(part.kv.pos.shape[1:] for part in parts) for parts in layers}
        assert shapes == {((1, PROMPT + NEW), (cfg.kv_heads - 1, CAPACITY + 1))}
        return
    held = [kv for parts in layers for part in parts for kv in (part.kv, part.frozen and part.frozen.kv) if kv is not None]
    slots = sum(kv.pos.shape[2] for kv in held) / sum(map(len, layers))
    lossless = method in ("full", "think") or registry.get(method).site == "reader"
    assert slots >= PROMPT + NEW if lossless else CAPACITY < slots <= 1.6 * CAPACITY


assert jaxtok.methods  # importing the package fills the registry
