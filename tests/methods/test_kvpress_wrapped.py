"""What is kept of random prompts equals kvpress 0.5.5 for wrappers around other methods (golden files: make_kvpress_wrapped), and CaM's steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok as jt
from jaxtok.methods import TOVA, CaMPolicy, Chain, Chunked, KeyDiff, KeyRerotation, KNorm, PerLayer, SnapKV, ThinK
from jaxtok.models import blocks, decoder
from tests.golden.make_kvpress import FOLDER, RATIOS, WINDOW
from tests.golden.make_kvpress_wrapped import CHOSEN, FIRST, MERGE, PIECE, SECOND, SOME, STEPS, TARGET
from tests.methods.test_kvpress import Golden, masks, opened


@functools.cache
def read(name: str) -> Golden:
    with np.load(FOLDER / name / "case.npz") as case, np.load(FOLDER / name / "wrapped.npz") as wrapped:
        return opened(name, FOLDER / name, {"ids": case["ids"]} | dict(wrapped))


def left(n: int, removed: float) -> int:
    """kvpress's number of kept tokens."""
    return max(1, int(n * (1 - removed)))


@functools.cache
def ours(name: str):
    """{field: caches of the layers, or positions for each ratio} of one prompt, all in one program."""
    golden = read(name)
    cfg, n, ids = golden.cfg, golden.n, jnp.asarray(golden.fields["ids"])[None]
    snap = lambda capacity: SnapKV(capacity=capacity, window=WINDOW)
    one, two = left(n, FIRST), left(n, SECOND)
    thin = ThinK(ratio=1 - SECOND, window=WINDOW, variant="kvpress")
    singles = {
        "composed": Chain(methods=(KNorm(capacity=one), KeyDiff(capacity=left(one, SECOND)))),
        "thinned": Chain(methods=(snap(one), thin)),
        "per_layer": PerLayer(base=snap(two), capacities=(one, two)),
        "turned": KeyRerotation(base=snap(two)),
    }
    pieces = {
        "chunk_key_diff": Chunked(base=KeyDiff(capacity=n), chunk=PIECE),
        "chunk_k_norm": Chunked(base=KNorm(capacity=n), chunk=PIECE),
    }
    counts = [sum(left(min(PIECE, n - i), removed) for i in range(0, n, PIECE)) for removed in RATIOS]

    def run(params):
        prefill = lambda method, keep=None: decoder.prefill(
            cfg, params, decoder.embed(cfg, params, ids), jt.Recipe(cache=method), new=0, keep=keep
        )[1]
        out = {x: [parts[0] for parts in prefill(method)] for x, method in singles.items()}
        budget = lambda count: {"cache": jnp.full((1,), count, jnp.int32)}
        return out | {x: [[p[0].kv.pos for p in prefill(method, budget(c))] for c in counts] for x, method in pieces.items()}

    return jax.device_get(jax.jit(run)(golden.params))


@pytest.mark.parametrize("press", ["chunk_key_diff", "chunk_k_norm"])
@pytest.mark.parametrize("name", CHOSEN)
def test_pieces(name, press):
    """Each piece of 20 tokens by itself, KeyDiff's mean that of the piece; at kvpress's total, whose shares are these here."""
    golden = read(name)
    for i in range(len(RATIOS)):
        np.testing.assert_array_equal(masks(ours(name)[press][i], golden.n), golden.kept(press, i))


@pytest.mark.parametrize("press", ["composed", "thinned", "per_layer", "turned"])
@pytest.mark.parametrize("name", CHOSEN)
def test_kept_tokens(name, press):
    golden = read(name)
    parts = ours(name)[press]
    pos = [x.kv.pos if x.frozen is None else x.frozen.kv.pos for x in parts]
    np.testing.assert_array_equal(masks(pos, golden.n), golden.fields[f"{press}.kept"])
    if press == "thinned":
        got = np.stack([(x.frozen.channels[0][:, :, None] == np.arange(golden.cfg.head_dim)).any(1) for x in parts])
        np.testing.assert_array_equal(got, golden.fields["thinned.channels"])
    if press == "turned":
        np.testing.assert_allclose(np.stack([x.kv.k[0] for x in parts]), golden.fields["turned.keys"], atol=3e-5)


@pytest.mark.parametrize("name", CHOSEN)
def test_cam_step_by_step(name):
    """CAMPress around TOVA at every step: kept tokens and logits of each, the values at the end; the paper's A, of the prompt too, gives others."""
    golden = read(name)
    ids = jnp.asarray(golden.fields["cam.ids"])[None]

    def run(params, variant):
        base = TOVA(capacity=TARGET, variant="kvpress")
        recipe = jt.Recipe(policy=CaMPolicy(base=base, window=MERGE, sample=False, variant=variant))
        _, layers = decoder.prefill(golden.cfg, params, decoder.embed(golden.cfg, params, ids[:, :TARGET]), recipe, new=0)

        def one(layers, token):
            x, layers = decoder.step(
                golden.cfg, params, blocks.embed(golden.cfg, params, token[None, None]), jnp.ones((1, 1), bool), layers, recipe
            )
            return layers, ([parts[0].kv.pos for parts in layers], decoder.logits(golden.cfg, params, x)[0, 0, :SOME])

        layers, (pos, logits) = jax.lax.scan(one, layers, ids[0, TARGET:])
        return [parts[0].kv for parts in layers], pos, logits

    (caches, pos, logits), other = jax.device_get(jax.jit(lambda params: [run(params, x) for x in ("kvpress", "paper")])(golden.params))
    for t in range(STEPS):
        np.testing.assert_array_equal(masks([x[t] for x in pos], TARGET + STEPS), golden.fields["cam.kept"][t])
    np.testing.assert_allclose(logits, golden.fields["cam.logits"], atol=1e-4)
    for kv, want in zip(caches, golden.fields["cam.values"], strict=True):
        order = np.argsort(np.where(kv.pos < 0, 9999, kv.pos), -1)[0, :, :TARGET]
        np.testing.assert_allclose(np.take_along_axis(kv.v[0], order[..., None], 1), want, atol=1e-4)
    assert np.abs(other[2] - logits).max() > 1e-3
