"""jaxtok: transformers on fewer tokens, as pure JAX transforms."""

from jaxtok import decode, methods
from jaxtok.core.plugins import discover
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import build, get, names, register
from jaxtok.core.types import KV, Evidence, Needs, Plan, Protect, Tokens

__version__ = "0.1.0"
__all__ = [
    "KV",
    "Evidence",
    "Needs",
    "Plan",
    "Protect",
    "Recipe",
    "Tokens",
    "build",
    "decode",
    "discover",
    "get",
    "methods",
    "names",
    "register",
]
