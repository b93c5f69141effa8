"""What the commands share: methods from outside, the model, the terminal."""

import dataclasses
import sys
from typing import Annotated, Any

import tyro

EMBEDDED = "embedded"  # what `models.load` takes for the model of the package


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    import_: Annotated[tuple[str, ...], tyro.conf.arg(name="import", metavar="FILE.py|MODULE"), tyro.conf.UseAppendAction] = ()
    """A Python file or module that registers methods, such as my_method.py. Those of installed packages (entry points of the group
    jaxtok.methods) are there without it."""

    def fill_registry(self) -> None:
        """Register the methods of the package, of installed packages (a line on stderr for each that fails) and of `import_`."""
        import jaxtok.methods  # noqa: F401
        from jaxtok.core import plugins

        for line in plugins.discover():
            print(f"jaxtok: {line}", file=sys.stderr)
        for what in self.import_:
            plugins.load(what)

    def run(self) -> None:
        """What the command does."""
        raise NotImplementedError


def load_draft(name: str | None, model: str) -> Any:
    """(cfg, params) of the draft that was named, else of the embedded model's own, else None."""
    from jaxtok.models import load

    name = load.DRAFT if name is None and model == EMBEDDED else name
    return None if name is None else load.load(name)[:2]


def console(least: int = 100) -> Any:
    """A rich console, at least so wide."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich would leave with exit code 1
            raise  # the BrokenPipeError that is being handled

    out = Plain(highlight=False)
    return out if out.width >= least else Plain(highlight=False, width=least)


def load_model(name: str) -> tuple[Any, Any, Any]:
    """(cfg, params, tokenizer) of a checkpoint with a tokenizer."""
    from jaxtok.evals import report
    from jaxtok.models import load

    with report.bar("loading") as progress:
        cfg, params, tokenizer = load.load(name, progress=progress)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer (tokenizer.json, or tokenizer.bin beside a llama2.c file)")
    return cfg, params, tokenizer
