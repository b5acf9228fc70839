"""`fbl-flower run` on Flower's simulation engine: `flwr run`, with a status one can rely on.

`flwr run` exits 0 for a run that failed, and starts its background SuperLink in whatever directory it is called from; the
clients then import their code from there. So it is called from an empty directory, and the status is asked for afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fbl_flower.commands.app_folder import app_folder
from fbl_flower.commands.flower_cli import final_status, flower_environment, flower_program, neutral_directory, stop_run
from fbl_flower.commands.interruption import only_ctrl_c_interrupts
from fbl_flower.commands.proxies import unusable_proxies
from fbl_flower.commands.superlink import check_superlink
from fbl_flower.config import Value, to_toml
from fbl_flower.errors import RunFailed

_STARTED = re.compile(r"started run (\d+)")
_TOO_SLOW = "Failed to start local SuperLink within"  # Flower's limit of 15 seconds
# Lines that are not shown.
_LEFT_OUT = re.compile(
    r"Since flwr 1\.32, default simulated SuperNodes changed"  # here `--nodes` is their number, and Flower's advice would mislead
    r"|To change federation size, use the following command"
    r"|flwr federation simulation-config"
    r"|\[mutex\.cc : \d+\] RAW: Lock "  # of a C++ library in Ray's processes, when the machine is busy
    r"|^(\x1b\[\d+m)?INFO *(\x1b\[0m)?: *$"  # nothing but Flower's prefix
)


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
    for name in unusable_proxies(os.environ):
        print(f"{name}: Flower cannot use this kind of proxy. The run does not get it.", file=sys.stderr, flush=True)
    with app_folder(app) as folder, tempfile.TemporaryDirectory(prefix="fbl-") as temporary:
        check_superlink(folder)
        config = Path(temporary, "run.toml")  # a file needs no quoting; flwr reads it when the run is submitted
        config.write_text(to_toml(settings), encoding="utf-8")
        resources = f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus={0.1 if gpu else 0.0}"
        command = [flower_program("flwr"), "run", str(folder), "--stream", "--federation-config", resources, "-c", str(config)]
        try:
            run_id = follow(command)
        except RunFailed as error:
            if _TOO_SLOW not in str(error):
                raise
            print("This machine is slow or busy. Trying once more.", file=sys.stderr, flush=True)
            run_id = follow(command)  # its files are in memory by now
    status, details = final_status(run_id)
    if status != "finished:completed":
        raise RunFailed(
            f"run {run_id}: {status}" + (f": {details}" if details else "") + f"; its log: flwr log {run_id} --show"
        )


def follow(command: list[str], *, home: Path | None = None) -> str:
    """Run `flwr run --stream`, pass its output on, and return the run's id.

    Whatever ends this early also stops the run: Ctrl-C, a signal, or an output that nobody reads any more.

    Args:
        command: `flwr run --stream` with its arguments.
        home: Its FLWR_HOME, if not the user's.
    """
    run_id, refusal = None, []
    # A session of its own keeps a Ctrl-C from it: it would only stop the log, not the run.
    process = subprocess.Popen(
        command, env=flower_environment(home), cwd=neutral_directory(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if run_id is None:
                refusal.append(line)
                if started := _STARTED.search(line):
                    run_id = started[1]
            if not _LEFT_OUT.search(line):
                print(line, end="", flush=True)
        process.wait()
    except BaseException:
        with only_ctrl_c_interrupts():
            process.terminate()
            if run_id is None and (started := _STARTED.search(process.stdout.read())):  # accepted just before
                run_id = started[1]
            if run_id is not None:
                with contextlib.suppress(OSError):  # the terminal may be closed
                    print(f"stopping run {run_id} ...", file=sys.stderr, flush=True)
                stop_run(run_id, home=home)
        raise
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    if run_id is None:
        raise RunFailed("`flwr run` did not start the run: " + "".join(refusal[-20:]).strip())
    return run_id
