"""A run ends with its command: Ctrl-C, SIGTERM, a closed terminal, a closed pipe; and `nohup` keeps it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fbl_flower.commands.interruption import signals_interrupt

# `flwr`: a run that never ends by itself, and a stop that takes a while.
FLWR = """#!/bin/sh
case $1 in
  run) echo $$ > FOLDER/stream; echo 'Successfully started run 42'; i=0; while :; do echo "line $i"; i=$((i+1)); sleep 0.05; done;;
  stop) echo "asked to stop $2" >> FOLDER/calls; sleep 1; echo "stopped $2" >> FOLDER/calls;;
  ls) echo '{"success": true, "runs": [{"run-id": "42", "status": "finished:stopped", "status-details": ""}]}';;
esac
"""
# `fbl-flower run` without its checks, which import torch.
COMMAND = """
import sys
from pathlib import Path
from fbl_flower import cli
from fbl_flower.commands import flower_cli, simulation
flower_cli.flower_program = lambda name: sys.argv[1]
cli._run = lambda options: simulation.follow([sys.argv[1], "run"])
sys.exit(cli.main(["run"]))
"""
STOPPED = "asked to stop 42\nstopped 42\n"


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "flwr"
    script.write_text(FLWR.replace("FOLDER", str(tmp_path)))
    script.chmod(0o755)
    return [sys.executable, "-c", COMMAND, str(script)]


def calls(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stream_has_ended(tmp_path: Path) -> bool:
    """Whether `flwr run` is gone, which the command started."""
    try:
        os.kill(int((tmp_path / "stream").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM],  # a shell passes on what the terminal has sent already
        [signal.SIGINT, signal.SIGHUP],  # Ctrl-C, and then the window is closed
    ],
    ids=lambda signals: "-".join(number.name for number in signals),
)
def test_signals_stop_the_run(command: list[str], tmp_path: Path, signals: list[signal.Signals]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("line 3" in line for line in process.stdout)
        first, *others = signals
        process.send_signal(first)
        for number in others:
            wait_until(lambda: calls(tmp_path) != "")
            process.send_signal(number)
            time.sleep(0.1)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "stopping run 42 ...\nfbl-flower: interrupted\n"
    assert calls(tmp_path) == STOPPED and stream_has_ended(tmp_path)


def test_a_second_interrupt_gives_up(command: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("line 0" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: calls(tmp_path) != "")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" not in calls(tmp_path)


def test_a_signal_before_the_run_is_known_stops_it(command: list[str], tmp_path: Path) -> None:
    """`flwr` has submitted the run, and says so only when it is terminated."""
    script = tmp_path / "flwr"
    script.write_text(
        script.read_text().replace(
            "echo 'Successfully", "trap 'echo Successfully started run 7; exit' TERM; while :; do sleep 0.05; done; '"
        )
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "stream").exists)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=90)
    assert process.returncode == 130 and error.startswith("stopping run 7 ...\n")
    assert "stopped 7\n" in calls(tmp_path)


def test_a_closed_terminal_stops_the_run(command: list[str], tmp_path: Path) -> None:
    """Nothing can be printed any more, and the run is stopped all the same."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    seen = b""
    while b"line 3" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (1, 130)  # which it meets first: the signal, or that it cannot print
    assert calls(tmp_path) == STOPPED and stream_has_ended(tmp_path)


def test_a_closed_pipe_stops_the_run(command: list[str], tmp_path: Path) -> None:
    """As in `fbl-flower run | head`; also when a signal comes while it is being stopped."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any("line 0" in line for line in process.stdout)
        process.stdout.close()
        wait_until(lambda: calls(tmp_path) != "")
        process.send_signal(signal.SIGHUP)
        error = process.stderr.read()
    assert process.returncode == 1
    assert error == "stopping run 42 ...\nfbl-flower: failed: [Errno 32] Broken pipe\n"
    assert calls(tmp_path) == STOPPED


def test_nohup_keeps_the_run(command: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("line 0" in line for line in process.stdout)
        process.send_signal(signal.SIGHUP)
        assert any("line 9" in line for line in process.stdout)
        assert process.poll() is None and calls(tmp_path) == ""
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130 and calls(tmp_path) == STOPPED


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with contextlib.suppress(KeyboardInterrupt), signals_interrupt():
        assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before, strict=True))
        os.kill(os.getpid(), signal.SIGHUP)
        pytest.fail("the signal did not interrupt")
    assert [signal.getsignal(number) for number in numbers] == before
