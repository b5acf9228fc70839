"""A federation of separate processes, made with the guide's own lines: it runs, it speaks gRPC, and strangers stay out."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import free_port, processes_of
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fbl_flower.commands.deploy.certificates import make_certificates
from fbl_flower.commands.deploy.files import Folder
from fbl_flower.commands.deploy.keys import make_keys
from fbl_flower.commands.overrides import read_overrides
from fbl_flower.federation.local import run_local

pytestmark = pytest.mark.real_process

ROOT = Path(__file__).resolve().parents[1]
TWO_MINUTES, TEN_MINUTES = 120.0, 600.0


@dataclass
class Federation:
    """The guide's federation, on ports of its own.

    Attributes:
        environment: Its HOME is nobody else's.
        guide: The guide's lines for one machine, with those ports, by action; several for `node`.
        staying: Server and nodes, by the name of their log.
    """

    environment: dict[str, str]
    fleet: int
    control: int
    guide: dict[str, list[list[str]]]
    staying: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return Path(self.environment["HOME"])

    @property
    def folder(self) -> Folder:
        return Folder(path=self.home / ".fbl" / "federation")

    def call(self, words: list[str], *, patience: float = TWO_MINUTES) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fbl_flower.cli", "deploy", *words],
            env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=patience, check=False,
        )  # fmt: skip

    def start(self, name: str, words: list[str]) -> None:
        with (self.home / f"{name}.log").open("wb") as log:
            self.staying[name] = subprocess.Popen(
                [sys.executable, "-m", "fbl_flower.cli", "deploy", *words],
                env=self.environment, cwd=self.home, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.home.glob("*.log"))

    def operate(self, *words: str, patience: float = TWO_MINUTES) -> subprocess.CompletedProcess[str]:
        return self.call([*words, "--address", f"127.0.0.1:{self.control}"], patience=patience)


def guide_lines(fleet: int, control: int) -> dict[str, list[list[str]]]:
    """Return the words of the guide's block for one machine, with other ports in place of 9092, 8000 and 9094 to 9096."""
    (block,) = re.findall(
        r"^```bash loopback\n(.*?)^```", (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    found: dict[str, list[list[str]]] = {}
    for line in block.splitlines():
        program, deploy, action, *rest = shlex.split(line, comments=True)
        assert (program, deploy) == ("fbl-flower", "deploy")
        words = [action, *rest]
        match action:
            case "server":
                words = [word.replace("127.0.0.1:9092", f"127.0.0.1:{fleet}") for word in words]
                words += ["--control", f"127.0.0.1:{control}"]
            case "node":
                words = [f"localhost:{fleet}" if word == "localhost" else word for word in words]
                words[words.index("--port") + 1] = str(free_port())
            case "register" | "watch" | "run":
                words += ["--address", f"127.0.0.1:{control}"]
        found.setdefault(action, []).append(words)
    return found


def wait_until(condition: Callable[[], Any], what: str, patience: float = TWO_MINUTES) -> Any:
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(1.0)
    return value


@pytest.fixture(scope="module")
def federation(module_flower_environment: dict[str, str]) -> Iterator[Federation]:
    fleet, control = free_port(), free_port()
    guide = guide_lines(fleet, control)
    environment = module_flower_environment | {"PYTHONPATH": str(ROOT)}
    made = Federation(environment=environment, fleet=fleet, control=control, guide=guide)
    try:
        for action in ("certs", "keys"):
            done = made.call(guide[action][0])
            assert done.returncode == 0, done.stdout + done.stderr
        made.start("server", guide["server"][0])
        done = made.call(guide["register"][0])
        assert done.returncode == 0, done.stdout + done.stderr + made.logs()
        for words in guide["node"]:
            made.start(words[1], words)
        wait_until(lambda: made.call(guide["watch"][0]).stdout.count(" online") == 3, "three nodes online")
        yield made
    finally:
        for process in made.staying.values():
            process.terminate()
        for process in made.staying.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


# --- the wire


def connection(federation: Federation, *protocols: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(federation.folder.ca))
    context.set_alpn_protocols(list(protocols))
    plain = socket.create_connection(("127.0.0.1", federation.fleet), 10)
    return context.wrap_socket(plain, server_hostname="localhost")


def fleet(federation: Federation, credentials: grpc.ChannelCredentials | None) -> Any:
    address = f"localhost:{federation.fleet}"
    channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    return contextlib.closing(channel)


def refusal(federation: Federation, ca: Path | None, call: Callable[[FleetStub], object]) -> grpc.RpcError:
    credentials = grpc.ssl_channel_credentials(ca.read_bytes()) if ca else None
    with fleet(federation, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        call(FleetStub(channel))
    return caught.value


PULL = PullMessagesRequest(node=Node(node_id=1))


def test_the_link_between_machines_is_grpc(federation: Federation) -> None:
    """An HTTP/2 server answers a client's preface with a SETTINGS frame (RFC 9113, 3.4), and a gRPC one knows the Fleet service."""
    with connection(federation, "h2", "http/1.1") as wire:
        assert wire.version() == "TLSv1.3" and wire.selected_alpn_protocol() == "h2"
        wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        frame = wire.recv(9)
        assert frame[3] == 4 and int.from_bytes(frame[5:9], "big") == 0
    error = refusal(federation, federation.folder.ca, lambda stub: stub.PullMessages(PULL, timeout=10))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED and error.details() == "Missing authentication metadata"


def test_the_control_api_is_https_and_not_grpc(federation: Federation) -> None:
    """If this fails after an upgrade, the guide's table of links is to be written anew."""
    context = ssl.create_default_context(cafile=str(federation.folder.ca))
    with urllib.request.urlopen(f"https://127.0.0.1:{federation.control}/health", context=context, timeout=10) as answer:
        assert answer.status == 200
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://127.0.0.1:{federation.control}/health", timeout=10)
    assert federation.operate("health", "server").returncode == 0
    port = federation.guide["node"][0][-1]
    assert federation.call(["health", "node", "--port", port]).returncode == 0


def test_the_server_does_not_listen_where_it_was_not_told_to(federation: Federation) -> None:
    """Of this machine's addresses, only the loopback interface is served here; the control API is nowhere else by default."""
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout
    if not listening:
        pytest.skip("no ss here")
    for port in (federation.fleet, federation.control):
        (address,) = {line.split()[3] for line in listening.splitlines() if line.split()[3].endswith(f":{port}")}
        assert address in (f"127.0.0.1:{port}", f"[::ffff:127.0.0.1]:{port}")


# --- strangers


def test_plaintext_and_another_authority_are_refused(federation: Federation, tmp_path: Path) -> None:
    error = refusal(federation, None, lambda stub: stub.PullMessages(PULL, timeout=10))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    other = Folder(path=tmp_path / "other")
    make_certificates(other, [], days=1)
    error = refusal(federation, other.ca, lambda stub: stub.PullMessages(PULL, timeout=10))
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "certificate" in str(error.details()).lower()


def test_a_wrong_signature_and_an_unregistered_key_are_refused(federation: Federation) -> None:
    """With the public key of a registered node, but without its private key; and with a whole key that nobody registered.

    The second one's signature holds, so that it is refused for the key and for nothing before that.
    """
    registered = load_ssh_public_key(federation.folder.public_key("site-0").read_bytes())
    stranger = ec.generate_private_key(ec.SECP384R1())

    def headers(public: Any) -> list[tuple[str, Any]]:
        time_text = now().isoformat()
        return [
            (PUBLIC_KEY_HEADER, public_key_to_bytes(public)), (TIMESTAMP_HEADER, time_text),
            (SIGNATURE_HEADER, sign_message(stranger, time_text.encode("ascii"))),
        ]  # fmt: skip

    ca = federation.folder.ca
    error = refusal(federation, ca, lambda stub: stub.PullMessages(PULL, timeout=10, metadata=headers(registered)))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, "Invalid signature")
    own = stranger.public_key()
    activate = ActivateNodeRequest(public_key=public_key_to_bytes(own), heartbeat_interval=30)
    error = refusal(federation, ca, lambda stub: stub.ActivateNode(activate, timeout=10, metadata=headers(own)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "Failed to activate SuperNode" in str(error.details())


def test_strange_nodes_do_not_get_in(federation: Federation, tmp_path: Path) -> None:
    """Flower's own program, started by the line that our command prints: as it is, with another authority, and in plaintext."""
    assert federation.call(["keys", "stranger"]).returncode == 0
    words = ["node", "stranger", "--server", f"localhost:{federation.fleet}", "--partition-id", "0", "--num-partitions", "3"]
    printed = federation.call([*words, "--port", str(free_port()), "--dry-run"]).stdout.removeprefix("$ ").strip()
    assert printed.startswith(f"cd {federation.folder.path}/nodes/stranger && FLWR_HOME=")
    federation.folder.node("stranger").mkdir(parents=True)
    other = Folder(path=tmp_path / "other")
    make_certificates(other, [], days=1)
    make_keys(other, ["stranger"])
    plaintext = re.sub(r"--root-certificates \S+ --auth-supernode-private-key \S+", "--insecure", printed)
    assert plaintext.count("--insecure") == 1
    lines = {
        "unregistered": printed,
        "other authority": printed.replace(str(federation.folder.ca), str(other.ca)) + " --max-retries 1",
        "plaintext": plaintext + " --max-retries 1",
    }
    reasons = {
        "unregistered": "Failed to activate SuperNode",
        "other authority": "CERTIFICATE_VERIFY_FAILED",
        "plaintext": "Socket closed",
    }
    for name, line in lines.items():
        done = subprocess.run(
            line, shell=True, env=federation.environment | {"PATH": f"{Path(sys.executable).parent}:{federation.environment['PATH']}"},
            capture_output=True, text=True, timeout=TWO_MINUTES, check=False,
        )  # fmt: skip
        assert done.returncode != 0, name
        said = done.stdout + done.stderr
        assert "Exit Code: 305" in said and reasons[name] in said, said
    seen = federation.call(federation.guide["watch"][0]).stdout
    assert seen.count(" online") == 3 and seen.count("site-") == 3


# --- runs


def test_the_guide_s_run_gives_the_metrics_of_the_engine_in_one_process(federation: Federation, tmp_path: Path) -> None:
    (words,) = federation.guide["run"]
    done = federation.call(words, patience=TEN_MINUTES)
    assert done.returncode == 0, done.stdout + done.stderr + federation.logs()
    assert re.search(r"run \d+: finished:completed", done.stdout)
    (run_dir,) = (federation.home / ".fbl" / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["rounds"] == 2
    assert summary["left_out"] == {} and summary["not_prepared"] == {}
    settings = read_overrides([words[words.index("-c") + 1]]) | {"pictures": False}
    local = run_local(settings | {"output-dir": str(tmp_path / "runs"), "state-dir": str(tmp_path / "state")})
    ours, one_process = ((path / "metrics.jsonl").read_text().splitlines() for path in (run_dir, local.run_dir))
    assert [json.loads(line) for line in ours] == [json.loads(line) for line in one_process]


def test_a_run_that_fails_exits_1_with_the_reason(federation: Federation) -> None:
    done = federation.operate("run", "-c", "data.name='parquet' data.path='/nowhere.parquet'", patience=TEN_MINUTES)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "finished:failed" in done.stderr and "data.path: no file at /nowhere.parquet" in done.stderr
    bad = federation.operate("run", "-c", "data.alpa=1.0")
    assert bad.returncode == 2 and "did you mean data.alpha" in bad.stderr


def test_registering_again_changes_nothing_and_there_is_nothing_to_stop(federation: Federation) -> None:
    done = federation.call(federation.guide["register"][0])
    assert done.returncode == 0 and done.stdout.count("registered before") == 3
    assert federation.operate("stop").stdout.strip() == "no run to stop"


def test_sigterm_ends_nodes_and_server_and_leaves_no_process(federation: Federation) -> None:
    for name, process in reversed(federation.staying.items()):
        process.terminate()
        assert process.wait(60) is not None, name
    wait_until(lambda: not processes_of(federation.home), f"no process left: {processes_of(federation.home)}", 60.0)
