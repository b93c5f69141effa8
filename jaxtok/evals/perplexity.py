"""Perplexity of running text under a method: teacher forcing through the caches, one token a step.

Step policies act from the first token on: each window is fed token by token through a cache of `capacity` slots. Compressors and
readers, which act after a prefill, get the first `skip` tokens as their prefill. The negative log-likelihood counts the predictions
of tokens skip, skip + 1, ... of each window, in nats a token; it equals the full model's where the budget covers the window.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import live_count
from jaxtok.decode import prefill
from jaxtok.decode.prefill import Draft
from jaxtok.evals import heads, tasks
from jaxtok.evals.programs import Program, Programs
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.models.text import Tokenizer

SEPARATOR = "<|endoftext|>"  # between the documents of a file


def windows(tokenizer: Tokenizer, path: str | None, *, length: int, count: int) -> Int[np.ndarray, "w n"]:
    """Up to `count` windows of exactly `length` ids from a text file (None = the package's haystack), one after another.

    Documents (apart by SEPARATOR) start anew; a window begins with bos where the model has one. What is shorter than a window is left
    out. ValueError where there is none.
    """
    if path is None:
        text = tasks.haystack()
    else:
        try:
            text = pathlib.Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"cannot read the text {path}: {e}") from None
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    body, out = length - len(bos), []
    for document in text.split(SEPARATOR):
        if len(out) >= count:
            break
        # a token is at least a byte, so this much text is enough and a long file need not be encoded whole
        ids = tokenizer.encode(document.strip()[: 16 * length * count], special=False)
        out += [bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    if not out:
        raise ValueError(f"{path or 'the haystack'} has no document of {length} tokens; choose a shorter length")
    return np.asarray(out[:count], np.int32)


def measure(
    cfg: Config,
    params: Any,
    recipe: Recipe,
    ids: Int[np.ndarray, "w n"],
    *,
    skip: int,
    batch: int = 16,
    key: Array | None = None,
    programs: Programs | None = None,
    draft: Draft | None = None,
) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, " w"], Float[np.ndarray, " w"], Program]:
    """(NLL a token of each window, live slots a layer and head at its end, rows without room a layer and head, the program).

    `draft`: a model with the same token ids, for the methods that need one.
    """
    w, n = ids.shape
    if not 0 < skip < n:
        raise ValueError(f"skip={skip} must be from 1 to {n - 1}, inside the windows of {n} tokens")
    programs, key = Programs() if programs is None else programs, jax.random.key(0) if key is None else key
    small, draft_params = (None, None) if draft is None or recipe.drafts is None else draft
    found = []
    program = None
    for i in range(0, w, batch):
        rows = jnp.asarray(ids[i : i + batch])
        fn = functools.partial(nll, cfg, recipe, skip, small)
        program = programs.get("nll", (recipe, skip), fn, (params, draft_params, rows, key))
        found.append([np.asarray(x) for x in program.call(params, draft_params, rows, key)])
    if program is None:
        raise ValueError(f"no windows to measure: ids have shape {ids.shape}")
    score, kept, lost = (np.concatenate(x) for x in zip(*found, strict=True))
    return score, kept, lost, program


def nll(
    cfg: Config, recipe: Recipe, skip: int, small: Config | None, params: Any, draft: Any, ids: Int[Array, "b n"], key: Array
) -> tuple[Array, Array, Array]:
    """(NLL a token, live slots and lost rows a layer and head), each f32 [b]. Static: `recipe`, `skip`, `small` (a draft's configuration)."""
    n = ids.shape[1]
    first = 1 if recipe.policy is not None else skip
    given: Any = None if small is None else (small, draft)
    tokens, layers = prefill(cfg, params, ids[:, :first], None, recipe, new=n - first, draft=given, key=key)
    later = recipe.replace(prompt=None, cache=None)

    def one(state, row):
        x, layers = state
        i, token = row
        logits = decoder.logits(cfg, params, x)[:, 0]
        score = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
        y = blocks.embed(cfg, params, token[:, None])
        x, layers = decoder.step(cfg, params, y, jnp.ones_like(token, bool)[:, None], layers, later, key=jax.random.fold_in(key, i))
        return (x, layers), score

    steps = jnp.arange(n - first, dtype=jnp.int32), ids[:, first:].T
    (_, layers), score = jax.lax.scan(one, (tokens.x[:, -1:], layers), steps)
    kept = heads.average(layers, lambda part: live_count(part.kv.pos))
    return jnp.mean(score[skip - first :], 0), kept, heads.average(layers, lambda part: part.kv.lost)
