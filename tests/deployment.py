"""A Flower deployment on this machine for tests: one SuperLink and several SuperNodes with TLS and node authentication.

Every node has a home of its own, by which its processes are found: to kill them, to stop them for a while, to end them after the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conftest import free_port

from fbl_flower.commands.deploy.certificates import make_certificates
from fbl_flower.commands.deploy.files import Folder
from fbl_flower.commands.deploy.keys import make_keys
from fbl_flower.config import to_toml

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = "127.0.0.1"
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
_RESTART_PAUSE = 5.0  # seconds after which a node that ended is started again, as a supervisor such as systemd does


class Deployment:
    """One SuperLink and its nodes; a context manager that leaves no process behind.

    Args:
        folder: For everything.
        environment: Of the processes, but for their homes.
        num_nodes: SuperNodes, each with its own state folder.
        addresses: More addresses of this machine at which nodes may call the SuperLink.
    """

    def __init__(self, folder: Path, environment: dict[str, str], *, num_nodes: int = 3, addresses: Sequence[str] = ()) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        programs = str(Path(sys.executable).parent)
        # gRPC sends what is not excepted through the proxy of the environment, which knows nothing of this machine's own networks.
        environment = {key: value for key, value in environment.items() if key.lower() not in _PROXIES}
        self._environment = environment | {
            "PATH": programs + os.pathsep + environment["PATH"], "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }  # fmt: skip
        self.http_port, self.fleet_port = free_port(), free_port()
        self._fleet_host = "0.0.0.0" if addresses else LOOPBACK
        self.home("server").mkdir(parents=True)
        self._files = Folder(path=folder)
        make_certificates(self._files, [LOOPBACK, *addresses], days=1)
        self._supervisors: list[threading.Thread] = []
        self._ending = threading.Event()

    def __enter__(self) -> Deployment:
        self.start_superlink()
        operator = self.home("server") / ".flwr"
        operator.mkdir(exist_ok=True)
        (operator / "config.toml").write_text(
            f'[superlink]\ndefault = "edge"\n[superlink.edge]\naddress = "{LOOPBACK}:{self.http_port}"\n'
            f'root-certificates = "{self._files.ca}"\n'
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5.0
            while found := self.processes(""):
                for process in found:
                    _send(process, number)
                if time.monotonic() > deadline or number == signal.SIGCONT:
                    break
                time.sleep(0.2)
        for supervisor in self._supervisors:
            supervisor.join(10.0)

    def home(self, name: str) -> Path:
        return self.folder / "homes" / name

    def state_dir(self, node: int) -> Path:
        return self.folder / f"state-{node}"

    def start_superlink(self) -> None:
        """Start the SuperLink, on the same ports and database each time, and wait until it listens."""
        self._start(
            "server",
            [
                "flower-superlink", "--ssl-ca-certfile", str(self._files.ca), "--ssl-certfile", str(self._files.server_certificate),
                "--ssl-keyfile", str(self._files.server_key), "--enable-supernode-auth", "--host", LOOPBACK,
                "--port", str(self.http_port), "--fleet-api-address", f"{self._fleet_host}:{self.fleet_port}",
                "--database", str(self.folder / "state.db"), "--disable-runtime-dependency-installation",
            ],
        )  # fmt: skip
        wait_for(lambda: _listens(self.http_port) and _listens(self.fleet_port), 60.0, "the SuperLink to listen", self.log)

    def start_node(self, node: int, *, at: str = LOOPBACK, within: Sequence[str] = (), **node_config: str | int | bool) -> None:
        """Register a node and start it, under supervision: whenever it ends, it is started again.

        Args:
            node: Its partition-id.
            at: Address of the SuperLink as the node sees it.
            within: Command in front of the node's own, such as `ip netns exec`.
            node_config: Settings of the node beside those that all have.
        """
        name = f"node-{node}"
        self.home(name).mkdir(parents=True, exist_ok=True)
        make_keys(self._files, [name])
        done = self.flwr("supernode", "register", str(self._files.public_key(name)), "edge", "--name", name, "--format", "json")
        assert json.loads(done[done.index("{") :])["success"], done
        settings = {"partition-id": node, "num-partitions": self.num_nodes, "name": f"site-{node}"}
        settings |= {"state-dir": str(self.state_dir(node))} | {k.replace("_", "-"): v for k, v in node_config.items()}
        command = [
            *within, "flower-supernode", "--superlink", f"{at}:{self.fleet_port}", "--root-certificates", str(self._files.ca),
            "--auth-supernode-private-key", str(self._files.key(name)), "--host", LOOPBACK, "--port", str(free_port()),
            "--node-config", to_toml(settings).replace(" = ", "=").replace("\n", " "),
        ]  # fmt: skip

        def supervise() -> None:
            while not self._ending.is_set():
                self._start(name, command).wait()
                self._ending.wait(_RESTART_PAUSE)

        self._supervisors.append(threading.Thread(target=supervise, daemon=True))
        self._supervisors[-1].start()

    def submit(self, settings: dict[str, Any], name: str = "run.toml") -> str:
        """Submit a run and return its id."""
        (self.folder / name).write_text(to_toml(settings))
        done = self.flwr("run", str(ROOT), "edge", "-c", str(self.folder / name), "--format", "json")
        answer = json.loads(done[done.index("{") :])
        assert answer.get("success", True) and "run-id" in answer, f"{answer}\n{self.log()}"
        return str(answer["run-id"])

    def flwr(self, *arguments: str) -> str:
        """Call Flower's command line as the operator and return what it prints."""
        home = self.home("server")
        environment = self._environment | {"HOME": str(home), "FLWR_HOME": str(home / ".flwr")}
        done = subprocess.run(
            ["flwr", *arguments], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def processes(self, name: str, program: str = "") -> list[int]:
        """Return the processes of "server", of "node-K", or of all, whose command line contains `program`."""
        prefix = f"HOME={self.home(name) if name else self.folder / 'homes'}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (folder / "environ").read_bytes().split(b"\0"), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            mine = any(entry == prefix or (not name and entry.startswith(prefix + b"/")) for entry in environment)
            if mine and program.encode() in command:
                found.append(int(folder.name))
        return found

    def wait_for_new_process(self, name: str, program: str, seconds: float) -> None:
        """Wait for a process that is not there yet: one that is may be about to end."""
        old = set(self.processes(name, program))
        wait_for(lambda: set(self.processes(name, program)) - old, seconds, f"a new {program} of {name}", self.log)

    def send(self, number: signal.Signals, name: str) -> set[int]:
        """Send a signal to the processes of a node or the server, also to those that start meanwhile; return them."""
        reached: set[int] = set()
        while new := set(self.processes(name)) - reached:
            for process in new:
                _send(process, number)
            reached |= new
        return reached

    def kill(self, name: str) -> None:
        """Kill all processes of a node or the server and wait until they are gone, and with them what they listened on."""
        killed = self.send(signal.SIGKILL, name)
        assert killed, f"nothing of {name} to kill"

        def gone() -> bool:
            killed.update(self.send(signal.SIGKILL, name))
            return not any(map(_holds_files, killed))

        wait_for(gone, 30.0, f"the end of {name}")

    def log(self) -> str:
        """Return what all processes said."""
        return "\n".join(f"--- {path.stem}\n{path.read_text(errors='replace')[-4000:]}" for path in self.folder.glob("*.log"))

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        home = self.home(name)
        environment = self._environment | {"HOME": str(home), "FLWR_HOME": str(home / ".flwr")}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


class Watch:
    """Reads the run directories below a folder while a run writes them."""

    def __init__(self, runs: Path, log: Callable[[], str]) -> None:
        self._runs, self._log = runs, log

    @property
    def run_dir(self) -> Path:
        (run_dir,) = self._runs.iterdir()
        return run_dir

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole lines of the metrics, from round 0 on."""
        files = list(self._runs.glob("*/metrics.jsonl"))
        lines = files[0].read_text().split("\n")[:-1] if files else []
        return [json.loads(line) for line in lines]

    def summary(self) -> dict[str, Any] | None:
        files = list(self._runs.glob("*/summary.json"))
        return json.loads(files[0].read_text()) if files else None

    def wait_for_row(self, wanted: Callable[[dict[str, Any]], bool], seconds: float, what: str) -> dict[str, Any]:
        """Wait until a line of the metrics is as wanted, and return it."""

        def look() -> dict[str, Any] | None:
            assert (self.summary() or {}).get("status") != "failed", f"{self.summary()}\n{self._log()}"
            return next((row for row in self.rows() if row["round"] > 0 and wanted(row)), None)

        return wait_for(look, seconds, what, lambda: f"{self.rows()}\n{self.summary()}\n{self._log()}")

    def wait_for_end(self, seconds: float) -> dict[str, Any]:
        """Wait for the summary and return it."""
        return wait_for(self.summary, seconds, "the end of the run", lambda: f"{self.rows()}\n{self._log()}")


def wait_for(look: Callable[[], Any], seconds: float, what: str, explain: Callable[[], str] = str) -> Any:
    """Return what `look` returns as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{explain()}"
        time.sleep(0.1)
    return found


def carries(name: str, address: str, port: int) -> bool:
    """Whether a process in the network namespace `name` reaches a port of this machine within half a minute."""
    program = f"""
import socket, time
deadline = time.monotonic() + 30
while True:
    try:
        socket.create_connection(({address!r}, {port}), 3).close()
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.5)
"""
    return (
        subprocess.run(
            ["ip", "netns", "exec", name, sys.executable, "-c", program], check=False, capture_output=True
        ).returncode
        == 0
    )


@contextlib.contextmanager
def cuttable_network(name: str, *, here: str, there: str) -> Iterator[Callable[[bool], None]]:
    """Make a network namespace that is joined to this one by a cable; give the function that plugs it (True) or cuts it (False).

    Args:
        name: Of the namespace, at most 13 letters.
        here, there: The two addresses.
    """
    commands = [
        f"ip netns add {name}",
        f"ip link add {name}-h type veth peer name {name}-n netns {name}",
        f"ip addr add {here}/30 dev {name}-h",
        f"ip link set {name}-h up",
        f"ip -n {name} addr add {there}/30 dev {name}-n",
        f"ip -n {name} link set {name}-n up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield lambda on: _run(f"ip link set {name}-h {'up' if on else 'down'}")
    finally:
        subprocess.run(["ip", "link", "del", f"{name}-h"], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex((LOOPBACK, port)) == 0


def _holds_files(process: int) -> bool:
    """Whether a process is not dead yet: one that dies loses its environment first and its sockets a good while later."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
