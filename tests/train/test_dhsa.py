"""Boundary labels against sums by hand and the official ones; the loss against numpy, and falling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.methods import DHSA
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.ops.boundaries import boundary_logits
from jaxtok.train.dhsa import loss, make_loss, ratios
from jaxtok.train.loop import fit
from tests.methods.prefill import views
from tests.methods.prefill.test_vertical_slash import attention

CFG = Config(vocab=8, width=8, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=8)


@pytest.mark.parametrize("width, reach", [(1, None), (2, None), (3, 4)])
def test_ratios_equal_numpy(width, reach):
    x = views.view(1)
    a, got = attention(x).mean(1), np.asarray(ratios(x.q, x.k, x.pos, width=width, reach=reach))
    for i, n in enumerate((24, 17)):
        for j in range(24):
            want = 0.0
            if 2 * width <= j <= n - 2 * width:
                some = a[i, j + width - 1 : n if reach is None else j + width - 1 + reach]
                past, future = some[:, j - width : j].sum(), some[:, j : j + width].sum()
                want = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
            np.testing.assert_allclose(got[i, j], want, rtol=1e-3)


def test_official_ratios(data):
    """xiongsiheng/DHSA, first version; the ratio of the gap behind row p there is that of row p + 1 here."""
    z = np.load(data / "golden" / "dhsa_v1.npz")
    q, k = jnp.asarray(z["c2_q"]), jnp.asarray(z["c2_k"])
    pos = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
    got = np.asarray(ratios(q, k, pos, width=int(z["c2_label_full_boundary_window"])))[0]
    np.testing.assert_allclose(got[1:], z["c2_label_full_ratios"][:-1], rtol=1e-3)


def test_loss_equals_numpy_and_falls():
    x = views.view(2)
    params = DHSA(capacity=300, predicted=True, width=2, hidden=8).init_params(jax.random.key(0), CFG)["predictor"]
    ratio, live = ratios(x.q, x.k, x.pos, width=2), x.pos >= 0
    logit, r = (np.asarray(a, np.float64) for a in (boundary_logits(params, x.k, live), ratio))
    y, p = r[r > 0] ** 4 / (1 + r[r > 0] ** 4), 1 / (1 + np.exp(-logit[r > 0]))
    want = np.mean(-y * (1 - p) ** 2 * np.log(p) - (1 - y) * p**2 * np.log(1 - p))
    step = jax.jit(jax.value_and_grad(lambda p: loss(p, x.k, live, ratio)))
    first, _ = step(params)
    np.testing.assert_allclose(first, want, rtol=1e-4)
    for _ in range(60):
        value, slope = step(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
    assert np.isfinite(value) and value < first


def test_a_predictor_learns_a_models_boundaries():
    """Random tokens in a model whose heads look at sinks and neighbours: the loss falls, the model's own arrays stay, and a prefill takes it."""
    model = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    method = DHSA(capacity=14, chunks=4, predicted=True, width=2, hidden=8, apart=1, local=2, sinks=2, block_q=4, block_k=2, tail=0)
    params = {"predictor": method.init_params(jax.random.key(1), CFG)["predictor"], "model": model}
    ids = jax.random.randint(jax.random.key(2), (4, 24), 0, CFG.vocab)
    live, seen = jnp.arange(24)[None] >= jnp.asarray([[0], [3], [0], [9]]), []
    how = dict(optimizer=optax.adam(0.02), steps=40, trainable=lambda path: path.startswith("predictor"), log_every=1, progress=False)
    state = fit(make_loss(CFG, method), params, lambda step: (ids, live), on_log=seen.append, **how)
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"] and int(state.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], model)
    taught = model | {"methods": {"sparsify": {"predictor": state.params["predictor"]}}}
    tokens, _ = decoder.prefill(CFG, taught, decoder.embed(CFG, taught, ids, live), Recipe(sparsify=method), new=1)
    assert np.isfinite(tokens.x).all()
    with pytest.raises(ValueError, match="variant='a' has none"):
        make_loss(CFG, DHSA(capacity=128, variant="a"))
