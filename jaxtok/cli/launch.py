"""`jaxtok launch`: a script in one of several processes, or in all of them on this machine."""

import dataclasses
import pathlib
import sys
from typing import Annotated

import tyro

from jaxtok.cli.common import Common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch(Common):
    """Run SCRIPT as a program of several processes: on a TPU pod or under Slurm as it is (one call a host), elsewhere with
    --coordinator, --processes and --process, or with --local N all at once on this machine."""

    script: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")]
    """A Python file."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARGUMENT")] = ()
    """Its arguments; those that begin with a dash go behind --."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0."""
    local: int | None = None
    """Start so many processes on this machine."""
    devices: int | None = None
    """With --local: CPU devices of each."""

    def fill_registry(self) -> None:
        """Nothing here needs a method."""

    def run(self) -> None:
        import os

        from jaxtok.parallel import launch

        if not self.script.is_file():
            raise ValueError(f"no such script: {self.script}")
        if self.local is not None:
            if self.local < 1 or (self.devices is not None and self.devices < 1):
                raise ValueError(f"local={self.local}, devices={self.devices} must be at least 1")
            code = launch.start(str(self.script), self.arguments, self.local, devices=self.devices)
            if code:
                print(f"jaxtok: a process ended with exit code {code}", file=sys.stderr)
                raise SystemExit(2)
            return
        given = dict(zip(launch.ENVIRONMENT, (self.coordinator, self.processes, self.process), strict=True))
        os.environ.update({name: str(x) for name, x in given.items() if x is not None})
        launch.run(str(self.script), self.arguments)
