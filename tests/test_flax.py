"""The nnx modules and the linen example against the pure functions; checkpoints between them."""

import doctest
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

try:
    from flax import linen, nnx, serialization
except (AttributeError, ImportError) as e:
    if sys.version_info < (3, 12):
        raise
    pytest.skip(f"this Flax does not know JAX {jax.__version__}: {e}", allow_module_level=True)

import jaxtok as jt
import jaxtok.flax
from experiments import linen_example
from jaxtok.flax import Decoder, Pure
from jaxtok.methods import H2O, SnapKV
from jaxtok.models import blocks, decoder, flax_msgpack
from jaxtok.models.config import Config
from tests.models import reverse

CFG = Config(vocab=12, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=12)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, CFG.vocab, (2, 10)), jnp.int32)
LIVE = jnp.asarray(np.arange(10)[None] >= np.array([[0], [3]]))
OPTIMIZER = optax.adamw(1e-2)
STANDARD = functools.partial(jax.numpy_dtype_promotion, "standard")  # optax itself mixes dtypes
RECIPES = [decoder.PLAIN, jt.Recipe(cache=SnapKV(capacity=4, window=2)), jt.Recipe(policy=H2O(capacity=4))]


def loss(logits, ids=IDS):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def same(a, b, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    if atol:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)
    else:
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def params():
    return blocks.init(CFG, jax.random.key(0), embed_std=1.0)


@pytest.fixture(scope="module")
def plain(params):
    """(logits, gradients, params after one step of AdamW, loss before it) of the pure function."""

    @jax.jit
    def run(params):
        before, grads = jax.value_and_grad(lambda p: loss(blocks.forward(CFG, p, IDS)))(params)
        with STANDARD():
            updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
        return blocks.forward(CFG, params, IDS, LIVE), grads, optax.apply_updates(params, updates), before

    logits, grads, stepped, before = run(params)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-5  # every array is reached
    # the first step of Adam is the rate times the sign of the gradient, whatever its size
    same(stepped["norm"], params["norm"] - 1e-2 * (jnp.sign(grads["norm"]) + 1e-4 * params["norm"]), 1e-5)
    return logits, grads, stepped, before


# --- nnx --------------------------------------------------------------------------------------------------------------


def test_nnx_logits_and_gradients(params, plain):
    graph, state = nnx.split(Decoder(CFG, params))

    @jax.jit
    def run(state):
        grads = jax.grad(lambda s: loss(nnx.merge(graph, s)(IDS)))(state)
        return nnx.merge(graph, state)(IDS, LIVE), nnx.merge(graph, grads).plain()

    logits, grads = run(state)
    same(logits, plain[0])
    same(grads, plain[1], 1e-6)


def test_nnx_trains_one_optax_step(params, plain):
    model = Decoder(CFG, params)
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        grads = nnx.grad(lambda m: loss(m(IDS)))(model)
        with STANDARD():
            optimizer.update(model, grads)
        return grads

    grads = update(model, optimizer)
    same(nnx.merge(nnx.graphdef(model), grads).plain(), plain[1], 1e-6)
    same(model.plain(), plain[2], 1e-6)
    assert int(optimizer.step[...]) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=["plain", "cache", "policy"])
def test_nnx_prefill_and_step(params, plain, recipe):
    graph, state = nnx.split(Decoder(CFG, params))

    @jax.jit
    def fill(state, params, ids, live):
        model = nnx.merge(graph, state)
        out = model.prefill(model.embed(ids, live), recipe, new=3)
        return (model.logits(out[0].x), out), decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=3)

    @jax.jit
    def step(state, params, ids, live, layers):
        model = nnx.merge(graph, state)
        x, after = model.step(model.lookup(ids), live, layers, recipe)
        return (model.logits(x), (x, after)), decoder.step(CFG, params, blocks.embed(CFG, params, ids), live, layers, recipe)

    (logits, mine), pure = fill(state, params, IDS[:, :7], LIVE[:, :7])
    same(mine, pure)
    said = [logits[:, -1]]
    for t in range(7, 10):
        (logits, mine), pure = step(state, params, IDS[:, t : t + 1], LIVE[:, t : t + 1], mine[1])
        same(mine, pure)
        said.append(logits[:, 0])
    assert step._cache_size() == 1
    far = float(jnp.abs(jnp.stack(said, 1) - plain[0][:, 6:]).max())
    assert far < 1e-5 if recipe == decoder.PLAIN else far > 1e-3  # the recipe did act


def test_nnx_holds_any_tree():
    tree = {
        "layers": ({"w": jnp.ones((2, 3), jnp.bfloat16)}, {"w": jnp.zeros(2)}),
        "methods": {"policy": {}, "layers": ({}, jnp.arange(3))},
    }
    model = Pure(tree)
    graph, state = nnx.split(model)
    back = nnx.merge(graph, state).plain()
    same(back, tree)
    assert [x.dtype for x in jax.tree.leaves(back)] == [x.dtype for x in jax.tree.leaves(tree)]
    floats = jax.tree.leaves(nnx.state(model, nnx.Param))  # integer tables are not trained
    assert [x.shape for x in floats] == [(2, 3), (2,)]


def test_stacked_layers(params, plain):
    model = Decoder(CFG, blocks.stack(params))
    same(jax.jit(lambda m: m(IDS, LIVE))(model), plain[0], 1e-5)
    with pytest.raises(ValueError, match="unstack"):
        model.prefill(model.embed(IDS), new=1)


def test_the_docstring_runs():
    ran = doctest.testmod(jaxtok.flax, verbose=False)
    assert ran.attempted > 10 and not ran.failed


# --- linen ------------------------------------------------------------------------------------------------------------


def test_linen_logits_gradients_and_one_step(params, plain):
    model = linen_example.Decoder(CFG)
    made = jax.eval_shape(model.init, jax.random.key(0), IDS)
    assert jax.tree.map(jnp.shape, made) == {"params": {"decoder": jax.tree.map(jnp.shape, params)}}
    state = linen_example.TrainState.create(apply_fn=model.apply, params={"decoder": params}, tx=OPTIMIZER)

    @jax.jit
    def run(params):
        grads = jax.grad(lambda p: linen_example.loss_fn(model.apply, p, IDS))(params)
        return model.apply({"params": params}, IDS, LIVE), grads

    logits, grads = run(state.params)
    same(logits, plain[0])
    same(grads["decoder"], plain[1], 1e-6)
    with STANDARD():
        state, before = linen_example.train_step(state, IDS)
        _, after = linen_example.train_step(state, IDS)
    same(state.params["decoder"], plain[2], 1e-5)
    assert abs(float(before - plain[3])) < 1e-5 and after < before


def test_linen_generates_with_a_compressed_cache(params):
    recipe = RECIPES[1]

    @jax.jit
    def pure(params):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, IDS, LIVE), recipe, new=4)
        return jt.decode.generate(CFG, params, tokens, layers, recipe, new=4).ids

    model = linen_example.Decoder(CFG, recipe)
    got = jax.jit(functools.partial(model.apply, method="generate", new=4))({"params": {"decoder": params}}, IDS, LIVE)
    np.testing.assert_array_equal(got, pure(params))
    assert got.shape == (2, 4) and (np.asarray(got) >= 0).all()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_orbax_between_nnx_linen_and_the_plain_dict(tmp_path, params, plain):
    model = Decoder(CFG, params)
    graph, state = nnx.split(model)
    variables = {"params": {"decoder": params}}
    abstract = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in (("nnx", state), ("linen", variables), ("plain", model.plain())):
            checkpointer.save(tmp_path / name, tree)
        checkpointer.wait_until_finished()
        back = nnx.merge(graph, checkpointer.restore(tmp_path / "nnx", abstract(state)))
        linen_back = checkpointer.restore(tmp_path / "linen", abstract(variables))
        plain_back = checkpointer.restore(tmp_path / "plain", abstract(params))
    same(back.plain(), params)
    same(linen_back, variables)
    same(plain_back, params)
    same(jax.jit(lambda m: m(IDS, LIVE))(back), plain[0])
    crossed = jax.jit(linen_example.Decoder(CFG).apply)({"params": {"decoder": plain_back}}, IDS, LIVE)  # saved from nnx, run in linen
    same(crossed, plain[0])


def test_msgpack_written_by_flax(tmp_path, monkeypatch, params):
    path = tmp_path / "params.msgpack"
    path.write_bytes(serialization.to_bytes(params))
    same(flax_msgpack.read(path, params), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    path.write_bytes(serialization.to_bytes(half))
    got = flax_msgpack.read(path, half)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    same(got, half)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)  # arrays in pieces
    tree = {
        "params": nnx.to_pure_dict(nnx.state(Decoder(CFG, params))),
        "step": np.int32(7),
        "z": 1 + 2j,
        "rate": 0.5,
        "name": "x",
        "no": None,
    }
    body = serialization.msgpack_serialize(tree)
    assert body.count(b"__msgpack_chunked_array__") > 10
    path.write_bytes(body)
    got, theirs = flax_msgpack.read(path), serialization.msgpack_restore(body)
    same(got, theirs)
    kinds = lambda t: [(type(x), getattr(x, "dtype", None)) for x in jax.tree.leaves(t)]
    assert kinds(got) == kinds(theirs) and got["params"]["params"]["layers"][1]["q"].shape == (8, 16)


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x):
        q, k, v = jnp.split(linen.Dense(3 * x.shape[-1], name="qkv_proj")(x), 3, -1)
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.float32(np.sqrt(x.shape[-1])), -1)
        return linen.Dense(x.shape[-1], name="o_proj")(weights @ v)


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm(name="norm1")(x + Attention(name="self_attn")(x))
        y = linen.relu(linen.Dense(64, name="linear_0")(x))
        return linen.LayerNorm(name="norm2")(x + linen.Dense(32, name="linear_3")(y))


class Stack(linen.Module):
    @linen.compact
    def __call__(self, x):
        return Layer(name="layers_0")(x)


class Reverser(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Dense(32, name="input_layer")(jax.nn.one_hot(ids, 10)) + reverse.waves(ids.shape[1], 32)[None]
        x = linen.Dense(32, name="output_net_0")(Stack(name="transformer")(x))
        return linen.Dense(10, name="output_net_4")(linen.relu(linen.LayerNorm(name="output_net_1")(x)))


class NnxReverser(Pure):
    def __call__(self, ids):
        return reverse.forward(self.plain(), ids)


def test_the_reverse_checkpoint_in_linen_and_nnx(data):
    ids = np.random.default_rng(1).integers(0, 10, (1000, 16))
    model = Reverser()
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = flax_msgpack.read(data / reverse.FILE, like)
    want = jax.jit(reverse.forward)(params, ids)
    np.testing.assert_array_equal(np.argmax(want, -1), ids[:, ::-1])
    same(jax.jit(model.apply)({"params": params}, ids), want, 1e-4)
    same(jax.jit(lambda m, ids: m(ids))(NnxReverser(params), ids), want)
