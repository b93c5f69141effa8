"""The methods, one file a paper. Importing this package registers all of them; the classes can be imported from here by name.

A method is found by lying in a folder below this one: there is no list to keep.
"""

import importlib
import pkgutil

from jaxtok.core import registry

for _module in pkgutil.walk_packages(__path__, __name__ + "."):
    importlib.import_module(_module.name)

_CLASSES = {cls.__name__: cls for cls in map(registry.get, registry.names()) if cls.__module__.startswith(__name__ + ".")}
__all__ = sorted(_CLASSES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> type:
    try:
        return _CLASSES[name]
    except KeyError:
        raise AttributeError(f"jaxtok.methods has no method {name!r}; it has {', '.join(__all__)}") from None


def __dir__() -> list[str]:
    return [*globals(), *__all__]
