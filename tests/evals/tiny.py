"""A tiny random character model with grouped heads: nothing it says means anything, so only exact relations are tested on it."""

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models

from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.models.text import JsonTokenizer

CHARS = "\n" + "".join(map(chr, range(32, 127)))
CFG = Config(vocab=len(CHARS) + 1, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24, tied=True)


def make():
    """(cfg, params, tokenizer)."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={"\ufffd": 0} | {c: i + 1 for i, c in enumerate(CHARS)}, merges=[], unk_token="\ufffd"))
    inner.decoder = decoders.Fuse()
    params = blocks.unstack(blocks.init(CFG, jax.random.key(3), jnp.float32))
    return CFG, params, JsonTokenizer(inner)
