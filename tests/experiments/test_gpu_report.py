"""The report on a GPU, tried in the Pallas interpreter: a tiny case of each kernel, what goes wrong becomes a row, and what the rows say together."""

import importlib
import json
import pathlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
ONE = {  # a case a kernel
    "check flash: ", "check column_sum: ", "check block_sparse: ", "check read: ", "time scores: ", "time merge: ", "time ceiling: copy",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def script(name):
    return importlib.import_module(name)


def test_report(tmp_path, capsys, monkeypatch):
    """JSON, table and exit state; a kernel that fails is a row with its error, and its numbers have no time."""
    report, rows = script("gpu_report"), script("kernel_rows")
    real = rows.merge_row

    def broken(name, case, **more):
        if more.get("exact"):
            return real(name, case, **more)
        raise RuntimeError("no such instruction")

    def wrong(name, case, **more):
        row = score(name, case, **more)
        return row if more.get("exact") else row.__class__(**vars(row) | {"call": lambda *a: lambda *b: 1 + row.call(*a)(*b)})

    score = rows.score_row
    monkeypatch.setattr(rows, "merge_row", broken)
    monkeypatch.setattr(rows, "score_row", wrong)
    o = report.Options(impl="interpret", quick=True, only=tuple(ONE), here=True, repeats=2, budget=0.01, out=tmp_path / "r")
    report.main(o)
    document = json.loads((o.out / "results.json").read_text())
    by = {(r["part"], r["kernel"]): r for r in document["checks"] + document["rows"]}
    assert {kernel for part, kernel in by if part == "check"} == {"flash", "column_sum", "block_sparse", "read"}
    assert all(r["right"] and r["delta"] <= 1e-5 and r["compile_ms"] > 0 for r in document["checks"])
    assert by["time", "merge"]["error"] == "RuntimeError: no such instruction"
    assert by["time", "scores"]["error"].startswith("wrong: it differs from the reference by 1 ") and "run_ms" not in by["time", "scores"]
    copy = by["time", "ceiling"]
    assert copy["copy_%"] == pytest.approx(100) and copy["gbs"] == pytest.approx(copy["bytes"] / copy["run_ms"][1] / 1e6)
    assert {x["met"] for x in document["goals"]} == {None} and document["left"] == []
    page, said = (o.out / "README.md").read_text(), capsys.readouterr().out
    assert (
        "| merge | match | - | - |" in page
        and "no such instruction" in page
        and "times mean nothing" in page
        and "| flash | 1 | 0 | 0 | 0 | 0 |" in page
    )
    assert "0 rows left for want of time; 0 cases not right" in said
    assert not report.failed(document["checks"]) and report.failed([by["time", "scores"]])


def test_every_kernel_is_checked_and_timed():
    rows = script("kernel_rows")
    for impl, backend in (("pallas_gpu", "gpu"), ("pallas_tpu", "tpu")):
        checks, timed = rows.checks(impl, False), rows.timed(backend, False)
        for kernel in rows.KERNELS:
            assert sum(name.startswith(f"check {kernel}: ") for name in checks) >= 8, kernel
            assert any(name.startswith(f"time {kernel}: ") for name in timed), kernel
        assert any("cudnn" in name for name in timed) == (backend == "gpu")
        assert next(iter(timed)).startswith("time ceiling: matmul")


def test_goals():
    """By hand: what is compared with what, and in which direction."""
    bench = script("bench_kernels")
    row = lambda kernel, name, ms, **more: (
        {"kernel": kernel, "name": name, "run_ms": [ms, ms, ms], "peer": "", "flops": 0, "gbs": 1.0} | more
    )
    peer = {"peer": "prefill 32k"}
    rows = [
        row("ceiling", "copy", 1.0, gbs=4000.0),
        row("dense", "prefill 32k, cudnn", 10.0, **peer),
        row("dense", "prefill 32k, xla", 30.0, **peer),
        row("flash", "prefill 32k", 8.0, **peer),
        row("column_sum", "prefill 32k", 9.0, **peer),
        row("block_sparse", "rho 1/2", 6.0, **peer),
        row("block_sparse", "rho 1/4", 4.0, **peer),
        row("dense", "decode 128k, cudnn", 0.3, peer="decode 128k"),
        row("read", "decode 128k", 0.2, peer="decode 128k", gbs=3400.0),
        row("read", "2048 rows by indices", 0.01),
        row("read", "Quest, pages of 16, with its selection", 0.04),
        {"kernel": "read", "name": "TokenSelect, a cache hit", "error": "wrong", "peer": ""},
    ]
    found = {x["goal"]: x for x in bench.goals(rows)}
    get = lambda start: next((x["measured"], x["met"]) for name, x in found.items() if name.startswith(start))
    assert get("flash forward, 32k") == (1.25, True) and get("flash forward, 8k") == (None, None)
    assert get("block_sparse, rho = 1/2") == (0.6, True) and get("block_sparse, rho = 1/4") == (pytest.approx(0.4), False)
    assert get("full decode") == (85.0, True)
    assert get("2048 rows") == (pytest.approx(20), True) and get("Quest, pages of 16") == (pytest.approx(5), False)
    assert get("TokenSelect, a cache hit") == (None, None) and get("column_sum, 32k") == (pytest.approx(9 / 8), False)


def test_a_worker_that_hangs_or_dies_costs_one_row(tmp_path):
    workers = script("kernel_workers")
    code = """
        import os, sys, time
        sys.path.insert(0, {folder!r})
        import kernel_workers

        def perform(name):
            print("no answer")
            if name == "hangs":
                time.sleep(60)
            if name == "dies":
                print("out of luck", file=sys.stderr, flush=True)
                os._exit(3)
            return {{"error": "CUDA_ERROR_ILLEGAL_ADDRESS"}} if name == "breaks" else {{"pid": os.getpid()}}

        kernel_workers.answer(perform)
    """
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(code.format(folder=str(FOLDER))))
    found, command = {}, [sys.executable, str(path)]
    workers.run(["one", "two", "hangs", "three", "dies", "breaks", "four"], command, found.__setitem__, each=1.5)
    assert found["one"]["pid"] == found["two"]["pid"] != found["three"]["pid"] != found["four"]["pid"]
    assert "no answer in 2 s" in found["hangs"]["error"]
    assert found["dies"]["error"].startswith("the process died (3): ") and found["dies"]["error"].endswith("| out of luck")
    assert "CUDA_ERROR" in found["breaks"]["error"]
    late = {}
    workers.run(["one"], command, late.__setitem__, until=0.0)
    assert late == {}


def test_difference():
    rows = script("kernel_rows")
    inf = np.inf
    assert rows.difference([np.array([1.0, -inf])], [np.array([1.5, -inf])], 0.5) == (0.5, True)
    assert rows.difference([np.array([1.0, 0.0])], [np.array([1.0, -inf])], 0.5)[1] is False
    assert rows.difference([np.array([np.nan, 1e30])], [np.array([1.0, 1e30])], 9.0)[1] is False
    assert rows.difference([np.array([3.0, 1e30])], [np.array([3.1, 1.0000001e30])], 0.04) == (pytest.approx(0.1), True)
    small = [np.zeros(3)], [np.full(3, 0.01)], 2e-2
    assert rows.difference(*small)[1] and not rows.difference(*small, 0.0)[1]  # a long mean of random rows


def test_pairs_and_tables():
    """FLOPs count what is visible or listed."""
    rows = script("kernel_rows")
    case = rows.flash_cases.Case(h=4, g=2, t=6, s=10, d=8, c=8)
    *_, named = case.arrays()
    assert rows.visible(case, named).tolist() == [[[5, 6, 7, 8, 9, 10]]]
    assert rows.flash_row("x", case).flops == 2 * 4 * 45 * 16
    windowed = rows.flash_cases.Case(t=6, s=10, window=3, segments=2)
    q, k, _, named = jax.tree.map(jnp.asarray, windowed.arrays())
    _, seen = rows.flash_reference.logits(q, k, **named, **windowed.options())
    np.testing.assert_array_equal(rows.visible(windowed, windowed.arrays()[3])[0, 0], jnp.sum(seen[0, 0], -1))
    sparse = rows.sparse_cases.Case(t=64, s=64, bq=16, bk=8)
    index, count = rows.spread(sparse, 0.5, 0)
    assert count[0, 0].tolist() == [1, 2, 3, 4] and index.shape == (1, 1, 4, 4)
    for i in range(4):
        listed = index[0, 0, i, : count[0, 0, i]]
        assert 2 * i + 1 in listed and max(listed) == 2 * i + 1 and len(set(listed.tolist())) == len(listed)
