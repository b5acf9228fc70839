"""What all tests share: one thread, a home of their own, repeatable hypothesis.

Markers:
    slow: Takes more than a few seconds (trainings, whole data sets). A step of its own in CI.
    real_process: Starts Flower or Ray processes, or builds an environment. A step of its own in CI.

`python -m pytest` leaves both out (see `addopts` in pyproject.toml); `python -m pytest -m "slow or real_process"` runs them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch or flwr is imported: one thread, and nothing of the user's own home is read or written, but for caches.
_REAL_HOME = Path.home()
_TEST_HOME = Path(tempfile.mkdtemp(prefix="fbl-test-home-"))
atexit.register(shutil.rmtree, _TEST_HOME, ignore_errors=True)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("XDG_CACHE_HOME", str(_REAL_HOME / ".cache"))
for _pip_config in (_REAL_HOME / ".config/pip/pip.conf", _REAL_HOME / ".pip/pip.conf"):
    if _pip_config.is_file():
        os.environ.setdefault("PIP_CONFIG_FILE", str(_pip_config))
os.environ["HOME"] = str(_TEST_HOME)
os.environ["FLWR_HOME"] = str(_TEST_HOME / ".flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def flower_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give the environment for Flower processes that meet nobody else's: own home, own ports; end what is left of them."""
    with _flower_home(tmp_path / "flwr-home") as environment:
        yield environment


@pytest.fixture(scope="module")
def module_flower_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give the same to all tests of a module."""
    with _flower_home(tmp_path_factory.mktemp("flower") / "flwr-home") as environment:
        yield environment


@contextlib.contextmanager
def _flower_home(home: Path) -> Iterator[dict[str, str]]:
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "FLWR_HOME": str(home / ".flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    try:
        yield environment
    finally:
        _end_processes_of(home)


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the directory of a small Stable Diffusion pipeline with random weights; nobody may change it."""
    from small_pipelines import save_small_pipeline

    return save_small_pipeline(tmp_path_factory.mktemp("small-source"))


@pytest.fixture(scope="session")
def small_made(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the text-to-image generator that was made of it, in 4 bits; nobody may change it."""
    from fbl_flower.generation.pipeline_store import quantize_pipeline

    folder = tmp_path_factory.mktemp("small-made") / "sd"
    quantize_pipeline(str(small_source), folder)
    return folder


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _end_processes_of(home: Path) -> None:
    """Stop every process that was started with `home` as its HOME (Flower's local SuperLink outlives its caller)."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        for process in processes_of(home):
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
                os.kill(process, number)
        while processes_of(home):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return


def processes_of(home: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        if f"HOME={home}".encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.fixture
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tiny network judge: half a second instead of half a minute, and still right on most digits."""
    from dataclasses import replace

    from fbl_flower.config import ModelConfig
    from fbl_flower.training import judge

    monkeypatch.setattr(judge, "JUDGE_MODEL", ModelConfig(name="tiny"))
    monkeypatch.setattr(judge, "JUDGE_TRAINING", replace(judge.JUDGE_TRAINING, learning_rate=0.1))
    monkeypatch.setattr(judge, "MIN_STEPS", 100)
