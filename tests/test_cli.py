"""The command line: what it prints and writes, and how it refuses."""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxtok import cli
from jaxtok.core import registry
from jaxtok.models import load
from tests.evals import tiny

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cli") / "model"
    load.save(path, *tiny.make())
    return str(path)


def test_list(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in registry.names():
        assert name in text and registry.get(name).paper in text
    assert cli.main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in entries] == list(registry.names())
    assert next(e for e in entries if e["name"] == "h2o")["site"] == "policy"


def test_list_of_one(capsys):
    assert cli.main(["list", "snapkv"]) == 0
    text = capsys.readouterr().out
    assert "arXiv:2404.14469" in text and "window=64" in text and "capacity=" not in text
    assert inspect.getdoc(registry.get("snapkv")) in text  # all of it
    assert text.endswith("  url = {https://arxiv.org/abs/2404.14469}\n}\n") and "@misc{snapkv,\n  title = {{SnapKV: LLM Knows" in text
    assert cli.main(["list", "snapkv", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["options"]["window"] == 64 and entry["bibtex"] == registry.get("snapkv").bibtex
    assert cli.main(["list", "random"]) == 0
    assert "@" not in capsys.readouterr().out  # a baseline has nothing to cite


def test_generate(model, capsys):
    prompts = ["the first prompt, which is long", "short"]
    argv = ["generate", "--model", model, "--prompt", *prompts, "--new", "6", "--budget", "40"]
    assert cli.main([*argv, "--methods", "full", "k_norm", "--json"]) == 0
    full, _, same, short = json.loads(capsys.readouterr().out)
    assert full["ids"] == same["ids"] and len(full["ids"]) == 6 and full["text"].startswith(prompts[0])  # the budget covers it
    assert cli.main(["generate", "--model", model, "--prompt", prompts[1], "--new", "6", "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert alone["ids"] == short["ids"]  # a row of a batch is itself alone
    assert cli.main(["generate", "--model", model, "--prompt", prompts[1], "--new", "6"]) == 0
    assert capsys.readouterr().out == alone["text"] + "\n"


def test_a_draft(model, tmp_path, capsys):
    """A method that looks at a draft takes one by name, the embedded model's by itself."""
    prompts = ["the first prompt, which is long", "short"]
    argv = ["generate", "--model", model, "--prompt", *prompts, "--new", "3", "--budget", "40", "--json"]
    assert cli.main([*argv, "--methods", "full", "speckv:window=4,look=2", "--draft", model]) == 0
    full, _, same, short = json.loads(capsys.readouterr().out)
    assert full["ids"] == same["ids"] and full["kept"] == same["kept"] and len(short["ids"]) == 3  # the budget covers it
    out = tmp_path / "out"
    argv = [
        "compare",
        "--methods",
        "full",
        "speckv",
        "--budgets",
        "25%",
        "--tasks",
        "needle",
        "--lengths",
        "96",
        "--count",
        "2",
        "--batch",
        "2",
    ]
    assert cli.main([*argv, "--new", "2", "--out", str(out)]) == 0
    assert "speckv has window=" in capsys.readouterr().out
    document = json.loads((out / "compare.json").read_text())
    assert [r["method"].partition(":")[0] for r in document["rows"]] == ["full", "speckv"] and document["rows"][1]["kept"] < 30


def test_compare(model, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    argv = ["compare", "--model", model, "--methods", "full", "snapkv", "--budgets", "50%", "20%", "--tasks", "needle", "perplexity"]
    argv += ["--lengths", "80", "--count", "4", "--batch", "4", "--out", str(out), "--query-aware"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert "question seen when compressing" in said.out and "snapkv:window=" in said.out and said.err == ""
    document = json.loads((out / "compare.json").read_text())
    assert document["options"]["budgets"] == ["50%", "20%"] and document["options"]["query_aware"] is True
    assert document["machine"]["versions"]["jax"] and document["config"]["vocab"] == tiny.CFG.vocab
    assert len(document["rows"]) == 2 * 3 and {r["task"] for r in document["rows"]} == {"needle", "perplexity"}
    assert document["summary"][0]["kl"] == pytest.approx(0, abs=1e-6) and document["summary"][0]["top1"] == 1
    for name in ("pareto", "needles", "kept", "perplexity"):
        picture = (out / f"{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG" and len(picture) > 8000, name
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "kept.png", "needles.png", "pareto.png", "perplexity.png"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "Expected one of {list, generate, compare, show, launch}"),
        (["nope"], "nope"),
        (["compare", "--nonsense", "3"], "--nonsense"),
        (["compare", "--count", "x"], "--count: invalid literal for int"),
        (["generate"], "--prompt"),
        (["list", "snapk"], "unknown method 'snapk' (did you mean snapkv?)"),
        (["compare", "--methods", "nope"], "unknown method 'nope'"),
        (["compare", "--methods", "snapkv:windw=3"], "no option windw"),
        (["compare", "--budgets", "a quarter"], "budget 'a quarter' must be"),
        (["compare", "--tasks", "haystack"], "unknown task 'haystack'"),
        (["compare", "--tasks", "none.jsonl", "--model", "MODEL"], "cannot read none.jsonl"),
        (["compare", "--tasks", "perplexity", "--text", "none.txt", "--model", "MODEL"], "cannot read the text none.txt"),
        (["compare", "--model", "MODEL", "--methods", "snapkv:window=64", "--budgets", "10%"], "has no room for the 64 protected rows"),
        (["compare", "--model", "MODEL", "--out", "MODEL/config.json/x"], "config.json"),
        (["compare", "--model", "/no/such/place"], "no checkpoint at /no/such/place"),
        (["generate", "--prompt", "x", "--model", "BROKEN"], "is not JSON"),
        (["generate", "--prompt", "", "--model", "MODEL"], "the prompt is empty"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--temperature", "-1"], "temperature=-1"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--new", "0"], "new must be >= 1"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--methods", "speckv", "--budget", "64"], "speckv needs a draft model"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--draft", "/no/such/place"], "no checkpoint at /no/such/place"),
        (["generate", "--chat", "--draft", "MODEL"], "leave --draft out"),
        (["compare", "--model", "MODEL", "--methods", "speckv"], "speckv needs a draft model with the same token ids"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    argv = [a.replace("MODEL", model).replace("BROKEN", str(broken)) for a in argv]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("jaxtok: ") and said.err.count("\n") == 1 and message in said.err


def test_help_is_no_mistake(capsys):
    assert cli.main(["compare", "--help"]) == 0
    assert "--query-aware" in capsys.readouterr().out


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.List, "run", interrupted)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "jaxtok: interrupted\n"


def test_as_a_module():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    run = lambda *a: subprocess.run([sys.executable, "-m", "jaxtok", *a], capture_output=True, text=True, env=env, timeout=120)
    done = run("list", "nope")
    assert (
        (done.returncode, done.stdout) == (2, "")
        and done.stderr.startswith("jaxtok: unknown method 'nope'")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("argv", [["list"], ["list", "snapkv"]], ids=["table", "page"])
def test_a_reader_that_stops_is_no_error(argv):
    """As in `jaxtok list | head -1`: not a word, and the exit code of a program that the closed pipe ended."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxtok", *argv], stdout=write, stderr=subprocess.PIPE, text=True, env=env, timeout=120
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_importing_the_package_brings_in_little():
    code = "import sys, jaxtok; print([m for m in ('matplotlib', 'tyro', 'rich', 'jaxtok.cli', 'torch') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == "[]\n", done.stderr
