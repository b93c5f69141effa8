"""The gates' label, by hand; that they learn it; that what they read is what the model reads when it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok.core.types import IMAGE
from jaxtok.methods.vision.dyvte import dyvte, look
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.train.dyvte import answers, make_loss, may_leave
from jaxtok.train.loop import fit

CFG = Config(vocab=6, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=24)
B, N = 12, 12


def world():
    """Prompts of one text row, six of an image, two of text, an answer of three; what follows each row."""
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    ids = jax.random.randint(jax.random.key(1), (B, N + 1), 0, CFG.vocab)
    tokens = decoder.embed(CFG, params, ids[:, :-1])
    image = (np.arange(N) >= 1) & (np.arange(N) < 7)
    tokens = tokens._replace(kind=jnp.broadcast_to(jnp.asarray(np.where(image, IMAGE, 0), jnp.int8), (B, N)))
    label = jnp.broadcast_to(jnp.arange(N) >= 10, (B, N))
    return params, {"tokens": tokens, "target": ids[:, 1:], "label": label}


def test_label_by_hand():
    """Two answer rows. The first sequence keeps its best tokens and its loss; the second one of its two best tokens; the third both, with a loss that
    is too high; the fourth has no answer."""
    row = lambda a, b: [[9.0, 0.0, 0.0], *([a, b])]
    sure, other, vague = [4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.5, 0.0, 0.0]
    full = jnp.asarray([row(sure, other)] * 4)
    short = jnp.asarray([row(sure, other), row(sure, sure), row(vague, other), row(sure, other)])
    target = jnp.asarray([[2, 0, 1]] * 4)
    label = jnp.asarray([[False, True, True]] * 3 + [[False] * 3])
    assert may_leave(full, short, target, label).tolist() == [True, False, False, False]
    assert may_leave(full, short, target, label, worse=50.0).tolist() == [True, False, True, False]
    assert may_leave(full, short, target, label, agree=0.4, worse=100.0).tolist() == [True, True, True, False]


def test_dead_from_a_layer_on():
    """What the model answers without the image from layer k on is what a gate that fires there makes of it; without a layer, the model itself."""
    params, batch = world()
    recipe = dyvte(6, layers=3, by=2)
    learned = recipe.init_params(jax.random.key(2), CFG)["layers"]
    never = tuple(p | {"bias": jnp.asarray([1e9, 0.0])} for p in learned)
    both = jax.jit(lambda tokens: (answers(CFG, params, tokens, jnp.int32(2)).logits, answers(CFG, params, tokens)))
    short, plain = both(batch["tokens"])
    run = jax.jit(lambda tokens, recipe=recipe: decoder.prefill(CFG, params | {"methods": {"layers": never}}, tokens, recipe, new=0)[0])
    end = run(batch["tokens"])
    assert end.pos.shape[1] == N - 6
    np.testing.assert_allclose(decoder.logits(CFG, params, end.x), short[:, [0, 7, 8, 9, 10, 11]], atol=2e-5)
    full = jax.jit(lambda tokens: decoder.prefill(CFG, params, tokens, new=0)[0])(batch["tokens"])
    np.testing.assert_allclose(decoder.logits(CFG, params, full.x), plain.logits, atol=2e-5)
    np.testing.assert_allclose(plain.looks[0], look(batch["tokens"]), atol=1e-6)


def test_gates_learn():
    """Both labels occur; trained, each gate tells which sequences the image may leave; the model itself stays as it is."""
    params, batch = world()
    recipe, loss_fn, told = dyvte(6, layers=3, hidden=32), make_loss(CFG, agree=0.9, worse=1.1), []
    gates = recipe.init_params(jax.random.key(3), CFG)["layers"]
    state = fit(
        loss_fn,
        {"gates": gates, "model": params},
        lambda step: batch,
        optimizer=optax.adam(0.02),
        steps=120,
        trainable=lambda path: path.startswith("gates"),
        log_every=1,
        on_log=told.append,
        progress=False,
    )
    exit, right = (np.array([line[name] for line in told]) for name in ("exit", "right"))
    assert 0 < exit.mean() < 1
    assert right[:10].mean() < 0.9 and right[-20:].mean() == 1
    after = jax.device_get(state.params["gates"])
    assert all(np.abs(a["up"] - b["up"]).max() > 1e-3 for a, b in zip(after, gates, strict=True)), "every place's gate is trained"


def test_the_model_is_frozen():
    params, batch = world()
    gates = dyvte(6, layers=3, hidden=4).init_params(jax.random.key(3), CFG)["layers"]
    grad = jax.jit(jax.grad(lambda p: make_loss(CFG)(p, batch, jax.random.key(5))[0]))({"gates": gates, "model": params})
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grad["model"]))
    assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(grad["gates"]))
