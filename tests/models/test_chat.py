"""Chat templates: what is read, how it renders, how it refuses; conversations that are told piece by piece."""

import json

import pytest

pytest.importorskip("jinja2", reason="chat templates need jinja2 (the chat extra)")

from jaxtok.models.chat import ChatTemplate, Conversation

CHATML = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TRIMMED = """{% for m in messages %}
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}
{% endif %}
{% endfor %}"""
FORGETS = """{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}
{% endfor %}[assistant]"""
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "caf\u00e9 <3"}]


def test_blocks_leave_no_blank_lines_and_special_tokens_have_names():
    assert ChatTemplate(CHATML)(SAID[:1]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(CHATML)(SAID[:2], reply=False).endswith("assistant\nYes?<|im_end|>\n")
    assert (
        ChatTemplate(TRIMMED, {"bos_token": "<s>", "eos_token": "</s>"})(SAID)
        == "<s>[INST] Hi [/INST] Yes? </s>\n<s>[INST] caf\u00e9 <3 [/INST]"
    )


def test_what_templates_expect_of_their_surroundings():
    source = """{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}
{% generation %}{{ namespace(x=3).x }}{% endgeneration %}
{{ strftime_now('%Y') | length }} {{ tools is none }} {{ documents is none }} {{ unk_token }}."""
    said = [{"role": "user", "content": "<caf\u00e9 & 'x'>"}]
    assert ChatTemplate(source)(said) == '{"role": "user", "content": "<caf\u00e9 & \'x\'>"}34 True True .'


def test_against_transformers():
    """The same text as apply_chat_template gives, where transformers is installed."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed (the parity extra)")
    for source in (CHATML, TRIMMED, FORGETS):
        specials = {"bos_token": "<s>", "eos_token": "</s>"}
        for reply in (True, False):
            (want,), _ = utils.render_jinja_template([SAID], chat_template=source, add_generation_prompt=reply, **specials)
            assert ChatTemplate(source, specials)(SAID, reply=reply) == want


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for m in messages %}", r"no valid template: line 1: .*(endfor|end of template)"),
        ("{{ raise_exception('only users\\nmay speak') }}", "does not take this conversation: only users may speak$"),
        ("{{ messages[7].content.strip() }}", "does not take this conversation: .*no element 7"),
        ("{{ 1 / 0 }}", "does not take this conversation: division by zero$"),
        ("{{ messages.append(3) }}", "does not take this conversation: .*unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take this conversation: .*unsafe"),
        ("{{ messages + 1 }}", "does not take this conversation: "),
    ],
    ids=["syntax", "refused", "missing", "zero", "changes", "escapes", "type"],
)
def test_errors_are_one_line(source, message):
    with pytest.raises(ValueError, match=message) as said:
        ChatTemplate(source, where="this one")(SAID)
    assert str(said.value).startswith("this one ") and "\n" not in str(said.value)


@pytest.fixture
def folder(tmp_path):
    def make(**files):
        for name, text in files.items():
            name, _, end = name.rpartition("_")
            (tmp_path / f"{name}.{end}").write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path

    return make


def test_where_templates_are_kept(folder):
    config = {"chat_template": "{{ bos_token }}1{{ pad_token }}", "bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None}
    assert ChatTemplate.read(folder(tokenizer_config_json=config))(SAID) == "<s>1"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "2{{ eos_token }}"}]
    assert ChatTemplate.read(folder(tokenizer_config_json={"chat_template": named, "eos_token": "</s>"}))(SAID) == "2</s>"
    assert ChatTemplate.read(folder(tokenizer_config_json={}, chat_template_json={"chat_template": "3"}))(SAID) == "3"
    assert ChatTemplate.read(folder(chat_template_jinja="4"))(SAID) == "4"  # before all others


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no chat template"),
        ({"tokenizer_config_json": {"chat_template": None}}, "has no chat template"),
        ({"tokenizer_config_json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config_json": []}, "should hold an object, holds a list"),
        (
            {"tokenizer_config_json": {"chat_template": [{"name": "rag", "template": "x"}]}},
            "chat templates 'rag', but none named 'default'",
        ),
        ({"chat_template_jinja": "{{"}, "chat_template.jinja is no valid template: line 1"),
    ],
)
def test_no_template_is_one_line(folder, files, message):
    with pytest.raises(ValueError, match=message) as said:
        ChatTemplate.read(folder(**files))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("source", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
def test_a_conversation_told_piece_by_piece_is_the_whole(source):
    """The pieces and the replies join to the text of all messages, up to the blanks around a reply that a template puts or takes away."""
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    talk, told = Conversation(template), ""
    plain = lambda text: text.replace(" ", "").replace("\n", "")
    for i, (question, reply) in enumerate((("Hi", " Yes?"), ("caf\u00e9 <3", "  42, of course \n"), ("Why? ", "Because"))):
        more, fresh = talk.ask(question)
        assert fresh == (i == 0)
        told += more
        assert plain(told) == plain(template(talk.messages))
        told += reply
        talk.answer(reply)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3


def test_a_system_message_comes_first():
    talk = Conversation(ChatTemplate(CHATML), system="Be brief.")
    assert talk.ask("Hi")[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_a_template_that_rewrites_what_was_said_is_told_from_the_start():
    talk = Conversation(ChatTemplate(FORGETS))
    assert talk.ask("Hi") == ("[user]Hi\n[assistant]", True)
    talk.answer("Yes?")
    assert talk.ask("Well?") == ("\n[user]Well?\n[assistant]", False)
    talk.answer("<think>hm</think>No")
    assert talk.ask("Why?") == ("[user]Hi\n[assistant]Yes?\n[user]Well?\n[assistant]No\n[user]Why?\n[assistant]", True)
    talk.answer("So")
    assert talk.ask("Bye") == ("\n[user]Bye\n[assistant]", False)
