"""What is on the port of the background SuperLink: whose it is, where it was started, and what may be stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import free_port

from fbl_flower import cli
from fbl_flower.commands import local_processes, superlink
from fbl_flower.commands.flower_cli import flower_home
from fbl_flower.errors import ConfigError, RunFailed

ROOT = Path(__file__).parents[1]
LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[-1].rpartition("=")[2])))
print("listens", flush=True)
while True:
    server.accept()
"""
Start = Callable[..., subprocess.Popen[str]]

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    number = free_port()
    monkeypatch.setenv(superlink.PORT, str(number))
    return number


@pytest.fixture
def start(port: int, tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a program which listens on the port as a SuperLink does, and answers nothing."""
    with contextlib.ExitStack() as stack:

        def started(
            *,
            name: str = "flower-superlink",
            folder: Path | None = None,
            flag: tuple[str, ...] = ("--port",),
            user: int | None = None,
            **environment: str,
        ) -> subprocess.Popen[str]:
            program = tmp_path / name
            program.write_text(LISTENER)
            arguments = [*flag, str(port)] if len(flag) == 1 else [f"--port={port}"]
            process = subprocess.Popen(
                [sys.executable, program, *arguments],
                cwd=folder or tmp_path,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                text=True,
                user=user,
            )
            stack.callback(lambda: (process.kill(), process.communicate()))
            assert process.stdout is not None
            assert process.stdout.readline() == "listens\n"
            return process

        yield started


def test_nothing_on_the_port(port: int) -> None:
    superlink.check_superlink(ROOT)
    assert superlink.stop_superlink() == f"no background SuperLink on port {port}"


@pytest.mark.parametrize("flag", [("--port",), ("--port", "=")])
def test_own_superlink_is_used(start: Start, port: int, flag: tuple[str, ...]) -> None:
    process = start(flag=flag)
    superlink.check_superlink(ROOT)
    assert superlink.find_superlink(port) == process.pid and process.poll() is None
    assert superlink.find_superlink(port + 1) is None


def test_superlink_is_found_by_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that shows the program is none."""
    listing = [
        (1, ["init"]),
        (6, ["vi", "x", "flower-superlink", "--port", "39091"]),
        (5, ["python", "/venv/bin/flower-superlink", "--port", "39091"]),
        (7, ["flower-superlink", "--port"]),
    ]
    monkeypatch.setattr(superlink, "all_arguments", lambda: listing)
    assert superlink.find_superlink(39091) == 5 and superlink.find_superlink(39092) is None


def test_default_and_relative_homes_are_compared(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FLWR_HOME counts from the folder in which Flower's programs are started: here ~/.fbl/superlink."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLWR_HOME", "")
    assert flower_home(os.environ) == tmp_path / ".flwr"
    start(FLWR_HOME=str(tmp_path / "elsewhere" / ".." / ".flwr"))
    superlink.check_superlink(ROOT)
    monkeypatch.setenv("FLWR_HOME", "../../.flwr")
    superlink.check_superlink(ROOT)
    monkeypatch.setenv("FLWR_HOME", ".flwr")
    with pytest.raises(RunFailed, match=r"expected .*/\.fbl/superlink/\.flwr, got "):
        superlink.check_superlink(ROOT)


def test_superlink_of_another_home_is_left_alone(start: Start, port: int, tmp_path: Path) -> None:
    process = start(FLWR_HOME=str(tmp_path / "other"))
    with pytest.raises(RunFailed) as caught:
        superlink.check_superlink(ROOT)
    text = str(caught.value)
    assert text == (
        f"port {port}: the SuperLink there (process {process.pid}) is of another FLWR_HOME: expected "
        f"{Path(os.environ['FLWR_HOME']).resolve()}, got {(tmp_path / 'other').resolve()}. This run does not join it. "
        "To use another port, set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to the number of a free one."
    )
    with pytest.raises(RunFailed, match=r"another FLWR_HOME: .* It is not stopped\. Only its owner can"):
        superlink.stop_superlink(force=True)
    assert process.poll() is None


def test_superlink_of_another_user_is_left_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its home is the same, and before any of its runs is looked at."""
    process = start()
    monkeypatch.setattr(superlink, "owner", lambda _: 2**31)
    monkeypatch.setattr(superlink, "run_status", lambda: pytest.fail("its runs were looked at"))
    with pytest.raises(RunFailed, match=rf"\(process {process.pid}\) is of another user \(number 2147483648\)\. This run"):
        superlink.check_superlink(ROOT)
    with pytest.raises(RunFailed, match=r"another user .* It is not stopped\. Only its owner can"):
        superlink.stop_superlink(force=True)
    assert process.poll() is None


def test_superlink_that_may_not_be_signalled(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    really = os.kill

    def kill(process: int, number: int) -> None:
        if number == 0:
            raise PermissionError
        really(process, number)

    monkeypatch.setattr(superlink.os, "kill", kill)
    monkeypatch.setattr(superlink, "owner", lambda _: None)  # as without /proc
    with pytest.raises(RunFailed, match=r"is of another user\. This run does not join it"):
        superlink.check_superlink(ROOT)


def test_another_program_on_the_port_is_named(
    start: Start, port: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    process = start(name="my-server")
    with pytest.raises(RunFailed) as caught:
        superlink.check_superlink(ROOT)
    text = str(caught.value)
    assert text.startswith(f"port {port}: expected Flower's background SuperLink, got process {process.pid} ({sys.executable}")
    assert text.endswith("To use another port, set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to the number of a free one.")
    assert cli.main(["superlink", "stop"]) == 0
    assert f"no background SuperLink on port {port}; the port is used by process {process.pid} " in capsys.readouterr().out
    assert process.poll() is None


def test_listener_of_another_user_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Port 39091 is 0x98B3; of its sockets only the first listens. The one of port 39092 belongs to this process."""
    rows = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
        "   0: 0100007F:98B3 0100007F:1234 01 00000000:00000000 00:00000000 00000000  1111        0 501 1",
        "   1: 0100007F:98B3 00000000:0000 0A 00000000:00000000 00:00000000 00000000  4321        0 502 1",
        f"   2: 0100007F:98B4 00000000:0000 0A 00000000:00000000 00:00000000 00000000  {os.geteuid()}        0 503 1",
    ]
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text("\n".join(rows) + "\n")
    for pid, inode in ((7, 501), (8, 503)):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "cmdline").write_bytes(b"python\0serve.py\0")
        (tmp_path / str(pid) / "fd" / "4").symlink_to(f"socket:[{inode}]")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cmdline").touch()
    monkeypatch.setattr(local_processes, "_PROC", tmp_path)
    assert local_processes.describe_listener(39091) == "a process of user number 4321"
    assert local_processes.describe_listener(39092) == "process 8 (python serve.py)"
    assert local_processes.describe_listener(39093) == "another program"
    assert local_processes.environment_of(7) is None and local_processes.working_folder(7) == (None, False)
    assert local_processes.owner(9) is None


def test_a_full_queue_counts_as_listening() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        number = server.getsockname()[1]
        for _ in range(4):  # more than the kernel keeps for it
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", number))
        assert local_processes.is_listening(number)
    assert not local_processes.is_listening(number)


def test_superlink_of_a_deleted_folder_is_restarted(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is stopped here, and Flower starts another; while a run is active it is left alone."""
    folder = tmp_path / "gone"
    folder.mkdir()
    process = start(folder=folder)
    folder.rmdir()
    monkeypatch.setattr(superlink, "run_status", lambda: [{"run-id": "5", "status": "running"}])
    with pytest.raises(RunFailed, match=r"runs are active on port \d+: 5\. .*`fbl-flower superlink stop --force`"):
        superlink.check_superlink(ROOT)
    assert process.poll() is None
    monkeypatch.setattr(superlink, "run_status", lambda: [{"run-id": "5", "status": "finished:completed"}])
    capsys.readouterr()
    superlink.check_superlink(ROOT)
    assert process.wait(10) == -signal.SIGTERM
    assert capsys.readouterr().err == f"The folder of the background SuperLink ({folder}) was deleted. It is restarted.\n"


def test_a_folder_with_the_mark_in_its_name_is_not_deleted(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "old (deleted)"
    folder.mkdir()
    process = start(folder=folder)
    assert local_processes.working_folder(process.pid) == (folder, False)
    superlink.check_superlink(ROOT)
    assert process.poll() is None


def test_superlink_of_other_code_is_refused(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    start(folder=folder)
    superlink.check_superlink(ROOT)  # an empty folder
    (folder / "client_app.py").touch()
    superlink.check_superlink(folder)  # the app itself
    with pytest.raises(ConfigError, match="`fbl-flower superlink stop`"):
        superlink.check_superlink(ROOT)


def test_stop_refuses_while_runs_are_active(
    start: Start, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start()
    stopped: list[str] = []
    monkeypatch.setattr(superlink, "run_status", lambda: [{"run-id": "9", "status": "running"}])
    monkeypatch.setattr(superlink, "stop_run", stopped.append)
    assert cli.main(["superlink", "stop"]) == 1
    assert f"runs are active on port {port}: 9." in capsys.readouterr().err
    assert process.poll() is None and stopped == []
    assert cli.main(["superlink", "stop", "--force"]) == 0
    assert capsys.readouterr().out == f"stopped the background SuperLink on port {port} (process {process.pid})\n"
    assert process.wait(10) == -signal.SIGTERM and stopped == ["9"]


@pytest.mark.parametrize("given", ["", "http", "0", "65536", "-1", "３９", "39091 "])
def test_a_port_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(superlink.PORT, given)
    with pytest.raises(ConfigError) as caught:
        superlink.superlink_port()
    assert caught.value.problems == [f"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT: expected a port from 1 to 65535, got {given!r}."]
