"""Sub-images side by side: rows and evidence against the crops on their own, and methods that choose among them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import CROP, IMAGE
from jaxtok.methods import FasterVLM, GlobalCom2, HiPrune, HiRED
from jaxtok.models import crops, encoder, vit
from jaxtok.testing import rows

P, N = 3, 17  # thumbnail and two crops; a class row and 4 x 4 patches
METHODS = {
    "fastervlm": FasterVLM(capacity=12, special=0, crops=P),
    "hired": HiRED(capacity=20, special=0, grid=(1, 2), layers=(0, -1)),
    "globalcom2": GlobalCom2(capacity=20, special=0, grid=(1, 2), side=4, rank="raster"),
    "hiprune": HiPrune(capacity=18, special=0, crops=P, layers=(0, 1), alpha=1.0),
}


VISION = dataclasses.replace(rows.VISION, layers=3)


@functools.cache
def world():
    params = encoder.init(VISION, jax.random.key(0))
    params["layers"] = tuple(p | {"q": p["q"] * 3, "k": p["k"] * 3} for p in params["layers"])
    return params, vit.embed(VISION, params, jax.random.normal(jax.random.key(1), (2 * P, 8, 8, 3)))


@functools.cache
def found(name):
    params, tokens = world()
    recipe = Recipe(select=METHODS[name])

    def run(params, tokens):
        alone = vit.encode(VISION, params, tokens, recipe, until=2)
        joined = crops.join(alone, P, several=bool(METHODS[name].needs.layers))
        return alone, joined, vit.select(params, joined, recipe)

    return jax.jit(run)(params, tokens)


def test_rows_and_evidence_stand_side_by_side():
    alone, joined, _ = found("hired")
    tokens = joined.tokens
    assert tokens.x.shape == (2, P * N, 16) and tokens.seen.tolist() == [48, 48]
    for image in range(2):
        for p in range(P):
            rows = slice(p * N, p * N + N)
            np.testing.assert_array_equal(tokens.x[image, rows], alone.tokens.x[image * P + p])
            np.testing.assert_array_equal(joined.evidence.cls[:, image, :, rows], alone.evidence.cls[:, image * P + p])
            assert tokens.segment[image, rows].tolist() == [p] * N and tokens.pos[image, rows].tolist() == [-1, *range(16 * p, 16 * p + 16)]
            assert (np.asarray(tokens.kind[image, rows])[1:] == (CROP if p else IMAGE)).all()
            assert tokens.source[image, rows].tolist() == [-1, *range(p * N + 1, p * N + N)]
    alone, joined, _ = found("globalcom2")
    np.testing.assert_array_equal(joined.evidence.lead[1, :, 2], alone.evidence.lead[5])
    np.testing.assert_array_equal(joined.evidence.keys[1, :, 2 * N :], alone.evidence.keys[5])


def test_a_class_row_may_stay():
    params, tokens = world()
    joined = crops.join(vit.encode(VISION, params, tokens, until=1), P, with_cls=True)
    assert (np.asarray(joined.tokens.pos) == np.arange(P * N)).all()


def test_the_best_of_each_crop_are_those_of_the_crop_alone():
    alone, _, out = found("fastervlm")
    for image in range(2):
        want = []
        for p in range(P):
            score = np.asarray(alone.evidence.cls[image * P + p]).mean(0)[1:]
            want += [p * N + 1 + j for j in sorted(np.argsort(-score)[:4])]
        assert np.flatnonzero(np.asarray(out.source[image]) >= 0).tolist() == want
        assert np.asarray(out.rope)[image, :, 0].tolist() == list(range(12))


@pytest.mark.parametrize("name", ["hired", "globalcom2", "hiprune"])
def test_methods_of_several_crops_obey_their_budget(name):
    *_, out = found(name)
    alive = (np.asarray(out.pos) >= 0).sum(1)
    assert (alive <= METHODS[name].capacity).all() and (alive >= METHODS[name].capacity - P).all()
    assert np.isfinite(out.x).all() and out.lost.tolist() == [0, 0]


def test_a_batch_that_does_not_divide():
    params, tokens = world()
    alone = vit.encode(VISION, params, jax.tree.map(lambda x: x[:4], tokens), until=1)
    with pytest.raises(ValueError, match="multiple"):
        crops.join(alone, P)
