"""`fbl-flower deploy server` and `fbl-flower deploy node`: the two programs that stay, always with TLS and known nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fbl_flower.commands.deploy.certificates import certificate_state
from fbl_flower.commands.deploy.files import Folder, missing
from fbl_flower.commands.deploy.keys import check_key
from fbl_flower.commands.deploy.plain import PlainCommand
from fbl_flower.config import Value
from fbl_flower.errors import ConfigError

FLEET_PORT = 9092
CONTROL_ADDRESS = "127.0.0.1:8000"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def server_command(folder: Folder, *, listen: str, control: str) -> PlainCommand:
    """Return the command of a SuperLink.

    Args:
        folder: With the certificates; gets registrations and runs in `superlink/`.
        listen: Address and port of the Fleet API (gRPC), for the nodes.
        control: Address and port of the Control and the Runtime API (HTTPS), for this machine.

    Raises:
        ConfigError: Certificates are missing or do not hold now, or an address is none.
    """
    way_out = "`fbl-flower deploy certs --host NAME` makes it"
    problems = [
        problem
        for file, what in (
            (folder.ca, "the authority's certificate"),
            (folder.server_certificate, "the server's certificate"),
            (folder.server_key, "the server's key"),
        )
        for problem in missing(file, what, way_out)
    ]
    if problems:
        raise ConfigError(problems)
    if warning := certificate_state(folder.server_certificate):
        print(f"warning: {warning}", flush=True)
    fleet_host, fleet_port = split_address("--listen", listen, FLEET_PORT)
    host, port = split_address("--control", control, int(CONTROL_ADDRESS.rpartition(":")[2]))
    return PlainCommand(
        arguments=[
            "flower-superlink",
            "--ssl-ca-certfile", str(folder.ca),
            "--ssl-certfile", str(folder.server_certificate),
            "--ssl-keyfile", str(folder.server_key),
            "--enable-supernode-auth",
            "--fleet-api-address", f"{fleet_host}:{fleet_port}",
            "--host", host.strip("[]"),
            "--port", str(port),
            "--database", str(folder.superlink / "state.db"),
            "--disable-runtime-dependency-installation",
        ],
        home=folder.superlink / "flwr",
        directory=folder.superlink,
    )  # fmt: skip


def node_command(
    folder: Folder, node: str, *, server: str, ca: Path | None, port: int, settings: Mapping[str, Value]
) -> PlainCommand:
    """Return the command of a SuperNode.

    Args:
        folder: With the node's key; gets its working directory.
        node: Its name.
        server: The server's name or address, with the port if it is not 9092.
        ca: The authority's certificate; None: the folder's.
        port: Of the API for the node's own processes, on this machine only.
        settings: Its node config.

    Raises:
        ConfigError: Lists what is missing or no setting.
    """
    ca = ca or folder.ca
    problems = missing(ca, "the authority's certificate", "copy certificates/ca.crt from the server, or name it with --ca")
    problems += check_key(folder, node)
    place, nodes = settings["partition-id"], settings["num-partitions"]
    if not (isinstance(place, int) and isinstance(nodes, int) and 0 <= place < nodes):
        problems.append(
            f"--partition-id, --num-partitions: got {place} of {nodes}; wanted 0 to {nodes} - 1, a number for each node"
        )
    host, fleet_port = split_address("--server", server, FLEET_PORT)
    text = node_config_text(settings, problems)
    if problems:
        raise ConfigError(problems)
    for key in ("data-path", "generator-path"):  # each may be mounted later, and the node checks before it trains
        if key in settings and not Path(str(settings[key])).is_dir():
            print(
                f"warning: {key}: no folder {settings[key]}; without it the server shows this node as not prepared", flush=True
            )
    return PlainCommand(
        arguments=[
            "flower-supernode",
            "--superlink", f"{host}:{fleet_port}",
            "--root-certificates", str(ca),
            "--auth-supernode-private-key", str(folder.key(node)),
            "--host", "127.0.0.1",
            "--port", str(port),
            "--node-config", text,
        ],
        home=folder.node(node) / "flwr",
        directory=folder.node(node),
    )  # fmt: skip


def node_config_text(settings: Mapping[str, object], problems: list[str]) -> str:
    """Write settings as Flower's `--node-config` wants them, and add what cannot be written to `problems`."""
    words = []
    for key, value in settings.items():
        if not _KEY.fullmatch(key):
            problems.append(f"--set: got the key {key!r}; allowed: letters, digits, '-', '_', with '.' between")
        elif isinstance(value, bool):
            words.append(f"{key}={str(value).lower()}")
        elif isinstance(value, int | float):
            words.append(f"{key}={value!r}")
        elif not isinstance(value, str):
            problems.append(f"{key}: got {value!r}; Flower's node config takes text, numbers, true and false")
        elif "'" not in value and value.isprintable():  # Flower's reader knows no escapes
            words.append(f"{key}='{value}'")
        else:
            problems.append(f"{key}: got {value!r}; Flower's node config takes text without ' and control characters")
    return " ".join(words)


def split_address(option: str, text: str, port: int) -> tuple[str, int]:
    """Return host and port of `HOST`, `HOST:PORT` or `[IPv6]:PORT`; `port` where there is none.

    Raises:
        ConfigError: It is no address; names the option.
    """
    host, colon, number = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, number = text, str(port)
    bare = host.startswith("[") and host.endswith("]")
    if not host or "/" in host or (":" in host and not bare) or not number.isdecimal() or not 1 <= int(number) <= 65535:
        raise ConfigError(
            [f"{option}: got {text!r}; wanted HOST or HOST:PORT, such as fbl.example.org:{port} or [2001:db8::1]:{port}"]
        )
    return host, int(number)
