"""The chat template of a Hugging Face checkpoint: from messages to the text that the model was trained on.

A template is a Jinja program that somebody else wrote; it runs in Jinja's sandbox, which gives it no access to Python.
"""

import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtok.models import load

Messages = Sequence[Mapping[str, Any]]  # {"role": "user", "content": "..."}


class ChatTemplate:
    """A template and the special tokens that it may name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, specials: Mapping[str, str] | None = None, *, where: str = "the chat template"):
        """ValueError, one line, where `source` is no Jinja template."""
        jinja2, environment = _environment()
        self.specials, self.where = dict(specials or {}), where
        try:
            self.program = environment.from_string(source)
        except jinja2.TemplateError as e:
            line = getattr(e, "lineno", None)
            raise ValueError(f"{where} is no valid template: {f'line {line}: ' if line else ''}{_why(e)}") from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "ChatTemplate":
        """That of a checkpoint (a Hugging Face directory or hub id): chat_template.jinja, or `chat_template` of tokenizer_config.json or of
        chat_template.json. Where there are several by name, the one named default. ValueError where there is none.
        """
        folder = load.find(path)
        folder = folder if folder.is_dir() else folder.parent
        config, file = _object(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
        specials = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        specials = {k: v for k, v in specials.items() if isinstance(v, str)}
        if file.is_file():
            return cls(file.read_text("utf-8"), specials, where=str(file))
        for name, found in (("tokenizer_config.json", config), ("chat_template.json", _object(folder / "chat_template.json"))):
            template = found.get("chat_template")
            if isinstance(template, list):
                named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
                template = named.get("default")
                if template is None:
                    raise ValueError(f"{folder / name} has chat templates {', '.join(map(repr, named))}, but none named 'default'")
            if isinstance(template, str):
                return cls(template, specials, where=f"the chat template of {folder / name}")
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); choose a chat model"
        )

    def __call__(self, messages: Messages, *, reply: bool = True) -> str:
        """The text of a conversation, special tokens spelled out; `reply`: up to where the model's next message begins.

        ValueError, one line, where the template refuses the messages or fails on them.
        """
        try:
            messages = [dict(m) for m in messages]
            return self.program.render(messages=messages, add_generation_prompt=reply, tools=None, documents=None, **self.specials)
        except Exception as e:  # a template may fail in any way a program can
            raise ValueError(f"{self.where} does not take this conversation: {_why(e)}") from None


MARK = "\u241ereply\u241e"  # stands for a reply while its place in a text is looked for


class Conversation:
    """The messages so far, and what of their text the model has not been told yet."""

    def __init__(self, template: ChatTemplate, system: str | None = None):
        self.template, self.told = template, ""
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str) -> tuple[str, bool]:
        """(what the model reads next, whether from the start): what follows its last reply, unless the template has changed what stands
        before (a rule of some: earlier thoughts are left out), or this is the first message.
        """
        last = self.messages[-1] if self.messages else {}
        self.messages.append({"role": "user", "content": text})
        before, self.told = self.told, self.template(self.messages)
        if last.get("role") != "assistant":
            return self.told, True
        marked = self.template([*self.messages[:-2], last | {"content": MARK}, self.messages[-1]])
        start, mark, after = marked.partition(MARK)
        reply = last["content"]
        if mark and start.rstrip() == before.rstrip() and self.told in (start + reply + after, start + reply.strip() + after):
            return after, False
        return self.told, True

    def answer(self, text: str) -> None:
        """The model's reply, without the token that ends it."""
        self.messages.append({"role": "assistant", "content": text})


def _why(e: Exception) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a file, {} without the file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold an object, holds a {type(found).__name__}")
    return found


def _environment() -> tuple[Any, Any]:
    """(jinja2, what templates written for transformers expect: blocks leave no blank line, loops may break, a few functions)."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise ValueError("chat templates need jinja2: pip install 'jaxtok[chat]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what the model says, for training; here it is its contents."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return jinja2, environment
