"""`jaxtok generate --chat`: turns on one cache, streamed; what it reports and how it refuses."""

import io
import json
import sys

import pytest

from jaxtok import cli
from jaxtok.models import load
from tests.evals import tiny

pytest.importorskip("jinja2", reason="chat templates need jinja2 (the chat extra)")
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}|\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("chat") / "model"
    load.save(path, *tiny.make())
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "~"}))
    return str(path)


def talk(model, *argv):
    return cli.main(["generate", "--chat", "--model", model, "--new", "12", "--context", "256", *argv])


@pytest.fixture(scope="module")
def replies(model):
    """Two turns with the full cache."""
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert talk(model, "--prompt", "Hello there", "And then?", "--system", "Be brief", "--json") == 0
        return json.loads(sys.stdout.getvalue())
    finally:
        sys.stdout = out


def test_turns_on_one_cache_say_what_the_whole_text_says(model, replies, capsys):
    first, second = replies
    text = "[system] Be brief|\n[user] Hello there|\n[assistant] "
    for turn in (first, second):
        assert cli.main(["generate", "--model", model, "--prompt", text, "--new", "12", "--json"]) == 0
        (whole,) = json.loads(capsys.readouterr().out)
        upto = whole["ids"].index(95) if 95 in whole["ids"] else 12  # "~", which ends a turn here, is id 95
        assert turn["ids"] == whole["ids"][:upto] and turn["text"] == whole["text"][len(text) :][:upto]
        assert turn["lost"] == 0 and turn["kept"] == turn["tokens"] == len(text) + len(turn["ids"])
        text += turn["text"] + "|\n[user] And then?|\n[assistant] "


class Screen(io.StringIO):
    """What was to be seen at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_what_is_typed_is_answered_as_it_comes(model, replies, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there\n\nAnd then?\n/new\nHello there\n/exit\nnever\n"))
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    assert talk(model, "--system", "Be brief") == 0
    said = [turn["text"] for turn in replies]
    assert screen.getvalue() == "".join(f"{text}\n" for text in (*said, said[0]))
    assert any(0 < len(seen) < len(said[0]) for seen in screen.seen), "nothing is shown before a reply is whole"


@pytest.mark.parametrize("method", ["snapkv:window=4", "h2o", "quest:block=4"])
def test_a_method_bounds_the_cache_turn_after_turn(model, method, capsys):
    prompts = [f"A question with some length, number {i}" for i in range(3)]
    assert talk(model, "--prompt", *prompts, "--methods", method, "--budget", "20", "--json") == 0
    said = capsys.readouterr()
    turns = json.loads(said.out)
    assert said.err == "" and [turn["lost"] for turn in turns] == [0] * 3
    most = {"snapkv:window=4": 20 + 12, "h2o": 20, "quest:block=4": 1000}[method]
    assert all(turn["kept"] <= most for turn in turns) and turns[-1]["tokens"] > 120


def test_a_full_cache_is_reported(model, capsys):
    assert talk(model, "--context", "48", "--prompt", "Hello", "Hello again", "--json") == 0
    said = capsys.readouterr()
    first, second = json.loads(said.out)
    assert first["lost"] == 0 and second["lost"] == second["tokens"] - 48 > 0 and second["kept"] == 48
    assert f"jaxtok: the cache is full: {second['lost']} tokens found no room" in said.err and said.err.count("\n") == 1


def test_a_template_that_rewrites_is_read_again(model, tmp_path, capsys):
    path = tmp_path / "model"
    load.save(path, *tiny.make())
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}"))
    assert talk(str(path), "--prompt", "Hello", "Again", "--json") == 0
    said = capsys.readouterr()
    assert "rewrites earlier turns" in said.err and said.err.count("\n") == 1
    second = json.loads(said.out)[1]
    assert second["kept"] == second["tokens"] == len("[user] ...|\n[assistant] ...|\n[user] Again|\n[assistant] ") + len(second["ids"])


@pytest.mark.parametrize(
    "argv, template, message",
    [
        ([], None, "has no chat template"),
        ([], "{{", "is no valid template: line 1"),
        ([], "{{ raise_exception('no!') }}", "does not take this conversation: no!"),
        (["--methods", "h2o", "tova"], "x", "a chat takes one method, got h2o, tova"),
        (["--context", "0"], "x", "context must be >= 1, got 0"),
        (["--context", "16"], "seventeen letters", "a turn of 17 tokens is more than the cache of 16 slots holds"),
        (["--methods", "key_rerotation:base=k_norm", "--prompt", "a", "b"], TEMPLATE, "they are not kept after a prefill"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, template, message, tmp_path, capsys):
    path = tmp_path / "model"
    load.save(path, *tiny.make())
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    assert talk(str(path), "--prompt", "x", "--json", *argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("jaxtok: ") and said.err.count("\n") == 1 and message in said.err


def test_without_jinja_it_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert talk(model, "--prompt", "x") == 2
    assert capsys.readouterr().err == "jaxtok: chat templates need jinja2: pip install 'jaxtok[chat]'\n"


def test_what_goes_with_a_chat_only(capsys):
    assert cli.main(["generate", "--prompt", "x", "--system", "Be brief"]) == 2
    assert "--system and --context go with --chat" in capsys.readouterr().err
