"""The Flower command that a command of ours stands for: shown, so that it can be typed without us, and run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from fbl_flower.commands.deploy.files import private_folder
from fbl_flower.commands.flower_cli import flower_environment, flower_program
from fbl_flower.commands.proxies import loopback_exceptions

_QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # torch would be installed anew for each run
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@dataclass(frozen=True, kw_only=True)
class PlainCommand:
    """One of Flower's programs with its arguments.

    Attributes:
        arguments: Program and arguments.
        home: Its FLWR_HOME.
        directory: Where it is to be started: a folder without code, because what stands there would be imported.
    """

    arguments: Sequence[str]
    home: Path
    directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: _QUIET | loopback_exceptions(os.environ))

    @property
    def text(self) -> str:
        """The command for a shell, in one line."""
        settings = " ".join(
            f"{key}={shlex.quote(value)}" for key, value in {"FLWR_HOME": str(self.home), **self.environment}.items()
        )
        place = f"cd {shlex.quote(str(self.directory))} && " if self.directory else ""
        return f"{place}{settings} {shlex.join(self.arguments)}"

    def show(self) -> None:
        print(f"$ {self.text}", flush=True)

    def become(self) -> NoReturn:
        """Replace this process by the program, so that signals and exit codes are its own."""
        directory = private_folder(self.directory or self.home)
        private_folder(self.home)
        os.chdir(directory)
        program, *rest = self.arguments
        os.execvpe(flower_program(program), [program, *rest], flower_environment(self.home))
