"""`fbl-flower deploy register | run | watch | stop`: what talks to the server's Control API, over TLS.

Flower finds a server by a connection in FLWR_HOME/config.toml. These commands keep one of their own, so that a user's is not changed.
"""

from __future__ import annotations

import datetime
import http.client
import json
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from fbl_flower.commands.app_folder import app_folder
from fbl_flower.commands.deploy.certificates import validity
from fbl_flower.commands.deploy.files import Folder, missing, write_whole
from fbl_flower.commands.deploy.plain import PlainCommand
from fbl_flower.commands.flower_cli import (
    final_status,
    flower_environment,
    flower_program,
    json_answer,
    neutral_directory,
    run_status,
    stop_run,
)
from fbl_flower.commands.simulation import follow
from fbl_flower.config import Value, to_toml
from fbl_flower.errors import ConfigError, RunFailed

CONNECTION = "fbl"
_NAMES = "nodes.json"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The way to a server's Control API.

    Attributes:
        home: FLWR_HOME with the connection.
        address: HOST:PORT.
        ca: The authority's certificate.
    """

    home: Path
    address: str
    ca: Path

    def flwr(self, *arguments: str) -> PlainCommand:
        return PlainCommand(arguments=["flwr", *arguments], home=self.home)


def connect(folder: Folder, *, address: str, ca: Path | None) -> Operator:
    """Write the connection, and return it.

    Raises:
        ConfigError: There is no certificate.
    """
    ca = (ca or folder.ca).absolute()
    problems = missing(ca, "the authority's certificate", "copy certificates/ca.crt from the server, or name it with --ca")
    if problems:
        raise ConfigError(problems)
    table = {"address": address, "root-certificates": str(ca)}
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{to_toml(table)}'
    operator = Operator(home=folder.operator, address=address, ca=ca)
    if not (operator.home / "config.toml").is_file() or (operator.home / "config.toml").read_text(encoding="utf-8") != text:
        write_whole(operator.home / "config.toml", text.encode(), mode=0o600)
    return operator


def wait_for_server(operator: Operator, seconds: float) -> None:
    """Wait until the server answers.

    Raises:
        RunFailed: It does not in time; says why.
    """
    deadline = time.monotonic() + seconds
    while reason := server_problem(operator.address, operator.ca):
        if time.monotonic() > deadline:
            raise RunFailed(f"no server at https://{operator.address}: {reason}; is `fbl-flower deploy server` running there?")
        time.sleep(0.5)


def server_problem(address: str, ca: Path) -> str:
    """Return why a server is not well, and "" for one that is."""
    try:
        return _health(f"https://{address}/health", ssl.create_default_context(cafile=str(ca)))
    except (OSError, ssl.SSLError) as error:
        return f"{ca} is no certificate: {error}"


def shown_certificate_state(address: str, ca: Path) -> str:
    """Return a warning if the certificate that the running server shows ends soon, and "" if not or if it shows none."""
    host, _, port = address.rpartition(":")
    try:
        pem = ssl.get_server_certificate((host.strip("[]"), int(port)), ca_certs=str(ca), timeout=5)
        certificate = x509.load_pem_x509_certificate(pem.encode())
        return validity(certificate, "the server's certificate", now=datetime.datetime.now(datetime.UTC))
    except (OSError, ValueError, ConfigError):  # `server_problem` tells of what keeps the server from answering
        return ""


def node_problem(port: int) -> str:
    """Return why the node on this machine whose own API is at `port` is not well, and "" for one that is."""
    return _health(f"http://127.0.0.1:{port}/health", None)


def register(operator: Operator, public_keys: Mapping[str, Path], *, wait: float) -> None:
    """Make nodes known to the server; those that are known already stay as they are.

    Args:
        operator: The server.
        public_keys: Node's name: file of its public key.
        wait: Seconds for which the server may not answer yet.

    Raises:
        ConfigError: A file is missing.
        RunFailed: The server does not answer or refuses a key.
    """
    problems = [
        problem
        for name, file in public_keys.items()
        for problem in missing(
            file, f"the public key of {name}", f"`fbl-flower deploy keys {name}` makes it on the node's machine; copy it here"
        )
    ]
    if problems:
        raise ConfigError(problems)
    wait_for_server(operator, wait)
    names = _known_names(operator)
    for name, file in public_keys.items():
        command = operator.flwr("supernode", "register", str(file.absolute()), CONNECTION, "--name", name, "--format", "json")
        command.show()
        answer = _ask(operator, command)
        if answer.get("success"):
            names[str(answer["node-id"])] = name
            write_whole(operator.home / _NAMES, json.dumps(names, indent=2).encode(), mode=0o600)
            print(f"{name}: registered as node {answer['node-id']}", flush=True)
        elif "already in use" in str(answer):
            print(f"{name}: registered before", flush=True)
        else:
            raise RunFailed(f"{name}: not registered: {answer.get('error-message', answer)}")


def run(operator: Operator, settings: Mapping[str, Value], *, app: Path | None) -> None:
    """Submit a run, show its log, and wait for its end. Ctrl-C stops the run.

    Args:
        operator: The server.
        settings: Run-config keys that differ from the defaults.
        app: Directory of the Flower app; None: this project's.

    Raises:
        RunFailed: The run was not accepted, did not complete, or the server went away.
    """
    wait_for_server(operator, 0.0)
    with app_folder(app) as folder, tempfile.TemporaryDirectory(prefix="fbl-") as temporary:
        config = Path(temporary, "run.toml")
        config.write_text(to_toml(settings), encoding="utf-8")
        for line in to_toml(settings).splitlines():
            print(f"# run.toml: {line}")
        command = operator.flwr("run", str(folder), CONNECTION, "--stream", "-c", str(config))
        command.show()
        run_id = follow([flower_program("flwr"), *command.arguments[1:]], home=operator.home)
    try:
        status, details = final_status(run_id, home=operator.home)
    except RunFailed as error:
        raise RunFailed(
            f"run {run_id}: the server does not answer any more; if it was killed, start it again and go on with "
            "`--resume` and the run directory that the log names"
        ) from error
    if status != "finished:completed":
        log = operator.flwr("log", run_id, CONNECTION, "--show").text
        raise RunFailed(f"run {run_id}: {status}" + (f": {details}" if details else "") + f"; its log: {log}")
    print(f"run {run_id}: {status}", flush=True)


def watch(operator: Operator, *, every: float | None) -> None:
    """Show nodes and runs; with `every`, again whenever they changed, looking every so many seconds, until Ctrl-C."""
    nodes_command = operator.flwr("supernode", "list", CONNECTION, "--format", "json")
    nodes_command.show()
    operator.flwr("ls", CONNECTION, "--format", "json").show()
    before = ""
    while True:
        answer = _ask(operator, nodes_command)
        if not answer.get("success"):
            raise RunFailed(f"the server did not list its nodes: {answer.get('error-message', answer)}")
        text = _overview(answer["nodes"], run_status(home=operator.home), _known_names(operator))
        if warning := shown_certificate_state(operator.address, operator.ca):
            text += f"\nwarning: {warning}"
        if text != before:
            print(f"{time.strftime('%H:%M:%S')}\n{text}\n", flush=True)
        if every is None:
            return
        before = text
        time.sleep(every)


def stop(operator: Operator, run_ids: Sequence[str]) -> None:
    """Stop the given runs, or, if none is given, all that have not finished."""
    active = list(run_ids) or [
        row["run-id"] for row in run_status(home=operator.home) if not row["status"].startswith("finished")
    ]
    if not active:
        print("no run to stop")
    for run_id in active:
        operator.flwr("stop", run_id, CONNECTION).show()
        stop_run(run_id, home=operator.home)
        status, _ = final_status(run_id, home=operator.home)
        if not status.startswith("finished"):
            raise RunFailed(f"run {run_id} was asked to stop, and is still {status}")
        print(f"run {run_id}: {status}", flush=True)


def _overview(nodes: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    lines = [f"{'node':<20}  {'name':<16}  state"]
    for row in nodes:
        node, state = str(row["node-id"]), str(row["status"])
        meaning = {"registered": "registered, never connected"}.get(state, state)
        lines.append(f"{node:<20}  {names.get(node, '?'):<16}  {meaning}")
    lines += [f"run {row['run-id']}: {row['status']}" for row in runs if not row["status"].startswith("finished")] or [
        "no run is active"
    ]
    return "\n".join(lines)


def _known_names(operator: Operator) -> dict[str, str]:
    """Return the names that were given to node ids when they were registered from here: Flower's list does not show them."""
    try:
        return dict(json.loads((operator.home / _NAMES).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _ask(operator: Operator, command: PlainCommand) -> dict[str, Any]:
    done = subprocess.run(
        [flower_program("flwr"), *command.arguments[1:]],
        env=flower_environment(operator.home), cwd=neutral_directory(), capture_output=True, text=True,
    )  # fmt: skip
    return json_answer(done, "flwr " + " ".join(command.arguments[1:3]))


def _health(url: str, context: ssl.SSLContext | None) -> str:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # the server is asked directly, whatever proxy the web needs
        *([urllib.request.HTTPSHandler(context=context)] if context else []),
    )
    try:
        with opener.open(url, timeout=5) as answer:
            return "" if answer.status == 200 else f"status {answer.status}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last: what answers speaks no HTTP
        return str(error) or type(error).__name__
