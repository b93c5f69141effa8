"""The command line: `jaxtok list`, `jaxtok generate`, `jaxtok compare`, `jaxtok show`, `jaxtok launch` (also `python -m jaxtok`).

What a user can get wrong (a method, a budget, a path, a checkpoint, an option) is one line on stderr and exit code 2; an interrupt is 130;
141, without a word, when what reads the output stops reading.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jaxtok.cli.compare import Compare
from jaxtok.cli.generate import Generate
from jaxtok.cli.launch import Launch
from jaxtok.cli.listing import List
from jaxtok.cli.show import Show

Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parse(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 2
    try:
        command.fill_registry()
        command.run()
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("jaxtok: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if sys.stdout is sys.__stdout__:  # what is left in the buffer has nowhere to go when Python exits
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (ValueError, OSError, NotImplementedError) as e:
        if os.environ.get("JAXTOK_TRACEBACK"):
            raise
        print(f"jaxtok: {_line(str(e) or type(e).__name__)}", file=sys.stderr)
        return 2


def _line(text: str) -> str:
    return " ".join(text.split())


def _parse(argv: list[str]) -> Any:
    """The command; what does not parse is one line, not a box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, args=argv, prog="jaxtok", description="Transformers on fewer tokens.")  # type: ignore[call-overload]
    except SystemExit as e:
        if e.code in (0, None):
            raise SystemExit(0) from None
        lines = [line.strip("│╭╮╰╯─ ") if line[:1] in "│╭╰" else line for line in said.getvalue().splitlines()]
        body = [line for line in lines[1:] if line]
        keep = body[
            : next(
                (i for i, line in enumerate(body) if line.startswith(("Argument helptext", "For full helptext", "Perhaps you meant"))),
                len(body),
            )
        ]
        print(f"jaxtok: {_line(' '.join(keep) or said.getvalue()).rstrip('.')}; see jaxtok --help", file=sys.stderr)
        raise SystemExit(2) from None
