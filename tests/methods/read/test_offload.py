"""Readers whose prompt stands in host memory answer as they do without, and what they do not read does not cross."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate, prefill_chunked, replay
from jaxtok.methods import H2O, SentenceKV, SnapKV, TokenSelect
from jaxtok.models import blocks, decoder
from jaxtok.ops import offload
from jaxtok.testing.world import CFG, LIVE, N, T, world

READERS = {
    "sentencekv": SentenceKV(budget=6, start_tokens=1, recent=2, ends=(1, 2, 5, 9), sentences=8),
    "tokenselect": TokenSelect(top_k=3, n_init=1, n_local=2, threshold=0.5),
    "pages": TokenSelect(top_k=3, n_init=1, n_local=2, block=2, threshold=None),
}


def both(name):
    return READERS[name], dataclasses.replace(READERS[name], offload=True)


def answer(recipe, params, ids, live, force, new=T):
    """Prefill and T forced steps -> (logits, caches after the prefill, caches at the end)."""
    tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live, ends=recipe.reader.ends), recipe, new=new)
    logits, end = replay(CFG, params, tokens, layers, force, recipe)
    return logits, layers, end


@pytest.mark.parametrize("name, dtype", [("sentencekv", "float32"), ("tokenselect", "bfloat16")])
def test_same_logits_and_the_prompt_stands_in_host_memory(name, dtype):
    params, ids, force = world(dtype)
    slots, cache = (9, SnapKV(capacity=9, window=2, pool=1)) if name == "sentencekv" else (N, None)  # compressed first, or whole
    out = [jax.jit(functools.partial(answer, Recipe(cache=cache, reader=r)))(params, ids, jnp.asarray(LIVE), force) for r in both(name)]
    np.testing.assert_array_equal(*(z for z, *_ in out))
    (_, _, plain), (_, begun, end) = out
    for (a,), (b,), (c,) in zip(plain, begun, end, strict=True):
        np.testing.assert_array_equal(a.kv.k, offload.whole(c.kv.k))  # what was written along the way is there
        np.testing.assert_array_equal(a.kv.v, offload.whole(c.kv.v))
        hosted = READERS[name].hosted
        for which in ("k", "v"):
            x = getattr(c.kv, which)
            assert isinstance(x, offload.Halves) == (which in hosted)
            if which in hosted:
                assert x.host.shape[2] == slots and jax.typeof(x.host).memory_space == jax.memory.Space.Host
                np.testing.assert_array_equal(x.host, getattr(b.kv, which).host)  # never written
    here, there = offload.nbytes([part.kv for (part,) in end])
    assert there == CFG.layers * len(hosted) * 4 * CFG.kv_heads * slots * CFG.head_dim * jnp.dtype(dtype).itemsize


def crossings(jaxpr, inside=False):
    """(rows, in a branch) of everything that goes from host memory to the device."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put":
            before, after = (v.aval.memory_space for v in (eqn.invars[0], eqn.outvars[0]))
            if before == jax.memory.Space.Host and after == jax.memory.Space.Device:
                yield eqn.outvars[0].aval.shape, inside
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from crossings(sub, inside or eqn.primitive.name == "cond")


@pytest.mark.parametrize("name", ["sentencekv", "tokenselect"])
def test_only_rows_that_are_read_cross(name):
    recipe = Recipe(reader=both(name)[1])
    params, ids, force = world()
    jaxpr = jax.make_jaxpr(functools.partial(answer, recipe))(params, ids, jnp.asarray(LIVE), force).jaxpr
    found = list(crossings(jaxpr))
    rows = {shape[2] for shape, branch in found if not (branch and shape[2] == N)}
    assert rows == {6}  # budget; top_k + n_init + n_local
    assert any(shape[2] == N for shape, _ in found) == (name == "sentencekv")  # its whole steps, in a branch


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["sentencekv", "tokenselect"])
def test_lowers_for_accelerators(name, platform):
    """The cache is placed in pinned host memory and gathered there. Execution on an accelerator is untested."""
    recipe = Recipe(reader=both(name)[1])

    def run(params, ids, live):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids, live, ends=recipe.reader.ends), recipe, new=4)
        return generate(CFG, params, tokens, layers, recipe, new=4).ids

    params, ids, _ = world()
    text = jax.jit(run).trace(params, ids, jnp.asarray(LIVE)).lower(lowering_platforms=(platform,)).as_text()
    placed = text.count('_xla_buffer_placement = "pinned_host"')
    assert placed >= CFG.layers * len(READERS[name].hosted) and '_xla_compute_type = "host"' in text


def test_chunks_through_the_reader_and_steps_that_donate():
    params, ids, force = world()
    out = []
    for reader in both("pages"):
        recipe = Recipe(reader=reader)
        begin = jax.jit(lambda p, i, l, recipe=recipe: prefill_chunked(CFG, p, i, l, recipe, chunk=2, new=T, read=True))
        step = jax.jit(
            lambda p, i, s, recipe=recipe: decoder.step(CFG, p, blocks.embed(CFG, p, i), jnp.ones(i.shape, bool), s, recipe),
            donate_argnums=2,
        )
        _, layers = begin(params, ids, jnp.asarray(LIVE))
        rows = []
        for n in range(5):
            x, layers = step(params, force[:, n : n + 1], layers)
            rows.append(np.asarray(x))
        out.append(rows)
    assert isinstance(layers[0][0].kv.v, offload.Halves) and layers[0][0].kv.v.host.shape[2] == N
    np.testing.assert_array_equal(*out)


def test_a_prefill_on_top_of_what_was_written():
    """The next turn: all of it comes back to the device, layer by layer, and goes to host memory again."""
    params, ids, force = world()
    out = []
    for reader in both("tokenselect"):
        recipe = Recipe(reader=reader)

        def turns(params, ids, live, force, recipe=recipe):
            _, layers, end = answer(recipe, params, ids, live, force[:, :3], new=8)
            more = decoder.embed(CFG, params, ids[:, :4])
            tokens, layers = decoder.prefill(CFG, params, more, recipe, new=4, layers=end)
            return replay(CFG, params, tokens, layers, force[:, :4], recipe)

        out.append(jax.jit(turns)(params, ids, jnp.asarray(LIVE), force))
    np.testing.assert_allclose(out[0][0], out[1][0], atol=2e-6)
    part = out[1][1][0][0]
    assert part.kv.v.host.shape[2] == N + 8 + 4 and part.kv.v.here.shape[2] == 4


def test_what_is_read_whole_stays_and_what_cannot_be_is_refused():
    params, ids, force = world()
    covering = Recipe(reader=TokenSelect(top_k=40, n_init=1, n_local=2, offload=True))
    layers = jax.eval_shape(functools.partial(answer, covering), params, ids, jnp.asarray(LIVE), force)[1]
    assert not isinstance(layers[0][0].kv.v, offload.Halves)
    recipe = Recipe(policy=H2O(capacity=8, compact=True), reader=TokenSelect(offload=True))
    with pytest.raises(ValueError, match=r"h2o writes to any slot.*offload=False"):
        recipe.validate(CFG)
