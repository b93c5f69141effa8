"""Name -> method class. Knows no method: importing `jaxtok.methods` (or any module that registers) fills it."""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtok.core.types import Protect

SITES = ("prompt", "vit", "select", "layers", "sparsify", "attention", "cache", "policy", "reader", "heads", "edits")  # fields of Recipe
_REGISTRY: dict[str, type] = {}
T = TypeVar("T")


def register(
    name: str, *, paper: str, site: str, title: str | None = None, authors: str | None = None, year: int | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a method known under `name` and sets its `name`, `paper`, `site` (a Recipe field) and `bibtex`.

    paper: "arXiv:2404.14469", "doi:...", an https address, or "baseline" (there is none).
    title, authors ("Ada Lovelace and Charles Babbage"), year (None = that of the arXiv id): what to cite; without a title `bibtex` is "".

    ValueError for a name that is taken, a site that is not a Recipe field, a method that is no frozen dataclass, half a citation.
    """
    bibtex = "" if title is None else _bibtex(name, paper, title, authors, year)

    def add(cls: Any) -> Any:
        old = _REGISTRY.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"method {name!r} is registered twice: {old.__module__}.{old.__qualname__} and {cls.__module__}.{cls.__qualname__}"
            )
        if site not in SITES:
            raise ValueError(f"method {name!r}: site {site!r} must be one of {', '.join(SITES)}")
        dataclass = getattr(cls, "__dataclass_params__", None)
        if dataclass is None or not dataclass.frozen:
            raise ValueError(f"method {name!r} must be a frozen dataclass")
        cls.name, cls.paper, cls.site, cls.bibtex = name, paper, site, bibtex
        _REGISTRY[name] = cls
        return cls

    return add


def _bibtex(name: str, paper: str, title: str, authors: str | None, year: int | None) -> str:
    kind, _, number = paper.partition(":")
    if year is None and kind == "arXiv":
        year = 2000 + int(number[:2])
    if not authors or year is None:
        raise ValueError(f"method {name!r}: a title goes with authors and, where paper is no arXiv id, a year; got {authors!r}, {year!r}")
    plain = lambda text: re.sub(r"([&%#_])", r"\\\1", text)
    fields = {"title": f"{{{plain(title)}}}", "author": plain(authors), "year": str(year)}
    if kind == "arXiv":
        fields |= {"eprint": number, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{number}"}
    else:
        fields |= {"doi": number} if kind == "doi" else {"url": paper}
    return f"@misc{{{name},\n" + ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items()) + "\n}"


def names(site: str | None = None) -> tuple[str, ...]:
    """Registered names, sorted; of one site if given."""
    return tuple(sorted(n for n, c in _REGISTRY.items() if site in (None, c.site)))


def get(name: str) -> type:
    """The class registered under `name`; ValueError names the known ones."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, names(), 1)
        raise ValueError(f"unknown method {name!r}{f' (did you mean {near[0]}?)' if near else ''}; known: {', '.join(names())}")
    return _REGISTRY[name]


# --- methods from text ------------------------------------------------------------------------------------------------

BASE, STEP = "snapkv", "h2o"  # what a wrapper, and one of step policies, holds unless `base=` says otherwise


Fill = Callable[[type], dict[str, Any]]  # class -> what its fields are that a text leaves open


def build(spec: str, capacity: int, fill: Fill | None = None) -> Any:
    """The method that a text names, for `capacity` slots: "snapkv", "snapkv:window=32,pool=7", "ada_kv:base=k_norm,alpha=0.3,sinks=4".

    Options are fields of the method, or of its `protect` (sinks, recent); those that a wrapper lacks go to its base, a second
    `base=` included. Entries of a tuple are joined by "+": "per_layer:weights=3+2+1". Methods in a tuple get every option that they know:
    "chain:methods=snapkv+think,window=16". A reader, which has no capacity, reads about `capacity` keys (`Reader.sized`), unless the field
    that says so is given. fill: what the fields are that the text leaves open, the capacity among them (None = `capacity` and the defaults).

    ValueError, one line: an unknown method or option (with the known ones), a value of another type, an option given twice or
    `capacity` among them, and what the method itself refuses.
    """
    name, _, rest = spec.strip().partition(":")
    options = []
    for item in filter(None, map(str.strip, rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: {item!r} is not option=value")
        options.append((key.strip(), value.strip()))
    method, left = _make(spec, name.strip(), options, capacity, fill)
    if left:
        known = ", ".join(_known(get(name.strip())))
        raise ValueError(f"{spec!r}: no option {', '.join(k for k, _ in left)}; {name.strip()} has {known or 'none'}")
    return method


def _known(cls: type) -> list[str]:
    """Names that may stand in a spec."""
    out = []
    for field, kind in _fields(cls).items():
        out += [f.name for f in dataclasses.fields(Protect)] if kind is Protect else [field] if field != "capacity" else []
    return out + (["and those of its base"] if "base" in _fields(cls) else [])


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    """Field name -> its type."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _make(spec: str, name: str, options: list[tuple[str, str]], capacity: int, fill: Fill | None) -> tuple[Any, list[tuple[str, str]]]:
    """The method, and the options that neither it nor its base knows."""
    cls = get(name)
    fields, given, left = _fields(cls), {}, []
    guard = next((f for f, kind in fields.items() if kind is Protect), None)
    for key, value in options:
        if key == "capacity":
            raise ValueError(f"{spec!r}: the capacity is the budget's to say")
        if key in given and "base" in fields:
            left.append((key, value))  # the base's own
        elif key in given or key in given.get(guard, {}):
            raise ValueError(f"{spec!r}: {key} is given twice")
        elif key in fields and key != guard:
            given[key] = value if key in ("base", "methods") else _parse(spec, key, value, fields[key])
        elif guard and key in _fields(Protect):
            given.setdefault(guard, {})[key] = _parse(spec, key, value, int)
        else:
            left.append((key, value))
    if guard in given:
        given[guard] = Protect(**given[guard])
    if "base" in fields:
        inner = given.get("base", BASE if issubclass(get(BASE), fields["base"]) else STEP)
        given["base"], left = _make(spec, inner, left, capacity, fill)
        if not isinstance(given["base"], fields["base"]):
            raise ValueError(f"{spec!r}: {name} needs a {fields['base'].__name__} as its base, which {inner} is not")
    if "methods" in given:
        inner = {n.strip(): _known(get(n.strip())) for n in given["methods"].split("+")}
        given["methods"] = tuple(_make(spec, n, [o for o in left if o[0] in known], capacity, fill)[0] for n, known in inner.items())
        left = [o for o in left if not any(o[0] in known for known in inner.values())]
    if fill is not None:
        given = fill(cls) | given
    elif "capacity" in fields:
        given["capacity"] = capacity
    elif hasattr(cls, "sized"):
        given = cls.sized(capacity, given) | given
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in given and _required(f)]
    if missing:
        raise ValueError(f"{spec!r}: {name} needs {', '.join(missing)}")
    try:
        return cls(**given), left
    except (ValueError, TypeError) as e:
        raise ValueError(f"{spec!r}: {e}") from None


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _parse(spec: str, key: str, text: str, kind: Any) -> Any:
    """`text` as a value of a field of type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        return _parse(spec, key, text, next(a for a in args if a is not type(None)))
    if origin is tuple:
        inner = [a for a in args if a is not Ellipsis]
        parts = list(filter(None, text.split("+")))
        return tuple(_parse(spec, key, part, inner[min(i, len(inner) - 1)]) for i, part in enumerate(parts))
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"{spec!r}: {key}={text} must be true or false")
        return text.lower() in ("true", "1", "yes")
    if kind not in (int, float, str):
        raise ValueError(f"{spec!r}: {key} cannot be given as text; build the method in Python")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{spec!r}: {key}={text} must be {'a whole number' if kind is int else 'a number'}") from None


def parse_budget(text: str) -> float | int:
    """ "25%" -> the ratio 0.25, in (0, 1]; "128" -> 128 tokens. ValueError for anything else."""
    text = text.strip()
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) / 100 if percent else int(number)
    except ValueError:
        raise ValueError(f"budget {text!r} must be a number of tokens (128) or a share of the context (25%)") from None
    if not value > 0 or (percent and value > 1):
        raise ValueError(f"budget {text!r} must be {'over 0% and at most 100%' if percent else 'at least 1 token'}")
    return value
