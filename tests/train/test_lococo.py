"""Training of LoCoCo's memory: what the loss is, where its gradient goes, at which rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok import train
from jaxtok.core.recipe import Recipe
from jaxtok.methods import H2O, LoCoCo
from jaxtok.models import blocks
from jaxtok.testing import world
from jaxtok.train import lococo

CFG, METHOD = world.CFG, LoCoCo(capacity=5, kernel=5, slack=2)
RECIPE = Recipe(policy=METHOD)


def model(method=METHOD):
    """Weights several times larger than at the start, so that the convolution decides something."""
    params, ids, force = world.world()
    own = {name: x if name == "alpha" else x * 8 for name, x in method.init_params(jax.random.key(0), CFG).items()}
    return params | {"methods": {"policy": own}}, jnp.concatenate([ids, force], 1)


def test_the_loss_is_that_of_the_blocks_after_the_first():
    """With a memory that holds the text: the full model's."""
    method = LoCoCo(capacity=16, kernel=5)
    params, ids = model(method)
    loss, metrics = jax.jit(lococo.make_loss(CFG, Recipe(policy=method), chunk=4))(params, {"ids": ids[:, :17]}, None)
    z = jax.jit(lambda params, ids: blocks.forward(CFG, params, ids))(params, ids[:, :16])[:, 4:]
    want = optax.softmax_cross_entropy_with_integer_labels(z, ids[:, 5:17]).mean()
    assert float(loss) == pytest.approx(float(want), rel=1e-5) and float(metrics["alpha_low"]) == 0.5


def test_gradients_reach_the_memory():
    """Of the loss over four blocks in the convolution, its bias and alpha of both layers, against finite differences."""
    params, ids = model()
    own = params["methods"]["policy"]
    loss = lococo.make_loss(CFG, RECIPE, chunk=4)
    frozen = {name: x for name, x in params.items() if name != "methods"}
    of = jax.jit(lambda own: loss(frozen | {"methods": {"policy": own}}, {"ids": ids[:, :17]}, None)[0])
    grad = jax.jit(jax.grad(of))(own)
    rng = np.random.default_rng(6)
    for name, x in own.items():
        g = np.asarray(grad[name])
        assert np.isfinite(g).all() and all(np.abs(layer).max() > 0 for layer in g), name
        direction = jnp.asarray(rng.normal(size=x.shape) * (np.abs(g) > 0), jnp.float32)
        e = 1e-2 / float(jnp.linalg.norm(direction))
        up, down = (float(of(own | {name: x + s * e * direction})) for s in (1, -1))
        want = float((g * np.asarray(direction)).sum())
        assert (up - down) / (2 * e) == pytest.approx(want, rel=0.05, abs=2e-3), name


def test_only_the_memory_is_trained_and_at_its_rates():
    params, _ = model()
    paths = jax.tree_util.tree_map_with_path(lambda p, _: lococo.trainable(jax.tree_util.keystr(p, simple=True, separator="/")), params)
    assert all(jax.tree.leaves(paths["methods"])) and not any(jax.tree.leaves({k: v for k, v in paths.items() if k != "methods"}))
    own = {"methods": params["methods"]}
    opt = lococo.optimizer(1e-4)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        updates, _ = opt.update(jax.tree.map(jnp.ones_like, own), opt.init(own), own)
    size = {name: float(jnp.abs(x).max()) for name, x in updates["methods"]["policy"].items()}
    assert size["conv"] == pytest.approx(0.1, rel=1e-3) and size["bias"] == pytest.approx(0.1, rel=1e-3)
    assert size["alpha"] == pytest.approx(5e-4, rel=1e-3)  # x 1000 and x 5 of the base rate


def test_training_moves_the_memory_and_nothing_else():
    """Two steps of `fit`: one compiled program, the model's own arrays come back, the memory has moved."""
    params, ids = model()
    traces, loss = [], lococo.make_loss(CFG, RECIPE, chunk=4)

    def counted(*args):
        traces.append(1)
        return loss(*args)

    state = train.fit(
        counted,
        params,
        lambda step: {"ids": ids[:, :13]},
        optimizer=lococo.optimizer(1e-4),
        steps=3,
        trainable=lococo.trainable,
        progress=False,
    )
    assert len(traces) == 1
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, params)
    assert all(jax.tree.leaves({k: v for k, v in same.items() if k != "methods"})) and not any(jax.tree.leaves(same["methods"]))


def test_refuses():
    params, ids = model()
    for match, recipe, chunk in (("a recurrent step policy", Recipe(policy=H2O(capacity=4)), 4), ("do not divide into blocks", RECIPE, 5)):
        with pytest.raises(ValueError, match=match):
            lococo.read(CFG, params, ids[:, :16], recipe, chunk)
