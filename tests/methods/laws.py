"""A method at a size for the laws (jaxtok.testing), from its own test file."""

import importlib.util
import pathlib


def makers(name: str):
    """{label: maker} from `small` of the method's own test file: a function of the capacity, or a dict of such functions."""
    stem = name.split(".")[0]  # a paper of several sites has one file
    found = sorted(pathlib.Path(__file__).parent.rglob(f"test_{stem}.py"))
    if not found:
        raise AssertionError(f"method {name!r} has no tests/methods/**/test_{stem}.py")
    spec = importlib.util.spec_from_file_location(f"laws_of_{name}", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "small"):
        raise AssertionError(f"{found[0].name} must define small(capacity): the method at a size for the laws")
    if not isinstance(module.small, dict):
        return {name: module.small}
    return {x: make for x, make in module.small.items() if x.split(":")[0] == name or (stem == name and "." not in x)}
