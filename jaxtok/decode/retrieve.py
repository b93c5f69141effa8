"""Texts of any length through one window: the host hands over a chunk at a time, one program reads it (InfiniRetri)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxtok.models import decoder
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl


def retrieve(
    cfg: Config,
    params,
    texts: Sequence[Any],
    questions: Sequence[Sequence[int]],
    method: Any,
    *,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    impl: Impl = "auto",
) -> tuple[Int[np.ndarray, "b m"], Bool[np.ndarray, "b m"], Any]:
    """(ids and liveness of the prompts to answer, what `method` retained) of a batch of texts and their questions.

    texts: token ids, each anything that slices to a 1-d array of ints (a list, an array, a memory map); a device holds `method.chunk` of
    them at a time. questions: at most `method.question` ids each. The prompt is what was retained, in order, and the question, packed into
    method.capacity rows: hand it to `prefill`. State: ids, order in the text, sentence, `lost`. progress(tokens read, tokens in all).

    One compiled program for all chunks and lengths; the same as a prefill with `Recipe(prompt=method)` of text and question.
    ValueError: no text, another number of questions, an empty or a long question.
    """
    b = len(texts)
    if not b or len(questions) != b:
        raise ValueError(f"{len(questions)} questions for {b} texts; give each text its own, and at least one text")
    for question in questions:
        if not 1 <= len(question) <= method.question:
            raise ValueError(f"a question of {len(question)} tokens; {method.name} takes from 1 to {method.question}, raise question=")
    asked = np.zeros((b, method.question), bool)
    asking = np.zeros(asked.shape, np.int32)
    for row, question in enumerate(questions):
        asked[row, -len(question) :], asking[row, -len(question) :] = True, question
    total, read = np.array([len(text) for text in texts]), np.zeros(b, np.int64)
    state, chunk, whole = method.start(b), method.chunk, total <= method.room
    while (read < total).any():
        ids = np.zeros((b, chunk), np.int32)
        count = np.minimum(total - read, chunk).astype(np.int32)
        for row in range(b):
            ids[row, : count[row]] = texts[row][read[row] : read[row] + count[row]]
        state, taken = _absorb(cfg, method, impl, params, state, ids, count, asking, asked, read + count >= total, whole)
        read += np.asarray(taken)
        progress(int(read.sum()), int(total.sum()))
    order = np.asarray(state.order)
    ids, live = np.concatenate([np.asarray(state.ids), asking], 1), np.concatenate([order >= 0, asked], 1)
    where = np.argsort(live, axis=1, kind="stable")  # dead rows first, the others in order
    return np.maximum(np.take_along_axis(ids, where, 1), 0), np.take_along_axis(live, where, 1), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _absorb(cfg: Config, method, impl: Impl, params, state, ids, count, question, asked, last, whole) -> tuple[Any, Array]:
    return method.absorb(through(cfg, params, impl, method.sees), state, ids, count, question, asked, last, whole)


def program(cfg: Config, method, params, b: int, impl: Impl = "auto") -> Any:
    """The lowered program of a chunk of `b` texts, to be compiled and looked at."""
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    flags = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool)
    q = method.question
    state = jax.eval_shape(lambda: method.start(b))
    return _absorb.lower(cfg, method, impl, params, state, i32(b, method.chunk), i32(b), i32(b, q), flags(b, q), flags(b), flags(b))


def through(cfg: Config, params, impl: Impl = "auto", layer: int = -1) -> Callable[..., tuple[Array]]:
    """What a method of site prompt looks through where it needs no draft: a layer of the model itself; those behind it do not run."""
    if not -cfg.layers <= layer < cfg.layers:
        raise ValueError(f"sees={layer}, but the model has {cfg.layers} layers; give {-cfg.layers} to {cfg.layers - 1}")

    def look(ids, live, rows):
        return (decoder.last_rows(cfg, params, decoder.embed(cfg, params, ids, live), rows, layer=layer, impl=impl),)

    return look
