"""`fbl-flower deploy keys`: the key pair that makes a node known to the server."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fbl_flower.commands.deploy.files import Folder, write_whole
from fbl_flower.errors import ConfigError


def make_keys(folder: Folder, nodes: Sequence[str], *, overwrite: bool = False, if_missing: bool = False) -> list[str]:
    """Make a key pair for each node: ECDSA on P-384, in OpenSSH's format, which is the one that Flower reads.

    Args:
        folder: Gets `keys/NAME`, which must not leave the machine, and `keys/NAME.pub`, for the server.
        nodes: Their names.
        overwrite: Replace keys that are there. The server knows the old one; the new one must be registered.
        if_missing: Leave keys that are there.

    Returns:
        The nodes whose keys were made.

    Raises:
        ConfigError: A name is none, or, without either switch, some of the keys are there, or, without `overwrite`, a public key without
            its private one; then none is made.
    """
    present = [node for node in nodes if folder.key(node).exists() or folder.public_key(node).exists()]
    if present and not (overwrite or if_missing):
        raise ConfigError(
            [f"{folder.key(node)}: is there; --overwrite replaces it, and --if-missing leaves it" for node in present]
        )
    made = [node for node in nodes if overwrite or not folder.key(node).exists()]
    if foreign := [node for node in made if not overwrite and folder.public_key(node).exists()]:
        raise ConfigError(
            [
                f"{folder.public_key(node)}: is there without its private key, as of another machine's pair; --overwrite replaces it"
                for node in foreign
            ]
        )
    for node in made:
        _make_key(folder, node)
    for node in set(nodes) - set(made):
        if not folder.public_key(node).exists():  # a stop between the two files
            _write_public_key(folder, node)
    return made


def ssh_keygen_line(folder: Folder, node: str) -> str:
    """Return OpenSSH's command that makes the same."""
    return shlex.join(["ssh-keygen", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", str(folder.key(node))])


def check_key(folder: Folder, node: str) -> list[str]:
    """Return the problems of a node's private key: missing, or readable by others."""
    path = folder.key(node)
    if not path.is_file():
        return [f"{path}: no such file; wanted the node's private key: `fbl-flower deploy keys {node}` makes it"]
    if mode := path.stat().st_mode & 0o077:
        return [f"{path}: others have access (mode {path.stat().st_mode & 0o777:o}, {mode:o} too many); `chmod 600 {path}`"]
    return []


def _make_key(folder: Folder, node: str) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    folder.public_key(node).unlink(missing_ok=True)  # never beside a private key that is not its own
    write_whole(folder.key(node), private, mode=0o600)
    _write_public_key(folder, node)


def _write_public_key(folder: Folder, node: str) -> None:
    try:
        key = serialization.load_ssh_private_key(folder.key(node).read_bytes(), None)
    except ValueError as error:
        raise ConfigError([f"{folder.key(node)}: is no private key in OpenSSH's format; --overwrite replaces it"]) from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_whole(folder.public_key(node), public + b"\n", mode=0o644)
