"""The classifier's loss by hand, and that encoders with other attention learn by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.methods import BiFormer, PoNet
from jaxtok.methods.attention.maelre import maelre
from jaxtok.models import encoder
from jaxtok.models.config import EncoderConfig
from jaxtok.train.classify import logits, make_loss, right
from jaxtok.train.loop import fit

IMAGES = EncoderConfig(width=16, layers=2, heads=2, hidden=24, image=(8, 8), patch=(2, 2), channels=1, cls=False, pool="mean", out=4)
TEXT = EncoderConfig(width=16, layers=2, heads=2, hidden=24, image=None, vocab=8, context=10, cls=False, pool="mean", out=4)


def pictures(step=0, b=16):
    """The brightest quarter of the picture."""
    rng = np.random.default_rng((0, step))
    label = rng.integers(0, 4, b).astype(np.int32)
    image = rng.normal(size=(b, 2, 4, 2, 4)).astype(np.float32)
    image[np.arange(b), label // 2, :, label % 2] += 2
    return {"images": image.reshape(b, 8, 8, 1), "label": label}


def texts(step=0, b=16):
    """The token that stands first; padding behind."""
    rng = np.random.default_rng((1, step))
    ids = rng.integers(4, 8, (b, 10)).astype(np.int32)
    ids[:, 0] = label = rng.integers(0, 4, b).astype(np.int32)
    return {"ids": ids, "live": np.arange(10) < rng.integers(2, 11, (b, 1)), "label": label}


def begin(cfg, recipe):
    return encoder.init(cfg, jax.random.key(0)) | {"methods": recipe.init_params(jax.random.key(1), cfg)}


def test_loss_by_hand():
    params, batch = begin(IMAGES, Recipe()), pictures()
    there = jax.tree.map(jnp.asarray, batch)
    said = np.asarray(logits(IMAGES, params, there), np.float64)
    log = said - np.log(np.exp(said).sum(1, keepdims=True))
    for smooth in (0.0, 0.1):
        want = np.mean(-(1 - smooth) * log[np.arange(16), batch["label"]] - smooth * log.mean(1))
        loss, metrics = make_loss(IMAGES, smooth=smooth)(params, there, None)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
    hits = said.argmax(1) == batch["label"]
    assert float(metrics["right"]) == hits.mean() and np.array_equal(right(IMAGES, params, batch, size=8), hits)


@pytest.mark.parametrize(
    "cfg, data, recipe, options",
    [
        (IMAGES, pictures, Recipe(attention=BiFormer(side=2, topk=(1, 2), kernel=3)), {}),
        (IMAGES, pictures, maelre(2, stages=2, switch=8, landmarks=4), {"proportional": True}),
        (TEXT, texts, Recipe(attention=PoNet(segments=3)), {}),
    ],
)
def test_they_learn(cfg, data, recipe, options):
    """120 steps leave each at 0.99 or more (half as many would not: full attention itself has 0.6 of the pictures then)."""
    state = fit(make_loss(cfg, recipe, **options), begin(cfg, recipe), data, optimizer=optax.adam(1e-2), steps=120, progress=False)
    assert right(cfg, state.params, data(1000, 200), recipe, **options).mean() > 0.9


def test_refuses():
    with pytest.raises(ValueError):
        make_loss(IMAGES, smooth=1.5)
    with pytest.raises(ValueError):
        make_loss(EncoderConfig(width=16, layers=2, heads=2, hidden=24))
    with pytest.raises(ValueError):
        right(IMAGES, begin(IMAGES, Recipe()), pictures(b=10), size=3)
