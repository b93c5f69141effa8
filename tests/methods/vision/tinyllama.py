"""The tiny Llamas of the official outputs of methods between a decoder's layers, and their rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config

NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def model(case) -> tuple[Config, dict]:
    """Configuration and parameters of a case (a dict of its arrays)."""
    layers = 1 + max(int(k.split(".")[2]) for k in case if k.startswith("w.layers."))
    wide, heads = case["inputs_embeds"].shape[-1], int(case["num_heads"])
    cfg = Config(
        vocab=4,
        width=wide,
        layers=layers,
        heads=heads,
        kv_heads=int(case.get("num_kv_heads", heads)),
        head_dim=wide // heads,
        hidden=case["w.layers.0.mlp.gate_proj.weight"].shape[0],
        norm_eps=float(case["rms_eps"]),
        rope_theta=float(case["rope_theta"]),
        tied=True,
    )
    array = lambda i, name: jnp.asarray(case[f"w.layers.{i}.{NAMES[name]}.weight"].T)
    params = {
        "embed": jnp.zeros((4, wide)),
        "norm": jnp.asarray(case["w.norm.weight"]),
        "layers": tuple({name: array(i, name) for name in blocks.layer_shapes(cfg)} for i in range(layers)),
    }
    return cfg, params


def rows(cfg: Config, params, case, images: int | None = None):
    """The rows that enter the decoder: `images` (default: the case's) of them pictures, from its image_start on."""
    x, start = case["inputs_embeds"], int(case["image_start"])
    n, many = x.shape[1], int(case["image_tokens"]) if images is None else images
    tokens = decoder.embed(cfg, params, jnp.zeros((1, n), jnp.int32))
    image = (np.arange(n) >= start) & (np.arange(n) < start + many)
    return tokens._replace(x=jnp.asarray(x), kind=jnp.asarray(np.where(image, IMAGE, 0), jnp.int8)[None])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(cfg, params, tokens, recipe):
    end, _ = decoder.prefill(cfg, params, tokens, recipe, new=0)
    return end, blocks.norm(end.x, params["norm"], cfg.norm_eps, cfg.norm_offset)


def run(case, recipe: Recipe, images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(the original places of the image rows that are there in the end, counted from the first, last hidden states after the norm [n c])."""
    cfg, params = model(case)
    tokens = rows(cfg, params, case, images)
    end, hidden = jax.device_get(_run(cfg, params, tokens, recipe))
    kept = np.flatnonzero((end.source[0] >= 0) & (np.asarray(tokens.kind[0]) == IMAGE)) - int(case["image_start"])
    return kept, hidden[0][end.pos[0] >= 0]
