"""The comparison on a tiny random model: exact relations, both protocols, what falls with the budget."""

import dataclasses
import functools
import io
import json
import os

import numpy as np
import pytest

import jaxtok.methods  # noqa: F401  fills the registry
from jaxtok.evals import cases, compare, figures, report, ruler, tasks
from tests.evals import tiny

# a method of each kind: drawn, policies, budgets a layer and a head, wrappers, folded, thin keys, read twice, read sparsely
METHODS = ("full", "random", "streaming_llm", "h2o", "snapkv:window=4", "pyramidkv:window=4", "expected_attention",
           "criticalkv:base=ada_kv,base=k_norm", "think:ratio=1", "cam:window=4,base=k_norm", "kvzip:share=model", "quest:dense_layers=0")  # fmt: skip
if os.environ.get("JAXTOK_FULL"):
    METHODS += ("tova", "key_diff", "k_norm", "ada_kv:window=4", "chunkkv:window=4", "lagkv", "cur", "drop_kv:window=4", "finch:window=4",
                "merging:base=k_norm")  # fmt: skip
SMALL = compare.Options(
    methods=("full", "snapkv:window=4", "streaming_llm"), budgets=("50%", "25%"), tasks=("needle", "kv_recall"), lengths=(64, 96),
    count=3, batch=8, repeats=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@functools.cache
def compared(aware):
    return compare.run(*tiny.make(), dataclasses.replace(SMALL, query_aware=aware))


@pytest.fixture(params=[False, True], ids=["question unseen", "question seen"])
def result(request):
    return compared(request.param)


def test_a_budget_that_covers_everything_is_the_full_model(model):
    # 48 + 16 rows for question and padding, 4 generated
    options = dataclasses.replace(SMALL, methods=METHODS, budgets=("128",), tasks=("needle",), lengths=(48,))
    rows = compare.run(*model, options).rows
    assert [r["method"] for r in rows] == list(METHODS)
    for row in rows:
        assert row["kl"] < 1e-6 and row["top1"] == 1.0, row["method"]
        assert row["sample"]["said"] == rows[0]["sample"]["said"], row["method"]
        assert row["kept"] == rows[0]["kept"] and row["lost"] == 0 and row["score"] == rows[0]["score"]
        assert row["uncounted"] == [] and row["peak_bytes"] > row["cache_bytes"] > 0


def test_rows(result):
    plan = [("full", "100%"), *((m, b) for m in SMALL.methods[1:] for b in SMALL.budgets)]
    want = {(m, b, t, n) for m, b in plan for n in (64, 96) for t in SMALL.tasks}
    found = [(r["method"], r["budget"], r["task"], r["length"]) for r in result.rows]
    assert set(found) == want and len(found) == len(want)
    for row in result.rows:
        assert row["cases"] == 3 and len(row["each"]) == 3
        assert row["time_s"] > 0 and row["compile_s"] > 0 and row["step_flops"] > 0 and row["prefill_flops"] > row["step_flops"]
        if row["method"] == "full":
            assert row["kl"] == pytest.approx(0, abs=1e-6) and row["top1"] == 1.0 and row["lost"] == 0
        else:
            assert row["kl"] > 0


def test_costs_fall_with_the_budget(result):
    for method in SMALL.methods[1:]:
        mine = {b: next(r for r in result.rows if (r["method"], r["budget"]) == (method, b)) for b in SMALL.budgets}
        full = result.rows[0]
        for less, more in ((mine["50%"], full), (mine["25%"], mine["50%"])):
            for name in ("cache_bytes", "step_bytes", "kept", "capacity"):
                assert less[name] < more[name], (method, name)


def test_a_share_is_of_each_rows_own_tokens(result):
    aware = result.rows[0]["query_aware"]
    for row in result.rows:
        if row["budget"] == "25%" and row["task"] == "kv_recall":
            tokens = row["length"] if aware else row["length"] - len("\nRemember abcdef=")
            assert 0.25 * tokens - 3 <= row["kept"] <= 0.25 * tokens + 1


def test_a_second_reading_and_thin_keys(model):
    """KVzip reads the context twice and keeps half; ThinK keeps all tokens in fewer bytes."""
    options = dataclasses.replace(
        SMALL, methods=("full", "kvzip", "think:ratio=0.5,recent=4"), budgets=("50%",), tasks=("needle",), lengths=(48,)
    )
    full, half, thin = compare.run(*model, options).rows
    assert half["kept"] == pytest.approx(full["kept"] / 2, abs=0.5) and thin["kept"] == full["kept"]
    assert half["prefill_flops"] > 2 * full["prefill_flops"] > 0
    assert 0.75 < thin["cache_bytes"] / full["cache_bytes"] < 0.9  # keys are half of the cache, most of them half as wide


def test_methods_that_look_at_a_draft(model):
    """The model as its own draft: a budget that covers everything is the full model, a smaller one keeps that share; without it, no."""
    options = dataclasses.replace(
        SMALL, methods=("full", "speckv:window=4,look=3"), budgets=("128", "25%"), tasks=("needle", "perplexity"), lengths=(48,)
    )
    with pytest.raises(ValueError, match=r"speckv needs a draft model with the same token ids; give draft=\(cfg, params\)"):
        compare.run(*model, options)
    other = (dataclasses.replace(model[0], vocab=5), model[1])
    with pytest.raises(ValueError, match="the draft has 5 token ids and the model 97; they must share a tokenizer"):
        compare.run(*model, options, draft=other)
    rows = compare.run(*model, options, draft=model[:2]).rows
    full, texts = rows[0], [r for r in rows if r["task"] == "perplexity"]
    covered, less = rows[1:3]
    assert covered["kl"] < 1e-6 and covered["kept"] == full["kept"] and less["uncounted"] == []
    assert less["kept"] == pytest.approx(full["kept"] / 4 + 1, abs=1)  # the last token comes on top
    assert less["prefill_flops"] > 1.7 * full["prefill_flops"]  # where something is dropped, the draft runs too
    for row in texts[1:]:
        assert (abs(row["nll"] - texts[0]["nll"]) < 1e-5) == (row["budget"] == "128")
    good, notes = compare.fitted(["speckv", "k_norm"], tiny.CFG, 51, leave_out=True)
    assert good == ("k_norm",) and "left out: speckv needs a draft model" in notes[0]
    assert compare.fitted(["speckv"], tiny.CFG, 51, leave_out=True, draft=tiny.CFG)[0] == ("speckv",)


def test_lengths_near_each_other_share_their_programs(model):
    made = [c for n in (64, 96, 300) for c in cases.make("needle", model[2], lengths=(n,), count=2, seed=0)]
    groups = cases.group(made, query_aware=False)
    assert [len(g.cases) for g in groups] == [2, 4]
    assert all(g.context % cases.BUCKET == 0 == g.question % cases.BUCKET for g in groups)
    ((_, rows),) = cases.batches(groups[1], 8)
    live = np.asarray(rows.live)
    assert live.shape == (8, groups[1].context) and not live[4:].any()  # padded to the batch
    assert (np.diff(live.astype(int), axis=1) >= 0).all()  # dead first


def test_perplexity_is_a_task(model):
    rows = compare.run(
        *model, dataclasses.replace(SMALL, tasks=("perplexity",), budgets=("20",), lengths=(40,), methods=("full", "h2o"))
    ).rows
    assert [r["task"] for r in rows] == ["perplexity"] * 2
    assert rows[0]["perplexity"] == pytest.approx(np.exp(rows[0]["nll"])) and rows[1]["kept"] == 20
    assert report.summary(rows)[0]["nll"] == rows[0]["nll"]


def test_a_ruler_file_is_a_task(model, tmp_path):
    path = tmp_path / "niah.jsonl"
    ruler.write_jsonl(path, tasks.examples("needle", 2, length=60, encode=lambda t: model[2].encode(t, special=False)))
    options = dataclasses.replace(SMALL, tasks=(str(path),), budgets=("50%",), methods=("k_norm",), new=4)
    (row,) = compare.run(*model, options).rows
    assert row["task"] == "niah" and row["cases"] == 2


def test_windows_are_fitted_and_said():
    good, notes = compare.fitted(["snapkv", "k_norm", "per_layer", "chain"], tiny.CFG, 51, leave_out=True)
    assert good == ("snapkv:window=16", "k_norm")
    assert notes[0] == "snapkv has window=16, so that it fits into 51 slots" and [n[:8] for n in notes[1:]] == ["left out"] * 2
    assert compare.fitted(["snapkv:window=99"], tiny.CFG, 51, leave_out=False) == (("snapkv:window=99",), [])
    with pytest.raises(ValueError, match="chain needs methods"):
        compare.fitted(["chain"], tiny.CFG, 51, leave_out=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("nope",)}, "unknown method 'nope'"),
        ({"methods": ("snapkv:pool=2",)}, "pool must be odd"),
        ({"budgets": ("x",)}, "budget 'x' must be"),
        ({"tasks": ("x",)}, "unknown task 'x'; known: needle"),
        ({"lengths": (0,)}, "lengths must be >= 1"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"new": 1}, "new must be >= 2"),
        ({"skip": 1.0}, "skip must be between 0 and 1"),
    ],
)
def test_refused_before_anything_runs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_what_cannot_fit_is_refused_before_compiling(model):
    with pytest.raises(ValueError, match="has no room for the 64 protected rows"):
        compare.run(*model, dataclasses.replace(SMALL, methods=("snapkv:window=64",), budgets=("25%",)))


def test_table_json_and_figures(result, tmp_path):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table(result.rows))
    text = console.export_text()
    assert "snapkv:window=4" in text and "recall" in text
    path = report.write(tmp_path / "x.json", {"rows": result.rows, "nan": float("nan")})
    assert json.loads(path.read_text())["nan"] is None
    for name, draw in (("pareto", figures.pareto), ("needles", figures.needles)):
        out = draw(result.rows, tmp_path / f"{name}.png")
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 10_000
    assert figures.kept(result.kept, tmp_path / "kept.png").stat().st_size > 10_000
    assert figures.perplexities(result.rows, tmp_path / "no.png") is None


def test_kept_maps_name_the_positions(result):
    for m in result.kept:
        row = next(r for r in result.rows if (r["method"], r["budget"]) == (m["method"], m["budget"]))
        assert len(m["kept"]) >= m["context"] and 0 <= min(m["kept"]) and max(m["kept"]) <= 1
        assert sum(m["kept"]) <= row["capacity"] + 1e-3
    stream = next(m for m in result.kept if m["method"] == "streaming_llm" and m["budget"] == "25%")
    assert stream["kept"][:4] == [1.0] * 4 and stream["kept"][5] == 0.0  # the sinks, and not what follows them


def test_rows_say_how_many_sinks_are_left(result):
    for row in result.rows:
        assert 0 <= row["sinks"] <= 4
        if row["method"].partition(":")[0] in ("full", "streaming_llm"):
            assert row["sinks"] == 4
    assert any(row["sinks"] < 4 for row in result.rows)


def test_offload_is_refused():
    with pytest.raises(ValueError, match=r"tokenselect:offload=true.*leave offload out"):
        compare.checked("tokenselect:offload=true", 16, tiny.CFG, None)


def test_sink_figure(tmp_path):
    path = figures.sinks([("a", np.eye(3, 5)), ("b", np.zeros((20, 32)))], tmp_path / "sinks.png")
    assert path.stat().st_size > 10_000
