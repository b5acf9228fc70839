"""Flower's own command line: which programs to call, in what surroundings, and what `flwr ls` says of a run."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbl_flower.commands.proxies import with_direct_loopback
from fbl_flower.errors import RunFailed

_PATIENCE_S = 60.0  # from the end of a log to a final status

# Ray's own notes; a user may set them otherwise.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # no summary of lines that several clients print
}


def flower_program(name: str) -> str:
    """Return the path of one of Flower's programs, beside this Python."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """Return the environment for Flower's programs: this virtual environment's programs first, no installing at run time.

    Args:
        home: FLWR_HOME, whose default connection says which server is meant; None: the user's.
    """
    programs = str(Path(sys.executable).parent)
    own_home = {"FLWR_HOME": str(home)} if home else {}
    return (
        _RAY
        | _ray_token()
        | with_direct_loopback(os.environ)
        | own_home
        | {
            "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )


def _ray_token() -> dict[str, str]:
    """Have Ray ask for a token that nobody else knows: its ports are open to the network, and whoever reaches them may run code."""
    if "RAY_ADDRESS" in os.environ:  # a cluster of the user's own, whose token it is
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def flower_home(environment: Mapping[str, str]) -> Path:
    """Return the FLWR_HOME of a program with this environment; a relative one counts from its working folder."""
    if given := environment.get("FLWR_HOME"):
        return Path(given)
    return Path(environment.get("HOME") or "~").expanduser() / ".flwr"


def neutral_directory() -> Path:
    """Return a directory without code, from which a background SuperLink may be started."""
    folder = Path("~/.fbl/superlink").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_status(run_id: str | None = None, *, home: Path | None = None) -> list[dict[str, Any]]:
    """Ask the SuperLink for its runs, or for one of them; each has `run-id`, `status` and `status-details`."""
    which = ["--run-id", run_id] if run_id else []
    command = [flower_program("flwr"), "ls", *which, "--format", "json"]
    # A session of its own, here and in `stop_run`: a closed terminal must not end what stops a run.
    done = subprocess.run(
        command, env=flower_environment(home), cwd=neutral_directory(), capture_output=True, text=True, start_new_session=True
    )
    answer = json_answer(done, "flwr ls")
    if not answer.get("success", False):
        raise RunFailed(f"`flwr ls` failed: {answer.get('error-message', answer)}")
    return list(answer["runs"])


def json_answer(done: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    """Return what a program that was called with `--format json` said; `name` is for the error message.

    Raises:
        RunFailed: It said nothing of the kind.
    """
    try:
        return dict(json.loads(done.stdout[done.stdout.index("{") :]))  # notices may come before it
    except ValueError as error:
        raise RunFailed(f"`{name}` gave no answer: {(done.stderr or done.stdout).strip()}") from error


def stop_run(run_id: str, *, home: Path | None = None) -> None:
    """Stop a run and wait until its processes had time to end."""
    command = [flower_program("flwr"), "stop", run_id]
    subprocess.run(command, env=flower_environment(home), cwd=neutral_directory(), capture_output=True, start_new_session=True)
    final_status(run_id, home=home)


def final_status(run_id: str, *, home: Path | None = None) -> tuple[str, str]:
    """Wait for a final status; the log may end a little earlier."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        row = run_status(run_id, home=home)[0]
        if row["status"].startswith("finished") or time.monotonic() > deadline:
            return row["status"], row.get("status-details") or ""
        time.sleep(1.0)
