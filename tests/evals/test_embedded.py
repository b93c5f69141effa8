"""The models inside the package load like any checkpoint, are small, keep text exactly, and retrieve."""

import importlib.resources
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.evals import tasks
from jaxtok.models import blocks, load

MODELS = pathlib.Path(str(importlib.resources.files("jaxtok.models")))


@pytest.fixture(scope="module")
def embedded():
    return load.load(MODELS / "embedded")


@pytest.fixture(scope="module")
def draft():
    return load.load(MODELS / "embedded_draft")


def replies(model, cases, length):
    """The fraction of cases answered in full, greedily: each character of the answer is the likeliest next one."""
    cfg, params, tokenizer = model
    answers = np.array([tokenizer.encode(e.answers[0]) for e in cases])
    n, width = answers.shape[1], length + answers.shape[1]
    ids = np.zeros((len(cases), width), np.int32)
    for row, e in zip(ids, cases, strict=True):
        text = tokenizer.encode(e.context + e.question + e.answers[0])
        row[width - len(text) :] = text
    out = jax.jit(lambda p, ids: jnp.argmax(blocks.forward(cfg, p, ids, ids > 0, remat=False), -1))(params, ids)
    return (np.asarray(out)[:, -n - 1 : -1] == answers).all(1).mean()


def test_the_big_one_fits_in_4_mb_and_the_draft_is_a_quarter(embedded, draft):
    size = lambda model: sum(x.size for x in jax.tree.leaves(model[1]))
    assert sum(f.stat().st_size for f in (MODELS / "embedded").iterdir()) <= 4e6
    assert 0.2 < size(draft) / size(embedded) < 0.3
    cfg = embedded[0]
    assert cfg.layers >= 3 and cfg.heads // cfg.kv_heads > 1 and not any(cfg.local)
    assert draft[0].vocab == cfg.vocab


def test_text_survives_the_tokenizer_a_token_a_character(embedded):
    tokenizer = embedded[2]
    for text in ("  two  blanks\n\nand lines. ", tasks.haystack()[:5000], "Remember mako=528.", "".join(map(chr, range(32, 127)))):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("caf\u00e9\t")) == "caf\ufffd\ufffd"


@pytest.mark.parametrize("task", ["needle", "multi_key", "kv_recall"])
def test_it_retrieves_what_it_never_saw(embedded, task):
    cases = tasks.examples(task, 24, length=500, seed=7)
    assert replies(embedded, cases, 500) >= 0.9


def test_without_the_fact_it_cannot_know(embedded):
    cases = tasks.examples("needle", 8, length=300, seed=8)
    blind = [e._replace(context=e.context.replace(e.answers[0], "")) for e in cases]
    assert replies(embedded, blind, 300) <= 0.25
