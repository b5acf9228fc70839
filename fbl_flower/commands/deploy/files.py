"""Where one machine keeps its part of a federation, and how private files are written.

certificates/        ca.crt on every machine; ca.key, server.crt and server.key on the server's
keys/                NAME and NAME.pub of each node of this machine; on the server, NAME.pub of all nodes
superlink/           the server's: registrations and runs; its working directory
nodes/NAME/          a node's working directory
operator/            Flower's settings (FLWR_HOME) of the commands that talk to the server
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from fbl_flower.errors import ConfigError
from fbl_flower.whole_file import replacing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The paths in a machine's folder of a federation."""

    path: Path

    @property
    def certificates(self) -> Path:
        return self.path / "certificates"

    @property
    def ca(self) -> Path:
        return self.certificates / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.certificates / "ca.key"

    @property
    def server_certificate(self) -> Path:
        return self.certificates / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.certificates / "server.key"

    @property
    def superlink(self) -> Path:
        return self.path / "superlink"

    @property
    def operator(self) -> Path:
        return self.path / "operator"

    def key(self, node: str) -> Path:
        return self.path / "keys" / checked_name(node)

    def public_key(self, node: str) -> Path:
        return self.path / "keys" / f"{checked_name(node)}.pub"

    def node(self, node: str) -> Path:
        return self.path / "nodes" / checked_name(node)


def checked_name(node: str) -> str:
    """Return a node's name if it may be one: it becomes the name of files.

    Raises:
        ConfigError: Says what is allowed.
    """
    if not _NAME.fullmatch(node) or node.endswith(".pub"):
        raise ConfigError(
            [f"node: got {node!r}; allowed: up to 63 letters, digits, '.', '-' and '_', no '.pub' at the end, such as site-0"]
        )
    return node


def write_whole(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file at once: others see all of it or nothing, and never with looser permissions than `mode`."""
    private_folder(path.parent)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with replacing(path, part=part, sync=True):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask is
            file.write(content)


def private_folder(path: Path) -> Path:
    """Make a folder that its owner alone can enter, if it is not there, and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def missing(path: Path, what: str, way_out: str) -> list[str]:
    """Return the problem that a file is not there, if so."""
    return [] if path.is_file() else [f"{path}: no such file; wanted {what}: {way_out}"]
