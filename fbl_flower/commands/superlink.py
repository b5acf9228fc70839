"""Flower's background SuperLink on this machine: check it before a run, and stop it. Flower has no command for that."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fbl_flower.commands.flower_cli import flower_home, neutral_directory, run_status, stop_run
from fbl_flower.commands.local_processes import (
    all_arguments,
    describe_listener,
    environment_of,
    is_listening,
    owner,
    user_name,
    working_folder,
)
from fbl_flower.errors import ConfigError, RunFailed

PORT = "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
_STOP = "fbl-flower superlink stop"
_OTHER_PORT = f"To use another port, set {PORT} to the number of a free one."
_DEFAULT_PORT = "39091"  # Flower's
_PATIENCE_S = 20.0  # from SIGTERM to the end of a SuperLink


def superlink_port() -> int:
    """Return the port that decides which SuperLink `flwr run` talks to.

    Raises:
        ConfigError: The variable is not a port.
    """
    given = os.environ.get(PORT, _DEFAULT_PORT)
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= 65535):
        raise ConfigError([f"{PORT}: expected a port from 1 to 65535, got {given!r}."])
    return int(given)


def find_superlink(port: int) -> int | None:
    """Return the process id of the local `flower-superlink` on `port`; None if there is none."""
    for process, arguments in all_arguments():
        programs = {Path(argument).name for argument in arguments[:2]}  # the first may be its interpreter
        if "flower-superlink" in programs and _value_of("--port", arguments) == str(port):
            return process
    return None


def check_superlink(app: Path) -> None:
    """Make sure that a run can use what is on the port: nothing, or a SuperLink of this user with the app's code.

    A SuperLink whose working folder was deleted cannot start a run. It is stopped, and Flower then starts another.

    Raises:
        RunFailed: Another program or another user's SuperLink is on the port, or runs are active on one that must be restarted.
        ConfigError: The SuperLink was started in a folder with another copy of this code: clients would import that one.
    """
    port = superlink_port()
    if not is_listening(port):
        return
    process = find_superlink(port)
    if process is None:
        raise RunFailed(f"port {port}: expected Flower's background SuperLink, got {describe_listener(port)}. {_OTHER_PORT}")
    if reason := _not_ours(process, port):
        raise RunFailed(f"{reason} This run does not join it. {_OTHER_PORT}")
    folder, deleted = working_folder(process)
    if folder is None:
        return
    if deleted:
        print(f"The folder of the background SuperLink ({folder}) was deleted. It is restarted.", file=sys.stderr, flush=True)
        stop_superlink()
        return
    has_code = any((folder / name).exists() for name in ("client_app.py", "fbl_flower"))
    if has_code and _code(folder) != _code(app):
        raise ConfigError(
            [
                f"the background SuperLink (process {process}) was started in {folder}, and its clients would "
                f"import the code there, not that of {app}; stop it with `{_STOP}`"
            ]
        )


def stop_superlink(*, force: bool = False) -> str:
    """Stop the background SuperLink; return a sentence that says what was done.

    Args:
        force: Stop the runs that are still active first; without it they are a reason to refuse.

    Raises:
        RunFailed: Runs are active, or the SuperLink is not this user's, or does not end.
    """
    port = superlink_port()
    process = find_superlink(port)
    if process is None:
        others = f"; the port is used by {describe_listener(port)}" if is_listening(port) else ""
        return f"no background SuperLink on port {port}{others}"
    if reason := _not_ours(process, port):
        raise RunFailed(f"{reason} It is not stopped. Only its owner can, with its FLWR_HOME.")
    active = [row["run-id"] for row in run_status() if not row["status"].startswith("finished")]
    if active and not force:
        raise RunFailed(
            f"runs are active on port {port}: {', '.join(active)}. Wait for them, stop each with `flwr stop ID`, or stop all "
            f"with `{_STOP} --force`."
        )
    for run_id in active:
        stop_run(run_id)  # first, or their processes would outlive the SuperLink
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE_S
    while find_superlink(port) == process:
        if time.monotonic() > deadline:
            raise RunFailed(f"the SuperLink on port {port} (process {process}) did not end within {_PATIENCE_S:g} s")
        time.sleep(0.2)
    return f"stopped the background SuperLink on port {port} (process {process})"


def _not_ours(process: int, port: int) -> str:
    """Return why a SuperLink is not to be used from here, and "" for one of this user and this FLWR_HOME."""
    name = f"port {port}: the SuperLink there (process {process})"
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except ProcessLookupError:  # it has just ended
        return ""
    else:
        home = _home_of(process)
        if owner(process) in (None, os.geteuid()):
            ours = (neutral_directory() / flower_home(os.environ)).resolve()
            return "" if home in (None, ours) else f"{name} is of another FLWR_HOME: expected {ours}, got {home}."
    uid = owner(process)
    return f"{name} is of another user{'' if uid is None else f' ({user_name(uid)})'}."


def _home_of(process: int) -> Path | None:
    """Return the FLWR_HOME of a process; None if it is unknown."""
    environment = environment_of(process)
    if environment is None:
        return None
    if not (environment.get("FLWR_HOME") or environment.get("HOME")):
        return None
    folder, _ = working_folder(process)
    return ((folder or Path()) / flower_home(environment)).resolve()


def _code(folder: Path) -> dict[str, bytes]:
    """Return what clients would import from `folder`, by name."""
    files = [folder / "client_app.py", *(folder / "fbl_flower").rglob("*.py")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file() and "_app" not in file.parts}


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """Return the value in `--flag value` or `--flag=value`."""
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None
