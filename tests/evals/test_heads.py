"""Methods that leave some heads whole, in a comparison: budgets on the average, heads found on the model, everything covered = the full model."""

import dataclasses

import numpy as np
import pytest

from jaxtok.core import registry
from jaxtok.evals import compare, heads, measure
from jaxtok.evals.batched import Model
from jaxtok.models import blocks
from tests.evals import tiny

OPTIONS = compare.Options(
    methods=("full", "razor_attention"), budgets=("50%", "128"), tasks=("needle",), lengths=(64,), count=2, batch=4, repeats=1
)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def test_compare(model):
    """One call: half the slots, at most, of which a whole head is counted; at a budget over the context nothing differs from the full model."""
    result = compare.run(*model, OPTIONS)
    full, *rows = result.rows
    for row in rows:
        assert row["lost"] == 0 and row["uncounted"] == []
        if row["budget"] == "128":
            assert row["kl"] < 1e-6 and row["kept"] == full["kept"]
        else:  # one of four heads whole: 48 of the context's 48 live tokens, the others 21 slots of 64 less the bucket's 16 dead rows
            assert row["kl"] > 1e-3 and row["kept"] == pytest.approx((48 + 3 * 21) / 4) and row["cache_bytes"] < 0.55 * full["cache_bytes"]
    assert any("razor_attention at 50% leaves 1 of 4 heads of a context of 64 whole, 21 slots in the others" in n for n in result.notes)


def test_the_searches_name_as_many_heads_as_asked(model):
    for name, search in heads.SEARCH.items():
        choose = search(*model, 32)
        assert [int(choose(count).sum()) for count in (0, 1, 4)] == [0, 1, 4], name


def test_recipes_and_weights_go_together(model):
    cfg, params, _ = model
    splits = heads.Splits(*model)
    recipe, moved = splits.at("razor_attention:sinks=1", 20, 40)
    assert recipe.policy == registry.build("razor_attention:sinks=1", (20 * 4 - 40) // 3) and sum(a for a, _ in recipe.heads) == 1
    ids = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_allclose(blocks.forward(cfg, moved, ids), blocks.forward(cfg, params, ids), atol=1e-5)
    assert splits.at("razor_attention:sinks=1", 20, 40)[0] == recipe and len(splits.notes) == 1


def test_sinks_are_made_to_fit(model):
    good, notes = compare.fitted(["duo_attention", "razor_attention"], tiny.CFG, 40, leave_out=False)
    assert good == ("duo_attention:sinks=2", "razor_attention") and notes == ["duo_attention has sinks=2, so that it fits into 40 slots"]
    with pytest.raises(ValueError, match="has no room for the 65 protected rows"):
        compare.fitted(["duo_attention:sinks=64"], tiny.CFG, 40, leave_out=False) and compare.run(
            *model, dataclasses.replace(OPTIONS, methods=("duo_attention:sinks=64",))
        )


def test_elsewhere_the_heads_must_be_told(model):
    cfg, params, _ = model
    with pytest.raises(ValueError, match="razor_attention leaves some heads whole and must be told which"):
        measure.recipe_of("razor_attention", 64)
    with pytest.raises(ValueError, match="duo_attention leaves some heads whole and must be told which"):
        Model(cfg=cfg, params=params, method="duo_attention", budget="50%", batch=2)
