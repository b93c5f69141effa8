"""`jaxtok list`: the registry, or all about one method."""

import dataclasses
import inspect
import json
from typing import Annotated, Any

import tyro

from jaxtok.cli.common import Common, console


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(Common):
    """Which methods there are: name, site, paper. With a NAME: what it does, its options, what to cite."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """A method's name."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from jaxtok.core import registry

        if self.name is not None:
            entry = _all_about(registry.get(self.name))
            print(json.dumps(entry, indent=1, default=str) if self.json else _page(entry))
            return
        found = [_summary(registry.get(name)) for name in registry.names()]
        if self.json:
            print(json.dumps(found, indent=1))
            return
        from rich.table import Table

        out = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("name", "site", "paper", "summary"):
            out.add_column(column, no_wrap=column != "summary", overflow="fold")
        for entry in found:
            out.add_row(*(entry[k].replace("[", "\\[") for k in ("name", "site", "paper", "summary")))
        console().print(out)


def _summary(cls: Any) -> dict[str, Any]:
    first = (inspect.getdoc(cls) or "").partition("\n")[0]
    return {"name": cls.name, "site": cls.site, "paper": cls.paper, "summary": first}


def _all_about(cls: Any) -> dict[str, Any]:
    default = lambda f: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    options = {f.name: default(f) for f in dataclasses.fields(cls) if f.name != "capacity"}
    options = {name: None if value is dataclasses.MISSING else value for name, value in options.items()}
    return _summary(cls) | {"class": cls.__name__, "options": options, "text": inspect.getdoc(cls) or "", "bibtex": cls.bibtex}


def _page(entry: dict[str, Any]) -> str:
    head = f"{entry['name']}  (site {entry['site']}, {entry['paper']}, class {entry['class']})"
    options = "options: " + (", ".join(f"{k}={v}" for k, v in entry["options"].items()) or "none")
    return "\n\n".join(filter(None, (head, entry["text"], options, entry["bibtex"])))
