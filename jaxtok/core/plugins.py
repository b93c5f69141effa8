"""Methods from outside the package: installed packages that offer some, modules, files."""

import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import traceback
import zlib

GROUP = "jaxtok.methods"


def discover() -> list[str]:
    """Import the methods that installed packages offer, and return one line about each offer that failed and is left out.

    A package offers a module, whose import registers methods, in its pyproject.toml:

        [project.entry-points."jaxtok.methods"]
        its_name = "its_package.its_module"
    """
    said = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as e:  # whatever somebody else's module raises
            said.append(f"left out the methods of {entry.value} (entry point {entry.name!r} of {GROUP}): {_why(e)}")
    return said


def load(what: str) -> None:
    """Import a .py file by its path, or a module by its name, for the methods that it registers.

    A file is run as a module of its own, every time anew; it finds other modules where Python does, not in its own folder.
    ValueError, one line: there is no such file or module, or it fails, with the line of the file where it does.
    """
    if not what.strip():
        raise ValueError(f"cannot import {what!r}; give the path of a .py file, or the name of a module")
    path = pathlib.Path(os.path.expanduser(what))  # pathlib's raises for ~nobody
    if path.suffix != ".py":
        try:
            importlib.import_module(what)
        except (Exception, SystemExit) as e:
            gone = isinstance(e, ModuleNotFoundError) and e.name is not None and f"{what}.".startswith(f"{e.name}.")
            hint = "; give the path of a .py file, or install the package that has it" if gone else ""
            raise ValueError(f"cannot import {what}: {_why(e)}{hint}") from e
        return
    if not path.is_file():
        raise ValueError(f"cannot import {what}: no such file")
    path = path.resolve()
    # a name of its own, lest random.py stand in for Python's; the same for the same file, so that it may be run again
    name = f"{path.stem}_{zlib.crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        here = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise ValueError(f"cannot import {what}: {f'line {here[-1]}: ' if here else ''}{_why(e)}") from e


def _why(e: BaseException) -> str:
    text = " ".join(str(e).split())
    return text if isinstance(e, ValueError) and text else f"{type(e).__name__}{f': {text}' if text else ''}"
