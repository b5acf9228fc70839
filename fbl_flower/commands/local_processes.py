"""Processes of this machine: their arguments, owner, environment and working folder, and which one listens on a port."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from pathlib import Path

_PROC = Path("/proc")  # Linux; elsewhere `ps` lists the processes, and the rest is unknown
_DELETED = " (deleted)"  # how Linux marks the path of a folder that is gone
_LISTENS = "0A"  # a state of a TCP socket


def all_arguments() -> list[tuple[int, list[str]]]:
    """List the processes of this machine with their arguments."""
    if (_PROC / "self/cmdline").exists():
        found = []
        for folder in _PROC.glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            found.append((int(folder.name), arguments))
        return found
    listing = subprocess.run(["ps", "-axo", "pid=,args="], capture_output=True, text=True).stdout
    return [(int(line.split()[0]), line.split()[1:]) for line in listing.splitlines() if line.strip()]


def owner(process: int) -> int | None:
    """Return the user id of a process; None if it is unknown."""
    try:
        return (_PROC / str(process)).stat().st_uid
    except OSError:
        return None


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # such as a user of a container
        return f"number {uid}"


def environment_of(process: int) -> dict[str, str] | None:
    """Return the variables that a process was started with; None if they cannot be read."""
    try:
        entries = (_PROC / str(process) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def working_folder(process: int) -> tuple[Path | None, bool]:
    """Return the working folder of a process, None if it is unknown; and whether it has been deleted."""
    try:
        text = os.readlink(_PROC / str(process) / "cwd")
    except OSError:
        return None, False
    if text.endswith(_DELETED) and not Path(text).exists():
        return Path(text.removesuffix(_DELETED)), True
    return Path(text), False


def is_listening(port: int) -> bool:
    """Whether a program on this machine accepts connections on a port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except ConnectionRefusedError:
        return False
    except TimeoutError:  # it listens, and its queue is full
        return True


def describe_listener(port: int) -> str:
    """Say which process listens on a port, as far as this user may know."""
    inode, uid = _listening_socket(port)
    if inode:
        for process, arguments in all_arguments():
            if _has_socket(process, inode):
                return f"process {process} ({' '.join(arguments).strip()[:80]})"
    if uid is not None and uid != os.geteuid():
        return f"a process of user {user_name(uid)}"
    return "another program"


def _listening_socket(port: int) -> tuple[str, int | None]:
    """Return inode and owner of the socket that listens on a port; "" and None if it is not listed."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):  # number, local address, remote address, state, ..., owner (7), ..., inode (9)
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                return fields[9], int(fields[7])
    return "", None


def _has_socket(process: int, inode: str) -> bool:
    try:
        return any(os.readlink(file) == f"socket:[{inode}]" for file in (_PROC / str(process) / "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return False
