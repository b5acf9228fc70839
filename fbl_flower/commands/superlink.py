"""Flower's background SuperLink on this machine: look at it, and stop it. Flower has no command for that."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

from fbl_flower.commands.flower_cli import run_status, stop_run
from fbl_flower.errors import ConfigError, RunFailed


def superlink_port() -> str:
    """Return the port that decides which SuperLink `flwr run` talks to."""
    return os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39091")


def find_superlink(port: str) -> int | None:
    """Return the process id of the local `flower-superlink` on `port`; None if there is none."""
    for process, arguments in _processes():
        programs = {Path(argument).name for argument in arguments[:2]}  # it may stand behind its interpreter
        if "flower-superlink" in programs and _value_of("--port", arguments) == port:
            return process
    return None


def check_superlink(app: Path) -> None:
    """Refuse a SuperLink that was started in a directory with another copy of this code: clients would import that one.

    Raises:
        ConfigError: Names the directory and the way out.
    """
    process = find_superlink(superlink_port())
    if process is None:
        return
    try:
        started_in = Path(os.readlink(f"/proc/{process}/cwd"))
    except OSError:  # no such folder outside Linux
        return
    foreign = any((started_in / name).exists() for name in ("client_app.py", "fbl_flower"))
    if foreign and _code(started_in) != _code(app):
        raise ConfigError(
            [
                f"the background SuperLink (process {process}) was started in {started_in}, and its clients would "
                f"import the code there, not that of {app}; stop it with `fbl-flower superlink stop`"
            ]
        )


def _code(folder: Path) -> dict[str, bytes]:
    """Return what clients would import from `folder`, by name."""
    files = [folder / "client_app.py", *(folder / "fbl_flower").rglob("*.py")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file() and "_app" not in file.parts}


def stop_superlink(*, force: bool = False) -> str:
    """Stop the background SuperLink; return a sentence that says what was done.

    Args:
        force: Stop the runs that are still active first; without it they are a reason to refuse.

    Raises:
        RunFailed: Runs are active, or the process is another user's, or does not end.
    """
    port = superlink_port()
    process = find_superlink(port)
    if process is None:
        return f"no background SuperLink on port {port}"
    try:
        os.kill(process, 0)
    except PermissionError as error:
        raise RunFailed(f"the SuperLink on port {port} (process {process}) is another user's; it may not be stopped") from error
    active = [row["run-id"] for row in run_status() if not row["status"].startswith("finished")]
    if active and not force:
        raise RunFailed(f"runs are active on port {port}: {', '.join(active)}; wait, `flwr stop` them, or use --force")
    for run_id in active:
        stop_run(run_id)  # first, or their processes would outlive the SuperLink
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while find_superlink(port) == process:
        if time.monotonic() > deadline:
            raise RunFailed(f"the SuperLink on port {port} (process {process}) did not end within 20 s")
        time.sleep(0.2)
    return f"stopped the background SuperLink on port {port} (process {process})"


def _processes() -> list[tuple[int, list[str]]]:
    """List the processes of this machine with their arguments."""
    if Path("/proc/self/cmdline").exists():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it ended meanwhile, or is none of ours
                continue
            found.append((int(folder.name), arguments))
        return found
    listing = subprocess.run(["ps", "-axo", "pid=,args="], capture_output=True, text=True).stdout
    return [(int(line.split()[0]), line.split()[1:]) for line in listing.splitlines() if line.strip()]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    return next((value for name, value in itertools.pairwise(arguments) if name == flag), None)
