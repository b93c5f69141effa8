"""Float32 parity with Hugging Face transformers: golden files always, fresh random models where torch is installed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.models import blocks, load
from tests.golden import make_models
from tests.models import golden as files

TOLERANCE = 1e-4


def run(cfg, params, ids, live):
    return jax.jit(blocks.forward, static_argnums=0)(cfg, params, ids, live)


def test_golden_files_cover_every_family_and_head_layout():
    cases = [files.read(name).cfg for name in files.NAMES]
    assert {c.family for c in cases} == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}
    assert {"mha" if c.kv_heads == c.heads else "mqa" if c.kv_heads == 1 else "gqa" for c in cases} == {"mha", "gqa", "mqa"}
    assert {c.rope_scaling.kind for c in cases if c.rope_scaling} == {"llama3", "linear"}
    assert any(c.window and all(c.local) for c in cases) and any(any(c.local) and not all(c.local) for c in cases)
    assert any(c.rotary_dim for c in cases) and any(c.tied for c in cases) and any(not c.tied for c in cases)
    assert sum(p.stat().st_size for p in files.FOLDER.rglob("*") if p.is_file()) < 1.5e6


def test_forward_equals_transformers(golden):
    """Left and right padding in one batch; the stacked, scanned pass."""
    got = run(golden.cfg, blocks.stack(golden.params), golden.ids, golden.live)
    assert golden.logits[golden.live].std() > 0.5, "the case is too weak to show an error"
    assert files.error(got, golden) <= TOLERANCE


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama31_gqa", dict(rope_scaling=None)),
        ("mistral_gqa", dict(window=7)),
        ("qwen2_window_mha", dict(local=(True, False))),
        ("gemma2_gqa", dict(softcap=None)),
        ("gemma2_gqa", dict(scale=None)),
        ("gemma3_text_gqa", dict(rope_theta_local=None)),
        ("phi3_gqa", dict(rotary_dim=None)),
    ],
)
def test_the_golden_files_see_each_feature(name, change):
    """A configuration off by one feature misses by far more than the tolerance."""
    case = files.read(name)
    cfg = dataclasses.replace(case.cfg, **change)
    options = {"xla_backend_optimization_level": 0}  # seven more compiles: quick ones
    got = jax.jit(lambda p: blocks.forward(cfg, p, case.ids, case.live, remat=False), compiler_options=options)(blocks.stack(case.params))
    assert files.error(got, case) > 10 * TOLERANCE


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="live parity needs the parity extra: torch")
    module = pytest.importorskip("transformers", reason="live parity needs the parity extra: transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize("heads", make_models.HEADS)
@pytest.mark.parametrize("family", make_models.FAMILIES)
def test_live(transformers, tmp_path, family, heads):
    """A fresh random model: its saved directory gives its logits; saved by us, transformers reads the same model back."""
    seed = 1000 + 10 * list(make_models.FAMILIES).index(family) + list(make_models.HEADS).index(heads)
    model = make_models.build(family, heads, seed)
    ids, live = make_models.batch(seed)
    want = make_models.logits(model, ids, live)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params, tokenizer = load.load(tmp_path / "theirs")
    assert tokenizer is None and params["embed"].dtype == jnp.float32
    got = run(cfg, blocks.stack(params), ids, live)
    error = np.abs(np.where(live[..., None], got - want, 0)).max()
    print(f"{family} {heads}: max |dlogit| {error:.1e}")
    assert error <= TOLERANCE

    load.save(tmp_path / "ours", cfg, params)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(make_models.logits(back.float(), ids, live), want)
    again, params2, _ = load.load(tmp_path / "ours")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params2, params)
