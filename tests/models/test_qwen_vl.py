"""Qwen2.5-VL: transformers' logits, rotary ids and steps; what the sites between pictures and text leave; a tower in windows."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, TEXT, Tokens
from jaxtok.decode import generate
from jaxtok.methods import DivPrune, HiPrune, HoloV, SnapKV, StreamingLLM, ToMe
from jaxtok.methods.vision import flowcut
from jaxtok.models import blocks, decoder, encoder, load, qwen_vl, vit
from jaxtok.models.qwen_vl import QwenVlConfig
from jaxtok.models.smart_resize import padded
from tests.golden import make_qwen_vl

PICTURES, MOST = [2, 1], 72  # pictures a prompt, patches
embed = jax.jit(qwen_vl.embed, static_argnums=(0, 6), static_argnames=("rows", "positions"))


def inputs(case, most=MOST):
    """(images, grid, ids, live) for `embed`."""
    return *map(jnp.asarray, padded(case["pixels"], case["grid"], PICTURES, most)), jnp.asarray(case["ids"]), jnp.asarray(case["live"])


@functools.cache
def world(name="qwen"):
    folder = make_qwen_vl.FOLDER / name
    cfg, params, _ = load.load_vlm(folder, dtype=jnp.float32)
    return cfg, params, dict(np.load(folder / "case.npz"))


@pytest.fixture(params=list(make_qwen_vl.CASES))
def golden(request):
    return world(request.param)


@functools.partial(jax.jit, static_argnums=0)
def _run(cfg, params, images, grid, ids, live, more):
    tokens = qwen_vl.embed(cfg, params, images, grid, ids, live)
    out, layers = decoder.prefill(cfg.text, params, tokens, new=4)
    after = []
    for t in range(4):
        x, layers = decoder.step(cfg.text, params, blocks.embed(cfg.text, params, more[:, t : t + 1]), jnp.ones((2, 1), bool), layers)
        after.append(decoder.logits(cfg.text, params, x)[:, 0])
    return tokens, decoder.logits(cfg.text, params, out.x), jnp.stack(after, 1)


def run(cfg, params, case) -> tuple[Tokens, dict[str, float]]:
    """max |difference| to transformers by output; logits by the place of each id."""
    tokens, logits, steps = _run(cfg, params, *inputs(case), jnp.asarray(case["more"]))
    at, live = np.maximum(np.asarray(tokens.source), 0), case["live"]
    by_id = np.take_along_axis(np.asarray(logits), at[..., None], 1)
    rope = np.take_along_axis(np.asarray(tokens.rope), at[..., None], 1).transpose(2, 0, 1)
    return tokens, {
        "logits": np.abs(by_id - case["logits"])[live].max(),
        "steps": np.abs(np.asarray(steps) - case["steps"]).max(),
        "rope": np.abs(rope - case["rope"])[:, live].max(),
        "delta": np.abs(np.asarray(tokens.delta + tokens.seen) - case["delta"] - live.sum(1)).max(),
    }


def test_logits_ids_and_steps_equal_transformers(golden):
    """Two prompts, padded, with two pictures and one, all of other sizes; four steps from the cache."""
    cfg, params, case = golden
    tokens, off = run(cfg, params, case)
    print({k: f"{v:.1e}" for k, v in off.items()})
    assert max(off["logits"], off["steps"]) <= 1e-4 and off["rope"] == off["delta"] == 0
    assert case["logits"][case["live"]].std() > 0.3 and (tokens.lost == 0).all()
    assert ((np.asarray(tokens.kind) == IMAGE).sum(1) == [19, 7]).all()


@pytest.mark.parametrize("name", list(make_qwen_vl.CASES))
def test_logits_equal_transformers_live(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make_qwen_vl.write(name, tmp_path, 7)
    cfg, params, _ = load.load_vlm(tmp_path, dtype=jnp.float32)
    _, off = run(cfg, params, dict(np.load(tmp_path / "case.npz")))
    print({k: f"{v:.1e}" for k, v in off.items()})
    assert max(off["logits"], off["steps"]) <= 1e-4 and off["rope"] == off["delta"] == 0
