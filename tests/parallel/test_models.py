"""A model whose sequence 4 devices share: caches, kept sets and continuations of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Needs
from jaxtok.decode import generate, prefill_chunked
from jaxtok.methods import H2O, ExpectedAttention, FastV, KeyDiff, Keyformer, Quest, SnapKV, StreamingLLM, TokenSelect
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.parallel import Spread, make_mesh

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=16)
PARAMS = blocks.init(CFG, jax.random.key(0))
T, NEW = 32, 4
RECIPES = {
    "plain": Recipe(),
    "snapkv": Recipe(cache=SnapKV(capacity=12, window=4, pool=3)),
    "keydiff": Recipe(cache=KeyDiff(capacity=12)),
    "expected_attention": Recipe(cache=ExpectedAttention(capacity=12)),
    "h2o": Recipe(policy=H2O(capacity=12)),
    "streaming_llm": Recipe(policy=StreamingLLM(capacity=12, sinks=2)),
    "quest": Recipe(reader=Quest(pages=3, block=4, dense_layers=0)),
    "tokenselect": Recipe(reader=TokenSelect(top_k=8)),
}


@functools.cache
def prompts():
    ids = jax.random.randint(jax.random.key(1), (2, T), 0, CFG.vocab)
    live = jnp.arange(T)[None] >= jnp.asarray([0, 5])[:, None]
    return ids, live


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(recipe, impl, params, ids, live):
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live), recipe, new=NEW, impl=impl)
    made = generate(CFG, params, tokens, layers, recipe, new=NEW, eos=(), impl=impl)
    return tokens.x[:, -1], [part.kv for (part,) in layers], made.ids


def compare(found, want):
    (x, caches, ids), (x_, caches_, ids_) = jax.device_get((found, want))
    np.testing.assert_allclose(x, x_, atol=2e-5)
    for a, b in zip(caches, caches_, strict=True):
        slots = b.pos.shape[2]
        np.testing.assert_array_equal(a.pos[..., :slots], b.pos)
        assert (a.pos[..., slots:] < 0).all()
        live = (b.pos >= 0)[..., None]
        np.testing.assert_allclose(a.k[:, :, :slots] * live, b.k * live, atol=2e-5)
        np.testing.assert_allclose(a.v[:, :, :slots] * live, b.v * live, atol=2e-5)
    np.testing.assert_array_equal(ids, ids_)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shared_sequence_gives_what_one_device_gives(name):
    spread = Spread(mesh=make_mesh(sequence=4), layout="zigzag")
    found = run(RECIPES[name], spread, PARAMS, *prompts())
    compare(found, run(RECIPES[name], "auto", PARAMS, *prompts()))
    if name == "plain":
        k = found[1][0].k
        assert k.sharding.shard_shape(k.shape)[2] == k.shape[2] // 4


@pytest.mark.parametrize("scheme, layout, mesh", [("ring", "contiguous", (1, 4, 2)), ("ulysses", "contiguous", (2, 2, 1)), ("gathered", "striped", (1, 4, 1)), ("token_ring", "zigzag", (2, 2, 2))])  # fmt: skip
def test_schemes_and_meshes(scheme, layout, mesh):
    data, sequence, tensor = mesh
    spread = Spread(mesh=make_mesh(data=data, sequence=sequence, tensor=tensor), scheme=scheme, layout=layout)
    compare(run(RECIPES["snapkv"], spread, PARAMS, *prompts()), run(RECIPES["snapkv"], "auto", PARAMS, *prompts()))


@pytest.mark.parametrize("name", ["plain", "snapkv", "h2o"])
def test_chunks(name):
    """The second chunk attends to the first one's cache: all devices know its queries."""

    @functools.partial(jax.jit, static_argnums=0)
    def chunked(impl, params, ids, live):
        tokens, layers = prefill_chunked(CFG, params, ids, live, RECIPES[name], chunk=16, new=NEW, impl=impl)
        made = generate(CFG, params, tokens, layers, RECIPES[name], new=NEW, eos=(), impl=impl)
        return tokens.x[:, -1], [part.kv for (part,) in layers], made.ids

    spread = Spread(mesh=make_mesh(sequence=4), layout="zigzag")
    compare(chunked(spread, PARAMS, *prompts()), chunked("auto", PARAMS, *prompts()))


def test_evidence_for_later():
    """`survey` lays its rows out and back: caches, rows of attention, what each key receives."""
    needs = Needs(rows=4, received=True)
    look = jax.jit(lambda impl, *args: decoder.survey(CFG, PARAMS, decoder.embed(CFG, PARAMS, *args), needs, impl=impl), static_argnums=0)
    (x, layers, found), (x_, layers_, found_) = (
        jax.device_get(look(impl, *prompts())) for impl in (Spread(mesh=make_mesh(sequence=4), layout="striped"), "auto")
    )
    live = np.asarray(prompts()[1])
    np.testing.assert_allclose(x.x[live], x_.x[live], atol=2e-5)
    for (a,), (b,), (seen,), (want,) in zip(layers, layers_, found, found_, strict=True):
        np.testing.assert_array_equal(a.kv.pos, b.kv.pos)
        np.testing.assert_allclose(seen.received, want.received, atol=2e-5)
        np.testing.assert_allclose(seen.rows, want.rows, atol=2e-5)


def test_rows_that_nobody_laid_out():
    """All devices know them, each reads its own keys."""
    spread = Spread(mesh=make_mesh(sequence=4), layout="zigzag")
    last = jax.jit(
        lambda impl, ids, live: decoder.last_rows(CFG, PARAMS, decoder.embed(CFG, PARAMS, ids, live), 4, impl=impl), static_argnums=0
    )
    np.testing.assert_allclose(last(spread, *prompts()), last("auto", *prompts()), atol=2e-5)


def test_refused():
    spread = Spread(mesh=make_mesh(sequence=4))
    ids, live = prompts()
    with pytest.raises(ValueError, match="pad them at the left to 32"):
        jax.eval_shape(functools.partial(run, RECIPES["plain"], spread), PARAMS, ids[:, :30], live[:, :30])
    over = lambda recipe: jax.eval_shape(functools.partial(run, recipe, spread), PARAMS, ids, live)
    with pytest.raises(ValueError, match="takes no `layers`"):
        over(Recipe(layers=((1, FastV(capacity=8, images=16)),)))
    with pytest.raises(ValueError, match="no evidence of the kind perturbed"):
        over(Recipe(policy=Keyformer(capacity=12)))
    with pytest.raises(ValueError, match="none is called 'time'"):
        Spread(mesh=make_mesh(sequence=2), sequence="time")
    with pytest.raises(ValueError, match="want 16 devices"):
        make_mesh(data=2, sequence=8)
    with pytest.raises(ValueError, match="must be one of ring"):
        Spread(mesh=make_mesh(sequence=2), scheme="tree")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_memory_falls_with_the_devices(layout):
    """64k tokens, four layers: what a device of 8 needs beside its parameters is at most a sixth of what one needs alone."""
    cfg = Config(vocab=32, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, hidden=448)
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))

    def prefill(impl, params, ids):
        tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), new=0, impl=impl)
        return tokens.x, [part.kv for (part,) in layers]

    def nbytes(impl):
        where = None if isinstance(impl, str) else jax.NamedSharding(impl.mesh, impl.spec("data", "sequence"))
        ids = jax.ShapeDtypeStruct((1, 65_536), jnp.int32, sharding=where)
        found = jax.jit(functools.partial(prefill, impl)).lower(params, ids).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    share = nbytes(Spread(mesh=make_mesh(sequence=8), layout=layout)) / nbytes("auto")
    assert share <= 1 / 6, share
