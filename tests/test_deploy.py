"""The deployment commands without processes: certificates, keys, files, and that every printed or documented line can be parsed."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store
from flwr.cli.app import app as flwr_app
from flwr.common.config import parse_config_args
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fbl_flower import cli
from fbl_flower.commands.deploy import certificates, operator, processes
from fbl_flower.commands.deploy.files import Folder, write_whole
from fbl_flower.commands.deploy.keys import make_keys
from fbl_flower.commands.deploy.processes import node_config_text
from fbl_flower.commands.overrides import chosen_config
from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.federation.arrival import is_simulated

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "deployment.md"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(path=tmp_path / "federation")


@pytest.fixture
def whole(folder: Folder) -> Folder:
    certificates.make_certificates(folder, ["fbl.example.org", "192.0.2.10"], days=90)
    make_keys(folder, ["site-0"])
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def problems(*arguments: str) -> str:
    options = cli._parser().parse_args(["deploy", *arguments])
    with pytest.raises(ConfigError) as caught:
        options.handler(options)
    return str(caught.value)


def flower_parses(line: str) -> Any:
    """Parse one of Flower's command lines with Flower's own parser, and return what it makes of it."""
    words = shlex.split(line)
    while "=" in words[0] or words[0] in ("cd", "&&"):
        words = words[2:] if words[0] == "cd" else words[1:]
    match words[0]:
        case "flower-superlink":
            return _parse_args_run_superlink().parse_args(words[1:])
        case "flower-supernode":
            return _parse_args_run_supernode().parse_args(words[1:])
        case "flwr":
            command, rest = typer.main.get_command(flwr_app), words[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            return command.make_context(command.name, rest).params
    raise AssertionError(line)


# --- certificates


def test_certificates_have_names_usage_and_permissions(whole: Folder) -> None:
    ca, server = certificates._read(whole.ca), certificates._read(whole.server_certificate)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fbl.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.10", "127.0.0.1", "::1"]
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign and not usage.value.digital_signature
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    usage = server.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert mode(whole.ca_key) == mode(whole.server_key) == 0o600
    assert mode(whole.certificates) == 0o700
    assert (server.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days in (89, 90)
    assert sorted(path.name for path in whole.path.rglob("*")) == sorted(
        ["certificates", "ca.crt", "ca.key", "server.crt", "server.key", "keys", "site-0", "site-0.pub"]
    )  # nothing half-made is left


@pytest.mark.parametrize("host", ["fbl.example.org", "localhost"])
def test_a_strict_verifier_accepts_the_server(whole: Folder, host: str) -> None:
    """cryptography's verifier follows RFC 5280 and the browsers' rules, as Python 3.13's default context does."""
    ca, server = certificates._read(whole.ca), certificates._read(whole.server_certificate)
    chain = PolicyBuilder().store(Store([ca])).build_server_verifier(x509.DNSName(host)).verify(server, [])
    assert chain == [server, ca]


def test_python_s_strict_context_accepts_the_server(whole: Folder) -> None:
    """A handshake in memory, with the flag that is Python 3.13's default."""
    assert _handshake(whole.ca, whole, "127.0.0.1") == "TLSv1.3"


def test_another_authority_and_another_name_are_refused(whole: Folder, tmp_path: Path) -> None:
    other = Folder(path=tmp_path / "other")
    certificates.make_certificates(other, [], days=1)
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed|unable to get local issuer|certificate verify failed"):
        _handshake(other.ca, whole, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(whole.ca, whole, "evil.example.org")


def _handshake(ca: Path, server: Folder, host: str) -> str | None:
    client_context = ssl.create_default_context(cafile=str(ca))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server.server_certificate, server.server_key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    served = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, served):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version()


def test_openssl_makes_the_same(whole: Folder, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    made = Folder(path=tmp_path / "openssl")
    made.certificates.mkdir(parents=True)
    for line in certificates.openssl_lines(["fbl.example.org", "192.0.2.10"], days=90):
        subprocess.run(line, shell=True, cwd=made.certificates, check=True, capture_output=True)
    for name in ("ca.crt", "server.crt"):
        ours, theirs = (certificates._read(f.certificates / name) for f in (whole, made))
        assert theirs.subject == ours.subject
        found = {extension.oid: extension for extension in theirs.extensions}
        for extension in ours.extensions:
            if "KeyIdentifier" not in type(extension.value).__name__:
                assert found[extension.oid].value == extension.value
                assert found[extension.oid].critical == extension.critical
    assert _handshake(made.ca, made, "localhost") == "TLSv1.3"
    assert mode(made.ca_key) == mode(made.server_key) == 0o600


def test_certificates_are_not_overwritten_unasked(whole: Folder) -> None:
    before = {path.name: path.read_bytes() for path in whole.certificates.iterdir()}
    assert "--renew" in problems("certs", "--dir", str(whole.path))
    assert cli.main(["deploy", "certs", "--dir", str(whole.path), "--if-missing"]) == 0
    assert {path.name: path.read_bytes() for path in whole.certificates.iterdir()} == before
    assert cli.main(["deploy", "certs", "--dir", str(whole.path), "--overwrite"]) == 0
    after = {path.name: path.read_bytes() for path in whole.certificates.iterdir()}
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)


def test_a_renewed_certificate_is_of_the_same_authority_key_and_names(whole: Folder) -> None:
    before = {path.name: path.read_bytes() for path in whole.certificates.iterdir()}
    old = certificates._read(whole.server_certificate)
    assert cli.main(["deploy", "certs", "--dir", str(whole.path), "--renew", "--days", "400"]) == 0
    new = certificates._read(whole.server_certificate)
    assert (new.not_valid_after_utc - old.not_valid_after_utc).days == 310
    assert new.public_key() == old.public_key()
    san = x509.SubjectAlternativeName
    assert new.extensions.get_extension_for_class(san).value == old.extensions.get_extension_for_class(san).value
    changed = {path.name for path in whole.certificates.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"server.crt"}
    assert _handshake(whole.ca, whole, "localhost") == "TLSv1.3"
    assert cli.main(["deploy", "certs", "--dir", str(whole.path), "--renew", "--host", "new.example.org"]) == 0
    names = certificates._read(whole.server_certificate).extensions.get_extension_for_class(san).value
    assert list(names) == [*old.extensions.get_extension_for_class(san).value, x509.DNSName("new.example.org")]
    whole.ca_key.unlink()
    assert "ca.key" in problems("certs", "--dir", str(whole.path), "--renew")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--host", "https://fbl.example.org"], "--host: got 'https://fbl.example.org'; wanted a name"),
        (["--host", "fbl.example.org:9092"], "without port and scheme"),
        (["--host", "300.1.1.1"], "--host: got '300.1.1.1'"),
        (["--host", "a b", "--host", ""], "2 problems"),
        (["--days", "0"], "--days: got 0; allowed: 1 to 3650"),
    ],
)
def test_bad_hosts_and_days_make_nothing(folder: Folder, arguments: list[str], text: str) -> None:
    assert text in problems("certs", "--dir", str(folder.path), *arguments)
    assert not folder.path.exists()


def test_a_certificate_that_ends_is_warned_of_and_one_that_ended_is_refused(whole: Folder) -> None:
    end = certificates._read(whole.server_certificate).not_valid_after_utc
    state = certificates.certificate_state
    assert state(whole.server_certificate, now=end - datetime.timedelta(days=31)) == ""
    assert "--renew" in state(whole.server_certificate, now=end - datetime.timedelta(days=29))
    with pytest.raises(ConfigError, match="this machine's clock says"):
        state(whole.server_certificate, now=end + datetime.timedelta(seconds=1))
    with pytest.raises(ConfigError, match="this machine's clock says 1970"):
        state(whole.server_certificate, now=datetime.datetime.fromtimestamp(0, datetime.UTC))


# --- keys and files


def test_keys_are_what_flower_reads(whole: Folder) -> None:
    private = load_ssh_private_key(whole.key("site-0").read_bytes(), None)
    public = load_ssh_public_key(whole.public_key("site-0").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP384R1)
    assert isinstance(public, ec.EllipticCurvePublicKey) and uses_nist_ec_curve(public)
    assert private.public_key() == public
    assert mode(whole.key("site-0")) == 0o600 and mode(whole.key("site-0").parent) == 0o700


def test_keys_are_not_overwritten_unasked_and_none_is_made_if_one_is_there(whole: Folder) -> None:
    before = whole.key("site-0").read_bytes()
    assert "--if-missing" in problems("keys", "--dir", str(whole.path), "site-1", "site-0")
    assert not whole.key("site-1").exists()
    assert make_keys(whole, ["site-1", "site-0"], if_missing=True) == ["site-1"]
    assert whole.key("site-0").read_bytes() == before
    whole.public_key("site-0").unlink()  # a stop between the two files
    assert make_keys(whole, ["site-0"], if_missing=True) == []
    private = load_ssh_private_key(before, None)
    assert load_ssh_public_key(whole.public_key("site-0").read_bytes()) == private.public_key()
    assert make_keys(whole, ["site-0"], overwrite=True) == ["site-0"]
    assert whole.key("site-0").read_bytes() != before


def test_what_answers_and_speaks_no_http_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert cli.main(["deploy", "health", "node", "--port", str(listener.getsockname()[1])]) == 1
        thread.join()
    assert "Traceback" not in capsys.readouterr().err


def test_values_that_flower_cannot_read_are_refused() -> None:
    problems: list[str] = []
    node_config_text({"x": [1, 2], "y": datetime.date(2024, 1, 1), "z": 1.5, "b": True}, problems)
    assert [problem.split(":")[0] for problem in problems] == ["x", "y"]
    assert problems[0] == "x: got [1, 2]; Flower's node config takes text, numbers, true and false"


def test_another_machines_public_key_is_not_replaced_unasked(whole: Folder) -> None:
    """As on a server, to which only the node's public key was copied."""
    whole.key("site-0").unlink()
    before = whole.public_key("site-0").read_bytes()
    with pytest.raises(ConfigError, match=r"site-0.pub: is there without its private key, .*; --overwrite replaces it"):
        make_keys(whole, ["site-1", "site-0"], if_missing=True)
    assert whole.public_key("site-0").read_bytes() == before and not whole.key("site-1").exists()
    assert make_keys(whole, ["site-0"], overwrite=True) == ["site-0"]


def test_what_is_public_is_put_where_it_was_asked_for(whole: Folder, tmp_path: Path) -> None:
    assert cli.main(["deploy", "certs", "--dir", str(whole.path), "--if-missing", "--public", str(tmp_path / "public")]) == 0
    assert (
        cli.main(["deploy", "keys", "site-0", "--dir", str(whole.path), "--if-missing", "--public", str(tmp_path / "public")])
        == 0
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "public").iterdir()} == {
        "ca.crt": whole.ca.read_bytes(), "site-0.pub": whole.public_key("site-0").read_bytes(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", ".x", "x.pub", "a" * 64, "a b"])
def test_a_node_s_name_is_no_path(folder: Folder, name: str) -> None:
    with pytest.raises(ConfigError, match="node: got"):
        make_keys(folder, [name])
    assert not folder.path.exists()


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder" / "key"
    write_whole(target, b"old", mode=0o600)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, b"new", mode=0o600)
    assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]


def test_permissions_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        write_whole(tmp_path / "a" / "key", b"x", mode=0o600)
        os.umask(0o077)
        write_whole(tmp_path / "a" / "crt", b"x", mode=0o644)
    finally:
        os.umask(before)
    assert (mode(tmp_path / "a" / "key"), mode(tmp_path / "a" / "crt")) == (0o600, 0o644)


# --- what is printed


def test_the_server_s_line_is_one_that_flower_takes(whole: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "server", "--dir", str(whole.path), "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    options = flower_parses(line.removeprefix("$ "))
    assert line.startswith(f"$ cd {whole.superlink} && FLWR_HOME={whole.superlink}/flwr ")
    assert options.enable_supernode_auth and not options.insecure and not options.runtime_dependency_install
    assert (options.fleet_api_address, options.host, options.port) == ("0.0.0.0:9092", "127.0.0.1", 8000)
    assert options.fleet_api_type == "grpc-rere"
    assert options.ssl_certfile == str(whole.server_certificate) and options.database == str(whole.superlink / "state.db")
    assert not whole.superlink.exists()  # a dry run makes nothing


def test_the_node_s_line_is_one_that_flower_takes(whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, generator = tmp_path / "my photos", tmp_path / "generator"
    images.mkdir()
    generator.mkdir()
    arguments = ["--server", "[2001:db8::1]:19092", "--partition-id", "2", "--num-partitions", "3", "--port", "9096"]
    arguments += ["--data-path", str(images), "--capability", "none", "--set", 'site="the barn" big=true', "--set", "share=0.5"]
    arguments += ["--generator", str(generator)]
    assert cli.main(["deploy", "node", "site-0", "--dir", str(whole.path), "--dry-run", *arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    options = flower_parses(line.removeprefix("$ "))
    assert options.superlink == "[2001:db8::1]:19092" and not options.insecure and options.transport == "grpc-rere"
    assert options.root_certificates == str(whole.ca) and options.auth_supernode_private_key == str(whole.key("site-0"))
    assert (options.host, options.port) == ("127.0.0.1", 9096)
    assert parse_config_args([options.node_config]) == {
        "partition-id": 2, "num-partitions": 3, "name": "site-0", "data-path": str(images), "capability": "none",
        "generator-path": str(generator), "site": "the barn", "big": True, "share": 0.5,
    }  # fmt: skip


def test_a_node_that_cannot_start_says_everything_that_is_wrong(whole: Folder, tmp_path: Path) -> None:
    whole.key("site-0").chmod(0o640)
    arguments = ["--server", "x", "--partition-id", "3", "--num-partitions", "3"]
    text = problems(
        "node", "site-0", "--dir", str(whole.path), "--ca", str(tmp_path / "no.crt"), *arguments, "--set", 'a="it\'s"'
    )
    for part in ("no.crt: no such file", "others have access (mode 640", "got 3 of 3", "without '"):
        assert part in text
    text = problems("node", "nobody", "--dir", str(whole.path), "--server", "x", "--partition-id", "0", "--num-partitions", "1")
    assert "`fbl-flower deploy keys nobody` makes it" in text
    twice = ["--set", "partition-id=1 capability='full'", "--server", "x", "--partition-id", "0", "--num-partitions", "1"]
    assert "2 problems" in problems("node", "site-0", "--dir", str(whole.path), *twice)


def test_a_node_whose_folders_are_not_there_yet_starts_with_a_warning(
    whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor would start one that refuses again and again, and the server would only see that it is not connected."""
    arguments = ["--dir", str(whole.path), "--server", "x", "--partition-id", "0", "--num-partitions", "1"]
    arguments += ["--data-path", str(tmp_path / "photos"), "--generator", str(tmp_path / "generator")]
    assert cli.main(["deploy", "node", "site-0", *arguments, "--dry-run"]) == 0
    first, second, line = capsys.readouterr().out.splitlines()
    assert first.startswith(f"warning: data-path: no folder {tmp_path}/photos; ")
    assert second.startswith(f"warning: generator-path: no folder {tmp_path}/generator; ")
    assert parse_config_args([flower_parses(line.removeprefix("$ ")).node_config])["data-path"] == str(tmp_path / "photos")


def test_a_server_without_certificates_says_how_to_get_them(folder: Folder) -> None:
    assert problems("server", "--dir", str(folder.path)).count("`fbl-flower deploy certs --host NAME` makes it") == 3


@pytest.mark.parametrize("text", ["", ":9092", "a:b", "a:0", "a:65536", "2001:db8::1", "https://a:1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--server: got"):
        processes.split_address("--server", text, 9092)


def test_addresses() -> None:
    assert processes.split_address("--server", "a", 9092) == ("a", 9092)
    assert processes.split_address("--server", "192.0.2.1:1", 9092) == ("192.0.2.1", 1)
    assert processes.split_address("--server", "[::1]", 9092) == ("[::1]", 9092)


# --- operator


@pytest.fixture
def link(whole: Folder) -> operator.Operator:
    return operator.connect(whole, address="127.0.0.1:8000", ca=None)


def answers(monkeypatch: pytest.MonkeyPatch, *replies: dict[str, Any]) -> list[str]:
    """Let Flower's program answer with `replies`; return the list that the command lines go to."""
    asked: list[str] = []
    waiting = iter(replies)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(shlex.join(["flwr", *command[1:]]))
        return subprocess.CompletedProcess(command, 0, stdout="a notice\n" + json.dumps(next(waiting)), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(operator, "server_problem", lambda *_: "")
    monkeypatch.setattr(operator, "shown_certificate_state", lambda *_: "")
    return asked


def test_the_connection_is_one_that_flower_reads(link: operator.Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.flower_config import read_superlink_connection

    monkeypatch.setenv("FLWR_HOME", str(link.home))
    for name in (None, "fbl"):
        connection = read_superlink_connection(name)
        assert (connection.address, connection.root_certificates) == ("127.0.0.1:8000", str(link.ca))
        assert not connection.insecure


def test_registering_twice_is_no_error_and_a_refusal_is(
    link: operator.Operator, whole: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"site-0": whole.public_key("site-0")}
    asked = answers(
        monkeypatch, {"success": True, "node-id": "77"}, {"success": False, "error-message": "Public key already in use"}
    )
    operator.register(link, keys, wait=0)
    operator.register(link, keys, wait=0)
    out = capsys.readouterr().out
    assert "site-0: registered as node 77" in out and "site-0: registered before" in out
    assert flower_parses(asked[0])["public_key"] == str(keys["site-0"]) and flower_parses(asked[0])["name"] == "site-0"
    assert [flower_parses(line.removeprefix("$ ")) for line in out.splitlines() if line.startswith("$")] == [
        flower_parses(line) for line in asked
    ]
    answers(monkeypatch, {"success": False, "error-message": "no"})
    with pytest.raises(RunFailed, match="site-0: not registered: no"):
        operator.register(link, keys, wait=0)
    with pytest.raises(ConfigError, match=r"site-9\.pub: no such file.*deploy keys site-9"):
        operator.register(link, {"site-9": whole.public_key("site-9")}, wait=0)


def test_watching_shows_names_states_and_active_runs(
    link: operator.Operator, whole: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, {"success": True, "node-id": "77"})
    operator.register(link, {"site-0": whole.public_key("site-0")}, wait=0)
    nodes = [{"node-id": "77", "status": "registered"}, {"node-id": "8", "status": "online"}]
    runs = [{"run-id": "1", "status": "finished:failed"}, {"run-id": "2", "status": "running"}]
    asked = answers(monkeypatch, {"success": True, "nodes": nodes}, {"success": True, "runs": runs})
    operator.watch(link, every=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-4:-1]] == [
        ["77", "site-0", "registered,", "never", "connected"], ["8", "?", "online"], ["run", "2:", "running"],
    ]  # fmt: skip
    for line in asked:
        flower_parses(line)


@contextlib.contextmanager
def tls_server(folder: Folder) -> Iterator[str]:
    """Serve handshakes with the folder's certificate at the address that is yielded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.server_certificate, folder.server_key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    plain, _ = listening.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as wire:
                        wire.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def test_a_running_server_whose_certificate_ends_soon_is_warned_of(
    whole: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the certificate that it shows: after `--renew` that is still the old one, until the server starts again."""
    with tls_server(whole) as address:
        assert operator.shown_certificate_state(address, whole.ca) == ""
    certificates.renew_server_certificate(whole, [], days=29)
    with tls_server(whole) as address:
        certificates.renew_server_certificate(whole, [], days=90)
        warning = operator.shown_certificate_state(address, whole.ca)
        assert re.fullmatch(r"the server's certificate: ends on [0-9-]+; .*--renew`, then restart the server", warning)
        link = operator.connect(whole, address=address, ca=None)
        with monkeypatch.context() as patched:
            patched.setattr(operator, "_ask", lambda *_: {"success": True, "nodes": []})
            patched.setattr(operator, "run_status", lambda home: [])
            operator.watch(link, every=None)
        assert f"warning: {warning}" in capsys.readouterr().out.splitlines()
        monkeypatch.setattr(operator, "server_problem", lambda *_: "")
        assert cli.main(["deploy", "health", "server", "--dir", str(whole.path), "--address", address]) == 0
        assert f"warning: {warning}" in capsys.readouterr().out.splitlines()
    assert operator.shown_certificate_state("127.0.0.1:1", whole.ca) == ""


def test_stopping_stops_what_is_active(
    link: operator.Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(status: str) -> dict[str, Any]:
        return {"success": True, "runs": [{"run-id": "2", "status": status}]}

    stopped = runs("finished:stopped")
    asked = answers(monkeypatch, runs("running"), {}, stopped, stopped)
    operator.stop(link, [])
    assert asked[1] == "flwr stop 2" and "run 2: finished:stopped" in capsys.readouterr().out
    answers(monkeypatch, stopped)
    operator.stop(link, [])
    assert "no run to stop" in capsys.readouterr().out


def test_a_run_that_failed_is_an_error_with_the_way_to_its_log(
    link: operator.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def follow(command: list[str], *, home: Path) -> str:
        started.append(["flwr", *command[1:]])
        assert home == link.home
        return "5"

    monkeypatch.setattr(operator, "follow", follow)
    monkeypatch.setattr(operator, "server_problem", lambda *_: "")
    monkeypatch.setattr(operator, "final_status", lambda run_id, home: ("finished:failed", "no client could be prepared"))
    with pytest.raises(
        RunFailed, match=r"run 5: finished:failed: no client could be prepared; its log: FLWR_HOME=.* flwr log 5 fbl --show"
    ):
        operator.run(link, {"seed": 3}, app=None)
    parsed = flower_parses(shlex.join(started[0]))
    assert parsed["superlink"] == "fbl" and parsed["stream"] and parsed["app"] == str(ROOT)
    monkeypatch.setattr(operator, "final_status", lambda run_id, home: ("finished:completed", ""))
    operator.run(link, {"seed": 3}, app=None)

    def gone(run_id: str, home: Path) -> tuple[str, str]:
        raise RunFailed("`flwr ls` failed: Connection to the SuperLink is unavailable")

    monkeypatch.setattr(operator, "final_status", gone)
    with pytest.raises(
        RunFailed, match="run 5: the server does not answer any more; if it was killed, .* go on with `--resume`"
    ):
        operator.run(link, {"seed": 3}, app=None)


def test_a_server_that_is_not_there_is_told_of(whole: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dir", str(whole.path), "--address", "127.0.0.1:1"]
    assert cli.main(["deploy", "health", "server", *arguments]) == 1
    assert cli.main(["deploy", "health", "node", "--port", "1"]) == 1
    assert cli.main(["deploy", "health", "server", "--dir", str(whole.path), "--address", "127.0.0.1:abc"]) == 1
    assert cli.main(["deploy", "register", "site-0", "--wait", "0", *arguments]) == 1
    assert capsys.readouterr().err.count("Connection refused") == 3


def test_flower_s_grid_of_a_deployment_has_the_name_that_the_server_looks_for() -> None:
    """By it the server knows that the generator may be on the nodes only."""
    assert is_simulated(object.__new__(InMemoryGrid)) and not is_simulated(object.__new__(HttpGrid))


# --- the guide, the units, the containers


def our_lines(text: str) -> Iterator[str]:
    """Yield the command lines of `fbl-flower` in a text's code blocks, without path and comment."""
    for block in re.findall(r"^```bash.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if found := re.search(r"(?<![\w/.-])(?:/opt/fbl/bin/)?fbl-flower (deploy .*)", line):
                yield found[1]


def parsed(words: list[str]) -> Any:
    options = cli._parser().parse_args(words)
    if options.handler.__name__ == "_run" and options.resume is None:
        chosen_config(options.config)
    return options


def test_every_line_of_the_guide_is_one_that_we_take() -> None:
    lines = list(our_lines(GUIDE.read_text(encoding="utf-8")))
    assert {line.split()[1] for line in lines} >= {"certs", "keys", "server", "register", "node", "run", "watch", "stop"}
    for line in lines:
        parsed(shlex.split(line, comments=True))


def test_every_plain_line_of_the_guide_is_one_that_flower_takes() -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## With Flower's own commands")[1]
    lines = [line for line in section.splitlines() if line.startswith(("flower-", "flwr "))]
    assert {tuple(line.split()[:2]) for line in lines if line.startswith("flwr ")} == {
        ("flwr", "supernode"), ("flwr", "run"), ("flwr", "ls"), ("flwr", "log"), ("flwr", "stop"),
    }  # fmt: skip
    assert len(lines) == 8
    for line in lines:
        flower_parses(line)
    table = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    assert table is not None and "[superlink.fbl]" in table[1]


@pytest.mark.parametrize("name", ["fbl-server", "fbl-node"])
def test_the_units_start_what_we_take(name: str) -> None:
    text = (ROOT / "docs" / "systemd" / f"{name}.service").read_text(encoding="utf-8").replace("\\\n", " ")
    settings = dict(re.findall(r"^(FBL_\w+)=(.*)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    (line,) = re.findall(r"^ExecStart=/opt/fbl/bin/fbl-flower (.*)$", text, re.MULTILINE)
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: settings.pop(found[1]), line)
    options = parsed(shlex.split(line))
    assert options.dir == Path("~/.fbl/federation")  # where the guide's `sudo -u fbl -H` puts certificates and keys
    assert {
        "Environment=HOME=/var/lib/fbl OMP_NUM_THREADS=1",
        "StateDirectory=fbl",
        "Restart=always",
        "NoNewPrivileges=true",
        "ProtectSystem=strict",
        "User=fbl",
    } <= set(text.splitlines())
    assert "ProtectClock" not in text  # it closes all devices but the clock, and so the GPU
    assert "PrivateDevices" not in text
    if name == "fbl-node":
        assert settings == {} and options.capability == "full"


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / "compose.yml").read_text(encoding="utf-8"))


def test_every_service_s_command_is_one_that_we_and_flower_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line goes through our parser; those of server and nodes are made into Flower's, which go through Flower's."""
    make = Folder(path=tmp_path / "federation")
    certificates.make_certificates(make, ["server"], days=1)
    plain = []
    for service in compose()["services"].values():
        words = [
            word.replace("/public/ca.crt", str(make.ca)).replace("/run.toml", str(ROOT / "docker/run.toml"))
            for word in service["command"]
        ]
        words = [str(make.path) if word == "/federation" else word for word in words]
        parsed(words)
        if words[1] == "node":
            make_keys(make, [words[2]], if_missing=True)
        if words[1] in ("server", "node"):
            assert cli.main([*words, "--dry-run"]) == 0
            plain += [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    options = [flower_parses(line.removeprefix("$ ")) for line in plain]
    server, *nodes = options
    assert server.enable_supernode_auth and server.host == "127.0.0.1"
    assert [node.superlink for node in nodes] == ["server:9092"] * 3
    settings = [parse_config_args([node.node_config]) for node in nodes]
    assert [(s["partition-id"], s["num-partitions"]) for s in settings] == [(0, 3), (1, 3), (2, 3)]
    _, run_settings = chosen_config([str(ROOT / "docker/run.toml")])
    assert run_settings["num-clients"] == 3 and run_settings["output-dir"] == "/results"


def test_the_compose_file_is_sound() -> None:
    """What the schema does not say: what is named exists, secrets go where they belong, and the control API stays inside."""
    document = compose()
    services, volumes = document["services"], set(document["volumes"])
    used = set()
    for name, service in services.items():
        assert service["image"] in ("fbl-server:0.1.0", "fbl-client:0.1.0") and service["pull_policy"] == "never"
        assert service["cap_drop"] == ["ALL"] and "ports" not in service and "privileged" not in service
        assert set(service.get("depends_on", {})) <= services.keys()
        conditions = {key: value["condition"] for key, value in service.get("depends_on", {}).items()}
        for other, condition in conditions.items():
            if condition == "service_healthy":
                assert services[other]["healthcheck"]["test"][0] == "CMD"
                parsed(services[other]["healthcheck"]["test"][2:])
            else:
                assert services[other]["restart"] == "no"
        mounts = [mount.split(":")[0] for mount in service.get("volumes", [])]
        named = {mount for mount in mounts if not mount.startswith(".")}
        assert named <= volumes
        used |= named
        if name.startswith(("client-", "key-")):
            number = name[-1]
            assert named & {"server", "operator", *(f"client-{k}" for k in range(3))} == {f"client-{number}"}
        if service["command"][1] in ("node", "server"):
            assert service["restart"] == "unless-stopped"
        if service["command"][1] in ("register", "run"):
            assert service["network_mode"] == "service:server" and "server" not in named
    assert used == volumes


def test_each_image_is_built_by_one_service() -> None:
    """Compose builds in parallel, and two builds of one tag can meet: "image already exists"."""
    built = [(s["image"], s["build"]["target"]) for s in compose()["services"].values() if "build" in s]
    assert sorted(built) == [("fbl-client:0.1.0", "client"), ("fbl-server:0.1.0", "server")]


def test_the_containers_start_one_after_the_other() -> None:
    """Certificates, keys, registration, clients, run; each waits until what it needs is done or well."""
    done, well = {"condition": "service_completed_successfully"}, {"condition": "service_healthy"}
    keys = {f"key-{k}": done for k in range(3)}
    assert {name: service.get("depends_on", {}) for name, service in compose()["services"].items()} == {
        "certs": {},
        **{name: {"certs": done} for name in keys},
        "server": {"certs": done},
        "register": {"server": well} | keys,
        **{f"client-{k}": {"register": done} for k in range(3)},
        "run": {f"client-{k}": well for k in range(3)},
    }


def test_server_and_clients_have_health_checks_and_nothing_else_has() -> None:
    checks = {
        name: service["healthcheck"]["test"] for name, service in compose()["services"].items() if "healthcheck" in service
    }
    assert checks == {
        "server": ["CMD", "fbl-flower", "deploy", "health", "server", "--dir", "/federation"],
        **{f"client-{k}": ["CMD", "fbl-flower", "deploy", "health", "node"] for k in range(3)},
    }


def test_the_run_s_container_sees_the_results_that_it_may_resume() -> None:
    """`--resume` reads the settings of the killed run under the path that the server has them."""
    services = compose()["services"]
    assert "./results:/results" in services["server"]["volumes"] and "./results:/results:ro" in services["run"]["volumes"]


def test_the_images_are_built_with_a_pinned_backend_and_for_no_root() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert "--no-build-isolation /src" in text and 'if [ "$FBL_UID" = 0 ]' in text
    assert re.search(r"^hatchling==", (ROOT / "docker" / "constraints.txt").read_text(), re.MULTILINE)


def test_the_images_have_a_user_and_no_secrets() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER fbl$", text, re.MULTILINE) and "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu" in text
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim", text, re.MULTILINE)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert stages == [("${BASE}", "installed"), ("installed", "server"), ("installed", "client")]
    for sources in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in sources.split()[:-1]:
            assert (ROOT / source).exists(), source
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "**"  # only what is named goes into an image
    names = [line for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!]*", line) for line in names)
    assert any(re.fullmatch(r"flwr==1\.39\.\d+", line) for line in names)
