"""Recall as classification: the label by another reckoning, what a row looks like, errors."""

import numpy as np
import pytest

from jaxtok.evals import recall, tasks


@pytest.mark.parametrize("fewest", [None, 2])
def test_pairs(fewest):
    keys, values = 12, 5
    b = recall.pairs(0, 40, length=21, keys=keys, values=values, fewest=fewest)
    lengths = set()
    for ids, live, label in zip(b.ids, b.live, b.label, strict=True):
        row = ids[live].tolist()
        assert row[0] == recall.ASK and live[: len(row)].all()
        pairs = dict(zip(row[2::2], row[3::2], strict=True))
        assert len(pairs) == len(row[2::2]) and all(2 <= k < 2 + keys <= v < recall.vocab(keys, values) for k, v in pairs.items())
        assert pairs[row[1]] - 2 - keys == label
        lengths.add(len(row))
    assert lengths == {20} if fewest is None else lengths > {6} or len(lengths) > 3
    assert np.array_equal(recall.pairs(0, 3, length=21, keys=keys, values=values, fewest=fewest, start=7).ids, b.ids[7:10])
    assert len(set(b.label.tolist())) == values


@pytest.mark.parametrize("fewest", [None, 3])
def test_entries(fewest):
    """The label by a search, and the same rows as `pairs`."""
    keys, values = 12, 5
    b = recall.entries(0, 40, length=9, keys=keys, values=values, fewest=fewest)
    two = recall.pairs(0, 40, length=18, keys=keys, values=values, fewest=fewest)
    assert b.ids.shape == (40, 9) and b.ids.max() < recall.entries_vocab(keys, values) and np.array_equal(b.label, two.label)
    for ids, live, label, long in zip(b.ids, b.live, b.label, two.ids, strict=True):
        asked, *told = ids[live].tolist()
        held = dict(divmod(t - 1 - keys, values) for t in told)
        assert 1 <= asked <= keys and len(held) == len(told) and held[asked - 1] == label
        assert [(2 + k, 2 + keys + v) for k, v in held.items()] == [tuple(p) for p in long[2 : 2 + 2 * len(told)].reshape(-1, 2).tolist()]
        assert live[: len(told) + 1].all() and not ids[~live].any()
    assert b.live.all() if fewest is None else len(set(b.live.sum(1).tolist())) > 3


def test_texts():
    b = recall.texts(1, 4, length=120)
    for ids, live, label, e in zip(b.ids, b.live, b.label, tasks.examples("kv_recall", 4, length=120, seed=1), strict=True):
        text = bytes(ids[live].tolist()).decode()
        assert text == e.question + e.context and text.startswith(e.question) and int(e.answers[0][0]) == label
        assert ids.max() < recall.ALPHABET


@pytest.mark.parametrize("given", [dict(length=5), dict(length=40, keys=8), dict(values=1), dict(fewest=1), dict(fewest=99)])
def test_refuses(given):
    with pytest.raises(ValueError):
        recall.pairs(0, 1, **({"length": 12} | given))
    with pytest.raises(ValueError):
        recall.entries(0, 1, length=40, keys=8)
