"""What a call is, and which functions must have one."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st

import jaxtok.core
import jaxtok.methods  # fills the registry
import jaxtok.ops
from jaxtok.core import protocols, registry
from jaxtok.core.types import Needs
from tests.calls.values import Sizes, Values
from tests.methods.laws import makers

# odd values in the place of an option
ODD = [-1, 0, 1, 7, 10**6, 2**31, 2**70, -(2**70), 0.5, 1.5, float("nan"), float("inf"), -float("inf"), "", "nonsense", None, True, (), (1, 2),
       [3], {}, b"x"]  # fmt: skip
INTS = st.one_of(st.integers(-3, 40), st.sampled_from([0, 1, -1, 10**6, 2**31 - 1, 2**31, -(2**31), 2**70, -(2**70)]))
REALS = st.one_of(st.floats(), st.floats(0, 1), INTS, st.sampled_from([0.0, 1.0, 0.5, 0.35, 1e-300, 1.0000001]))
ANY = st.one_of(REALS, st.sampled_from(ODD), st.text(max_size=8), st.lists(st.integers(-2, 9), max_size=3).map(tuple))


LEAST = 6  # the smallest capacity that the methods' own `small` must take


class Case(NamedTuple):
    """How a function is called with one shape set: fn(**arrays, **options). What is drawn must be finite, and so what comes out."""

    fn: Callable[..., Any]
    arrays: Callable[[Values], dict[str, Any]]
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    infinite: bool = False  # infinities may come out (a logsumexp over nothing)


CASES: dict[str, Callable[[Sizes], Case]] = {}  # compiled, values vary
PLAIN: dict[str, Callable[[Callable], tuple[Callable, tuple, dict]]] = {}  # static arguments only: hypothesis draws all of them
METHODS: set[str] = set()  # names of the registered methods that cases call


def case(name: str):
    def add(make):
        assert name not in CASES, name
        CASES[name] = make
        return make

    return add


def plain(name: str):
    def add(make):
        assert name not in PLAIN, name
        PLAIN[name] = make
        return make

    return add


def usually(draw: Callable, good: Any, bad: Any = ANY) -> Any:
    """Mostly a value of `good`."""
    return draw(bad) if draw(st.integers(0, 5)) == 0 else draw(good)


@functools.cache
def small(name: str) -> dict[str, Any]:
    """The makers of a method; none (then `missing` names it) where it has no test of its own yet."""
    try:
        return makers(name)
    except AssertionError:
        return {}


def public() -> Iterator[str]:
    """Every public function, and class with behaviour, of core and ops."""
    for package in (jaxtok.core, jaxtok.ops):
        for found in pkgutil.iter_modules(package.__path__):
            if found.name.startswith("_"):
                continue
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            for name, x in vars(module).items():
                if name.startswith("_") or getattr(x, "__module__", None) != module.__name__ or not callable(x):
                    continue
                # containers of arrays do nothing, and a protocol is what its methods are
                container = inspect.isclass(x) and issubclass(x, tuple) and x is not Needs
                if not container and not (inspect.isclass(x) and issubclass(x, protocols.Method)):
                    yield f"{module.__name__.removeprefix('jaxtok.')}.{name}"


def missing() -> list[str]:
    """Public functions without a case, registered methods that no case calls, and cases of nothing."""
    names, covered = set(public()), {*CASES, *PLAIN}
    stale = {n for n in covered if not n.startswith(("method ", "build ")) and n not in names}
    return sorted(names - covered) + sorted(set(registry.names()) - METHODS) + sorted(stale)
