"""What is kept while generating equals kvpress 0.5.5's PrefillDecodingPress and DecodingPress, cut by cut, and so do the logits of every step.

Forced tokens through `decoder.step` in a scan, all presses in one program (golden files: make_kvpress_decoding).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok as jt
from jaxtok.methods import CUR, Decoding, KeyDiff, KNorm, SnapKV
from jaxtok.models import blocks, decoder
from tests.golden.make_kvpress import FOLDER
from tests.golden.make_kvpress_decoding import ALONE, CHOSEN, INTERVAL, SOME, STEPS, TARGET
from tests.methods.test_kvpress import Golden, masks, opened

BASES = {
    "k_norm": KNorm(capacity=TARGET),
    "key_diff": KeyDiff(capacity=TARGET),
    "cur_whole": CUR(capacity=TARGET, sinks=0, local=None),
    "snapkv_1": SnapKV(capacity=TARGET, window=1, pool=1),
}
CUTS = [INTERVAL * i for i in range(STEPS // INTERVAL + 1)]  # after how many steps


@functools.cache
def read(name: str) -> Golden:
    with np.load(FOLDER / name / "decoding.npz") as fields:
        return opened(name, FOLDER / name, dict(fields))


@functools.cache
def ours(name: str, n: int, presses: tuple[str, ...]):
    """{press: (positions [steps + 1] of [l] of [1 g m] with those after the prefill first, logits [steps SOME])}."""
    golden = read(name)
    ids = jnp.asarray(golden.fields["ids"][None, : n + STEPS])

    def play(params, base):
        recipe = jt.Recipe(policy=Decoding(base=base, interval=INTERVAL))
        _, layers = decoder.prefill(golden.cfg, params, decoder.embed(golden.cfg, params, ids[:, :n]), recipe, new=0)
        places = lambda layers: [parts[0].kv.pos for parts in layers]

        def one(layers, token):
            x, layers = decoder.step(
                golden.cfg, params, blocks.embed(golden.cfg, params, token[None, None]), jnp.ones((1, 1), bool), layers, recipe
            )
            return layers, (places(layers), decoder.logits(golden.cfg, params, x)[0, 0, :SOME])

        after, (pos, logits) = jax.lax.scan(one, layers, ids[0, n:])
        return places(layers), pos, logits

    return jax.device_get(jax.jit(lambda params: {x: play(params, BASES[x]) for x in presses})(golden.params))


def agrees(golden: Golden, press: str, out, prefix: str = "") -> None:
    first, pos, logits = out
    total = len(golden.fields["ids"]) if not prefix else TARGET + STEPS
    for cut, want in zip(CUTS, golden.fields[f"{prefix}{press}.kept"], strict=True):
        got = masks(first if cut == 0 else [layer[cut - 1] for layer in pos], total)
        assert not (got != want).any(), f"{prefix}{press}, after {cut} steps: (layer, head, position) {np.argwhere(got != want).tolist()}"
    np.testing.assert_allclose(logits, golden.fields[f"{prefix}{press}.logits"], atol=1e-4)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_cut_is_kvpress_s(name):
    golden = read(name)
    out = ours(name, len(golden.fields["ids"]) - STEPS, tuple(BASES))
    for press in BASES:
        agrees(golden, press, out[press])


def test_a_prompt_of_the_target_is_the_decoding_press_alone():
    name = next(iter(CHOSEN))
    out = ours(name, TARGET, ALONE)
    for press in ALONE:
        agrees(read(name), press, out[press], "alone.")


def test_the_golden_files_see_the_cuts():
    """Logits of the plain model are others, and what is kept of the prompt changes from cut to cut."""
    for name in CHOSEN:
        golden = read(name)
        prompt = len(golden.fields["ids"]) - STEPS
        for press in BASES:
            kept = golden.fields[f"{press}.kept"]
            assert (kept.sum(-1) == TARGET).all() and kept[-1][..., prompt:].any()
            assert any((a != b).any() for a, b in zip(kept[1:], kept[:-1], strict=True))
