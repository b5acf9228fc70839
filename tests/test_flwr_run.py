"""Real processes: `flwr run` and `fbl-flower run`, killed and resumed, from a wheel, and on Flower 1.41."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import quick

from fbl_flower.config import to_toml
from fbl_flower.federation.local import run_local

pytestmark = pytest.mark.real_process

ROOT = Path(__file__).resolve().parents[1]
TEN_MINUTES = 600.0


def run(command: list[str], environment: dict[str, str], folder: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TEN_MINUTES, check=False, **kwargs
    )


def with_programs(environment: dict[str, str], folder: Path) -> dict[str, str]:
    return environment | {"PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def settings_file(tmp_path: Path, settings: dict[str, Any], name: str = "run.toml") -> Path:
    path = tmp_path / name
    path.write_text(to_toml(settings))
    return path


def only_run(tmp_path: Path) -> Path:
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def test_the_first_command_of_the_readme(flower_environment: dict[str, str]) -> None:
    """Without its set-up: this environment has the package already."""
    block = (ROOT / "README.md").read_text().split("## Quick start")[1].split("```bash\n")[1].split("```")[0]
    set_up, command = block.strip().rsplit(" && ", 1)
    assert set_up == "python3 -m venv .venv && . .venv/bin/activate && pip install ."
    environment = with_programs(flower_environment, Path(sys.executable).parent)
    del environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"]  # the command says it
    done = run(["bash", "-c", command], environment, ROOT)
    (run_dir,) = (Path(environment["HOME"]) / ".fbl" / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["left_out"] == {} == summary["not_prepared"], done.stdout
    assert f"Run directory: {run_dir}" in done.stdout and f"Round {summary['rounds']}/{summary['rounds']}" in done.stdout
    assert summary["final_accuracy"] > 0.5  # it has learned something, in few rounds
    assert {"accuracy.png", "gallery.png", "class_counts.png", "model.safetensors"} <= {path.name for path in run_dir.iterdir()}


def test_plain_flwr_run_on_two_nodes_equals_the_engine_in_this_process(
    tmp_path: Path, flower_environment: dict[str, str]
) -> None:
    environment = with_programs(flower_environment, Path(sys.executable).parent)
    config = settings_file(tmp_path, quick(tmp_path))
    done = run(["flwr", "run", str(ROOT), "--stream", "-c", str(config)], environment, tmp_path)
    assert "Round 3/3" in done.stdout, done.stdout + done.stderr
    simulated = only_run(tmp_path)
    assert f"Run directory: {simulated}" in done.stdout
    local = run_local(quick(tmp_path / "local"))
    assert (simulated / "metrics.jsonl").read_bytes() == (local.run_dir / "metrics.jsonl").read_bytes()


def test_a_killed_simulation_is_resumed_to_the_metrics_of_an_unbroken_run(
    tmp_path: Path, flower_environment: dict[str, str]
) -> None:
    settings = quick(tmp_path, num_server_rounds=40, checkpoint_every=3)
    environment = with_programs(flower_environment, Path(sys.executable).parent)
    command = ["fbl-flower", "run", "-c", str(settings_file(tmp_path, settings))]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + TEN_MINUTES / 2
        while len(_lines(tmp_path)) < 8:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        for pid in _simulations(environment["HOME"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(TEN_MINUTES / 2) == 1, (tmp_path / "log").read_text()
    killed = only_run(tmp_path)
    num_before = len(_lines(tmp_path))
    assert 8 <= num_before < 41
    resumed = run(["fbl-flower", "run", "--resume", str(killed)], environment, tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    unbroken = run_local(quick(tmp_path / "unbroken", num_server_rounds=40, checkpoint_every=3))
    assert (killed / "metrics.jsonl").read_bytes() == (unbroken.run_dir / "metrics.jsonl").read_bytes()


# All that a first run may say: Flower's steps, and ours.
LINES_OF_A_RUN = re.compile(
    r"""(
      (Flower\ configuration\ not\ found|Starting\ local\ SuperLink|Using\ SuperLink|Successfully\ (started|installed)\ ).*
    | INFO\ *:\ *(
        (Starting\ (logstream|Flower\ Simulation)|Federation\ `|Run\ directory:).*
      | Preparing\ 3\ clients:.* | Prepared\ [123]\ of\ 3\ clients
      | node\ .*connection.*clients | node-[012]\ .*connected\ +[012]:\ prepared
      | Round\ [012]/2:\ accuracy.* | Final\ accuracy\ .*
      )
    | [╭│╰].*
    | .*client\ \d:\ \d+\ %\ of\ its\ synthetic\ images\ generated  # only where that takes long
    )?""",
    re.VERBOSE,
)


def test_a_first_run_behind_a_proxy_has_a_clean_log(tmp_path: Path, flower_environment: dict[str, str]) -> None:
    """The proxy accepts and never answers: what asked it for this machine would wait. Ray asks it for cloud machines."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        names = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = with_programs(flower_environment, Path(sys.executable).parent) | dict.fromkeys(names, address)
        settings = quick(tmp_path, num_server_rounds=2, num_clients=3, generator__name="diffusion", pictures=True)
        done = run(["fbl-flower", "run", "-c", str(settings_file(tmp_path, settings))], environment, tmp_path)
    slow = "This machine is slow or busy. Trying once more.\n"  # Flower then has printed a framed message
    assert done.returncode == 0 and done.stderr in ("", slow), done.stdout + done.stderr
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in done.stdout.splitlines()]
    assert [line for line in lines if not LINES_OF_A_RUN.fullmatch(line)] == []
    assert [line[:17] for line in lines if "Round" in line] == [f"INFO :      Round {n}"[:17] for n in range(3)]


def test_a_deleted_folder_and_a_closed_terminal(tmp_path: Path, flower_environment: dict[str, str]) -> None:
    """A SuperLink whose folder is gone is restarted; a closed terminal stops the run and all its processes."""
    environment = with_programs(flower_environment, Path(sys.executable).parent)
    (tmp_path / "gone").mkdir()
    assert run(["flwr", "ls"], environment, tmp_path / "gone").returncode == 0  # starts it
    (tmp_path / "gone").rmdir()
    config = settings_file(tmp_path, quick(tmp_path, num_server_rounds=100_000))
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("fbl-flower", ["fbl-flower", "run", "-c", str(config)], environment)
    seen, deadline = b"", time.monotonic() + TEN_MINUTES / 2
    while b"Round 2/" not in seen:
        assert time.monotonic() < deadline, seen.decode()
        seen += os.read(terminal, 1000)
    assert f"({tmp_path / 'gone'}) was deleted. It is restarted." in seen.decode()
    assert _simulations(environment["HOME"])
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (1, 130)
    listed = run(["flwr", "ls", "--format", "json"], environment, tmp_path)
    (row,) = json.loads(listed.stdout)["runs"]
    assert row["status"] == "finished:stopped"
    while left := _simulations(environment["HOME"]):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_run_that_fails_exits_1_and_bad_input_exits_2(tmp_path: Path, flower_environment: dict[str, str]) -> None:
    environment = with_programs(flower_environment, Path(sys.executable).parent)
    (tmp_path / "state").write_text("a file where the clients' folder should be")
    config = settings_file(tmp_path, quick(tmp_path))
    failed = run(["fbl-flower", "run", "-c", str(config)], environment, tmp_path)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "no client could be prepared" in failed.stdout + failed.stderr
    bad = run(["fbl-flower", "run", "-c", "train.epochs='abc' data.alpa=1.0"], environment, tmp_path)
    assert bad.returncode == 2
    assert "train.epochs: got 'abc'" in bad.stderr and "did you mean data.alpha" in bad.stderr
    assert "Traceback" not in bad.stderr


def _lines(tmp_path: Path) -> list[str]:
    return [line for file in tmp_path.glob("runs/*/metrics.jsonl") for line in file.read_text().splitlines()]


def _simulations(home: str) -> list[int]:
    """Processes of `flwr-simulation` that were started with this HOME."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"flwr-simulation" in command and f"HOME={home}".encode() in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def _environment_beside(folder: Path) -> Path:
    """Make a virtual environment that sees this one's packages, but not this checkout; return its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(
        sysconfig.get_paths()["purelib"] + "\n"
    )  # a path in a .pth file: its own .pth files do not count
    return folder / "bin"


def test_an_installed_wheel_runs_in_another_directory(tmp_path: Path, flower_environment: dict[str, str]) -> None:
    """The bundle that Flower makes has no weights in it, and its copy of the package hides the installed one."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    programs = _environment_beside(tmp_path / "venv")
    subprocess.run([programs / "pip", "install", "--no-deps", "--quiet", str(wheel)], check=True)
    (programs / "flwr").write_text(f"#!{programs / 'python'}\nfrom flwr.cli.app import app\napp()\n")
    for name in ("flower-superlink", "flower-superexec", "flwr-simulation"):
        text = (Path(sys.executable).parent / name).read_text()
        (programs / name).write_text(text.replace(text.splitlines()[0], f"#!{programs / 'python'}", 1))
    for name in ("flwr", "flower-superlink", "flower-superexec", "flwr-simulation"):
        (programs / name).chmod(0o755)
    environment = with_programs(flower_environment, programs)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run([str(programs / "python"), "-c", "import fbl_flower; print(fbl_flower.__file__)"], environment, elsewhere)
    assert str(tmp_path) in where.stdout
    settings = quick(tmp_path, generator__name="diffusion", num_server_rounds=2, pictures=True)
    config = settings_file(tmp_path, settings)
    done = run([str(programs / "fbl-flower"), "run", "-c", str(config)], environment, elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["left_out"] == {}
    assert (only_run(tmp_path) / "gallery.png").stat().st_size > 5000
    local = run([str(programs / "fbl-flower"), "run", "--engine", "local", "-c", str(config)], environment, elsewhere)
    assert local.returncode == 0, local.stdout + local.stderr
    first, second = (tmp_path / "runs").glob("*/metrics.jsonl")
    assert first.read_bytes() == second.read_bytes()


def test_the_same_app_runs_on_flower_1_41(tmp_path: Path, flower_environment: dict[str, str]) -> None:
    programs = _environment_beside(tmp_path / "venv")
    installed = subprocess.run(
        [programs / "pip", "install", "--quiet", "flwr[simulation]==1.41.0"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"flwr 1.41.0 cannot be installed here: {installed.stderr.splitlines()[-1:]}")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "checkout.pth").write_text(f"{ROOT}\n")
    environment = with_programs(flower_environment, programs)
    version = run([str(programs / "flwr"), "--version"], environment, tmp_path)
    assert "1.41.0" in version.stdout
    config = settings_file(tmp_path, quick(tmp_path))
    done = run([str(programs / "flwr"), "run", str(ROOT), "--stream", "-c", str(config)], environment, tmp_path)
    assert "Round 3/3" in done.stdout, done.stdout + done.stderr
    local = run_local(quick(tmp_path / "local"))
    assert (only_run(tmp_path) / "metrics.jsonl").read_bytes() == (local.run_dir / "metrics.jsonl").read_bytes()
