"""Name -> method class. Knows no method: importing `jaxtok.methods` (or any module that registers) fills it."""

import dataclasses

SITES = ("prompt", "vit", "select", "layers", "sparsify", "attention", "cache", "policy", "reader", "heads", "edits")  # fields of Recipe
_REGISTRY: dict[str, type] = {}


def register(name: str, *, paper: str, site: str):
    """Class decorator: makes a method known under `name` and sets its `name`, `paper` and `site` (a Recipe field).

    ValueError for a name that is taken, a site that is not a Recipe field, or a method that is no frozen dataclass.
    """

    def add(cls):
        old = _REGISTRY.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is registered twice: {old.__module__}.{old.__qualname__} and {cls.__module__}.{cls.__qualname__}")
        if site not in SITES:
            raise ValueError(f"method {name!r}: site {site!r} must be one of {', '.join(SITES)}")
        if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
            raise ValueError(f"method {name!r} must be a frozen dataclass")
        cls.name, cls.paper, cls.site = name, paper, site
        _REGISTRY[name] = cls
        return cls

    return add


def names(site: str | None = None) -> tuple[str, ...]:
    """Registered names, sorted; of one site if given."""
    return tuple(sorted(n for n, c in _REGISTRY.items() if site in (None, c.site)))


def get(name: str) -> type:
    """The class registered under `name`; ValueError names the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(names())}")
    return _REGISTRY[name]
