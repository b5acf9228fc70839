"""`fbl-flower run` on Flower's simulation engine: `flwr run`, with a status one can rely on.

`flwr run` exits 0 for a run that failed, and starts its background SuperLink in whatever directory it is called from; the
clients then import their code from there. So it is called from an empty directory, and the status is asked for afterwards.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbl_flower.app_folder import app_folder
from fbl_flower.config import Value, to_toml
from fbl_flower.errors import RunFailed
from fbl_flower.superlink import check_superlink

_STARTED = re.compile(r"started run (\d+)")
_PATIENCE_S = 60.0  # from the end of the log to a final status


def run_simulation(settings: Mapping[str, Value], *, nodes: int, app: Path | None = None, gpu: bool = False) -> None:
    """Start the app, show its log while it runs, and wait for its end. Ctrl-C stops the run.

    Args:
        settings: Run-config keys that differ from the defaults.
        nodes: Virtual SuperNodes.
        app: Directory of the Flower app; None: this project's.
        gpu: Whether clients may use a GPU; they share one.

    Raises:
        RunFailed: The run was not accepted, or did not complete; says what Flower says of it.
    """
    with app_folder(app) as folder, tempfile.TemporaryDirectory(prefix="fbl-") as temporary:
        check_superlink(folder)
        config = Path(temporary, "run.toml")  # a file needs no quoting; flwr reads it when the run is submitted
        config.write_text(to_toml(settings), encoding="utf-8")
        resources = f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus={0.1 if gpu else 0.0}"
        command = [flower_program("flwr"), "run", str(folder), "--stream", "--federation-config", resources, "-c", str(config)]
        run_id = _follow(command)
    status, details = _final_status(run_id)
    if status != "finished:completed":
        raise RunFailed(
            f"run {run_id}: {status}" + (f": {details}" if details else "") + f"; its log: flwr log {run_id} --show"
        )


def run_status(run_id: str | None = None) -> list[dict[str, Any]]:
    """Ask the SuperLink for its runs, or for one of them; each has `run-id`, `status` and `status-details`."""
    which = ["--run-id", run_id] if run_id else []
    command = [flower_program("flwr"), "ls", *which, "--format", "json"]
    done = subprocess.run(command, env=flower_environment(), cwd=neutral_directory(), capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])  # notices may come before it
    except ValueError as error:
        raise RunFailed(f"`flwr ls` gave no answer: {(done.stderr or done.stdout).strip()}") from error
    if not answer.get("success", False):
        raise RunFailed(f"`flwr ls` failed: {answer.get('error-message', answer)}")
    return list(answer["runs"])


def stop_run(run_id: str) -> None:
    """Stop a run and wait until its processes had time to end."""
    command = [flower_program("flwr"), "stop", run_id]
    subprocess.run(command, env=flower_environment(), cwd=neutral_directory(), capture_output=True)
    _final_status(run_id)


def flower_environment() -> dict[str, str]:
    """Return the environment for Flower's programs: this virtual environment's programs first, no installing at run time."""
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def neutral_directory() -> Path:
    """Return a directory without code, from which a background SuperLink may be started."""
    folder = Path("~/.fbl/superlink").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def flower_program(name: str) -> str:
    """Return the path of one of Flower's programs, beside this Python."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def _follow(command: list[str]) -> str:
    """Run `flwr run --stream`, pass its output on, and return the run's id."""
    run_id, refusal = None, []
    # A session of its own keeps a Ctrl-C from it: it would only stop the log, not the run.
    process = subprocess.Popen(
        command, env=flower_environment(), cwd=neutral_directory(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if run_id is None:
                refusal.append(line)
                if started := _STARTED.search(line):
                    run_id = started[1]
        process.wait()
    except KeyboardInterrupt:
        if run_id is not None:
            print(f"stopping run {run_id} ...", file=sys.stderr, flush=True)
            stop_run(run_id)
        raise
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    if run_id is None:
        raise RunFailed("`flwr run` did not start the run: " + "".join(refusal[-20:]).strip())
    return run_id


def _final_status(run_id: str) -> tuple[str, str]:
    """Wait for a final status; the log may end a little earlier."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        row = run_status(run_id)[0]
        if row["status"].startswith("finished") or time.monotonic() > deadline:
            return row["status"], row.get("status-details") or ""
        time.sleep(1.0)
