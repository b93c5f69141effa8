"""Tower, decoder layers, cache and steps reduced in one compiled function: ToMe, FastV, SnapKV, Quest, on a ragged batch of prompts with pictures."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, live_count
from jaxtok.decode import generate
from jaxtok.methods import FastV, Quest, SnapKV, ToMe
from jaxtok.models import decoder, vlm
from jaxtok.models.config import Config, EncoderConfig

VISION = EncoderConfig(
    family="clip_vision_model", width=16, layers=2, heads=2, hidden=16, image=(8, 8), patch=(2, 2), channels=1, stem_norm=True
)
TEXT = Config(vocab=16, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=16)
CFG = vlm.VlmConfig(vision=VISION, text=TEXT, until=2, image_token=15)
B, NEW, N = 4, 4, 26  # prompts, new tokens, ids: 16 placeholders and 6 to 10 words
WORDS = np.array([10, 8, 9, 6])
TRACES = {}


@functools.partial(jax.jit, static_argnums=0)
def chain(recipe: Recipe, params, images, ids, live, keep):
    """(greedy ids, logits of the first, keys that the last layer wrote for them, live image rows behind the prefill, live slots by layer,
    rows without room): one program."""
    TRACES[recipe] = TRACES.get(recipe, 0) + 1
    limit = lambda *sites: {site: keep[site] for site in sites if site in keep}
    tokens = vlm.embed(CFG, params, images, ids, live, recipe, keep=limit("vit"), proportional=True)
    tokens, layers = decoder.prefill(TEXT, params, tokens, recipe, new=NEW, keep=limit("layers", "cache"))
    made = generate(TEXT, params, tokens, layers, recipe, new=NEW, eos=())
    pictures = jnp.sum((tokens.pos >= 0) & (tokens.kind == IMAGE), -1)
    lost = tokens.lost + sum(jnp.sum(part.kv.lost, -1) for (part,) in made.layers)
    kv = made.layers[-1][0].kv
    wrote = jax.lax.dynamic_slice_in_dim(kv.k, kv.cursor - (NEW - 1), NEW - 1, 2)
    slots = jnp.stack([live_count(part.pos[:, 0]) for (part,) in layers])
    return made.ids, decoder.logits(TEXT, params, tokens.x[:, -1:])[:, 0], wrote, pictures, slots, lost


@pytest.fixture(scope="module")
def world():
    params = vlm.init(CFG, jax.random.key(0))
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 15, (B, N)).astype(np.int32)
    live = np.arange(N)[None] >= (N - 16 - WORDS)[:, None]
    for row, words in enumerate(WORDS):
        ids[row, N - 16 - words + 2 : N - words + 2] = CFG.image_token
    images = rng.normal(size=(B, 1, 8, 8, 1)).astype(np.float32)
    return params, *map(jnp.asarray, (images, ids, live))


FULL = Recipe(
    vit=((1, ToMe(remove=0)),),
    layers=((1, FastV(capacity=16, images=16)),),
    cache=SnapKV(capacity=N, window=4),
    reader=Quest(pages=8, block=4, dense_layers=1),
)
SMALL = Recipe(
    vit=((1, ToMe(remove=4)),),
    layers=((1, FastV(capacity=8, images=12)),),
    cache=SnapKV(capacity=16, window=4),
    reader=Quest(pages=3, block=4, dense_layers=1),
)


def budgets(rows: int, images: int, slots: int) -> dict:
    """Image rows that the tower leaves (its class row is one more), image rows behind the pruner, slots."""
    return {"vit": [jnp.int32(1 + rows)], "layers": [jnp.asarray(WORDS + images, jnp.int32)], "cache": jnp.int32(slots)}


def test_at_full_budgets_it_is_the_plain_model(world):
    ids, logits, wrote, pictures, slots, lost = chain(FULL, *world, budgets(16, 16, N))
    plain = chain(Recipe(), *world, {})
    np.testing.assert_allclose(logits, plain[1], atol=1e-4)
    np.testing.assert_array_equal(ids, plain[0])
    np.testing.assert_allclose(wrote, plain[2], atol=1e-4)
    assert (pictures == 16).all() and (np.asarray(slots) == (16 + WORDS)[None]).all() and (lost == 0).all()
    assert np.asarray(logits).std() > 0.1 and np.asarray(wrote).std() > 0.1


def test_one_compile_serves_three_budgets(world):
    found = []
    for rows, images, slots in ((12, 8, 16), (10, 6, 12), (8, 3, 9)):
        ids, logits, wrote, pictures, kept, lost = map(np.asarray, chain(SMALL, *world, budgets(rows, images, slots)))
        assert pictures.tolist() == [images] * B and (lost == 0).all()
        assert kept[0].tolist() == np.minimum(slots, rows + WORDS).tolist(), "the layer before the pruner"
        assert kept[1].tolist() == np.minimum(slots, images + WORDS).tolist()
        assert np.isfinite(wrote).all() and ((ids >= 0) & (ids < 16)).all()
        found.append(logits)
    assert TRACES[SMALL] == 1
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(found)) > 1e-3


def test_a_prompt_is_itself_alone(world):
    """Other prompts and pictures of the batch change nothing."""
    params, images, ids, live = world
    keep = budgets(10, 6, 12)
    first = chain(SMALL, *world, keep)
    there = jnp.arange(B) == 2
    other = lambda x, y: jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    changed = chain(SMALL, params, other(images, -images), other(ids, ids[::-1]), other(live, live[::-1]), keep)
    for name, a, b in zip(("ids", "logits", "keys"), first, changed, strict=False):
        np.testing.assert_allclose(a[2], b[2], atol=2e-5, err_msg=name)
