"""Run a command; then end every process that it left behind, and fail if there was one.

The process adopts the orphans of its descendants (Linux: PR_SET_CHILD_SUBREAPER), so a daemon that the command started is found
however it was started, and nobody else's process is touched.

    python .ci/leftovers.py python -m pytest
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 20.0  # seconds for what is shutting down already
_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    if sys.platform != "linux":
        print("leftovers.py: only Linux can tell what a command left behind; not checked", file=sys.stderr)
        return subprocess.call(command)
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    code = subprocess.call(command)
    deadline = time.monotonic() + PATIENCE
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not left:
        return code
    print(f"leftovers.py: {len(left)} processes left behind by {' '.join(command)}:", file=sys.stderr)
    for process, name in left.items():
        print(f"  {process} {name}", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        deadline = time.monotonic() + 5
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.2)
    return code or 1


def descendants() -> dict[int, str]:
    """Map the process ids of all living descendants to their command lines; the dead among the children are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return {}
    parent_of, name_of = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # gone meanwhile
            continue
        if state != "Z":
            parent_of[int(folder.name)], name_of[int(folder.name)] = int(parent), name
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        new = {process for process, parent in parent_of.items() if parent in new}
        found |= new
    return {process: name_of[process][:200] for process in sorted(found)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
