"""A batch of eight prompts of 3 to 64 tokens gives, row by row, what a batch of one gives: every method, left and right padding.

Prefill as the recipe asks (`decode.prefill`; a reader and a policy of blocks also in chunks), then forced steps. With JAXTOK_FULL=1 in the
environment all methods run (some minutes), otherwise one; that a row depends on itself only is a law of every method anyway.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.decode import prefill, prefill_chunked
from jaxtok.methods import KVzip, SpecKV
from jaxtok.models import blocks, decoder
from jaxtok.testing import world
from tests.methods.laws import makers

CFG = dataclasses.replace(world.CFG, vocab=128)  # no token twice in a prompt: keys of one token are equally long and, unrotated, equal
N, STEPS, CAPACITY, CHUNK = 64, 8, 9, 16
LENGTHS = np.array([64, 3, 17, 40, 5, 33, 8, 52])
LEFT = np.arange(N)[None] >= N - LENGTHS[:, None]
SOME = ("quest",)

BY_LENGTH = ("pyramidkv",)  # shares out slots by the static length, as its docstring says
REAL = {  # the laws run these without their own prefill
    "kvzip": lambda capacity: KVzip(capacity=capacity, sinks=1),
    "kvzip-plus": lambda capacity: KVzip(capacity=capacity, sinks=1, plus=True, share="model"),
    "speckv": lambda capacity: SpecKV(capacity=capacity, window=2, look=2, pool=3),
}
KV = [name for name in registry.names() if registry.get(name).site in ("prompt", "cache", "policy", "reader")]
CASES = {label: make for name in KV for label, make in makers(name).items()} | REAL
CHOSEN = CASES if os.environ.get("JAXTOK_FULL") else {label: CASES[label] for label in SOME}


@functools.cache
def texts():
    """(params with peaked attention, prompt ids, forced continuation)."""
    params = blocks.init(CFG, jax.random.key(0), jnp.float32, embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    ids = np.random.default_rng(21).permuted(np.tile(np.arange(CFG.vocab, dtype=np.int32), (len(LENGTHS), 1)), axis=1)
    return params, ids[:, :N], ids[:, N : N + STEPS]


def recipe_of(method) -> Recipe:
    return Recipe(prompt=method) if method.site == "prompt" else world.recipe_of(method)


def program(method, chunked: bool):
    """(logits of the prompt's end and of the steps [b 1 + steps vocab], positions of each layer's last part, sorted)."""
    recipe = recipe_of(method)

    def run(params, ids, live, force):
        own, key = params | {"methods": recipe.init_params(jax.random.key(3), CFG)}, jax.random.key(4)
        if chunked:
            chunk = method.n_local if method.name == "tokenselect" else CHUNK  # its most
            tokens, layers = prefill_chunked(CFG, own, ids, live, recipe, chunk=chunk, new=STEPS, key=key, read=method.site == "reader")
        else:
            ask = {"chunk": 24, "prompt": (3, 5), "suffix": (7,)}
            tokens, layers = prefill(CFG, own, ids, live, recipe, new=STEPS, key=key, draft=(CFG, params), ask=ask)
        first = decoder.logits(CFG, own, tokens.x[:, -1:])

        def one(layers, token):
            x = blocks.embed(CFG, own, token[:, None])
            x, layers = decoder.step(CFG, own, x, jnp.ones(x.shape[:2], bool), layers, recipe, key=key, ids=token[:, None])
            return layers, decoder.logits(CFG, own, x)[:, 0]

        layers, out = jax.lax.scan(one, layers, force.T)
        return jnp.concatenate([first, jnp.swapaxes(out, 0, 1)], 1), [jnp.sort(parts[-1].pos, -1) for parts in layers]

    return jax.jit(run)


def check(method, chunked: bool = False) -> None:
    """Batches of one have the same static length, and one prompt also its own: of a step policy and a reader one shorter than the capacity."""
    params, ids, force = texts()
    run = program(method, chunked)
    right = np.stack([np.roll(row, n) for row, n in zip(ids, LENGTHS, strict=True)])  # the text first, then what was padding
    left_logits, left_pos = jax.device_get(run(params, ids, LEFT, force))
    right_logits, right_pos = jax.device_get(run(params, right, LEFT[:, ::-1], force))
    for i, length in enumerate(LENGTHS):
        one = slice(i, i + 1)
        logits, pos = jax.device_get(run(params, ids[one], LEFT[one], force[one]))
        for name, many, places in (("left", left_logits, left_pos), ("right", right_logits, right_pos)):
            world.near(many[one], logits, 3e-5, f"{method.name}, {length} tokens, padded on the {name}: logits")
            for a, b in zip(places, pos, strict=True):
                np.testing.assert_array_equal(a[one], b, f"{method.name}, {length} tokens, padded on the {name}: positions")
        if (
            length == (8 if method.site in ("policy", "reader") else 40) and method.name not in BY_LENGTH
        ):  # 56 or 24 rows of padding: whole pages
            logits, pos = jax.device_get(run(params, ids[one, -length:], LEFT[one, -length:], force[one]))
            world.near(left_logits[one], logits, 3e-5, f"{method.name}, {length} tokens, without padding: logits")
            live = lambda pos: [[x[x >= 0].tolist() for x in layer[0]] for layer in pos]
            assert live([a[one] for a in left_pos]) == live(pos), f"{method.name}, {length} tokens, without padding: positions"


@pytest.mark.parametrize("label", CHOSEN)
def test_a_batch_of_eight_is_eight_batches_of_one(label):
    check(CHOSEN[label](CAPACITY))


@pytest.mark.parametrize("label", [x for x, make in CHOSEN.items() if make(CAPACITY).site == "reader" or x == "lococo"])
def test_in_chunks(label):
    check(CHOSEN[label](CAPACITY), chunked=True)
